"""RSA against SciPy; ties depend neither on the machine nor on the order of summation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from _draw import pairs
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from repsim_kernels.kernels.torch import memory
from repsim_kernels.kernels.torch.distances import EqualRows, check_distinct, pair_distances
from repsim_kernels.kernels.torch.rsa import rank_distances

DISTANCES = ("euclidean", "sqeuclidean", "correlation", "cosine")
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])
seeds = st.integers(0, 2**32 - 1)


def expand_distances(d: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Expand the condensed distances of stimuli to those of their repeats, stimuli[index]."""
    i, j = np.triu_indices(len(index), 1)
    return scipy.spatial.distance.squareform(d)[index[i], index[j]]


def draw_repeats(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """Draw an index (n,) in which each of k stimuli occurs at least once."""
    return rng.permutation(np.concatenate([np.arange(k), rng.integers(0, k, n - k)]))


@pytest.mark.parametrize("compare", ["spearman", "pearson"])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "correlation", "cosine"])
@given(pairs(n=st.integers(4, 12), p=st.integers(3, 30), kinds=("gaussian", "large mean")))
def test_rsa_matches_scipy(distance, compare, pair):
    x, y = (z.values() for z in pair)
    a, b = (scipy.spatial.distance.pdist(z, distance) for z in (x, y))
    oracle = {"spearman": scipy.stats.spearmanr, "pearson": scipy.stats.pearsonr}[compare]
    # With row means of 1000, correlation distances lose 6 digits, in SciPy and here.
    np.testing.assert_allclose(
        rk.rsa(x, y, distance=distance, compare=compare), oracle(a, b).statistic, atol=1e-7
    )


@given(st.integers(3, 10), st.integers(1, 6), st.integers(0, 2**16))
def test_integer_distances_tie(n, p, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 3, (n, p)), rng.standard_normal((n, 4))
    a = scipy.spatial.distance.pdist(x)
    if np.ptp(a) == 0:
        with pytest.raises(rk.ConstantError):
            rk.rsa(x, y)
        return
    want = scipy.stats.spearmanr(a, scipy.spatial.distance.pdist(y)).statistic
    np.testing.assert_allclose(rk.rsa(x, y), want, atol=1e-12)


@pytest.mark.parametrize("distance", ["euclidean", "correlation"])
def test_distances_from_duplicates_tie(distance):
    """The distances from duplicates come from products at different positions."""
    rng = np.random.default_rng(8)
    x, y = (rng.standard_normal((200, 300)).astype(np.float32) for _ in "xy")
    for z in (x, y):
        z[:100] = z[100:]
    want = rk.rsa(x, y, distance=distance, backend="reference")
    assert rk.rsa(x, y, distance=distance) == pytest.approx(float(want), rel=1e-13)


def test_near_duplicates_keep_accurate_distances():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, 40)) + 1000
    x[1] = x[0] + 1e-7 * rng.standard_normal(40)
    x[3] = x[2]
    a, y = scipy.spatial.distance.pdist(x), rng.standard_normal((6, 4))
    got = pair_distances(torch.from_numpy(x), "euclidean").squared.sqrt().numpy()
    np.testing.assert_allclose(got, a, rtol=1e-9)
    assert np.isfinite(rk.rsa(x, y))


