"""RSA, RBF CKA and mutual kNN of ablations: against the metrics of ablated copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import NUMPY_DTYPES, labels, memberships, representations
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

import repsim_kernels as rk
from bench.common.tolerances import Tol, assert_close
from repsim_kernels.kernels.torch import gram
from repsim_kernels.ops.ablation import ALL_METRICS, METRICS
from repsim_kernels.reference.gram import membership

RAW = ("rsa_cosine", "rsa_correlation", "mutual_knn")
CENTRED = ("rsa_euclidean", "cka_rbf")
NEW = (*CENTRED, *RAW)
pytestmark = pytest.mark.filterwarnings("ignore::repsim_kernels.DegenerateWarning")
COMPARE = ("spearman", "pearson", "cosine")
# The oracle computes 1 minus a similarity.
TOLERANCE = Tol(1e-9, 1e-12)


def compute_distances(x, cells, metrics=NEW, k=3, **options):
    return rk.ablation_distances(x, cells, metrics=metrics, k=k, **options)


def compare_copies(x, cells, compare="spearman"):
    """Return the distances of explicit ablated copies, by the functions of a pair."""
    similarities = {
        "rsa_euclidean": lambda y: rk.rsa(x, y, compare=compare),
        "rsa_cosine": lambda y: rk.rsa(x, y, distance="cosine", compare=compare),
        "rsa_correlation": lambda y: rk.rsa(x, y, distance="correlation", compare=compare),
        "cka_rbf": lambda y: rk.cka(x, y, kernel="rbf"),
        "mutual_knn": lambda y: rk.mutual_knn(x, y, 3),
    }

    def compare_copy(name, cell):
        y = np.where(cell, 0, x).astype(x.dtype)
        try:
            return 0.0 if (x == y).all() else 1 - similarities[name](y)
        except rk.ConstantError:
            return np.nan

    members = membership(cells, int(cells.max(initial=-1)) + 1)
    flat = members.reshape(-1, x.shape[1])
    return {
        name: np.reshape([compare_copy(name, cell) for cell in flat], members.shape[:-1])
        for name in NEW
    }


def assert_match_copies(x, cells, backend=None, **options):
    """Compare with ablated copies: those of the reference, or those of `compare_copies`.

    The reference decides differently about distances that nearly tie.
    """
    got, info = compute_distances(x, cells, info=True, **options)
    if backend is None:
        want = compare_copies(x, cells, **options)
    else:
        want = compute_distances(x, cells, backend=backend, **options)
    for name in NEW:
        assert_close(got[name], want[name], TOLERANCE, nan=True)
    return {name: each.route for name, each in info.items()}


@st.composite
def any_cells(draw, p):
    kind = draw(st.sampled_from(["labels", "partitions", "membership", "sparse"]))
    if kind == "labels":
        return draw(labels(p))[0]
    if kind == "partitions":
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        return rng.integers(-1, 3, (draw(st.integers(1, 3)), p))
    members = draw(memberships(p))
    return sparse.csr_array(members) if kind == "sparse" else members


@given(st.data(), st.sampled_from(COMPARE))
def test_distances_match_the_reference(data, compare):
    kinds = ("gaussian", "relu", "low rank", "constant columns", "duplicate rows")
    n, p = st.integers(4, 14), st.integers(2, 40)
    x = data.draw(representations(n, p, kinds, layouts=("C", "F")))
    assert_match_copies(x.numpy(), data.draw(any_cells(x.p)), "reference", compare=compare)


@given(st.data(), st.sampled_from(COMPARE))
def test_distances_match_ablated_copies(data, compare):
    x = data.draw(representations(st.integers(4, 30), st.integers(2, 40), dtypes=NUMPY_DTYPES))
    cells = data.draw(st.one_of(memberships(x.p), labels(x.p).map(lambda drawn: drawn[0])))
    assert_match_copies(x.numpy(), cells, compare=compare)


@given(st.integers(0, 99), st.sampled_from(["float64", "float32"]), st.sampled_from(COMPARE))
def test_stimuli_that_differ_in_one_cell_are_equal_without_it(seed, dtype, compare):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, 60)).astype(dtype)
    cells = np.arange(60) // 12
    x[1:4, 12:] = x[0, 12:]  # equal without cell 0
    x[5, :48] = x[6, :48]  # equal without cell 4
    x[8] = x[9]
    x[11] = x[12] * (1 + np.finfo(dtype).eps)  # nearly equal
    routes = assert_match_copies(x, cells, compare=compare)
    assert all((route == "sums").all() for route in routes.values())


def test_a_cell_with_the_differences_of_most_stimuli_takes_a_copy():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 60))
    x[:30, 20:] = x[0, 20:]
    routes = assert_match_copies(x, np.arange(60) // 20)
    for name in NEW:
        assert routes[name].tolist() == ["definition", "sums", "sums"]


@pytest.mark.parametrize("share", [1e-6, 0.3, 0.99, 1 - 1e-6, 1 - 1e-12])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cells_of_any_energy_match_ablated_copies(share, dtype):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((24, 90))
    cells = np.arange(90) % 3
    x[:, cells == 1] *= np.sqrt(share / (1 - share) * 2)
    for compare in COMPARE:
        assert_match_copies((x + 0.3).astype(dtype), cells, compare=compare)


@pytest.mark.parametrize("offset", [1.0, 100.0, 1e4])
def test_features_far_from_zero_match_ablated_copies(offset):
    x = np.random.default_rng(2).standard_normal((20, 50)) + offset
    for compare in COMPARE:
        assert_match_copies(x, np.arange(50) // 10, compare=compare)


def test_options_are_those_of_the_pair_functions():
    rng = np.random.default_rng(3)
    x = np.maximum(rng.standard_normal((20, 60)), 0)
    cells = rng.integers(0, 4, 60)
    for options, sigma, k in (({}, 1.0, 10), ({"sigma": 0.4, "k": 5}, 0.4, 5)):
        got = rk.ablation_distances(x, cells, metrics=NEW, **options)
        for c in range(4):
            y = np.where(cells == c, 0, x)
            want = 1 - rk.cka(x, y, kernel="rbf", sigma=sigma)
            assert got["cka_rbf"][c] == pytest.approx(want, rel=1e-9)
            assert got["mutual_knn"][c] == pytest.approx(1 - rk.mutual_knn(x, y, k), rel=1e-12)
            assert got["rsa_cosine"][c] == pytest.approx(1 - rk.rsa(x, y, distance="cosine"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_constant_neurons_matter_to_metrics_of_raw_activations_alone(backend):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((12, 20))
    x[:, :3], x[:, 3:6] = 5.0, 0
    cells = np.zeros((4, 20), bool)
    cells[1, :3] = True  # constant
    cells[2, 3:6] = True  # zero
    cells[3, 6:] = True  # all that vary
    for compare in COMPARE:
        got = compute_distances(x, cells, backend=backend, compare=compare)
        for name in NEW:
            assert got[name][0] == got[name][2] == 0, name
            assert (got[name][1] > 0.01) == (name in RAW), name
            assert np.isnan(got[name][3]), name


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_stimulus_without_activation_leaves_no_cosine_and_no_correlation(backend):
    rng = np.random.default_rng(5)
    x = np.maximum(rng.standard_normal((12, 30)), 0) + 0.1
    x[4, 10:] = 0  # without cell 0 nothing is left
    got = compute_distances(x, np.arange(30) // 10, backend=backend)
    for name in NEW:
        assert np.isnan(got[name]).tolist() == [name in RAW, False, False], name


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_original_without_a_value_has_no_distances(backend):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((12, 30))
    x[4] = 0
    cells = np.vstack([np.arange(30) < 10, np.zeros((1, 30), bool)])
    got = compute_distances(x, cells, backend=backend)
    for name in RAW:
        np.testing.assert_array_equal(got[name], [np.nan, 0])
    assert not np.isnan(got["rsa_euclidean"]).any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equidistant_stimuli_have_no_rank_correlation(backend):
    x = np.concatenate([np.eye(8), np.random.default_rng(7).standard_normal((8, 3))], 1)
    for compare in COMPARE:
        got = compute_distances(x, np.arange(11) // 8 - 1, compare=compare, backend=backend)
        for distance in ("euclidean", "cosine", "correlation"):
            values = got[f"rsa_{distance}"]
            assert np.isnan(values[0]) == (compare != "cosine"), (distance, compare)


def pearson_distance(u, v):
    u, v = u - u.mean(), v - v.mean()
    u, v = u / np.sqrt((u * u).sum()), v / np.sqrt((v * v).sum())
    return ((u - v) ** 2).sum() / 2


def describe_rows(x, distance):
    """Return distances between rows, or the centred RBF kernel, in extended precision."""
    x = x.astype(np.longdouble)
    if distance in ("cosine", "correlation"):
        x = x - (x.mean(1, keepdims=True) if distance == "correlation" else 0)
        x = x / np.sqrt((x * x).sum(1, keepdims=True))
    d2 = ((x[:, None] - x) ** 2).sum(2)
    if distance == "rbf":
        kernel = np.exp(-d2 / (2 * np.median(d2)))
        kernel = kernel - kernel.mean(0)
        return (kernel - kernel.mean(1, keepdims=True)).ravel()
    d2 = d2[np.triu_indices(len(x), 1)]
    return np.sqrt(d2) if distance == "euclidean" else d2


@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4])
def test_small_distances_keep_their_digits(scale):
    """Down to 1e-17, where 1 minus a similarity has no digits."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((20, 40)) + 0.2
    x[:, 38:] *= scale
    y = np.where(np.arange(40) >= 38, 0, x)
    got = compute_distances(x, np.where(np.arange(40) >= 38, 0, -1), compare="pearson")
    for name, distance in {
        "rsa_euclidean": "euclidean",
        "rsa_cosine": "cosine",
        "rsa_correlation": "correlation",
        "cka_rbf": "rbf",
    }.items():
        want = pearson_distance(*(describe_rows(each, distance) for each in (x, y)))
        assert 0 < want < scale**2
        assert got[name][0] == pytest.approx(float(want), rel=1e-6), name


