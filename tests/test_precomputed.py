"""CKA of kernel matrices that the caller has computed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from _draw import SEEDS
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import SAME, Tol, assert_close
from repsim_kernels import _dispatch, _options
from repsim_kernels._arrays import Source

EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])
KINDS = ("features", "far from zero", "RBF", "indefinite", "large diagonal")


def draw_kernel(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw an exactly symmetric kernel matrix (n, n)."""
    x = rng.standard_normal((n, 3 * n))
    match kind:
        case "far from zero":
            x = x + 10
        case "RBF":
            return np.exp(-((x[:, None] - x) ** 2).sum(-1) / (2 * n))
        case "indefinite":
            return x[:, :n] + x[:, :n].T
    k = x @ x.T
    if kind == "large diagonal":
        k += np.diag(rng.uniform(0, 1e3, n))
    return (k + k.T) / 2


def hsic(k: np.ndarray, m: np.ndarray, debiased: bool) -> np.longdouble:
    """HSIC as written by Kornblith et al. 2019 and, if debiased, by Song et al. 2012."""
    k, m, n = k.astype(np.longdouble), m.astype(np.longdouble), len(k)
    if not debiased:
        h = np.eye(n) - np.ones((n, n), np.longdouble) / n
        return np.trace(k @ h @ m @ h) / (n - 1) ** 2
    k, m = k * (1 - np.eye(n)), m * (1 - np.eye(n))
    total = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2))
    return (total - 2 / np.longdouble(n - 2) * (k @ m).sum()) / (n * (n - 3))


def define_cka(k: np.ndarray, m: np.ndarray, debiased: bool) -> float:
    product = hsic(k, k, debiased) * hsic(m, m, debiased)
    return float(hsic(k, m, debiased) / np.sqrt(product))


@EACH_BACKEND
@pytest.mark.parametrize("debiased", [False, True])
@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(4, 15), SEEDS)
def test_values_follow_the_definition(backend, debiased, kind, other, n, seed):
    rng = np.random.default_rng(seed)
    k, m = draw_kernel(kind, n, rng), draw_kernel(other, n, rng)
    options = {"kernel": "precomputed", "debiased": debiased, "backend": backend}
    want, tol = define_cka(k, m, debiased), Tol(1e-10, 1e-10)
    assert_close(rk.cka(k, m, **options), want, tol)
    tensors = torch.from_numpy(k), torch.from_numpy(m)
    assert isinstance(rk.cka(*tensors, **options), torch.Tensor)
    assert_close(rk.cka(*tensors, **options), want, tol)
    assert_close(rk.pairwise([k, m], **options), [[1, want], [want, 1]], tol)
    assert_close(rk.pairwise([k], [m, k], **options), [[want, 1]], tol)
    batch = rk.cka(np.stack([k, m]), m, batched=True, **options)
    assert_close(batch, [want, 1], tol)


@EACH_BACKEND
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("p", [3, 40])
def test_grams_of_features_give_the_values_of_the_features(backend, debiased, p):
    rng = np.random.default_rng(p)
    xs = [rng.standard_normal((20, p)) + shift for shift in (0, 1, 2)]
    want = rk.pairwise(xs, debiased=debiased, backend=backend)
    options = {"debiased": debiased, "kernel": "precomputed", "backend": backend}
    for grams in ([x @ x.T for x in xs], [rk.centered_gram(x) for x in xs]):
        assert_close(rk.pairwise(grams, **options), want, SAME)
        assert_close(rk.cka(*grams[:2], **options), want[0, 1], SAME)


@EACH_BACKEND
@given(st.integers(4, 10), SEEDS)
def test_the_diagonal_does_not_matter_if_debiased(backend, n, seed):
    rng = np.random.default_rng(seed)
    k, m = draw_kernel("features", n, rng), draw_kernel("RBF", n, rng)
    options = {"kernel": "precomputed", "debiased": True, "backend": backend}
    want = rk.cka(k, m, **options)
    shifted = k + np.diag(rng.standard_normal(n) * 100)
    assert_close(rk.cka(shifted, m, **options), want, Tol(1e-10, 1e-10))


