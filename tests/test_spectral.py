"""Distances from Gram matrices alone, and spectra of batches: values, routes and errors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from _draw import SEEDS, labels, representations
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import DISTANCE, Tol, assert_close
from repsim_kernels.kernels.torch import cholesky, gram, riccati, spectral_distances
from repsim_kernels.ops.spectral import GRAM_METRICS

FLOAT64 = Tol(1e-9, 1e-13)


def compute_grams(x, cells, n_cells):
    return rk.centered_gram(x), rk.cell_grams(x, cells, n_cells=n_cells)


@given(st.data())
def test_grams_give_the_distances_of_activations(data):
    x = data.draw(
        representations(n=st.integers(4, 12), p=st.integers(30, 60), kinds=("gaussian", "relu"))
    )
    cells, n_cells = data.draw(labels(x.p))
    options = {"metrics": GRAM_METRICS, "ridge": data.draw(st.sampled_from([0.01, 0.1]))}
    members = cells == np.arange(n_cells)[:, None]
    want = rk.ablation_distances(x.values(), members, **options)
    got = rk.gram_ablation_distances(*compute_grams(x.values(), cells, n_cells), **options)
    for name in GRAM_METRICS:
        assert_close(got[name], want[name], DISTANCE["float64"], nan=True)


@pytest.mark.parametrize("options", [{}, {"ridge": 1e-3}, {"penalty": 3.0}, {"neurons": 5}])
@given(st.data())
def test_distances_match_the_reference(options, data):
    x = data.draw(
        representations(n=st.integers(4, 12), p=st.integers(30, 60), kinds=("gaussian", "relu"))
    )
    k, parts = compute_grams(x.values(), *data.draw(labels(x.p)))
    want = rk.gram_ablation_distances(k, parts, backend="reference", **options)
    got, info = rk.gram_ablation_distances(k, parts, info=True, **options)
    for name in GRAM_METRICS:
        # If a direction nearly vanishes, both take square roots of rounding errors.
        rough = info[name].route == "eigenvectors"
        assert_close(got[name][rough], want[name][rough], Tol(1e-5, 1e-9), nan=True)
        assert_close(got[name][~rough], want[name][~rough], FLOAT64, nan=True)


def test_grams_need_not_be_centred():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 40)) + rng.standard_normal(40)
    raw = np.stack([x[:, i::4] @ x[:, i::4].T for i in range(4)])
    got = rk.gram_ablation_distances(raw.sum(0), raw)
    want = rk.ablation_distances(x, np.arange(40) % 4, metrics=GRAM_METRICS)
    for name in GRAM_METRICS:
        assert_close(got[name], want[name], Tol(1e-8, 1e-12))


@pytest.mark.parametrize("options", [{}, {"ridge": 0.0}])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_parts_give_the_self_distance_and_complete_ones_nan(backend, options):
    x = np.random.default_rng(1).standard_normal((8, 30))
    k, parts = compute_grams(x, np.zeros(30, int), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        got = rk.gram_ablation_distances(k, parts, backend=backend, **options)
    for name, (complete, empty) in got.items():
        ridged = name in ("cca", "cca_squared") and not options
        self_distance = 1 - rk.cca(x, x, squared=name == "cca_squared", ridge=0.1) if ridged else 0
        assert np.isnan(complete)
        assert empty == pytest.approx(self_distance, rel=1e-12, abs=1e-15)


def test_eigenvectors_replace_stalling_iterations():
    """The Grams that remain lack directions of the whole."""
    x = np.random.default_rng(2).standard_normal((10, 14))
    k, parts = compute_grams(x, np.arange(14) // 6, 3)
    got, info = rk.gram_ablation_distances(k, parts, metrics=["procrustes", "cca"], info=True)
    assert info["procrustes"].route[:2].tolist() == ["eigenvectors"] * 2
    want = rk.ablation_distances(x, np.arange(14) // 6, metrics=["procrustes", "cca"])
    assert_close(got["cca"], want["cca"], FLOAT64)
    assert_close(got["procrustes"], want["procrustes"], DISTANCE["float64"])


def test_ablations_in_a_batch_do_not_mix(monkeypatch):
    """Ablations of one batch that converge at different steps, or fail, do not mix."""
    monkeypatch.setattr(spectral_distances, "_MAX_DIRECT_ERROR", 0)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((12, 60)) * np.linspace(1, 30, 60)
    cells = np.arange(60) < np.array([1, 5, 11, 20, 35, 47, 55])[:, None]
    batch, info = rk.ablation_distances(x, cells, metrics=("procrustes", "cca"), info=True)
    steps = info["procrustes"].steps
    assert len(set(steps.tolist())) >= 4
    assert {"iterations", "factors"} <= set(info["procrustes"].route)
    monkeypatch.setattr(gram, "_BATCH", 1)
    singles, singles_info = rk.ablation_distances(
        x, cells, metrics=("procrustes", "cca"), info=True
    )
    np.testing.assert_array_equal(singles_info["procrustes"].steps, steps)
    for name, values in singles.items():
        assert_close(batch[name], values, Tol(1e-12, 1e-15))


@pytest.mark.parametrize(("decades", "route"), [(1, "eigenvalues"), (8, "factors")])
@given(st.integers(10, 40), SEEDS)
def test_procrustes_from_eigenvalues_or_factors_matches_the_reference(decades, route, n, seed):
    """Eigenvalues serve a spectrum that falls slowly, and a Cholesky factor a steep one."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    x = basis * np.logspace(0, -decades / 2, n) @ rng.standard_normal((n, 5 * n))
    cells = np.arange(5 * n) % 4
    got, info = rk.ablation_distances(x, cells, metrics=["procrustes"], info=True)
    assert set(info["procrustes"].route) == {route}
    want = rk.ablation_distances(x, cells, metrics=["procrustes"], backend="reference")
    assert_close(got["procrustes"], want["procrustes"], FLOAT64)


