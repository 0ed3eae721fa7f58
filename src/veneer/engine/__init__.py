"""The engine: written once, against `Change`."""
