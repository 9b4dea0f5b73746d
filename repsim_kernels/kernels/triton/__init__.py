"""Fused Triton kernels: one read of the activations, whatever is asked of them."""
