"""Calls of cuSOLVER through ctypes: the library, its arguments, and what follows its errors."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import _cusolver
import numpy as np
import pytest
import torch
from _cupy import FakeCupy, on_cuda
from _cusolver import STREAM, FakeCusolver, FakeDevice
from _draw import SEEDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from repsim_kernels.kernels import cusolver
from repsim_kernels.kernels.cupy import spectral
from repsim_kernels.kernels.triton import spectral as solvers

TYPES = {
    "cusolverDnHandle_t": ctypes.c_void_p,
    "cusolverDnParams_t": ctypes.c_void_p,
    "cusolverDnHandle_t *": ctypes.POINTER(ctypes.c_void_p),
    "cusolverDnParams_t *": ctypes.POINTER(ctypes.c_void_p),
    "cudaStream_t": ctypes.c_void_p,
    "cusolverEigMode_t": ctypes.c_int,
    "cublasFillMode_t": ctypes.c_int,
    "cudaDataType": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
    "size_t *": ctypes.POINTER(ctypes.c_size_t),
    "void *": ctypes.c_void_p,
    "const void *": ctypes.c_void_p,
    "int *": ctypes.c_void_p,
}


@pytest.fixture
def library(monkeypatch):
    """A fake cuSOLVER that is used for CPU tensors."""
    fake = FakeCusolver()
    _cusolver.install(monkeypatch, fake)
    yield fake
    assert fake.problems == []
    assert FakeDevice.entered == 0


def symmetric(*shape, seed=0, dtype=torch.float64):
    a = np.random.default_rng(seed).standard_normal((*shape, shape[-1]))
    return torch.from_numpy(a + a.swapaxes(-1, -2)).to(dtype)


def assert_solved(a, w, v):
    a, w, v = (t.double().numpy() for t in (a, w, v))
    np.testing.assert_allclose(a @ v, v * w[..., None, :], atol=1e-4)
    np.testing.assert_allclose(v.swapaxes(-1, -2) @ v, np.eye(v.shape[-1]) + 0 * a, atol=1e-5)


def find_header(name: str) -> Path:
    spec = PathFinder.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else []
    files = [file for folder in folders for file in Path(folder).glob(f"*/include/{name}")]
    if not files:
        pytest.skip(f"{name} is not installed")
    return files[0]


def test_signatures_match_the_header():
    text = find_header("cusolverDn.h").read_text()
    for name, types in cusolver.SIGNATURES.items():
        (parameters,) = re.findall(rf"cusolverStatus_t\s+CUSOLVERAPI\s+{name}\(([^)]*)\)", text)
        declared = []
        for parameter in parameters.split(","):
            kind, pointer = re.fullmatch(r"\s*(.*?)\s*(\*?)\s*\w+\s*", parameter, re.S).groups()
            declared.append(TYPES[f"{kind} *" if pointer else kind])
        assert types == tuple(declared), name


def test_constants_match_the_headers():
    def find_value(header: str, name: str) -> int:
        return int(re.search(rf"\b{name}\s*=\s*(\d+)", find_header(header).read_text())[1])

    assert find_value("cusolver_common.h", "CUSOLVER_STATUS_SUCCESS") == 0
    assert find_value("cusolver_common.h", "CUSOLVER_EIG_MODE_NOVECTOR") == 0
    assert find_value("cusolver_common.h", "CUSOLVER_EIG_MODE_VECTOR") == 1
    assert find_value("cublas_api.h", "CUBLAS_FILL_MODE_UPPER") == cusolver._UPPER
    assert find_value("library_types.h", "CUDA_R_32F") == cusolver._TYPES[torch.float32]
    assert find_value("library_types.h", "CUDA_R_64F") == cusolver._TYPES[torch.float64]


def test_the_library_of_pytorch_is_loaded():
    """Its functions can be called; without a GPU only a handle can't be created."""
    if torch.version.cuda is None:
        pytest.skip("PyTorch was built without CUDA")
    assert cusolver.load_library() is not None
    params = ctypes.c_void_p()
    cusolver._call("cusolverDnCreateParams", params)
    assert params.value
    if not torch.cuda.is_available():
        with pytest.raises(cusolver.CusolverError, match="cusolverDnCreate: cuSOLVER's status 1"):
            cusolver._call("cusolverDnCreate", ctypes.c_void_p())


