"""What changes that depend on the call have in common: experts, a classifier for them, and what it said."""
