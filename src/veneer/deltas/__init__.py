"""What can be done with changes of weights as matrices: cut to a rank, added, pruned, voted on. Pure functions of tensors."""
