"""Metrics of neighbours against their definitions; ties do not depend on the machine."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from _draw import TORCH_DTYPES, TORCH_LAYOUTS, pairs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

import repsim_kernels as rk
from bench.common.tolerances import SAME, Tol, assert_close
from repsim_kernels._metrics import METRICS
from repsim_kernels.kernels.torch import nearest, neighbours
from repsim_kernels.kernels.torch.nearest import Rows, find_candidates, find_nearest

NAMES = neighbours.METRICS
# The reference has no tiles.
EACH_BACKEND = pytest.mark.parametrize(
    ("backend", "tiles"),
    [("torch", "whole"), ("torch", "tiles"), ("reference", "whole")],
    indirect=["tiles"],
)
seeds = st.integers(0, 2**16)


@pytest.fixture(params=["whole", "tiles"], autouse=True)
def tiles(request, monkeypatch):
    """Run each test with all distances from a stimulus, and with small tiles and few candidates."""
    if request.param == "tiles":
        monkeypatch.setattr(nearest, "_TILE", 5)
        monkeypatch.setattr(nearest, "_MARGIN", 1)
        monkeypatch.setattr(nearest, "_SORTED", 40)
    else:
        monkeypatch.setattr(nearest, "_MARGIN", 1000)


def find_by_sklearn(x, k, distance):
    """Return the k nearest others of each row of x, by scikit-learn."""
    fitted = NearestNeighbors(n_neighbors=k, metric=distance, algorithm="brute").fit(x)
    return fitted.kneighbors(return_distance=False)  # leaves out the row itself


def compute_overlaps(a, b):
    """Return mutual kNN and Jaccard of two lists of neighbours, by their definitions."""
    sets = [(set(i.tolist()), set(j.tolist())) for i, j in zip(a, b, strict=True)]
    mutual = np.mean([len(i & j) / len(i) for i, j in sets])
    return mutual, np.mean([len(i & j) / len(i | j) for i, j in sets])


def compute_cknna(x, y, near_x, near_y):
    """Return CKNNA by equations 12 and 16 to 18 of Huh et al. 2024."""
    units = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y)]
    kernels = [u @ u.T for u in units]
    centred = [kernel - kernel.mean(1, keepdims=True) for kernel in kernels]

    def align(a, b):
        total = 0.0
        for i in range(len(x)):
            for j in set(a[1][i].tolist()) & set(b[1][i].tolist()):
                total += a[0][i, j] * b[0][i, j]
        return total

    k, m = zip(centred, (near_x, near_y), strict=True)
    return align(k, m) / np.sqrt(align(k, k) * align(m, m))


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "sqeuclidean", "correlation"])
@EACH_BACKEND
@settings(max_examples=15)
@given(pairs(n=st.integers(12, 40), p=st.integers(3, 60), kinds=("gaussian",)), st.integers(1, 9))
def test_values_are_those_of_the_definitions(backend, distance, pair, k):
    x, y = (z.values() for z in pair)
    near = [find_by_sklearn(z, k, distance) for z in (x, y)]
    mutual, jaccard = compute_overlaps(*near)
    options = {"distance": distance, "backend": backend}
    assert_close(rk.mutual_knn(x, y, k, **options), mutual, SAME)
    assert_close(rk.jaccard_knn(x, y, k, **options), jaccard, SAME)
    if distance == "cosine":
        want = compute_cknna(x, y, *near)
        assert_close(rk.cknna(x, y, k, backend=backend), want, Tol(1e-9, 1e-12))


@settings(max_examples=15)
@given(
    pairs(
        n=st.integers(12, 40), p=st.integers(3, 60), kinds=("gaussian",), dtypes=TORCH_DTYPES,
        layouts=TORCH_LAYOUTS,
    )
)  # fmt: skip
def test_every_dtype_and_layout_matches_the_definitions(pair):
    x, y = pair
    near = [find_by_sklearn(z.values(), 4, "cosine") for z in pair]
    mutual, jaccard = compute_overlaps(*near)
    a, b = x.torch(), y.torch()
    copies = a.clone(), b.clone()
    assert_close(rk.mutual_knn(a, b, 4), mutual, SAME)
    assert_close(rk.jaccard_knn(a, b, 4), jaccard, SAME)
    assert_close(rk.cknna(a, b, 4), compute_cknna(x.values(), y.values(), *near), Tol(1e-9, 1e-12))
    assert torch.equal(a, copies[0])
    assert torch.equal(b, copies[1])


def sort_exactly(x, k, distance):
    """Return the k nearest others of integer rows by exact distance, then by index."""
    rows = [[int(v) for v in row] for row in x]

    def measure(a, b):
        if distance == "euclidean":
            return sum((v - w) ** 2 for v, w in zip(a, b, strict=True))
        dot = sum(v * w for v, w in zip(a, b, strict=True))
        norms = sum(v * v for v in a) * sum(w * w for w in b)
        return -Fraction(dot * abs(dot), norms)

    n = len(rows)
    orders = (sorted((measure(rows[i], rows[j]), j) for j in range(n) if j != i) for i in range(n))
    return np.array([[j for _, j in order[:k]] for order in orders])


@EACH_BACKEND
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@given(
    st.integers(9, 40), st.integers(1, 6), st.integers(1, 8), seeds,
    st.sampled_from(["float16", "float32", "float64", "int64"]),
)  # fmt: skip
def test_ties_of_integers_count_by_index(backend, distance, n, p, k, seed, dtype):
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(-1, 3, (n, p)) for _ in "xy")
    for z in (x, y):
        z[(z == 0).all(1), 0] = 1
        z[0] = -z[1]
    near = [sort_exactly(z, k, distance) for z in (x, y)]
    mutual, jaccard = compute_overlaps(*near)
    a, b = (z.astype(dtype) for z in (x, y))
    options = {"distance": distance, "backend": backend}
    assert_close(rk.mutual_knn(a, b, k, **options), mutual, SAME)
    assert_close(rk.jaccard_knn(a, b, k, **options), jaccard, SAME)


@EACH_BACKEND
@pytest.mark.parametrize("distance", ["euclidean", "cosine", "correlation"])
@given(
    st.integers(2, 9), st.integers(0, 30), st.integers(3, 300), seeds,
    st.sampled_from(["float32", "float64"]),
)  # fmt: skip
def test_repeated_stimuli_count_by_index(backend, distance, k, more, p, seed, dtype):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((10, p)).astype(dtype)
    index = rng.permutation(np.concatenate([np.arange(10), rng.integers(0, 10, more)]))
    y = rng.standard_normal((len(index), 9))
    order = find_by_sklearn(base.astype(float), 9, distance)
    rank = np.zeros((10, 10), int)  # of each distinct stimulus, from each
    rank[np.arange(10)[:, None], order] = np.arange(1, 10)
    n = len(index)
    near = [sorted((rank[index[i], index[j]], j) for j in range(n) if j != i)[:k] for i in range(n)]
    near_x = np.array([[j for _, j in row] for row in near])
    want, _ = compute_overlaps(near_x, find_by_sklearn(y, k, distance))
    got = rk.mutual_knn(base[index], y, k, distance=distance, backend=backend)
    assert_close(got, want, SAME)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounded_categories_tie(backend, dtype):
    """Orthonormal rows are equally far apart, up to rounding that differs between machines."""
    rng = np.random.default_rng(0)
    x = (np.linalg.qr(rng.standard_normal((40, 40)))[0] * 3.7).astype(dtype)
    y = rng.standard_normal((40, 7))
    first = np.array([[j for j in range(6) if j != i][:5] for i in range(40)])
    for distance in ("euclidean", "cosine"):
        want, _ = compute_overlaps(first, find_by_sklearn(y, 5, distance))
        assert_close(rk.mutual_knn(x, y, 5, distance=distance, backend=backend), want, SAME)


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "correlation"])
@given(
    st.integers(12, 60), st.integers(3, 200), seeds, st.sampled_from([0, 3, 100]),
    st.sampled_from(["float16", "float32", "float64"]),
)  # fmt: skip
def test_order_of_neurons_and_tiles_does_not_matter(distance, n, p, seed, mean, dtype):
    """A permutation changes the order of summation, as another BLAS would."""
    rng = np.random.default_rng(seed)
    # Rows of few neurons are nearly parallel or opposite once their means are subtracted.
    p += 10 * (distance == "correlation")
    x = (np.round(rng.standard_normal((n, p)) * 8) / 7 + mean).astype(dtype)
    x = torch.from_numpy(x[rng.integers(0, n, n)])
    assume(Rows(x, distance).have_distances())
    wants = find_nearest(Rows(x, distance), 3).sort(1).values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "_TILE", int(rng.integers(3, n)))
        patch.setattr(nearest, "_MARGIN", int(rng.integers(0, 5)))
        got = find_nearest(Rows(x[:, rng.permutation(p)], distance), 3).sort(1).values
    assert torch.equal(got, wants)


@given(
    st.integers(4, 60), st.integers(1, 300), seeds, st.integers(1, 3),
    st.sampled_from(["gaussian", "outlier", "tiny", "equal"]),
)  # fmt: skip
def test_bounds_of_candidates_hold(n, p, seed, count, kind):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    if kind == "outlier":
        x[n // 2] *= 1e6
    elif kind == "tiny":
        x[: n // 2] *= 1e-25
    elif kind == "equal":
        x[: n // 2] = x[0]
    rows = Rows(torch.from_numpy(x), "euclidean")
    candidates, lower, upper = find_candidates(*rows.to_float32(), count)
    d2 = ((x[:, None].astype(np.longdouble) - x) ** 2).sum(2) / rows.scale
    near = np.take_along_axis(d2, candidates.numpy(), 1)
    assert (lower.numpy() <= near * (1 + 1e-12)).all()
    assert (upper.numpy() >= near * (1 - 1e-12)).all()
    assert (lower.diff(dim=1) >= 0).all()
    others = np.ones((n, n), dtype=bool)
    np.put_along_axis(others, candidates.numpy(), False, 1)
    others[np.arange(n), np.arange(n)] = False
    assert (np.where(others, d2, np.inf).min(1) >= lower[:, -1].numpy()).all()
    assert others.sum() == n * (n - 1 - count)


@pytest.mark.parametrize(("dtype", "shares"), [("float32", (0.1, 0)), ("bfloat16", (1, 0.1))])
def test_distances_are_computed_for_few_stimuli(monkeypatch, dtype, shares):
    """Bounds from float32 products decide for most; where they don't, the candidates do."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr(nearest, "_TILE", 64)
    monkeypatch.setattr(nearest, "_MARGIN", 12)
    counts = {"refine": 0, "find_among_all": 0}

    def count(name):
        function = getattr(nearest, name)

        def counted(rows, stimuli, *arguments):
            counts[name] += len(stimuli)
            return function(rows, stimuli, *arguments)

        monkeypatch.setattr(nearest, name, counted)

    for name in counts:
        count(name)
    x = torch.from_numpy(rng.standard_normal((400, 8))).to(getattr(torch, dtype))
    got = find_nearest(Rows(x, "cosine"), 5).sort(1).values.numpy()
    want = np.sort(find_by_sklearn(x.double().numpy(), 5, "cosine"), 1)
    assert np.array_equal(got, want)
    assert all(n <= share * 400 for n, share in zip(counts.values(), shares, strict=True))


