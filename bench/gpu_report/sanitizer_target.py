"""Every kernel once on tiny inputs, in a process that compute-sanitizer runs."""

from __future__ import annotations

import sys

import torch

from bench.gpu_report.case import Case
from bench.gpu_report.cases import list_cases, list_native_cases
from bench.gpu_report.rows import relative_error
from repsim_kernels.kernels.cupy import module


def all_cases() -> list[Case]:
    """The rehearsal's, and the CUDA C++ kernels where CuPy can start them."""
    return list_cases(True) + ([] if module.unsupported() else list_native_cases(True))


def main(device: str = "cuda") -> int:
    """Run them; the number of those that are wrong."""
    wrong = 0
    for case in all_cases():
        inputs = case.inputs(torch.Generator(device).manual_seed(0))
        # On the CPU, so that the kernels of PyTorch's libraries are not sanitized for it.
        want = case.reference(*(t.cpu() for t in inputs))
        off = relative_error(case.kernel(*inputs).cpu(), want, case.parts)
        right = off <= case.tolerance
        wrong += not right
        print("right" if right else "WRONG", f"{off:.1e}", case.name, case.shape, case.dtype)
    if why := module.unsupported():
        print("without the CUDA C++ kernels:", why)
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
