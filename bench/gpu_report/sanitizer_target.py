"""Run every kernel once on tiny inputs; compute-sanitizer runs this module."""

from __future__ import annotations

import sys

import torch

from bench.gpu_report.cache import log_loads
from bench.gpu_report.case import KernelCase
from bench.gpu_report.cases import list_cases, list_native_cases
from bench.gpu_report.rows import compute_relative_error
from repsim_kernels.kernels.cupy import module


def list_all_cases() -> list[KernelCase]:
    """Return the rehearsal's rows, and the CUDA C++ rows if CuPy can launch them."""
    return list_cases(True) + ([] if module.unsupported() else list_native_cases(True))


def main(device: str = "cuda") -> int:
    """Run every case; return the number of wrong results."""
    log_loads()
    wrong = 0
    for case in list_all_cases():
        inputs = case.inputs(torch.Generator(device).manual_seed(0))
        # On the CPU, so that the sanitizer doesn't check PyTorch's own kernels.
        want = case.reference(*(t.cpu() for t in inputs))
        error = compute_relative_error(case.kernel(*inputs).cpu(), want, case.parts)
        right = error <= case.tolerance
        wrong += not right
        print("right" if right else "WRONG", f"{error:.1e}", case.name, case.shape, case.dtype)
    if why := module.unsupported():
        print("CUDA C++ kernels left out:", why)
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
