"""Every shipped Triton kernel, compiled as its launcher starts it: spills, tensor cores, memory.

Needs no GPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from bench.predict.compile import CompiledKernel, build, list_cases
from repsim_kernels.kernels.triton import _launch

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes available to a block
TENSOR_MEMORY = 512  # columns, on sm_100
LOCAL = 0  # bytes of local memory, in which registers are spilled

TARGETS = [pytest.param(arch, id=f"sm_{arch}") for arch in SHARED]
# The other targets rarely fail where sm_90 passes, and take twice as long.
CASES = [
    pytest.param(
        case,
        arch,
        id=f"{module}: {case.name}, sm_{arch}",
        marks=() if arch == 90 else pytest.mark.slow,
    )
    for module, case in list_cases()
    for arch in case.archs
]


def assert_fits(kernel: CompiledKernel, arch: int) -> None:
    assert kernel.local <= LOCAL, f"{kernel.name} spills to {kernel.local} bytes of local memory"
    assert kernel.shared <= SHARED[arch], f"{kernel.name}: {kernel.shared} bytes of shared memory"
    assert kernel.tensor_memory <= TENSOR_MEMORY, f"{kernel.name}: {kernel.tensor_memory} columns"


def assert_products(kernels: tuple[CompiledKernel, ...], expected: bool) -> None:
    """Check for tensor cores if expected; otherwise only float64's, which don't round float32."""
    used = any(kernel.tensor_cores not in ("", "DMMA") for kernel in kernels)
    assert used == expected, f"tensor cores {'used' if used else 'not used'}: {kernels}"


@pytest.mark.parametrize(("case", "arch"), CASES)
def test_shipped_kernels(case: _launch.CompileCase, arch: int) -> None:
    kernels = build(case, arch)
    assert kernels
    for kernel in kernels:
        assert_fits(kernel, arch)
    assert_products(kernels, case.products)


@triton.jit
def _square_kernel(x_ptr, PRECISION: tl.constexpr):
    i = tl.arange(0, 64)
    places = x_ptr + 64 * i[:, None] + i[None, :]  # (64, 64)
    x = tl.load(places)
    tl.store(places, tl.dot(x, x, input_precision=PRECISION))


def square(precision: str, **options: int) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        x = torch.empty(64, 64, device=device)
        _launch.launch(_square_kernel, (1,), x, PRECISION=precision, **options)

    return _launch.CompileCase("square", call, _launch.Floor(0, 0), products=True)


@pytest.mark.parametrize("arch", TARGETS)
def test_faults_are_detected(arch: int) -> None:
    (good,) = build(square("tf32"), arch)
    (bad,) = build(square("ieee", maxnreg=32), arch)
    assert_fits(good, arch)
    assert_products((bad, good), expected=True)
    assert_products((bad,), expected=False)
    with pytest.raises(AssertionError, match=r"spills to [1-9]\d* bytes"):
        assert_fits(bad, arch)
    for large in ({"shared": SHARED[arch] + 1}, {"tensor_memory": TENSOR_MEMORY + 1}):
        with pytest.raises(AssertionError, match=r"bytes of shared memory|columns"):
            assert_fits(dataclasses.replace(good, **large), arch)
    with pytest.raises(AssertionError, match="cores not used"):
        assert_products((bad,), expected=True)
    with pytest.raises(AssertionError, match="cores used"):
        assert_products((bad, good), expected=False)


def test_patches_are_undone() -> None:
    def state() -> tuple[object, ...]:
        return driver._active, _launch.launch, _launch.capability, _launch.unsupported

    def fail(device: torch.device) -> None:
        assert _launch.capability(device) == (8, 0)
        assert _launch.unsupported(torch.empty(1, device=device)) is None
        raise OSError("expected failure")

    before = state()
    with pytest.raises(OSError, match="expected failure"):
        build(_launch.CompileCase("fails", fail, _launch.Floor(0, 0)), 80)
    assert state() == before