@pytest.mark.parametrize("version", [None, "11.8", "99.1"])
def test_no_library_for_other_versions_of_cuda(monkeypatch, version):
    monkeypatch.setattr(torch.version, "cuda", version)
    assert cusolver.load_library.__wrapped__() is None


@pytest.mark.parametrize("name", ["libc.so.6", "libmissing.so.6"])
def test_no_library_without_the_batched_solver(monkeypatch, name):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cusolver, "_SONAMES", {"13": name})
    assert cusolver.load_library.__wrapped__() is None


def test_why_tensors_are_unsupported(monkeypatch):
    monkeypatch.setattr(cusolver, "load_library", lambda: None)
    assert cusolver.unsupported(torch.eye(2)) == "it needs CUDA tensors, not cpu"
    assert "CUDA 12.6.2" in cusolver.unsupported(on_cuda(1.0))
    assert "not float16" in cusolver.unsupported(on_cuda(1.0).half())
    monkeypatch.setattr(cusolver, "load_library", FakeCusolver)
    assert cusolver.unsupported(on_cuda(1.0)) is None


@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 4), max_size=2),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
    st.integers(1, 5),
    SEEDS,
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_results_match_numpy_for_calls_of_any_size(library, n, lead, dtype, vectors, most, seed):
    a = symmetric(*lead, n, seed=seed, dtype=dtype)
    copy, count = a.clone(), int(np.prod(lead))
    library.calls.clear()
    before, cusolver._MAX_MATRICES = cusolver._MAX_MATRICES, most
    try:
        result = cusolver.eigh(a, vectors=vectors)
    finally:
        cusolver._MAX_MATRICES = before
    assert library.problems == []
    sizes = [arguments[-1] for name, *arguments in library.calls if name.endswith("Batched")]
    assert sizes == [most] * (count // most) + ([count % most] if count % most else [])
    assert torch.equal(a, copy)
    assert not result["failed"].any()
    assert result["failed"].shape == tuple(lead)
    assert result["values"].dtype == dtype
    np.testing.assert_allclose(result["values"], np.linalg.eigvalsh(a.double()), atol=1e-4)
    assert ("vectors" in result) == vectors
    if vectors:
        assert result["vectors"].dtype == dtype
        assert_solved(a, result["values"], result["vectors"])


def test_calls_are_bounded_in_bytes(library, monkeypatch):
    monkeypatch.setattr(cusolver, "_MAX_BYTES", 3 * 7 * 7 * 4)
    cusolver.eigh(symmetric(7, 7, dtype=torch.float32), vectors=True)
    sizes = [arguments[-1] for name, *arguments in library.calls if name.endswith("Batched")]
    assert sizes == [3, 3, 1]
    library.calls.clear()
    monkeypatch.setattr(cusolver, "_MAX_BYTES", 1)
    cusolver.eigh(symmetric(2, 7), vectors=True)
    assert library.names().count("XsyevBatched") == 2


def test_an_empty_batch_is_not_passed_on(library):
    result = cusolver.eigh(torch.empty(0, 3, 3), vectors=True)
    assert [result[name].shape for name in ("values", "vectors", "failed")] == [
        (0, 3),
        (0, 3, 3),
        (0,),
    ]
    assert "XsyevBatched" not in library.names()


def test_each_stream_has_a_handle(library, monkeypatch):
    solve = ["XsyevBatched_bufferSize", "XsyevBatched"]
    a = symmetric(2, 3)
    cusolver.eigh(a, vectors=True)
    cusolver.eigh(a, vectors=True)
    assert library.names() == ["Create", "CreateParams", "SetStream", *solve, "SetStream", *solve]
    assert library.streams == {4096: STREAM}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    cusolver.eigh(a, vectors=True)
    assert library.streams == {4096: STREAM, 4097: 5}


def test_threads_take_turns(library):
    """A second thread waits until the first has finished with a handle."""
    inside, release = threading.Event(), threading.Event()
    a = symmetric(2, 3)

    def wait(w, v):
        inside.set()
        assert release.wait(60)

    library.spoil = wait
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(cusolver.eigh(a, vectors=False)))
        for _ in range(2)
    ]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    assert cusolver._LOCK.locked()
    assert library.names().count("SetStream") == 1
    release.set()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
    assert library.names().count("Create") == 1


