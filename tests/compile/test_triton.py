"""Every shipped Triton kernel, compiled as its launcher starts it: spills, tensor cores, memory.

Needs no GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from bench.predict.budgets import (
    EXEMPT,
    has_products,
    list_violations,
)
from bench.predict.compile import CompiledKernel, Dots, build, list_cases
from bench.predict.sass import Loop, parse
from repsim_kernels.kernels import triton as triton_kernels
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
    if arch == 90 and case.products:
        for kernel in filter(has_products, kernels):
            assert_within_budget(kernel)


def assert_within_budget(kernel: CompiledKernel) -> None:
    """Check a kernel's product loop against its budget, or that its exemption is still needed."""
    violations = list_violations(kernel)
    if kernel.name in EXEMPT:
        assert violations, f"{kernel.name} is within its budget: remove its exemption"
    else:
        assert not violations, f"{kernel.name}: {'; '.join(violations)}"
    if kernel.dots:
        issued = kernel.product_loop.tensor_operations(kernel.warps)
        assert issued >= kernel.dots.count * kernel.dots.operations, "the loop was not read whole"


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


def make_kernel(
    products: int, shape: str = "64x128x16", more: int = 0, changes: dict[str, int] | None = None
) -> CompiledKernel:
    """Return a kernel whose loop is exactly within a budget, apart from changes and more of it."""
    n_products = 4 * products
    counts = {
        f"HGMMA.{shape}.F32": n_products,
        "LDGSTS.E.BYPASS.128": 4,
        "BAR.SYNC": n_products // 2,
        "WARPGROUP.ARRIVE": 2 if products == 1 else 5,
        **(changes or {}),
    }
    most = (16 if products == 1 else 20) * n_products
    counts["NOP"] = most + more - sum(counts.values())
    lines = [name for name, count in counts.items() for _ in range(count)]
    text = "".join(f"  /*{16 * i:04x}*/  {name} R2, R4 ;\n" for i, name in enumerate(lines))
    loop = Loop(tuple(parse(text)))
    dots = Dots(products, 2 * 64 * 128 * 16)
    return CompiledKernel("_toy_kernel", 8, 128, 0, 0, 0, "HGMMA", (loop,), dots)


@pytest.mark.parametrize("products", [1, 2, 3])
@pytest.mark.parametrize(
    ("difference", "violation"),
    [
        ({"more": 1}, "instructions per product"),
        ({"shape": "64x64x16"}, "issue / tensor cycles"),
        ({"changes": {"BAR.SYNC": 7}}, "barriers per product"),
        ({"changes": {"WARPGROUP.ARRIVE": 6}}, "WARPGROUP"),
        ({"changes": {"STL": 1}}, "accesses to local memory"),
        ({"changes": {"LDG.E.128": 1}}, "LDG"),
        ({"changes": {"LDGSTS.E.64": 1}}, "LDGSTS narrower than 128 bits"),
        ({"changes": {"LDGSTS.E.BYPASS.128": 0}}, "neither TMA nor LDGSTS"),
    ],
)
def test_a_violated_budget_is_detected(
    products: int, difference: dict[str, Any], violation: str
) -> None:
    assert_within_budget(make_kernel(products))
    by_tma = {"LDGSTS.E.BYPASS.128": 0, "UTMALDG.2D": 4}
    assert_within_budget(make_kernel(products, changes=by_tma))
    bad = make_kernel(products, **difference)
    (found,) = list_violations(bad)
    assert found.startswith(violation)
    with pytest.raises(AssertionError, match=violation):
        assert_within_budget(bad)


def test_an_exemption_that_is_not_needed_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = make_kernel(3), make_kernel(3, more=1)
    with pytest.raises(AssertionError, match="instructions per product"):
        assert_within_budget(bad)
    monkeypatch.setitem(EXEMPT, "_toy_kernel", "a reason")
    assert_within_budget(bad)
    with pytest.raises(AssertionError, match="remove its exemption"):
        assert_within_budget(good)


def test_products_without_a_loop_or_of_another_count_are_detected() -> None:
    (kernel,) = build(square("tf32"), 90)
    assert has_products(kernel)
    for found in (kernel, dataclasses.replace(make_kernel(3), dots=None)):
        with pytest.raises(LookupError, match="not in one inner loop"):
            assert_within_budget(found)
    with pytest.raises(LookupError, match="0 product loops"):
        assert_within_budget(dataclasses.replace(kernel, dots=Dots(1, 1)))
    short = dataclasses.replace(make_kernel(3), dots=Dots(3, 2 * 128 * 128 * 128))
    with pytest.raises(AssertionError, match="not read whole"):
        assert_within_budget(short)


def test_exempt_kernels_exist() -> None:
    kernels = {
        name
        for module, _ in list_cases()
        for name, value in vars(
            importlib.import_module(f"{triton_kernels.__name__}.{module}")
        ).items()
        if isinstance(value, triton.JITFunction)
    }
    assert set(EXEMPT) <= kernels


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