def compute_deficit(v, f):
    """Return tr D from eigenvalues."""
    return v.sum() - np.sqrt(np.maximum(np.linalg.eigvalsh(np.diag(v**2) - f), 0)).sum()


@given(st.integers(1, 20), st.floats(0.01, 0.8), SEEDS)
def test_riccati_iterations_solve_the_equation(m, size, seed):
    """H = diag(v)² - F has eigenvalues well above zero; F has either sign."""
    rng = np.random.default_rng(seed)
    v = np.sort(rng.uniform(1, 10, m))[::-1].copy()
    a = rng.standard_normal((3, m, m))
    a = a + a.swapaxes(1, 2)
    f = size * a / np.abs(np.linalg.eigvalsh(a)).max((1, 2) if a.ndim > 3 else -1)[:, None, None]
    got, steps = riccati.solve_deficit(torch.from_numpy(v), torch.from_numpy(f))
    want = [compute_deficit(v, matrix) for matrix in f]
    assert_close(got, np.array(want), Tol(1e-9, 1e-12))
    assert (steps <= riccati._MAX_STEPS).all()


def test_a_riccati_equation_without_a_solution_gives_nan():
    v = torch.tensor([2.0, 1.0], dtype=torch.float64)
    got, _ = riccati.solve_deficit(
        v, torch.diag(torch.tensor([1.0, 1.5], dtype=torch.float64))[None]
    )
    assert got.isnan().all()


def test_an_inaccurate_correction_is_rejected(monkeypatch):
    """Steps that stop too early: the estimated error rejects them, and another route is taken."""
    monkeypatch.setattr(spectral_distances, "_MAX_DIRECT_ERROR", 0)
    x = np.random.default_rng(4).standard_normal((12, 60))
    cells = np.arange(60) % 3
    want, info = rk.ablation_distances(x, cells, metrics=["procrustes"], info=True)
    assert set(info["procrustes"].route) == {"iterations"}
    monkeypatch.setattr(riccati, "_CLOSE", 0.1)
    got, info = rk.ablation_distances(x, cells, metrics=["procrustes"], info=True)
    assert set(info["procrustes"].route) == {"factors"}
    assert_close(got["procrustes"], want["procrustes"], FLOAT64)


def draw_symmetric(rng, *shape):
    a = rng.standard_normal((*shape, shape[-1]))
    return a + a.swapaxes(-1, -2)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 40), (2, 2, 7)])
def test_eigh_matches_numpy(shape, backend):
    a = draw_symmetric(np.random.default_rng(5), *shape)
    w, v = rk.eigh(a, backend=backend)
    np.testing.assert_allclose(w, np.linalg.eigvalsh(a), atol=1e-12)
    np.testing.assert_allclose(a @ v, v * w[..., None, :], atol=1e-11)
    np.testing.assert_allclose(v.swapaxes(-1, -2) @ v, np.eye(shape[-1]) + 0 * a, atol=1e-12)
    np.testing.assert_allclose(rk.eigh(a, vectors=False, backend=backend), w, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 9), (3, 12, 5)])
def test_svd_matches_numpy(shape, backend):
    a = np.random.default_rng(6).standard_normal(shape)
    u, s, vh = rk.svd(a, backend=backend)
    np.testing.assert_allclose(u * s[..., None, :] @ vh, a, atol=1e-12)
    np.testing.assert_allclose(s, np.linalg.svd(a, compute_uv=False), atol=1e-12)
    np.testing.assert_allclose(rk.svd(a, vectors=False, backend=backend), s, atol=1e-12)


def test_spectra_have_the_kind_and_dtype_of_the_input():
    a = torch.from_numpy(draw_symmetric(np.random.default_rng(7), 2, 6))
    w, v = rk.eigh(a.float())
    assert w.dtype == v.dtype == torch.float32
    assert rk.eigh(a.half())[0].dtype == torch.float64
    assert isinstance(rk.svd(a, vectors=False), torch.Tensor)
    assert isinstance(rk.svd(a.numpy().tolist())[0], np.ndarray)
    assert rk.eigh([[2, 1], [1, 2]])[0].tolist() == pytest.approx([1, 3])


