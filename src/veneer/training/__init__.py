"""Training a model with adapters: data in, adapter and a record of the run out. Needs the extra `train`."""