@EACH_BACKEND
def test_half_of_an_asymmetry_from_rounding_counts_on_each_side(backend):
    rng = np.random.default_rng(0)
    k, m = draw_kernel("features", 9, rng), draw_kernel("features", 9, rng)
    uneven = k + 1e-7 * np.tri(9) * np.abs(k).max()
    want = rk.cka((uneven + uneven.T) / 2, m, kernel="precomputed", backend=backend)
    for a in (uneven, uneven.T):
        assert rk.cka(a, m, kernel="precomputed", backend=backend) == want
    pair = rk.pairwise([uneven.T, m], kernel="precomputed", backend=backend)
    assert_close(pair[0, 1], want, Tol(1e-14))


@EACH_BACKEND
@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "bool"])
def test_all_products_are_float64_whatever_the_dtype_and_precision(backend, dtype):
    rng = np.random.default_rng(1)
    draws = [draw_kernel("indefinite", 8, rng) * 2 for _ in range(2)]
    k, m = (draw > 0 if dtype == "bool" else draw.astype(dtype) for draw in draws)
    want = define_cka(k, m, debiased=False)
    for precision in ("float32", "float64"):
        options = {"kernel": "precomputed", "precision": precision, "backend": backend}
        value = rk.cka(k, m, **options)
        assert isinstance(value, np.float64)
        assert_close(value, want, SAME)


@EACH_BACKEND
@pytest.mark.parametrize("scale", [1e-130, 1e130])
@pytest.mark.parametrize("debiased", [False, True])
def test_extreme_magnitudes_do_not_overflow(backend, scale, debiased):
    rng = np.random.default_rng(2)
    k, m = draw_kernel("features", 9, rng), draw_kernel("RBF", 9, rng)
    options = {"kernel": "precomputed", "debiased": debiased, "backend": backend}
    assert_close(rk.cka(scale * k, m, **options), rk.cka(k, m, **options), SAME)


OFFSETS = np.arange(6) * 1.1
CONSTANT = {
    "zero": np.zeros((6, 6)),
    "one value": np.full((6, 6), 0.1),
    "a sum for rows and columns": OFFSETS[:, None] + OFFSETS + 1e6,
}
EQUALLY_FAR = {
    "identity": np.eye(6),
    "far identity": np.eye(6) + 3.3e6,
    "signs": np.diag(OFFSETS - 2),
}


@EACH_BACKEND
@pytest.mark.parametrize("name", [*CONSTANT, *EQUALLY_FAR])
@pytest.mark.parametrize("debiased", [False, True])
def test_matrices_that_centring_leaves_zero_are_refused(backend, name, debiased):
    """U-centring leaves zero if all stimuli are equally far apart, too."""
    k = (CONSTANT | EQUALLY_FAR)[name]
    m = draw_kernel("features", 6, np.random.default_rng(0))
    options = {"kernel": "precomputed", "debiased": debiased, "backend": backend}
    calls = {
        "x": lambda: rk.cka(k, m, **options),
        "y": lambda: rk.cka(np.stack([m, m]), np.stack([m, k]), batched=True, **options),
        r"xs\[1\]": lambda: rk.pairwise([m, k], **options),
        r"ys\[0\]": lambda: rk.pairwise([m], [k], **options),
    }
    for argument, call in calls.items():
        if name in CONSTANT or debiased:
            with pytest.raises(rk.ConstantError, match=f"^{argument}: the kernel matrix is zero"):
                call()
        else:
            assert np.isfinite(call()).all()