def test_ranks_that_stay_are_at_no_distance():
    x = np.random.default_rng(9).standard_normal((12, 40))
    x[:, 0] *= 1e-12
    got = compute_distances(x, np.arange(40) - 1 < 0)
    assert all(got[name][0] == 0 for name in ("rsa_euclidean", "rsa_cosine", "mutual_knn"))


@given(st.data(), st.sampled_from(COMPARE))
def test_distances_from_grams_match_those_from_activations(data, compare):
    x = data.draw(representations(st.integers(4, 14), kinds=("gaussian", "relu")))
    cells = data.draw(memberships(x.p))
    x = x.values()
    grams, options = (rk.centered_gram(x), rk.cell_grams(x, cells)), {"compare": compare}
    got = rk.gram_ablation_distances(*grams, metrics=CENTRED, sigma=0.7, **options)
    want = compute_distances(x, cells, CENTRED, sigma=0.7, **options)
    for name in CENTRED:
        assert_close(got[name], want[name], Tol(1e-7, 1e-11), nan=True)


@pytest.mark.parametrize("compare", COMPARE)
def test_distances_from_grams_match_the_reference(compare):
    rng = np.random.default_rng(16)
    x, cells = rng.standard_normal((12, 40)), rng.random((6, 40)) < 0.3
    cells[4], cells[5] = False, True
    grams, options = (rk.centered_gram(x), rk.cell_grams(x, cells)), {"compare": compare}
    got, want = (
        rk.gram_ablation_distances(*grams, metrics=CENTRED, sigma=0.7, backend=backend, **options)
        for backend in ("torch", "reference")
    )
    for name in CENTRED:
        assert_close(got[name], want[name], Tol(1e-7, 1e-11), nan=True)


