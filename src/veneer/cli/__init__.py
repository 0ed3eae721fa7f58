"""The command line: `veneer train` and its siblings."""
