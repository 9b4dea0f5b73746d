"""Batches of cuSOLVER, direct and through CuPy, simulated by NumPy: wrong results are found."""

from __future__ import annotations

import sys

import _cusolver
import numpy as np
import pytest
import torch
from _cupy import FakeCupy
from _cusolver import FakeCusolver
from _draw import SEEDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from repsim_kernels.kernels.cupy import spectral
from repsim_kernels.kernels.triton import spectral as solvers

with_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


@pytest.fixture(params=["direct", "CuPy"])
def solver(request, monkeypatch):
    """A fake solver used for every size, and a record of the matrices that LAPACK solves."""
    cupy = FakeCupy()
    fake = FakeCusolver() if request.param == "direct" else cupy
    fake.solved_by_lapack = []
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    _cusolver.install(monkeypatch, fake if request.param == "direct" else None)
    monkeypatch.setattr(spectral, "_SHARED", 0)
    monkeypatch.setattr(spectral, "unsupported", lambda *tensors: None)

    def watch(name):
        solve = getattr(torch.linalg, name)

        def solve_alone(a):
            assert a.ndim == 2  # a batch would go to cuSOLVER again
            assert a.device.type == "cpu"
            fake.solved_by_lapack.append(a)
            return fake.answer(solve, a)

        monkeypatch.setattr(torch.linalg, name, solve_alone)

    fake.answer = lambda solve, a: solve(a)
    watch("eigh")
    watch("eigvalsh")
    yield fake
    if request.param == "direct":
        assert fake.problems == []
        assert "XsyevBatched" in fake.names()
        assert cupy.events == []


def symmetric(shape, seed=0, dtype=torch.float64, scale=1.0):
    a = np.random.default_rng(seed).standard_normal((*shape, shape[-1]))
    return torch.from_numpy((a + a.swapaxes(-1, -2)) * scale).to(dtype)


def assert_solved(a, result):
    """Check values against LAPACK's; vectors must be orthonormal and diagonalise a / max |a|."""
    unit = a.double().abs().amax((-2, -1), keepdim=True).clamp_min(5e-324)
    exact, w = (a.double() / unit).numpy(), (result["values"].double() / unit[..., 0]).numpy()
    atol = 4 * a.shape[-1] * EPS[a.dtype]
    size = np.linalg.norm(exact, axis=(-2, -1))[..., None]
    assert (np.abs(w - np.linalg.eigvalsh(exact)) <= atol * size).all()
    if "vectors" in result:
        v = result["vectors"].double().numpy()
        assert (np.abs(v.swapaxes(-1, -2) @ v - np.eye(a.shape[-1])) <= atol).all()
        assert (np.abs(exact @ v - v * w[..., None, :]) <= atol * size[..., None]).all()


def identity(a, w, v):
    """Return the diagonal and identity vectors, as a solver that did nothing would."""
    w[...] = np.sort(np.diag(a))
    if v is not None:
        v[...] = np.eye(len(w))


def nan_value(a, w, v):
    w[len(w) // 2] = np.nan


def infinite_value(a, w, v):
    w[-1] = np.inf


def no_values(a, w, v):
    w[...] = 0


def not_ascending(a, w, v):
    w[[0, -1]] = w[[-1, 0]]
    if v is not None:
        v[:, [0, -1]] = v[:, [-1, 0]]


def one_value_off(a, w, v):
    w[-1] *= 1 + 1e-3


def opposite_sign(a, w, v):
    """Return the spectrum of -a, which has the Frobenius norm of a."""
    w[...] = -w[::-1]
    if v is not None:
        v[...] = v[:, ::-1]


def nan_vector(a, w, v):
    v[0, 0] = np.nan


def infinite_vector(a, w, v):
    v[-1, -1] = np.inf


def no_vectors(a, w, v):
    v[...] = 0


def duplicate_pair(a, w, v):
    w[1], v[:, 1] = w[0], v[:, 0]


def long_vector(a, w, v):
    v[:, 1] *= 1 + 1e-3


def rotated(a, w, v):
    """Mix two vectors, so that they are not eigenvectors."""
    c, s = np.cos(1e-2), np.sin(1e-2)
    v[:, [0, 2]] = v[:, [0, 2]] @ np.array([[c, s], [-s, c]])


VALUE_FAULTS = (
    *(identity, nan_value, infinite_value, no_values),
    *(not_ascending, one_value_off, opposite_sign),
)
VECTOR_FAULTS = (nan_vector, infinite_vector, no_vectors, duplicate_pair, long_vector, rotated)
FAULTS = [
    *((fault, vectors) for fault in VALUE_FAULTS for vectors in (True, False)),
    *((fault, True) for fault in VECTOR_FAULTS),
]


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("fault", "vectors"), FAULTS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_only_the_wrong_matrix_is_solved_again(solver, fault, vectors, dtype, scale):
    a = symmetric((2, 3, 7), dtype=dtype, scale=scale)
    right = np.linalg.eigh(a.numpy())

    def spoil(w, v):
        one = w.reshape(6, 7)[3], v if v is None else v.reshape(6, 7, 7)[3]
        fault(a[1, 0].numpy(), *one)

    solver.spoil = spoil
    with np.errstate(all="ignore"):
        result = spectral.eigh(a, vectors=vectors)
    assert not result["failed"].any()
    assert result["failed"].shape == (2, 3)
    assert [matrix.tolist() for matrix in solver.solved_by_lapack] == [a[1, 0].tolist()]
    assert_solved(a, result)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 0] = False
    assert (
        result["values"][others].tolist()
        == (right[0] if vectors else np.linalg.eigvalsh(a.numpy()))[others].tolist()
    )
    if vectors:
        assert result["vectors"][others].tolist() == right[1][others].tolist()