def test_batches_of_cells_do_not_change_distances(monkeypatch):
    rng = np.random.default_rng(10)
    x = rng.integers(0, 3, (15, 40)).astype(np.float32)
    x[:, 9] = rng.standard_normal(15)
    x[3, 20:] = 0
    cells = rng.random((25, 40)) < rng.choice([0.1, 0.5], (25, 1))
    cells[7] = np.arange(40) < 20  # leaves stimulus 3 without a direction
    for compare in COMPARE:
        want = compute_distances(x, cells, compare=compare)
        assert np.isnan(want["mutual_knn"][7])
        with monkeypatch.context() as patch:
            patch.setattr(gram, "_BATCH", 1)
            got = compute_distances(x, cells, compare=compare)
        for name in NEW:
            assert_close(got[name], want[name], Tol(1e-12, 1e-15), nan=True)


@pytest.mark.parametrize("known", [False, True])
def test_a_partition_does_not_depend_on_the_others(known):
    rng = np.random.default_rng(11)
    x, cells = rng.standard_normal((14, 30)), rng.integers(-1, 4, (3, 30))
    got, alone = (
        compute_distances(x, each, grams=rk.cell_grams(x, each) if known else None)
        for each in (cells, cells[1:2])
    )
    for name in NEW:
        np.testing.assert_array_equal(got[name][1], alone[name][0], err_msg=name)


