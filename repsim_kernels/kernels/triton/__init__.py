"""Fused Triton kernels for tensors on a GPU."""
