"""Every shipped CUDA C++ kernel compiles by nvcc and NVRTC: no warnings or spills, in budget.

Needs no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from compile import _cuda  # this folder

REGISTERS = 65_536  # per multiprocessor, on all targets


@dataclass(frozen=True)
class Budget:
    """Resources that a kernel may use, so that its launcher's blocks fit."""

    threads: int  # in the launcher's largest block
    blocks: int = 1  # that must fit on a multiprocessor together
    stack: int = 0  # bytes


BUDGETS = {
    "cell_grams_f32": Budget(128, blocks=2),
    "cell_grams_f64": Budget(128, blocks=2),
    "cell_grams_sum": Budget(128, blocks=2),
    "jacobi_eigh_f32": Budget(512, blocks=2),
    "jacobi_eigh_f64": Budget(512, blocks=2),
    "jacobi_svd_f32": Budget(512, blocks=2),
    "jacobi_svd_f64": Budget(512, blocks=2),
}

needs_nvcc = pytest.mark.skipif(_cuda.NVCC is None, reason="no nvcc")
needs_nvrtc = pytest.mark.skipif(_cuda.load_nvrtc() is None, reason="no NVRTC wheel")
every_source = pytest.mark.parametrize("source", _cuda.SOURCES, ids=lambda path: path.stem)
every_target = pytest.mark.parametrize("arch", _cuda.TARGETS, ids=lambda arch: f"sm_{arch}")


def assert_fits(kernel: _cuda.KernelResources, budget: Budget) -> None:
    assert kernel.spills == 0, f"{kernel.name} spills"
    assert kernel.stack <= budget.stack, f"{kernel.name}: {kernel.stack} bytes of stack"
    allocated = -(-kernel.registers // 8) * 8  # a warp allocates them in units of 256
    used = allocated * budget.threads * budget.blocks
    assert used <= REGISTERS, f"{kernel.name}: {kernel.registers} registers per thread"


def assert_all_fit(kernels: list[_cuda.KernelResources]) -> None:
    assert kernels
    for kernel in kernels:
        assert kernel.name in BUDGETS, f"{kernel.name} has no budget"
        assert_fits(kernel, BUDGETS[kernel.name])


def write_source(tmp_path: Path, code: str) -> Path:
    path = tmp_path / "toy.cu"
    path.write_text(code)
    return path


def test_kernels_exist():
    assert _cuda.SOURCES


@needs_nvcc
@every_target
@every_source
def test_nvcc_output_fits(source, arch, tmp_path):
    assert_all_fit(_cuda.build(source, arch, tmp_path))


@needs_nvcc
@every_source
def test_fatbin_builds(source, tmp_path):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in _cuda.TARGETS]
    newer = _cuda.TARGETS[-1]
    ptx = f"-gencode=arch=compute_{newer},code=compute_{newer}"
    assert _cuda.nvcc(source, tmp_path, "-fatbin", *targets, ptx) == ""
    assert (tmp_path / "out").stat().st_size > 0


@needs_nvrtc
@every_target
@every_source
def test_nvrtc_output_fits(source, arch):
    code = source.read_text(encoding="utf-8")
    cubin, log = _cuda.run_nvrtc(code, arch)
    assert cubin.startswith(b"\x7fELF")
    assert log == ""
    assert_all_fit(list(_cuda.read_kernels(_cuda.run_nvrtc(code, arch, "-Xptxas=-v")[1])))


VALID = """
extern "C" __global__ void toy(double* x) {
  extern __shared__ double tile[];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = 2 * tile[blockDim.x - 1 - threadIdx.x];
}
"""
# 64 numbers per thread, and registers for 32.
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) toy(double* x) {
  double v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  for (int k = 0; k < 3; ++k)
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 7) % 64] + v[(i * 5) % 64];
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i];
}
"""
WARNED = 'extern "C" __global__ void toy(int* x) { int unused; *x = 1; }'
WRONG = 'extern "C" __global__ void toy(int* x) { *x = missing; }'
STACK = """
extern "C" __global__ void toy(int* x, int n) {
  int v[64] = {};
  for (int i = 0; i < n; ++i) v[x[i] & 63] += i;
  for (int i = 0; i < 64; ++i) x[i] = v[i];
}
"""


@needs_nvcc
@every_target
def test_nvcc_faults_are_detected(arch, tmp_path):
    (valid,) = _cuda.build(write_source(tmp_path, VALID), arch, tmp_path)
    assert (valid.name, valid.spills, valid.stack) == ("toy", 0, 0)
    assert 0 < valid.registers <= 32
    assert_fits(valid, Budget(1024))
    (spilling,) = _cuda.build(write_source(tmp_path, SPILLING), arch, tmp_path)
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(spilling, Budget(1024, stack=spilling.stack))
    (stack,) = _cuda.build(write_source(tmp_path, STACK), arch, tmp_path)
    with pytest.raises(AssertionError, match="256 bytes of stack"):
        assert_fits(stack, Budget(32, stack=255))
    assert_fits(stack, Budget(32, stack=256))
    for code, error in ((WRONG, "missing"), (WARNED, "never referenced")):
        with pytest.raises(_cuda.CompileError, match=error):
            _cuda.build(write_source(tmp_path, code), arch, tmp_path)


def test_budget_overruns_are_detected():
    kernel = _cuda.KernelResources("toy", registers=128, stack=0, spills=0)
    assert_fits(kernel, Budget(512))
    assert_fits(kernel, Budget(256, blocks=2))
    for budget in (Budget(544), Budget(256, blocks=3)):
        with pytest.raises(AssertionError, match="128 registers"):
            assert_fits(kernel, budget)
    with pytest.raises(AssertionError, match="129 registers"):
        assert_fits(replace(kernel, registers=129), Budget(512))
    with pytest.raises(AssertionError, match="toy has no budget"):
        assert_all_fit([kernel])


@needs_nvrtc
@every_target
def test_nvrtc_faults_are_detected(arch):
    cubin, log = _cuda.run_nvrtc(VALID, arch)
    assert cubin.startswith(b"\x7fELF")
    assert log == ""
    assert "never referenced" in _cuda.run_nvrtc(WARNED, arch)[1]
    (spilling,) = _cuda.read_kernels(_cuda.run_nvrtc(SPILLING, arch, "-Xptxas=-v")[1])
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(spilling, Budget(1024, stack=spilling.stack))
    for code, error in ((WRONG, "missing"), ("#include <cmath>\n" + VALID, "cmath")):
        with pytest.raises(_cuda.CompileError, match=error):
            _cuda.run_nvrtc(code, arch)
