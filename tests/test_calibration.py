"""Calibrated similarities: their nulls by definition, and τ, p and scores by another package."""

from __future__ import annotations

import itertools
import re
import warnings

import numpy as np
import pytest
import torch
from _draw import SEEDS, Representation, make_layers
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import Tol, assert_close
from repsim_kernels import _check_permutations, _dispatch
from repsim_kernels._arrays import Source
from repsim_kernels._metrics import METRICS
from repsim_kernels.kernels.torch import calibration as kernel
from repsim_kernels.ops import calibration

OPTIONS = {
    "cka": [
        {},
        {"debiased": True},
        {"kernel": "rbf", "sigma": 0.7},
        {"kernel": "rbf", "debiased": True},
    ],
    "cka_debiased": [{}],
    "rsa": [
        {"distance": distance, "compare": compare}
        for distance, compare in (
            ("euclidean", "spearman"),
            ("sqeuclidean", "pearson"),
            ("correlation", "cosine"),
            ("cosine", "spearman"),
        )
    ],
    "procrustes": [{}],
    "cca": [
        {"squared": True},
        {"squared": True, "ridge": 0.1},
        {"squared": True, "penalty": 2.0},
    ],
    "mutual_knn": [{"k": 3}, {"k": 2, "distance": "euclidean"}],
    "cknna": [{"k": 3}],
    "jaccard_knn": [{"k": 3}],
}
CASES = [(metric, options) for metric, several in OPTIONS.items() for options in several]
OF_NEIGHBOURS = ("mutual_knn", "cknna", "jaccard_knn")
EACH_CASE = pytest.mark.parametrize(("metric", "options"), CASES, ids=str)
# Float64 throughout; the bases of CCA and Procrustes lose digits with their smallest eigenvalues.
CLOSE, BASES = Tol(0, 1e-10), Tol(0, 1e-6)


def draw_permutations(n, count, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(n) for _ in range(count)])


def test_every_metric_is_offered_or_refused_by_name():
    assert set(OPTIONS) == set(calibration.METRICS) == set(kernel._VALUES)
    x = make_layers(8)[0]
    names = ", ".join(map(repr, calibration.METRICS))
    refused = {
        "procrustes_distance": ", a distance; expected a similarity, such as 'procrustes'",
        "cca": " with squared=False has no cheap null; expected squared=True",
    }
    for metric in (m.name for m in METRICS if m.pairwise):
        problem = refused.get(metric, f" has no cheap null; expected one of {names}")
        if metric == "cca" or metric not in OPTIONS:
            with pytest.raises(rk.OptionError, match=f"^metric: '{metric}'{re.escape(problem)}$"):
                rk.calibrate(x, x, metric=metric)
    for unknown in ("xx", "cca_squared", ["cka"], None):
        with pytest.raises(rk.OptionError, match=f"^metric: .*; expected one of {names}$"):
            rk.calibrate(x, x, metric=unknown)


@EACH_CASE
def test_each_null_value_is_the_metric_of_permuted_stimuli(metric, options):
    """Also with more ys than xs, which exchanges the sides, and with one list alone."""
    xs, ys = make_layers(15), make_layers(15, seed=1, widths=(4, 40))
    indices = draw_permutations(15, 4)
    tolerance = BASES if metric in ("cca", "procrustes") else CLOSE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        for left, right in ((xs, ys), (ys, xs), (xs, None)):
            got = rk.calibrate(left, right, metric=metric, indices=indices, **options)
            others = left if right is None else right
            assert_close(got.score, rk.pairwise(left, right, metric=metric, **options), tolerance)
            want = [
                rk.pairwise(left, [y[index] for y in others], metric=metric, **options)
                for index in indices
            ]
            assert_close(got.null, np.stack(want), tolerance)
            reference = rk.calibrate(
                left, right, metric=metric, indices=indices, backend="reference", **options
            )
            for value, other in zip(got, reference, strict=True):
                assert_close(value, other, tolerance)


