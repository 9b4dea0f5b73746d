"""Fused Triton kernels that read the activations once."""