@with_fixture
@given(
    st.integers(1, 40),
    st.sampled_from(["random", "gram", "repeated", "zero", "graded", "rank 1"]),
    st.sampled_from(list(EPS)),
    st.sampled_from([1e-300, 1e-30, 1.0, 1e30, 1e300]),
    st.booleans(),
    SEEDS,
)
def test_right_results_are_accepted(solver, n, kind, dtype, scale, vectors, seed):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    w = {
        "random": rng.standard_normal(n),
        "gram": rng.standard_normal(n) ** 2,
        "repeated": np.sign(rng.standard_normal(n)),
        "zero": np.zeros(n),
        "graded": np.logspace(-16, 0, n),
        "rank 1": np.eye(n)[0],
    }[kind]
    a = q * w @ q.T
    if dtype == torch.float32:
        scale = np.clip(scale, 1e-30, 1e30)
    a = torch.from_numpy((a + a.T) * scale).to(dtype)
    solver.solved_by_lapack.clear()
    result = spectral.eigh(a, vectors=vectors)
    assert solver.solved_by_lapack == []
    assert not result["failed"]
    assert_solved(a, result)


@pytest.mark.parametrize("vectors", [True, False])
def test_no_product_of_large_numbers_overflows(solver, vectors):
    """The eigenvalues are within a factor of 8 of the largest number."""
    a = symmetric((2, 7), scale=2.0**1019)
    result = spectral.eigh(a, vectors=vectors)
    assert solver.solved_by_lapack == []
    assert result["values"].abs().amax() > 2.0**1021
    assert_solved(a, result)


@pytest.mark.parametrize("vectors", [True, False])
def test_the_lower_triangle_is_used(solver, vectors):
    a = symmetric((4, 9))
    rounded = a + 1e-6 * torch.rand(a.shape, generator=torch.Generator().manual_seed(0)).triu(1)
    result = spectral.eigh(rounded, vectors=vectors)
    assert solver.solved_by_lapack == []
    assert_solved(a, result)


@pytest.mark.parametrize("vectors", [True, False])
def test_error_if_lapack_fails_too(solver, vectors):
    a = symmetric((4, 5))

    def spoil(w, v):
        w[[0, 2]] = np.nan

    def fail(solve, matrix):
        raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")

    solver.spoil = spoil
    for answer in (fail, lambda solve, matrix: (solve(matrix)[0] * 2, torch.eye(5).double())):
        if not vectors and answer is not fail:
            answer = lambda solve, matrix: solve(matrix) * 2  # noqa: E731
        solver.answer = answer
        result = spectral.eigh(a, vectors=vectors)
        assert result["failed"].tolist() == [True, False, True, False]
        with pytest.raises(rk.ConvergenceError, match=r"a: 2 matrices of shape \(4, 5, 5\)"):
            rk.eigh(a, vectors=vectors, backend="cupy")
        if vectors:
            solver.solved_by_lapack.clear()
            with pytest.raises(torch.linalg.LinAlgError, match="2 matrices did not converge"):
                solvers.eigh(a)
            assert len(solver.solved_by_lapack) == 2  # each once


@pytest.mark.parametrize("solver", ["CuPy"], indirect=True)
def test_a_batch_of_cupy_runs_on_the_stream_of_torch(solver):
    spectral.eigh(symmetric((3, 3)), vectors=True)
    assert [event[0::2] for event in solver.events] == [
        ("device", "enter"),
        ("stream", "enter"),
        ("stream", "exit"),
        ("device", "exit"),
    ]