def test_chunks_of_sparse_cells_match_a_membership():
    rng = np.random.default_rng(12)
    x = rng.standard_normal((14, 200))
    members = rng.random((40, 200)) < 0.05
    got = compute_distances(x, sparse.csr_array(members), memory=7 * 8 * 14**2)
    for name, want in compute_distances(x, members).items():
        assert_close(got[name], want, Tol(1e-12, 1e-15))


def test_all_means_every_metric_and_the_default_the_seven():
    x, cells = np.random.default_rng(13).standard_normal((12, 40)), np.arange(40) // 10
    got = rk.ablation_distances(x, cells, metrics="all", k=4)
    assert tuple(got) == ALL_METRICS
    assert len(ALL_METRICS) == 12
    default = rk.ablation_distances(x, cells)
    assert tuple(default) == METRICS
    assert set(METRICS) == set(ALL_METRICS) - set(NEW)
    for name, values in (default | compute_distances(x, cells, k=4)).items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
    grams = rk.centered_gram(x), rk.cell_grams(x, cells)
    assert len(rk.gram_ablation_distances(*grams, metrics="all")) == 8


def test_arrays_of_any_kind_and_batches_match_single_calls():
    rng = np.random.default_rng(14)
    x, cells = rng.standard_normal((2, 12, 14)), rng.integers(0, 3, 14)
    got = compute_distances(torch.from_numpy(x), cells, batched=True)
    for name in NEW:
        for i in range(2):
            np.testing.assert_array_equal(got[name][i], compute_distances(x[i], cells)[name])


X, CELLS = np.random.default_rng(15).standard_normal((8, 6)), np.arange(6) // 2


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"metrics": "every"}, rk.OptionError, "metrics: 'every'; expected .* or 'all'"),
        ({"metrics": ["rsa"]}, rk.OptionError, "metrics: 'rsa'; expected one of .*'rsa_cosine'"),
        ({"compare": "kendall"}, rk.OptionError, "compare: 'kendall'; expected one of"),
        ({"sigma": 0}, rk.OptionError, "sigma: 0; expected"),
        ({"k": 0}, rk.OptionError, "k: 0; expected a whole number of at least 1"),
        (
            {"metrics": ["mutual_knn"]},
            rk.ShapeError,
            "x: 8 .* least 11 for the k=10 .* 'mutual_knn'$",
        ),
        (
            {"metrics": "all", "k": 8},
            rk.ShapeError,
            "x: 8 .* least 9 for the k=8 nearest .* 'mutual_knn'$",
        ),
    ],
)
def test_wrong_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        rk.ablation_distances(X, CELLS, **options)


def test_rsa_needs_three_stimuli():
    with pytest.raises(rk.ShapeError, match=r"x: 2 stimuli .* at least 3$"):
        rk.ablation_distances(X[:2], CELLS, metrics=["rsa_euclidean"])
    assert rk.ablation_distances(X[:2], CELLS, metrics=["cka_rbf"])["cka_rbf"].shape == (3,)
