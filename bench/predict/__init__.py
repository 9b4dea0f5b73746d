"""What the kernels should cost on a GPU, from what the compiler made of them."""