@EACH_BACKEND
@pytest.mark.parametrize("distance", DISTANCES)
@settings(max_examples=15)
@given(st.integers(5, 80), st.integers(1, 700), st.sampled_from(["float32", "float64"]), seeds)
def test_repeated_stimuli_tie(backend, distance, n, p, dtype, seed):
    rng = np.random.default_rng(seed)
    # With many float32 stimuli, some different distances are within rounding of each other.
    k = int(rng.integers(3, max(4, n // 2 if dtype == "float64" else min(n, 8))))
    index = draw_repeats(rng, n, k)
    base = rng.standard_normal((k, p + 2)).astype(dtype)
    y = rng.standard_normal((n, 10))
    want = scipy.stats.spearmanr(
        expand_distances(scipy.spatial.distance.pdist(base.astype(float), distance), index),
        scipy.spatial.distance.pdist(y, distance),
    ).statistic
    got = rk.rsa(base[index], y, distance=distance, backend=backend)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def make_smoothed_one_hot(rng: np.random.Generator, k: int) -> np.ndarray:
    share = rng.uniform(0.5, 0.99)
    return np.full((k, k), (1 - share) / (k - 1)) + np.eye(k) * (share - (1 - share) / (k - 1))


def make_log_softmax(rng: np.random.Generator, k: int) -> np.ndarray:
    logits = np.eye(k) * rng.uniform(1, 9)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def make_orthonormal(rng: np.random.Generator, k: int) -> np.ndarray:
    q = np.linalg.qr(rng.standard_normal((k + int(rng.integers(0, 300)), k)))[0].T
    return q * 10 ** rng.uniform(-3, 3)


@EACH_BACKEND
@pytest.mark.parametrize("classes", [make_smoothed_one_hot, make_log_softmax, make_orthonormal])
@settings(max_examples=15)
@given(st.integers(3, 25), st.integers(2, 50), st.sampled_from(["float32", "float64"]), seeds)
def test_categorical_models_tie(backend, classes, k, more, dtype, seed):
    """Rounded input with one distance within classes and one between them."""
    rng = np.random.default_rng(seed)
    index = draw_repeats(rng, k + more, k)
    x = classes(rng, k)[index].astype(dtype)
    y = rng.standard_normal((len(x), 10))
    apart = expand_distances(scipy.spatial.distance.squareform(1 - np.eye(k)), index)
    for distance in DISTANCES:
        if classes is make_orthonormal and distance == "correlation":
            continue  # the means of the vectors differ
        want = scipy.stats.spearmanr(apart, scipy.spatial.distance.pdist(y, distance)).statistic
        got = rk.rsa(x, y, distance=distance, backend=backend)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


@EACH_BACKEND
@pytest.mark.parametrize("seed", range(5))
def test_scaled_copies_tie_under_cosine(backend, seed):
    rng = np.random.default_rng(seed)
    index = draw_repeats(rng, 50, 5)
    base, y = rng.standard_normal((5, 40)), rng.standard_normal((50, 10))
    x = base[index] * rng.lognormal(size=(50, 1))
    a, b = (scipy.spatial.distance.pdist(z, "cosine") for z in (base, y))
    want = scipy.stats.spearmanr(expand_distances(a, index), b).statistic
    for z in (x, x.astype(np.float32)):
        got = rk.rsa(z, y, distance="cosine", backend=backend)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("compare", ["spearman", "pearson", "cosine"])
@pytest.mark.parametrize("distance", ["euclidean", "correlation", "cosine"])
@settings(max_examples=10)
@given(
    st.integers(10, 90), st.integers(3, 1500), st.sampled_from(["float16", "float32", "float64"]),
    st.sampled_from([0, 3, 100]), seeds,
)  # fmt: skip
def test_order_of_stimuli_and_neurons_does_not_matter(distance, compare, n, p, dtype, mean, seed):
    """A permutation changes the order of summation, as another BLAS would."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((int(rng.integers(3, n)), p)) + mean).astype(dtype)
    x = x[draw_repeats(rng, n, len(x))]
    y = x.astype(float) + rng.standard_normal((n, p))
    y[n // 2 :] = y[: n - n // 2]
    options = {"distance": distance, "compare": compare}
    stimuli = rng.permutation(n)
    permuted = (z[stimuli][:, rng.permutation(p)] for z in (x, y))
    # Rows with a mean of 100 have cosine distances of about 1e-4, from products near 1.
    bound = 1e-10 if (distance, mean) == ("cosine", 100) else 1e-12
    assert abs(rk.rsa(x, y, **options) - rk.rsa(*permuted, **options)) < bound


@EACH_BACKEND
@pytest.mark.parametrize("distance", DISTANCES)
@given(
    st.integers(4, 40), st.integers(2, 6), st.sampled_from(["float16", "float32", "float64"]),
    st.sampled_from([1, 3, 10]), st.sampled_from([0, 2]), seeds,
)  # fmt: skip
def test_order_does_not_matter_for_lattice_points(backend, distance, n, p, dtype, step, mean, seed):
    """Many pairs have equal distances although their rows differ in length and rounding."""
    rng = np.random.default_rng(seed)
    x = (np.round(rng.standard_normal((n, p)) * 2) / step + mean + 0.1).astype(dtype)
    y, order = rng.standard_normal((n, 3)), rng.permutation(n)
    options = {"distance": distance, "backend": backend}
    try:
        value = rk.rsa(x, y, **options)
    except rk.ConstantError:
        return
    permuted = x[order][:, rng.permutation(p)]
    assert abs(rk.rsa(permuted, y[order], **options) - value) < 1e-12


@pytest.mark.parametrize("scale", [1e-25, 1e-22, 1e-15, 1e15, 1e22])
def test_ties_do_not_depend_on_the_scale(scale):
    rng = np.random.default_rng(6)
    index = draw_repeats(rng, 50, 10)
    x, y = make_orthonormal(rng, 10)[index], rng.standard_normal((50, 6))
    x /= np.linalg.norm(x[0])
    apart = expand_distances(scipy.spatial.distance.squareform(1 - np.eye(10)), index)
    want = scipy.stats.spearmanr(apart, scipy.spatial.distance.pdist(y)).statistic
    np.testing.assert_allclose(rk.rsa((x * scale).astype(np.float32), y), want, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "distance", "dtype"),
    [
        ("gaussian", "euclidean", "float32"),
        ("log-normal", "cosine", "float32"),
        ("mean of 10", "euclidean", "float64"),
        ("mean of 10", "cosine", "float32"),
        pytest.param("gaussian", "euclidean", "float64", marks=pytest.mark.slow),
        pytest.param("gaussian", "cosine", "float32", marks=pytest.mark.slow),
        pytest.param("gaussian", "cosine", "float64", marks=pytest.mark.slow),
        pytest.param("log-normal", "euclidean", "float32", marks=pytest.mark.slow),
        pytest.param("log-normal", "euclidean", "float64", marks=pytest.mark.slow),
        pytest.param("log-normal", "cosine", "float64", marks=pytest.mark.slow),
        pytest.param("mean of 10", "euclidean", "float32", marks=pytest.mark.slow),
        pytest.param("mean of 10", "cosine", "float64", marks=pytest.mark.slow),
    ],
)
def test_generic_distances_do_not_tie(kind, distance, dtype):
    """With 2,000 stimuli, neighbouring distances are as close as float32 rounding."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2000, 12))
    x = {"gaussian": x, "log-normal": np.exp(1.5 * x), "mean of 10": x + 10}[kind].astype(dtype)
    exact = x.astype(np.longdouble)
    if distance == "cosine":
        exact /= np.sqrt((exact**2).sum(1, keepdims=True))
    d2 = np.concatenate([((exact[i + 1 :] - row) ** 2).sum(1) for i, row in enumerate(exact)])
    ranks = rank_distances(pair_distances(torch.from_numpy(x), distance)).numpy()
    _, first, counts = np.unique(ranks, return_index=True, return_counts=True)
    assert len(ranks) - len(first[counts == 1]) < 1e-4 * len(ranks)
    want = np.empty(len(d2))
    want[np.argsort(d2, kind="stable")] = np.arange(len(d2))
    assert np.corrcoef(ranks, want)[0, 1] > 1 - 1e-9


@EACH_BACKEND
def test_exact_ties_hold_among_dense_distances(backend):
    """The distances of 40 one-hot rows lie among others that are as dense as float32 rounding."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((190, 60)).astype(np.float32)
    x[:40] = 0
    x[np.arange(40), np.arange(40)] = 10
    x, y = x[rng.permutation(190)], rng.standard_normal((190, 8))
    a, b = (scipy.spatial.distance.pdist(z, "sqeuclidean") for z in (x.astype(float), y))
    assert (a == 200).sum() == 780
    want = scipy.stats.spearmanr(a, b).statistic
    # A chance tie among the others moves the correlation by 1e-8, these 780 ties by 1e-4.
    np.testing.assert_allclose(rk.rsa(x, y, backend=backend), want, rtol=0, atol=1e-7)


@EACH_BACKEND
@pytest.mark.parametrize("compare", ["spearman", "pearson"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_distances_equal_up_to_rounding_raise(backend, compare, dtype):
    rng = np.random.default_rng(4)
    x, y = make_orthonormal(rng, 12).astype(dtype), rng.standard_normal((12, 5))
    for distance in ("euclidean", "cosine"):
        assert scipy.spatial.distance.pdist(x.astype(float), distance).std() > 0
        with pytest.raises(rk.ConstantError, match="distances are all equal"):
            rk.rsa(x, y, distance=distance, compare=compare, backend=backend)


@pytest.mark.parametrize(
    ("dtype", "far"), [("float32", 1e3), ("float64", 1e3), ("float64", 1e6), ("float64", 1e9)]
)
@pytest.mark.parametrize("which", [0, 7])
def test_an_outlying_stimulus_does_not_blur_the_others(which, dtype, far):
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((30, 20)), rng.standard_normal((30, 20))
    x[which] *= far
    x = x.astype(dtype)
    for distance in ("euclidean", "sqeuclidean"):
        a, b = (scipy.spatial.distance.pdist(z.astype(np.longdouble), distance) for z in (x, y))
        # SciPy 1.18's spearmanr refuses long doubles.
        want = np.corrcoef(scipy.stats.rankdata(a), scipy.stats.rankdata(b))[0, 1]
        np.testing.assert_allclose(rk.rsa(x, y, distance=distance), want, rtol=0, atol=1e-12)


@given(
    st.integers(2, 40), st.integers(1, 40), seeds,
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)  # fmt: skip
def test_equal_rows_are_found(n, p, seed, dtype):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(-1, 2, (n, p)) * rng.choice([-1.0, 1.0], (n, p))).to(dtype)
    _, want = np.unique(x.double().numpy() + 0.0, axis=0, return_inverse=True)
    try:
        check_distinct(x)
    except EqualRows as equal:
        first, index = equal.args
    else:
        assert want.max() + 1 == n
        return
    assert torch.equal(x[first][index], x)
    assert len(first) == want.max() + 1 < n


@pytest.mark.parametrize("distance", DISTANCES)
@given(
    st.integers(2, 40), st.integers(1, 40), seeds,
    st.sampled_from(["gaussian", "integers", "repeats", "orthonormal"]),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_torch_and_numpy_ranks_agree(distance, n, p, seed, kind, dtype):
    rng = np.random.default_rng(seed)
    x = {
        "gaussian": lambda: rng.standard_normal((n, p)),
        "integers": lambda: rng.integers(-2, 3, (n, p)),
        "repeats": lambda: rng.standard_normal((n, p))[rng.integers(0, n, n)],
        "orthonormal": lambda: np.linalg.qr(rng.standard_normal((n, n)))[0],
    }[kind]()
    computed = pair_distances(torch.from_numpy(x).to(dtype), distance)
    want = rank_distances(computed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repsim_kernels.kernels.torch.rsa.np", torch)  # as for tensors on a GPU
        assert torch.equal(rank_distances(computed).nan_to_num(nan=0), want.nan_to_num(nan=0))


def test_blocks_of_neurons_do_not_change_all_pairs(monkeypatch):
    """Also where a block that two cores share has other sizes than one representation's."""
    rng = np.random.default_rng(7)
    xs = [rng.standard_normal((30, p)).astype(np.float32) for p in (400, 400, 90)]
    for options in ({}, {"distance": "sqeuclidean", "compare": "pearson"}):
        want = rk.pairwise(xs, metric="rsa", **options)
        for block in (31, 997, 5001):
            monkeypatch.setattr(memory, "BLOCK", block)
            got = rk.pairwise(xs, metric="rsa", **options)
            np.testing.assert_allclose(got, want, rtol=1e-10)
        monkeypatch.undo()
