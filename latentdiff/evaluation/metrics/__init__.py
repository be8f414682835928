"""The mathematics of each metric: pure functions of tensors, without files."""