K = np.cov(np.random.default_rng(8).standard_normal((5, 40)))
BAD = {
    "gram: shape (4, 5); expected": (np.ones((4, 5)), np.zeros((1, 4, 4))),
    "gram: shape (2, 3, 3); expected (n, n)": (np.stack([np.eye(3)] * 2), np.zeros((1, 3, 3))),
    "gram: shape (3, 3); expected (n, n) with at least 4": (np.eye(3), np.zeros((1, 3, 3))),
    "parts: shape (5, 5); expected (C, 5, 5)": (K, K),
    "parts: shape (1, 4, 4); expected (C, 5, 5)": (K, np.zeros((1, 4, 4))),
    "parts: a torch array on cpu, but gram is a numpy array": (K, torch.zeros(1, 5, 5)),
    "gram: 1 matrices differ from their transposes": (np.triu(K), np.zeros((1, 5, 5))),
    "parts: 1 of 25 values are NaN": (K, np.where(np.eye(5) * np.arange(5) == 4, np.nan, K)[None]),
    "gram: the same for every stimulus": (np.ones((5, 5)), np.zeros((1, 5, 5))),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_grams_are_refused(message):
    with pytest.raises(rk.RepsimError) as error:
        rk.gram_ablation_distances(*BAD[message])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("options", [{"metrics": ["pwcca"]}, {"neurons": 0}, {"neurons": 2.5}])
def test_bad_options_are_refused(options):
    with pytest.raises(rk.OptionError, match=next(iter(options))):
        rk.gram_ablation_distances(K, K[None], **options)


def test_bad_matrices_are_refused():
    with pytest.raises(rk.ShapeError, match="a: 1 matrices differ"):
        rk.eigh(np.triu(np.ones((3, 3))))
    with pytest.raises(rk.ShapeError, match="a: 1 matrices differ"):
        rk.eigh([1e9 * np.eye(2), [[1, 2], [3, 4]]])
    with pytest.raises(rk.ShapeError, match=r"a: shape \(3, 4\); expected \(…, n, n\)"):
        rk.eigh(np.ones((3, 4)))
    with pytest.raises(rk.ShapeError, match=r"a: shape \(0, 4\)"):
        rk.svd(np.ones((0, 4)))
    with pytest.raises(rk.DtypeError, match="a: dtype complex128"):
        rk.svd(np.ones((2, 2), complex))
    with pytest.raises(rk.NonFiniteError, match="a: 1 of 4 values"):
        rk.svd([[1, 2], [np.inf, 0]])
    with pytest.raises(rk.OptionError, match="vectors: 'yes'; expected True or False"):
        rk.eigh(np.eye(2), vectors="yes")


def test_failure_to_converge_raises(monkeypatch):
    from repsim_kernels import _dispatch

    def fails(a, *, vectors):
        return {"values": a[..., 0], "failed": torch.tensor([True, False])}

    monkeypatch.setattr(_dispatch, "_load_kernel", lambda operation, backend: fails)
    with pytest.raises(rk.ConvergenceError, match=r"a: 1 matrices of shape \(2, 3, 3\)"):
        rk.eigh(np.stack([np.eye(3)] * 2), vectors=False)


def test_a_backend_can_replace_the_solvers():
    calls = []

    def eigh(a):
        calls.append(a.shape)
        return torch.linalg.eigh(a)

    _, parts = compute_grams(torch.eye(6).double()[:, :5] + 0.1, np.arange(5) // 3, 2)
    solvers = spectral_distances.Solvers(eigh=eigh)
    original = spectral_distances.Original(
        (torch.eye(5, 4).double(), torch.ones(4).double()), 6, 5, 0.1, 0
    )
    original.solvers = solvers
    spectral_distances.AblationBatch(original, cell=parts).svcca()
    assert calls == [(2, 4, 4)]


@pytest.mark.parametrize("shape", [(5, 5), (3, 20, 20)])
def test_cholesky_factors_solve_and_invert(shape):
    rng = np.random.default_rng(9)
    a = rng.standard_normal(shape)
    a = a @ a.swapaxes(-1, -2) + np.eye(shape[-1])
    b = rng.standard_normal((*shape[:-1], 3))
    factor = torch.linalg.cholesky(torch.from_numpy(a))
    np.testing.assert_allclose(
        cholesky.solve(factor, torch.from_numpy(b)), np.linalg.solve(a, b), rtol=1e-9
    )
    np.testing.assert_allclose(cholesky.invert(factor), np.linalg.inv(a), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("metrics", [["cca"], ["cca_squared"]])
def test_a_failed_factorisation_names_the_ridge(metrics):
    """The part holds more of one direction than the whole does, so the rest is indefinite."""
    whole = np.diag([4.0, 3, 2, 1, 1])
    whole -= whole.mean(0)
    whole -= whole.mean(1, keepdims=True)
    direction = np.array([1.0, -1, 0, 0, 0])
    part = 3 * direction[:, None] * direction
    with pytest.raises(rk.ConvergenceError, match=r"ridge: 0\.001 leaves a matrix singular"):
        rk.gram_ablation_distances(whole, part[None], metrics=metrics, ridge=1e-3)
