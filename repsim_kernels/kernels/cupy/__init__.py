"""Launchers of the CUDA C++ kernels in repsim_kernels/cuda, through CuPy."""
