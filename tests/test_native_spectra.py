"""cuSOLVER's batches, by NumPy on the CPU: wrong results are found and solved again."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from _cupy import FakeCupy
from _draw import SEEDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from repsim_kernels.kernels.cupy import spectral
from repsim_kernels.kernels.triton import spectral as solvers

drawn = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


@pytest.fixture
def cusolver(monkeypatch):
    """A CuPy that serves every size, and the matrices that PyTorch solves beside it."""
    fake = FakeCupy()
    fake.alone = []
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(spectral, "_SHARED", 0)
    monkeypatch.setattr(spectral, "unsupported", lambda *tensors: None)

    def watch(name):
        solve = getattr(torch.linalg, name)

        def solve_alone(a):
            assert a.ndim == 2  # a batch would be cuSOLVER's again
            fake.alone.append(a)
            return fake.answer(solve, a)

        monkeypatch.setattr(torch.linalg, name, solve_alone)

    fake.answer = lambda solve, a: solve(a)
    watch("eigh")
    watch("eigvalsh")
    return fake


def symmetric(shape, seed=0, dtype=torch.float64, scale=1.0):
    a = np.random.default_rng(seed).standard_normal((*shape, shape[-1]))
    return torch.from_numpy((a + a.swapaxes(-1, -2)) * scale).to(dtype)


def assert_solved(a, found):
    """LAPACK's values, and vectors that are orthonormal and diagonalise a, on its own scale."""
    unit = a.double().abs().amax((-2, -1), keepdim=True).clamp_min(5e-324)
    exact, w = (a.double() / unit).numpy(), (found["values"].double() / unit[..., 0]).numpy()
    atol = 4 * a.shape[-1] * EPS[a.dtype]
    size = np.linalg.norm(exact, axis=(-2, -1))[..., None]
    assert (np.abs(w - np.linalg.eigvalsh(exact)) <= atol * size).all()
    if "vectors" in found:
        v = found["vectors"].double().numpy()
        assert (np.abs(v.swapaxes(-1, -2) @ v - np.eye(a.shape[-1])) <= atol).all()
        assert (np.abs(exact @ v - v * w[..., None, :]) <= atol * size[..., None]).all()


def identity(a, w, v):
    """The diagonal, and the identity for vectors: what a solver that did nothing returns."""
    w[...] = np.sort(np.diag(a))
    if v is not None:
        v[...] = np.eye(len(w))


def nan_value(a, w, v):
    w[len(w) // 2] = np.nan


def no_values(a, w, v):
    w[...] = 0


def not_ascending(a, w, v):
    w[[0, -1]] = w[[-1, 0]]
    if v is not None:
        v[:, [0, -1]] = v[:, [-1, 0]]


def one_value_off(a, w, v):
    w[-1] *= 1 + 1e-3


def opposite_sign(a, w, v):
    """The spectrum of -a, which has a's Frobenius norm."""
    w[...] = -w[::-1]
    if v is not None:
        v[...] = v[:, ::-1]


def nan_vector(a, w, v):
    v[0, 0] = np.nan


def infinite_vector(a, w, v):
    v[-1, -1] = np.inf


def no_vectors(a, w, v):
    v[...] = 0


def one_pair_twice(a, w, v):
    w[1], v[:, 1] = w[0], v[:, 0]


def long_vector(a, w, v):
    v[:, 1] *= 1 + 1e-3


def rotated(a, w, v):
    """Vectors of no eigenvalue, of which two are mixed."""
    c, s = np.cos(1e-2), np.sin(1e-2)
    v[:, [0, 2]] = v[:, [0, 2]] @ np.array([[c, s], [-s, c]])


OF_VALUES = (identity, nan_value, no_values, not_ascending, one_value_off, opposite_sign)
OF_VECTORS = (nan_vector, infinite_vector, no_vectors, one_pair_twice, long_vector, rotated)
FAULTS = [
    *((fault, vectors) for fault in OF_VALUES for vectors in (True, False)),
    *((fault, True) for fault in OF_VECTORS),
]


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("fault", "vectors"), FAULTS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_one_wrong_matrix_costs_that_one(cusolver, fault, vectors, dtype, scale):
    a = symmetric((2, 3, 7), dtype=dtype, scale=scale)
    right = np.linalg.eigh(a.numpy())
    with np.errstate(all="ignore"):
        cusolver.spoil = lambda w, v: fault(a[1, 0].numpy(), w[1, 0], v if v is None else v[1, 0])
        found = spectral.eigh(a, vectors=vectors)
    assert not found["failed"].any()
    assert found["failed"].shape == (2, 3)
    assert [one.tolist() for one in cusolver.alone] == [a[1, 0].tolist()]
    assert_solved(a, found)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 0] = False
    assert (
        found["values"][others].tolist()
        == (right[0] if vectors else np.linalg.eigvalsh(a.numpy()))[others].tolist()
    )
    if vectors:
        assert found["vectors"][others].tolist() == right[1][others].tolist()


@drawn
@given(
    st.integers(1, 40),
    st.sampled_from(["random", "gram", "repeated", "zero", "graded", "rank 1"]),
    st.sampled_from(list(EPS)),
    st.sampled_from([1e-300, 1e-30, 1.0, 1e30, 1e300]),
    st.booleans(),
    SEEDS,
)
def test_right_results_are_kept(cusolver, n, kind, dtype, scale, vectors, seed):
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
    cusolver.alone.clear()
    found = spectral.eigh(a, vectors=vectors)
    assert cusolver.alone == []
    assert not found["failed"]
    assert_solved(a, found)


@pytest.mark.parametrize("vectors", [True, False])
def test_matrices_symmetric_but_for_rounding_are_read_as_pytorch_does(cusolver, vectors):
    a = symmetric((4, 9))
    rounded = a + 1e-6 * torch.rand(a.shape, generator=torch.Generator().manual_seed(0)).triu(1)
    found = spectral.eigh(rounded, vectors=vectors)
    assert cusolver.alone == []
    assert_solved(a, found)


@pytest.mark.parametrize("vectors", [True, False])
def test_a_matrix_that_pytorch_solves_wrongly_too_is_an_error(cusolver, vectors):
    a = symmetric((4, 5))

    def spoil(w, v):
        w[[0, 2]] = np.nan

    def give_up(solve, one):
        raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")

    cusolver.spoil = spoil
    for answer in (give_up, lambda solve, one: (solve(one)[0] * 2, torch.eye(5).double())):
        if not vectors and answer is not give_up:
            answer = lambda solve, one: solve(one) * 2  # noqa: E731
        cusolver.answer = answer
        found = spectral.eigh(a, vectors=vectors)
        assert found["failed"].tolist() == [True, False, True, False]
        with pytest.raises(rk.ConvergenceError, match=r"a: 2 matrices of shape \(4, 5, 5\)"):
            rk.eigh(a, vectors=vectors, backend="cupy")
        if vectors:
            cusolver.alone.clear()
            with pytest.raises(torch.linalg.LinAlgError, match="2 matrices did not converge"):
                solvers.eigh(a)
            assert len(cusolver.alone) == 2  # each once


def test_the_batch_runs_on_torchs_stream(cusolver):
    spectral.eigh(symmetric((3, 3)), vectors=True)
    assert [event[0::2] for event in cusolver.events] == [
        ("device", "enter"),
        ("stream", "enter"),
        ("stream", "exit"),
        ("device", "exit"),
    ]
