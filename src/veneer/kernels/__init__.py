"""The hand-written autograd functions, and the readable versions that each must equal."""