@pytest.mark.parametrize("vectors", [True, False])
def test_a_reported_failure_is_solved_by_lapack(library, vectors):
    """Its result counts as failed, even though it passes the check."""
    a = symmetric(2, 2, 5)
    library.info = {1: 3, 2: -1}
    result = cusolver.solve_batch(a, vectors=vectors)
    assert result["failed"].tolist() == [[False, True], [True, False]]
    assert cusolver.retry(a, result) == 0
    assert not result["failed"].any()
    np.testing.assert_allclose(result["values"], np.linalg.eigvalsh(a), atol=1e-12)


@pytest.mark.parametrize("function", cusolver.SIGNATURES)
@pytest.mark.parametrize("vectors", [True, False])
def test_an_error_of_cusolver_is_reported_and_another_solver_used(
    library, monkeypatch, function, vectors
):
    library.statuses = {function: 7}
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(spectral, "_SHARED", 0)
    a = symmetric(3, 6)
    for solve, events in ((cusolver.eigh, 0), (spectral.eigh, 4)):
        with pytest.warns(RuntimeWarning, match=f"^{function}: cuSOLVER's status 7; .* another"):
            result = solve(a, vectors=vectors)
        assert len(cupy.events) == events
        assert not result["failed"].any()
        np.testing.assert_allclose(result["values"], np.linalg.eigvalsh(a), atol=1e-12)
        if vectors:
            assert_solved(a, result["values"], result["vectors"])


def test_results_of_the_other_solver_are_checked(library, monkeypatch):
    library.statuses = {"cusolverDnXsyevBatched": 3}
    a = symmetric(3, 6)
    with pytest.warns(RuntimeWarning, match="status 3"):
        result = cusolver.solve_batch(
            a, vectors=True, otherwise=lambda a, vectors: (a.diagonal(dim1=1, dim2=2), 0 * a)
        )
    assert result["failed"].all()


def test_distances_and_spectra_use_it_without_cupy(library, monkeypatch):
    monkeypatch.setattr(spectral, "unsupported", lambda *tensors: "CuPy is not installed")
    a = symmetric(3, 6)
    assert_solved(a, *solvers.eigh(a))
    assert library.names().count("XsyevBatched") == 1
    assert_solved(a, *rk.eigh(a, backend="torch"))
    np.testing.assert_allclose(rk.eigh(a, vectors=False), np.linalg.eigvalsh(a), atol=1e-12)
    assert library.names().count("XsyevBatched") == 3
    library.spoil = lambda w, v: v.fill(0)
    assert_solved(a, *solvers.eigh(a))
    monkeypatch.setattr(cusolver, "_solve_by_pytorch", lambda a, vectors: (a[0], 0 * a))
    with pytest.raises(torch.linalg.LinAlgError, match="3 matrices did not converge"):
        solvers.eigh(a)
    with pytest.raises(rk.ConvergenceError, match="a: 3 matrices"):
        rk.eigh(a)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "n"), [(40_000, 3), (300, 33), (20, 129), (4, 499)])
def test_batches_on_a_gpu(dtype, count, n):
    """On two streams; a status or a matrix that fails is an error."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    a = symmetric(count, n, dtype=dtype).cuda()
    assert cusolver.unsupported(a) is None
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = cusolver.solve_batch(a, vectors=True)
            values = cusolver.solve_batch(a, vectors=False)["values"]
        stream.synchronize()
        assert not result["failed"].any()
        want = np.linalg.eigvalsh(a.double().cpu())
        tolerance = 10 * n * torch.finfo(dtype).eps * np.abs(want).max()
        for got in (result["values"], values):
            np.testing.assert_allclose(got.cpu(), want, rtol=0, atol=tolerance)