M = draw_kernel("features", 6, np.random.default_rng(3))
WRONG = [
    (M[:, :4], rk.ShapeError, r"shape \(6, 4\); expected a kernel matrix \(n, n\)$"),
    (M[0], rk.ShapeError, r"shape \(6,\); expected a kernel matrix \(n, n\)$"),
    (M + np.tri(6), rk.ShapeError, "1 matrices differ from their transposes by more than 1e-05"),
    (M + np.diag([np.nan] * 6), rk.NonFiniteError, r"6 of 36 values are NaN .* index \(0, 0\)"),
    (M * 1e150, rk.NonFiniteError, r"the largest magnitude is .*e\+15\d"),
    (M[:1, :1], rk.ShapeError, r"1 stimuli in shape \(1, 1\); expected at least 2"),
    (M * 1j, rk.DtypeError, "dtype complex128; expected real numbers"),
]


@pytest.mark.parametrize(("k", "error", "match"), WRONG, ids=[w[2][:30] for w in WRONG])
def test_anything_but_kernel_matrices_is_refused(k, error, match):
    for argument, call in (
        ("x", lambda: rk.cka(k, M, kernel="precomputed")),
        ("y", lambda: rk.cka(M, k, kernel="precomputed")),
        (r"xs\[1\]", lambda: rk.pairwise([M, k], kernel="precomputed")),
        (r"ys\[0\]", lambda: rk.pairwise([M], [k], kernel="precomputed")),
    ):
        with pytest.raises(error, match=f"^{argument}: {match}") as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1


def test_options_and_sizes_that_do_not_fit_are_refused():
    small, stack = M[:3, :3], np.stack([M, M])
    for call, match in (
        (lambda: rk.cka(M, M, kernel="precomputed", sigma=1.0), "^sigma: 1.0 with kernel='precom"),
        (lambda: rk.pairwise([M], kernel="precomputed", sigma=1.0), "^sigma: 1.0 with kernel='pre"),
        (lambda: rk.cka(small, small, kernel="precomputed", debiased=True), "^x: 3 stimuli .* 4$"),
        (lambda: rk.cka(M, small, kernel="precomputed"), "^y: 3 stimuli, but x has 6"),
        (lambda: rk.cka(stack, M, kernel="precomputed"), r"^x: .* \(n, n\), or batched=True for"),
        (lambda: rk.pairwise([stack], kernel="precomputed"), r"^xs\[0\]: .* matrix \(n, n\)$"),
        (lambda: rk.centered_gram(M, kernel="precomputed"), "^kernel: 'precomputed'; expected one"),
    ):
        with pytest.raises(rk.RepsimError, match=match):
            call()


@EACH_BACKEND
@pytest.mark.parametrize("kind", ["features", "indefinite"])
def test_chance_is_the_mean_over_all_permutations(backend, kind):
    rng = np.random.default_rng(5)
    k, m = draw_kernel(kind, 5, rng), draw_kernel("RBF", 5, rng)
    orders = map(list, itertools.permutations(range(5)))
    want = np.mean([define_cka(k, m[o][:, o], debiased=False) for o in orders])
    options = {"debiased": False, "kernel": "precomputed", "sigma": None, "chance": True}
    tensors = torch.from_numpy(k), torch.from_numpy(m)
    source = Source("numpy", "cpu")
    result = _dispatch.call("cka", backend, source, *tensors, precision="float64", **options)
    assert result["chance"] == pytest.approx(want, rel=1e-10)


@EACH_BACKEND
def test_grams_of_noise_warn_that_cka_is_high_by_chance(backend, monkeypatch):
    x, y = np.random.default_rng(1).standard_normal((2, 50, 5000))
    for call in (
        lambda k, m: rk.cka(k, m, kernel="precomputed", backend=backend),
        lambda k, m: rk.pairwise([k, m], kernel="precomputed", backend=backend),
    ):
        monkeypatch.setattr(_options, "_warnings_shown", set())
        with pytest.warns(rk.DegenerateWarning, match=r"0\.990 is the mean") as caught:
            call(x @ x.T, y @ y.T)
        assert caught[0].filename == __file__
