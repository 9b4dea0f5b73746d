"""Predicted cost of the kernels on a GPU, from arithmetic and compiled code."""
