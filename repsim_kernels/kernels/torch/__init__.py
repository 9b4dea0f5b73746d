"""Implementations on vendor libraries (BLAS, LAPACK, cuBLAS, cuSOLVER) through PyTorch."""