def test_the_registry_has_the_metrics_of_neighbours():
    assert {metric.name for metric in METRICS if metric.neighbours} == set(NAMES)


@pytest.mark.parametrize("metric", NAMES)
@given(st.integers(8, 30), st.integers(1, 4), seeds)
def test_values_of_permutations_are_those_of_permuted_stimuli(metric, n, k, seed):
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((n, 3))
    xs, ys = (
        [
            torch.from_numpy(np.hstack([shared, rng.standard_normal((n, p))])).to(dtype)
            for p, dtype in sizes
        ]
        for sizes in (
            [(2, torch.float64), (5, torch.float32), (1, torch.float64)],
            [(3, torch.float64), (4, torch.float16)],
        )
    )
    ys[1][n // 2] = 0  # no direction, so no neighbours
    indices = torch.from_numpy(np.stack([rng.permutation(n) for _ in range(3)]))
    sides = ([neighbours.find_neighbours(z, k, with_entries=True) for z in zs] for zs in (xs, ys))
    got = neighbours.compare_permuted(*sides, indices, metric)
    assert got.shape == (3, 3, 2)
    assert got[..., 1].isnan().all()
    for a, permutation in enumerate(indices):
        want = rk.pairwise(xs, [ys[0][permutation]], metric=metric, k=k)
        assert_close(got[a, :, :1], want, Tol(1e-12, 1e-12))


@EACH_BACKEND
def test_pairwise_finds_neighbours_once_for_all_pairs_and_metrics(backend, monkeypatch):
    numbers = []

    def count(rows, k, find, ties):
        numbers.append(k)
        return find_nearest(rows, k, find, ties)

    monkeypatch.setattr(neighbours, "find_nearest", count)
    rng = np.random.default_rng(2)
    xs = [rng.standard_normal((15, p)) for p in (3, 8, 20)]
    values = rk.pairwise(xs, metric=[*NAMES, "cka_debiased", "rsa"], k=4, backend=backend)
    # RSA takes the option "distance" too, and has another default.
    assert numbers == ([4] * 3 if backend == "torch" else [])
    for name in NAMES:
        want = [[getattr(rk, name)(x, y, 4, backend=backend) for y in xs] for x in xs]
        assert_close(values[name], want, SAME)
        assert (values[name].diagonal() == 1).all()
        assert np.array_equal(values[name], values[name].T)
    others = rk.pairwise(xs, xs[::-1], metric="mutual_knn", k=4, distance="euclidean")
    assert_close(others[0, 1], rk.mutual_knn(xs[0], xs[1], 4, distance="euclidean"), SAME)


def test_compare_maps_layers_and_leaves_out_undefined_ones():
    rng = np.random.default_rng(3)
    layers = {f"{p}": rng.standard_normal((20, p)).astype(np.float32) for p in (4, 9)}
    layers["zero"] = np.zeros((20, 5), np.float32)
    with pytest.warns(UserWarning, match="no value for layers 'zero'"):
        maps = rk.compare(layers, layers, metric=list(NAMES), k=3)
    for name in NAMES:
        values = maps[name].values
        assert np.isnan(values[2]).all()
        assert np.isnan(values[:, 2]).all()
        want = rk.pairwise([layers["4"]], [layers["9"]], metric=name, k=3)
        assert_close(values[0, 1], want[0, 0], SAME)


@EACH_BACKEND
@pytest.mark.parametrize("metric", NAMES)
def test_batches_and_kinds_of_arrays(metric, backend):
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((3, 14, 5)), rng.standard_normal((14, 7))
    function = getattr(rk, metric)
    got = function(torch.from_numpy(x), torch.from_numpy(y), 3, batched=True, backend=backend)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.float64
    assert_close(got, [function(z, y, 3) for z in x], SAME)
    assert isinstance(function(x[0], y, 3, backend=backend), np.float64)


@EACH_BACKEND
@pytest.mark.parametrize("metric", NAMES)
def test_all_stimuli_are_neighbours_if_there_are_k_others(metric, backend):
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((6, 4)), rng.standard_normal((6, 3))
    value = getattr(rk, metric)(x, y, 5, backend=backend)
    if metric == "cknna":
        assert -1 <= value < 1
    else:
        assert value == 1
    assert getattr(rk, metric)(x, 3 * x, 5, backend=backend) == pytest.approx(1, abs=1e-14)


@EACH_BACKEND
@pytest.mark.parametrize("metric", NAMES)
def test_wrong_input_is_refused(metric, backend):
    rng = np.random.default_rng(6)
    function, x, y = getattr(rk, metric), rng.standard_normal((8, 4)), rng.standard_normal((8, 3))
    reason = f"for the k={{}} nearest neighbours of '{metric}'$"
    match = r"^x: 8 stimuli in .*; expected at least 11 " + reason.format(10)
    with pytest.raises(rk.ShapeError, match=match):
        function(x, y, backend=backend)
    match = r"^xs\[0\]: 8 stimuli in .*; expected at least 9 " + reason.format(8)
    with pytest.raises(rk.ShapeError, match=match):
        rk.pairwise([x], [y], metric=metric, k=8, backend=backend)
    for k in (0, 2.5, True, "3", None):
        with pytest.raises(rk.OptionError, match=r"k: .*; expected a whole number of at least 1"):
            function(x, y, k, backend=backend)
        with pytest.raises(rk.OptionError, match=r"k: .*; expected a whole number of at least 1"):
            rk.pairwise([x], [y], metric=metric, k=k, backend=backend)
    zero = np.where(np.arange(8)[:, None] == 5, 0, x)
    line = np.arange(1.0, 9)[:, None] * [1.1, 0.3]
    for wrong in (zero, line, line.astype(np.float32)):
        for a, b in ((wrong, y), (y, wrong)):
            with pytest.raises(rk.ConstantError, match=r"equal \(in direction, .*or one is zero"):
                function(a, b, 2, backend=backend)
    with pytest.raises(rk.ConstantError, match="y: the representation is the same"):
        function(x, 0 * y + 1, 2, backend=backend)
    if metric != "cknna":
        with pytest.raises(rk.OptionError, match="distance: 'manhattan'; expected one of"):
            function(x, y, 2, distance="manhattan", backend=backend)
        assert 0 <= function(zero, y, 2, distance="euclidean", backend=backend) <= 1
        flat = np.where(np.arange(8)[:, None] == 5, 0.7, x)
        with pytest.raises(rk.ConstantError, match=r"or constant \(for 'correlation'\)"):
            function(flat, y, 2, distance="correlation", backend=backend)


def test_similarities_leave_out_neighbours_that_are_not_there():
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((10, 4)), rng.standard_normal((10, 3))
    assert not set(NAMES) & set(rk.similarities(x, y))
    assert set(NAMES) <= set(rk.similarities(x, y, k=9))
    x[3] = 0
    assert not set(NAMES) & set(rk.similarities(x, y, k=3))