@st.composite
def sides(draw):
    """Draw two lists of layers of the same stimuli."""
    n, dtype = draw(st.integers(5, 14)), draw(st.sampled_from(("float64", "float32", "float16")))
    kinds = st.sampled_from(("gaussian", "relu", "large mean", "duplicate rows"))
    widths = st.lists(st.integers(2, 25), min_size=1, max_size=3)
    seed = draw(SEEDS)
    return [
        [
            Representation(n, p, draw(kinds), dtype, seed=seed + 10 * side + i).numpy()
            for i, p in enumerate(draw(widths))
        ]
        for side in range(2)
    ]


@settings(deadline=None)
@given(
    sides(),
    SEEDS,
    st.sampled_from([("cka", {}), ("cka", {"kernel": "rbf"}), ("rsa", {}), ("procrustes", {})]),
)
def test_kernels_agree_with_the_definition(layers, seed, case):
    metric, options = case
    indices = draw_permutations(len(layers[0][0]), 3, seed)
    values = []
    for backend in ("torch", "reference"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", rk.DegenerateWarning)
                result = rk.calibrate(
                    *layers, metric=metric, indices=indices, backend=backend, **options
                )
        except rk.ConstantError:
            values.append(None)
        else:
            values.append(result)
    got, want = values
    assert (got is None) == (want is None)
    if want is not None:
        assert_close(got.score, want.score, Tol(0, 1e-6))
        assert_close(got.null, want.null, Tol(0, 1e-6))


@pytest.mark.parametrize("aggregate", [None, "max", "mean"])
@given(st.integers(1, 60), st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.3, 0.7]), SEEDS)
def test_results_follow_from_the_null(aggregate, count, alpha, seed):
    xs, ys = make_layers(9, seed), make_layers(9, seed + 1, (3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        each = rk.calibrate(xs, ys, permutations=count, alpha=alpha, seed=seed)
        got = rk.calibrate(xs, ys, permutations=count, alpha=alpha, seed=seed, aggregate=aggregate)
    null, score = each.null, each.score
    if aggregate is not None:
        reduce = np.max if aggregate == "max" else np.mean
        null, score = reduce(null, axis=(1, 2)), reduce(score)
    assert_close(got.null, null, Tol(0, 0))
    assert_close(got.score, score, Tol(0, 0))
    assert_close(got.p_value, (1 + (null >= score).sum(0)) / (count + 1), Tol(1e-15))
    pool = np.sort(np.concatenate([null, score[None]]), axis=0)
    percent = round(100 * alpha)  # ⌈(1 - alpha)(K + 1)⌉ in integers
    threshold = pool[-(-(100 - percent) * (count + 1) // 100) - 1]
    assert_close(got.threshold, threshold, Tol(0, 0))
    calibrated = np.maximum(0, (score - threshold) / (1 - threshold))
    assert_close(got.calibrated, calibrated, Tol(1e-12))


@pytest.mark.parametrize(
    ("count", "alpha", "rank"),
    [(199, 0.05, 190), (200, 0.05, 191), (99, 0.01, 99), (6, 0.3, 5), (999, 0.059, 941)],
)
def test_the_rank_of_the_threshold_is_exact(count, alpha, rank):
    assert _check_permutations.find_threshold_rank(count, alpha) == rank


def linear_cka(x, y):
    """Linear CKA as the other package's documentation writes it, in float64."""
    x, y = x.double(), y.double()
    x, y = x - x.mean(0), y - y.mean(0)
    return (x @ x.T * (y @ y.T)).sum() / (x @ x.T).norm() / (y @ y.T).norm()


def debiased_cka(x, y):
    """Debiased CKA as Song et al. 2012 write HSIC₁."""
    n, off = len(x), 1 - torch.eye(len(x), dtype=torch.float64)
    k, m = ((z.double() @ z.double().T) * off for z in (x, y))

    def hsic(k, m):
        return (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()

    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


def euclidean_rsa(x, y):
    return torch.corrcoef(torch.stack([torch.pdist(x.double()), torch.pdist(y.double())]))[0, 1]


def cosine_knn(x, y):
    """The share of the 4 nearest neighbours that is common to both."""
    near = []
    for z in (x, y):
        z = z.double() / z.double().norm(dim=1, keepdim=True)
        order = (z @ z.T).fill_diagonal_(-2).argsort(1, descending=True)[:, :4]
        near.append(torch.zeros(len(z), len(z)).scatter_(1, order, 1))
    return (near[0] * near[1]).sum() / (4 * len(x))


@pytest.mark.parametrize(
    ("options", "similarity"),
    [
        ({}, linear_cka),
        ({"metric": "cka_debiased"}, debiased_cka),
        ({"metric": "rsa", "compare": "pearson"}, euclidean_rsa),
        ({"metric": "mutual_knn", "k": 4}, cosine_knn),
    ],
)
@pytest.mark.parametrize(("count", "alpha"), [(200, 0.05), (199, 0.05), (60, 0.1)])
def test_the_same_permutations_give_the_numbers_of_calibrated_similarity(
    options, similarity, count, alpha
):
    peer = pytest.importorskip("calibrated_similarity", reason="the extra `peers` is not installed")
    xs, ys = (
        [torch.from_numpy(x).float() for x in make_layers(24, seed, widths)]
        for seed, widths in ((0, (6, 50)), (1, (7, 40, 5)))
    )
    ys[0] += 0.7 * xs[0][:, :1]
    indices = torch.from_numpy(draw_permutations(24, count))

    def replay():
        rows = iter(indices)
        return {"K": count, "alpha": alpha, "perm_fn": lambda n, device: next(rows)}

    def assert_same(got, want):
        np.testing.assert_allclose([got.calibrated, got.p_value, got.threshold], want, atol=1e-5)

    for x, y in itertools.product(xs, ys):
        want = peer.calibrate(x, y, similarity, **replay())
        assert_same(rk.calibrate(x, y, indices=indices, alpha=alpha, **options), want)
    for aggregate in ("max", "mean"):
        want = peer.calibrate_layers(xs, ys, similarity, agg=aggregate, **replay())
        got = rk.calibrate(xs, ys, indices=indices, alpha=alpha, aggregate=aggregate, **options)
        assert_same(got, want)


@pytest.mark.parametrize(
    ("metric", "options"), [case for case in CASES if case[0] not in OF_NEIGHBOURS], ids=str
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exchanging_equal_stimuli_counts_as_the_observed_value(metric, options, dtype):
    """Rounding differs between the places of equal rows, and must not decide."""
    rng = np.random.default_rng(0)
    repeats = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 1])
    x, y = (rng.standard_normal((10, p)).astype(dtype)[repeats] for p in (700, 9))
    y = y + x[:, :9]
    equal = np.arange(14)
    equal[[0, 10]], equal[[1, 11, 13]] = [10, 0], [13, 1, 11]
    indices = np.stack([np.arange(14), equal, rng.permutation(14)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        for a, b in ((x, y), (y, x)):
            got = rk.calibrate(a, [b, b], metric=metric, indices=indices, **options)
            np.testing.assert_allclose(got.null[0], got.score, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(got.null[1], got.score)
            assert (got.p_value >= 3 / 4).all()


@pytest.mark.filterwarnings("ignore:1 permutation:")
@pytest.mark.parametrize("metric", ["cka", "rsa"])
def test_equal_values_of_different_sums_count_as_the_observed_value(metric):
    """Reflecting a grid of stimuli keeps all its distances, but not the order of a sum."""
    grid = np.stack(np.meshgrid(range(5), range(5)), -1).reshape(-1, 2) * 0.1
    y = np.random.default_rng(0).standard_normal((25, 30))
    places = np.arange(25).reshape(5, 5)
    for reflected in (places[:, ::-1].ravel(), places[::-1].ravel(), places.T.ravel()):
        got = rk.calibrate(grid, [y, grid], metric=metric, indices=reflected[None])
        assert (got.p_value == 1).all()
        assert got.null[0, 0, 0] == pytest.approx(got.score[0, 0], rel=0, abs=1e-13)


def test_a_score_above_its_threshold_has_a_small_p():
    """Also if the threshold is a value that equals the score up to rounding."""
    rng = np.random.default_rng(39)
    x, y = rng.integers(0, 2, (2, 12, 2))
    got = rk.calibrate(x, y, metric="cka_debiased", permutations=99, seed=39)
    assert got.p_value > 0.05
    assert got.score <= got.threshold
    assert got.calibrated == 0


@pytest.mark.parametrize("n", [20, 100])
def test_a_null_of_one_value_gives_p_1(n):
    """Stimuli that are equally far apart look the same in any order."""
    rng = np.random.default_rng(n)
    x = np.eye(n) + rng.standard_normal(n)
    y = rng.standard_normal((n, 5))
    for options in ({"null": "moments"}, {"permutations": 30}):
        got = rk.calibrate(x, y, **options)
        assert (got.p_value, got.calibrated) == (1, 0)
        assert got.score <= got.threshold


def test_a_list_with_itself_leaves_out_each_layer_with_itself():
    xs = make_layers(12)
    each = rk.calibrate(xs, permutations=30)
    assert_close(np.diag(each.score), np.ones(3), Tol(0, 0))
    other = ~np.eye(3, dtype=bool)
    for aggregate, reduce in (("max", np.max), ("mean", np.mean)):
        got = rk.calibrate(xs, permutations=30, aggregate=aggregate)
        assert_close(got.score, reduce(each.score[other]), Tol(0, 0))
        assert_close(got.null, reduce(each.null[:, other], axis=1), Tol(0, 0))
    with pytest.raises(rk.OptionError, match="aggregate: a single representation and itself"):
        rk.calibrate(xs[:1], aggregate="max")


def test_shapes_follow_the_arguments():
    x, y = make_layers(8)[:2]
    shapes = {
        (): [(x, y), (x, None), (x.tolist(), y)],
        (1, 1): [([x], [y]), ([x], y), ((x,), None), (x[None], y)],
        (2, 3): [([x, y], [x, y, x]), (np.stack([x, x]), [x, y, y])],
    }
    for shape, calls in shapes.items():
        for xs, ys in calls:
            got = rk.calibrate(xs, ys, permutations=25)
            assert got.null.shape == (25, *shape)
            assert all(np.shape(value) == shape for value in got[:4])
    assert isinstance(rk.calibrate(x, y).score, np.float64)
    tensors = rk.calibrate(torch.from_numpy(x), torch.from_numpy(y))
    assert all(isinstance(value, torch.Tensor) for value in tensors)
    assert_close(tensors.null, rk.calibrate(x, y).null, Tol(0, 0))


def test_kernel_matrices_have_the_null_of_their_features():
    xs, ys = make_layers(12), make_layers(12, 1)
    grams = [[x @ x.T for x in side] for side in (xs, ys)]
    for backend in ("torch", "reference"):
        for debiased in (False, True):
            options = {"permutations": 30, "debiased": debiased, "backend": backend}
            got = rk.calibrate(*grams, kernel="precomputed", **options)
            assert_close(got.null, rk.calibrate(xs, ys, **options).null, CLOSE)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(
    n=st.integers(1, 30),
    layers=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    count=st.integers(1, 40),
    entries=st.sampled_from([1, 7, 50, 2**13]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=SEEDS,
)
def test_permuted_products_match_the_definition(backend, n, layers, count, entries, dtype, seed):
    rng = np.random.default_rng(seed)
    h, k = (rng.standard_normal((size, n, n)) for size in layers)
    h, k = (torch.from_numpy(a + a.swapaxes(1, 2)).to(dtype) for a in (h, k))
    doubled = h * (2 - torch.eye(n, dtype=dtype))
    lower = doubled[:, *torch.tril_indices(n, n)]
    indices = torch.from_numpy(draw_permutations(n, count, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_ENTRIES", entries)
        got = _dispatch.call(
            *("permuted_products", backend, Source("torch", "cpu")),
            *(lower, k.flatten(1).mT.contiguous(), indices),
        )
    want = torch.stack(
        [torch.einsum("lij,mij->lm", h.double(), k.double()[:, i][:, :, i]) for i in indices]
    )
    assert got.dtype == torch.float64
    norms = torch.outer(*(a.double().flatten(1).norm(dim=1) for a in (h, k)))
    tolerance = 1e-13 if dtype == torch.float64 or backend == "reference" else 1e-5
    assert ((got - want).abs() <= tolerance * norms).all()


def test_docstring_states_the_metrics():
    listed = re.search(r"One of (.*?)\. See", rk.calibrate.__doc__, re.S)[1]
    assert sorted(re.findall(r'"(\w+)"', listed)) == sorted(calibration.METRICS)
