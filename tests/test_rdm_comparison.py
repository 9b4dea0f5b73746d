"""Comparisons of RDMs against their definitions, SciPy and rsatoolbox."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from _draw import _with_layout
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rsatoolbox.rdm.compare import compare as compare_by_rsatoolbox
from scipy.spatial.distance import pdist

import repsim_kernels as rk
from bench.common.tolerances import SAME, assert_close
from repsim_kernels.kernels.torch import rdm_comparison
from repsim_kernels.kernels.torch.rdm_comparison import RdmComparer
from repsim_kernels.ops.rdm_comparison import METHODS

RSATOOLBOX = {
    "spearman": "spearman",
    "pearson": "corr",
    "cosine": "cosine",
    "kendall": "tau-a",
    "rho-a": "rho-a",
    "whitened": "cosine_cov",
}
RNG = np.random.default_rng(0)
A, B = RNG.random((4, 15)), RNG.random((3, 15))
EACH_METHOD = pytest.mark.parametrize("method", METHODS)
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])


@pytest.fixture(params=["one block", "rows"])
def blocks(request, monkeypatch):
    """Run a test with all RDMs in one block, and with a few of them at a time."""
    if request.param == "rows":
        monkeypatch.setattr(rdm_comparison, "_CPU_BLOCK", 40)


@st.composite
def rdms(draw, max_conditions=12):
    """Draw RDMs (A, N) and (B, N): numbers without ties, with some, or with hardly any others."""
    n = draw(st.integers(3, max_conditions))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    out = []
    for _ in "ab":
        shape = draw(st.integers(1, 5)), n * (n - 1) // 2
        n_values = draw(st.sampled_from([2, 3, 10, None]))
        values = rng.normal(size=shape) if n_values is None else rng.integers(-1, n_values, shape)
        out.append(values.astype(float))
    return tuple(out)


def is_defined(method, *rdms):
    if method in ("spearman", "pearson"):
        return all((np.ptp(x, axis=-1) > 0).all() for x in rdms)
    return method in ("kendall", "rho-a") or all((x != 0).any(-1).all() for x in rdms)


def compute_kendall(u, v):
    """Return τ-a, pair by pair."""
    pairs = list(itertools.combinations(range(len(u)), 2))
    return sum(np.sign(u[i] - u[j]) * np.sign(v[i] - v[j]) for i, j in pairs) / len(pairs)


def compute_whitened(u, v):
    """Return the cosine with the inverse of V, whose entries are written out by pairs of pairs."""
    n = (1 + math.isqrt(1 + 8 * len(u))) // 2
    pairs = list(itertools.combinations(range(n), 2))
    # Differences of patterns with noise of variance 1 have variance 2, and covariance ±1 where
    # they share a condition. The covariance of squared distances is 2p times the square.
    covariance = [[4 if i == k else len(set(i) & set(k)) for k in pairs] for i in pairs]
    inverse = np.linalg.inv(np.array(covariance, float))
    return u @ inverse @ v / math.sqrt((u @ inverse @ u) * (v @ inverse @ v))


def compute_rho_a(u, v):
    n = len(u)
    r, s = (scipy.stats.rankdata(x) - (n + 1) / 2 for x in (u, v))
    return 12 * r @ s / (n**3 - n)


DEFINITIONS = {
    "spearman": lambda u, v: scipy.stats.spearmanr(u, v).statistic,
    "pearson": lambda u, v: scipy.stats.pearsonr(u, v).statistic,
    "cosine": lambda u, v: u @ v / math.sqrt((u @ u) * (v @ v)),
    "kendall": compute_kendall,
    "rho-a": compute_rho_a,
    "whitened": compute_whitened,
}


@EACH_METHOD
@EACH_BACKEND
@given(rdms())
def test_values_are_those_of_the_definitions(backend, method, pair):
    a, b = pair
    assume(is_defined(method, a, b))
    want = [[DEFINITIONS[method](u, v) for v in b] for u in a]
    assert_close(rk.compare_rdms(a, b, method=method, backend=backend), want, SAME)


@EACH_METHOD
@pytest.mark.usefixtures("blocks")
@given(rdms(max_conditions=40))
def test_values_are_those_of_rsatoolbox(method, pair):
    a, b = pair
    assume(is_defined(method, a, b))
    want = compare_by_rsatoolbox(a, b, method=RSATOOLBOX[method])
    assert_close(rk.compare_rdms(a, b, method=method), want, SAME)


@given(rdms())
def test_kendall_is_tau_b_with_all_pairs_in_the_denominator(pair):
    u, v = (x[0] for x in pair)
    assume(is_defined("pearson", u, v))
    n = len(u)
    n_untied = [
        math.comb(n, 2) - sum(math.comb(int(k), 2) for k in np.unique_counts(x).counts)
        for x in (u, v)
    ]
    tau_b = scipy.stats.kendalltau(u, v).statistic
    want = tau_b * math.sqrt(math.prod(n_untied)) / math.comb(n, 2)
    assert_close(rk.compare_rdms(u, v, method="kendall"), want, SAME)


@EACH_BACKEND
@settings(max_examples=10)
@given(st.lists(st.integers(0, 2), min_size=3, max_size=3), st.permutations(range(3)))
def test_rho_a_is_the_mean_over_all_orders_of_tied_values(backend, u, v):
    """All ways of breaking ties are enumerated; each of 3! orders is equally likely."""
    values = []
    for order in itertools.permutations(range(3)):
        ranks = np.empty(3)
        ranks[sorted(range(3), key=lambda i: (u[i], order[i]))] = range(3)
        values.append(scipy.stats.spearmanr(ranks, v).statistic)
    got = rk.compare_rdms(u, v, method="rho-a", backend=backend)
    assert_close(got, np.mean(values), SAME)


@settings(max_examples=10)
@given(st.integers(0, 2**16), st.sampled_from([1000, 4000]), st.sampled_from([None, 3, 500]))
def test_long_rdms(seed, approximate, n_values):
    """Ranks of many values are sorted in more steps; SciPy has its own algorithm for Kendall."""
    n = round(math.sqrt(2 * approximate))
    rng = np.random.default_rng(seed)
    u = rng.random(n * (n - 1) // 2)
    v = u + rng.random(len(u))
    if n_values is not None:
        u, v = (np.floor(x * n_values) for x in (u, v))
    for method in ("spearman", "kendall", "rho-a"):
        want = compare_by_rsatoolbox(u, v, method=RSATOOLBOX[method])[0, 0]
        assert_close(rk.compare_rdms(u, v, method=method), want, SAME)


def test_ranks_that_need_keys_of_64_bits():
    u = np.random.default_rng(0).integers(0, 10**5, 64_980)
    v = np.random.default_rng(1).integers(0, 10**5, 64_980) + u
    want = compare_by_rsatoolbox(u * 1.0, v * 1.0, method="tau-a")[0, 0]
    assert_close(rk.compare_rdms(u, v, method="kendall"), want, SAME)


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.integers(3, 20), st.integers(1, 20))
def test_whitened_squared_distances_compare_as_cka_does(seed, n, p):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, p)), rng.standard_normal((n, p))
    got = rk.compare_rdms(pdist(x, "sqeuclidean"), pdist(y, "sqeuclidean"), method="whitened")
    assert_close(got, rk.cka(x, y, precision="float64"), SAME)


@EACH_METHOD
@EACH_BACKEND
def test_each_side_is_one_rdm_or_several(backend, method):
    both = rk.compare_rdms(A, B, method=method, backend=backend)
    assert both.shape == (4, 3)
    assert both.dtype == np.float64
    for i, j in np.ndindex(4, 3):
        one = rk.compare_rdms(A[i], B[j], method=method, backend=backend)
        assert isinstance(one, float)
        assert_close(one, both[i, j], SAME)
        assert_close(rk.compare_rdms(A[i], B, method=method, backend=backend)[j], one, SAME)
        assert_close(rk.compare_rdms(A, B[j], method=method, backend=backend)[i], one, SAME)
        assert_close(rk.compare_rdms(B[j], A[i], method=method, backend=backend), one, SAME)


@EACH_METHOD
@given(rdms(), st.floats(1e-60, 1e60))
def test_an_rdm_equals_itself_at_any_scale(method, pair, scale):
    a, _ = pair
    assume(is_defined(method, a))
    got = np.diagonal(rk.compare_rdms(a, a * scale, method=method))
    if method in ("kendall", "rho-a"):
        has_ties = np.array([len(np.unique(u)) < len(u) for u in a])
        assert (got[has_ties] < 1).all()
        got = got[~has_ties]
    assert_close(got, np.ones_like(got), SAME)
    assert (got <= 1).all()


@EACH_METHOD
@given(rdms(), st.data())
def test_the_order_of_conditions_does_not_matter(method, pair, data):
    a, b = pair
    assume(is_defined(method, a, b))
    n = (1 + math.isqrt(1 + 8 * a.shape[1])) // 2
    i, j = np.triu_indices(n, 1)
    index = np.zeros((n, n), int)
    index[i, j] = index[j, i] = range(a.shape[1])
    order = index[np.ix_(*[data.draw(st.permutations(range(n)))] * 2)][i, j]
    want = rk.compare_rdms(a, b, method=method)
    assert_close(rk.compare_rdms(a[:, order], b[:, order], method=method), want, SAME)


@EACH_METHOD
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "uint8"])
def test_all_dtypes_are_compared_by_their_exact_values(method, dtype):
    a, b = (torch.from_numpy(x * 100).to(getattr(torch, dtype)) for x in (A, B))
    got = rk.compare_rdms(a, b, method=method)
    assert isinstance(got, torch.Tensor)
    assert_close(got, rk.compare_rdms(a.double(), b.double(), method=method), SAME)


@EACH_METHOD
@pytest.mark.parametrize("layout", ["F", "steps"])
def test_the_layout_in_memory_does_not_matter(method, layout):
    a, b = (_with_layout(np.zeros, x, layout) for x in (A, B))
    want = rk.compare_rdms(A, B, method=method)
    np.testing.assert_array_equal(rk.compare_rdms(a, b, method=method), want)


def test_equal_values_of_either_sign_of_zero_tie():
    for method in METHODS:
        got = rk.compare_rdms([0.0, -0.0, 1.0], [1.0, 2.0, 3.0], method=method)
        assert_close(got, rk.compare_rdms([0.0, 0.0, 1.0], [1.0, 2.0, 3.0], method=method), SAME)


@EACH_METHOD
@EACH_BACKEND
def test_rdms_without_a_similarity_are_named(backend, method):
    for value in (0.0, 2.0):
        constant = np.full((1, 15), value)
        for name, a, b in (
            ("a", constant[0], B),
            (r"a\[4\]", np.concatenate([A, constant]), B[0]),
            (r"b\[1\]", A[0], np.concatenate([B[:1], constant])),
        ):
            if is_defined(method, constant):
                got = rk.compare_rdms(a, b, method=method, backend=backend)
                assert np.isfinite(got).all()
                continue
            with pytest.raises(rk.ConstantError, match=rf"^{name}: all its values are .*{method}"):
                rk.compare_rdms(a, b, method=method, backend=backend)


def test_a_constant_rdm_has_no_rank_correlation():
    for method in ("kendall", "rho-a"):
        assert rk.compare_rdms(np.ones(15), A, method=method).tolist() == [0] * 4


@EACH_METHOD
@pytest.mark.usefixtures("blocks")
def test_the_comparer_returns_nan_where_a_similarity_is_undefined(method):
    rows = np.concatenate([A, A[:4], np.zeros((1, 15))])
    rows[4, 3], rows[5, 0], rows[6, 14], rows[7, [2, 5]] = np.nan, np.inf, -np.inf, [np.inf, np.nan]
    got = RdmComparer(torch.from_numpy(B), method)(torch.from_numpy(rows)).numpy()
    assert_close(got[:4], rk.compare_rdms(A, B, method=method), SAME)
    assert np.isnan(got[4:8]).all()
    assert np.isnan(got[8]).all() == (not is_defined(method, rows[8]))
    for dtype in (torch.float32, torch.float64):
        part = torch.from_numpy(A).to(dtype)
        got = RdmComparer(torch.from_numpy(rows), method)(part).numpy()
        want = RdmComparer(part, method)(torch.from_numpy(rows)).numpy().T
        assert_close(got, want, SAME, nan=True)


SQUARE = 1 - np.eye(6)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (A[:, :14], B, rk.ShapeError, r"a: shape \(4, 14\); .* N = n\(n - 1\)/2 for n >= 3"),
        ([1.0], [1.0], rk.ShapeError, r"a: shape \(1,\); .* n >= 3 conditions"),
        (1.0, B, rk.ShapeError, r"a: shape \(\)"),
        (A, B[None], rk.ShapeError, r"b: shape \(1, 3, 15\)"),
        (A, B[:0], rk.ShapeError, r"b: shape \(0, 15\)"),
        (SQUARE[:5, :5], B, rk.ShapeError, r"a: shape \(5, 5\)"),
        (SQUARE, B, rk.ShapeError, r"a: shape \(6, 6\); .*: pass a\[numpy\.triu_indices\(6, 1\)\]"),
        (A, B[:, :10], rk.ShapeError, "b: 10 dissimilarities, but a has 15; expected RDMs of the"),
        (A, np.full_like(B, np.nan), rk.NonFiniteError, "b: 45 of 45 values are NaN or infinite"),
        (A, np.full_like(B, np.inf), rk.NonFiniteError, "b: 45 of 45 values are NaN or infinite"),
        (A, torch.from_numpy(B), rk.DeviceError, "b: a torch array on cpu, but a is a numpy array"),
    ],
)
def test_wrong_rdms_are_refused(a, b, error, message):
    with pytest.raises(error, match=message):
        rk.compare_rdms(a, b)


def test_other_methods_are_refused():
    with pytest.raises(rk.OptionError, match="method: 'tau-a'; expected one of 'spearman', "):
        rk.compare_rdms(A, B, method="tau-a")
