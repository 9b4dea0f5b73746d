"""Invariances, bounds and limits of the reference's metrics, and properties of its cells."""

from __future__ import annotations

import _oracle
import numpy as np
import pytest
from _draw import (
    KINDS,
    classes,
    labels,
    memberships,
    pairs,
    representations,
)
from hypothesis import given
from hypothesis import strategies as st
from test_reference import LOOSE, RIDGE, make_pair

from bench.common.tolerances import (
    SAME,
    Tol,
    assert_close,
    assert_gram_close,
)
from repsim_kernels.ops.ablation import ALL_METRICS, METRICS
from repsim_kernels.reference.ablation import ablation_distances
from repsim_kernels.reference.cca import cca, pwcca, svcca
from repsim_kernels.reference.cells import class_means, selectivity_grid
from repsim_kernels.reference.cka import cka
from repsim_kernels.reference.gram import cell_grams, centered_gram, membership
from repsim_kernels.reference.neighbours import jaccard_knn, mutual_knn
from repsim_kernels.reference.pairwise import pairwise
from repsim_kernels.reference.probe import ablation_decodability
from repsim_kernels.reference.procrustes import procrustes, procrustes_distance
from repsim_kernels.reference.rsa import rsa

SIMILARITIES = {
    "cka": cka,
    "rbf": lambda x, y: cka(x, y, kernel="rbf", sigma=0.8),
    "cca": cca,
    "ridge cca": lambda x, y: cca(x, y, **RIDGE),
    "svcca": svcca,
    "procrustes": procrustes,
    "rsa": lambda x, y: rsa(x, y, compare="pearson"),
    "debiased": lambda x, y: cka(x, y, debiased=True),
    "mutual_knn": lambda x, y: mutual_knn(x, y, k=3, distance="euclidean"),
    "jaccard_knn": lambda x, y: jaccard_knn(x, y, k=2, distance="euclidean"),
    "pwcca": pwcca,
    "ridge pwcca": lambda x, y: pwcca(x, y, **RIDGE),
}
# Kinds for which every metric is defined: with duplicates an RBF bandwidth may be 0, and with
# mostly zero entries the debiased HSIC may be 0.
REGULAR = ("gaussian", "large mean")
SINGULAR_TOO = {"cka", "cca", "ridge cca", "procrustes"}
AXIS_BOUND = {"pwcca", "ridge pwcca"}


def draw_pairs_for(name):
    """Draw pairs for which the metric is well-conditioned."""
    kinds = KINDS if name in SINGULAR_TOO else REGULAR
    if name == "pwcca":  # with p + q > n several correlations are 1 and share their variates
        return pairs(n=st.integers(8, 12), p=st.integers(1, 4), kinds=kinds)
    return pairs(n=st.integers(4, 12), kinds=kinds)


@pytest.mark.parametrize("name", SIMILARITIES)
@given(data=st.data())
def test_order_scale_shift_and_rotation_do_not_change_similarity(name, data):
    metric = SIMILARITIES[name]
    x, y = data.draw(draw_pairs_for(name))
    x, y = x.values(), y.values()
    want = metric(x, y)
    rng = np.random.default_rng(0)
    stimuli, neurons = rng.permutation(len(x)), rng.permutation(x.shape[1])
    assert_close(metric(x[stimuli], y[stimuli]), want, LOOSE)
    assert_close(metric(x[:, neurons], y), want, LOOSE)
    assert_close(metric(-2.5 * x, 0.01 * y), want, LOOSE)
    assert_close(metric(x + rng.standard_normal(x.shape[1]), y), want, LOOSE)
    if name not in AXIS_BOUND:
        rotation = np.linalg.qr(rng.standard_normal((y.shape[1], y.shape[1])))[0]
        assert_close(metric(x, y @ rotation), want, LOOSE)
        assert_close(metric(y, x), want, LOOSE)
    if name not in ("ridge cca", "ridge pwcca"):
        assert_close(metric(np.hstack([x, x]), y), want, LOOSE)
        assert_close(metric(x, np.hstack([y, np.full((len(y), 2), 0.1)])), want, LOOSE)


@pytest.mark.parametrize("name", SIMILARITIES)
@given(data=st.data())
def test_similarities_are_within_bounds_and_1_with_itself(name, data):
    metric = SIMILARITIES[name]
    x, y = data.draw(draw_pairs_for(name))
    x, y = x.values(), y.values()
    low = -1 if name in ("rsa", "debiased") else 0
    assert low - 1e-14 <= metric(x, y) <= 1 + 1e-14
    if name not in ("ridge cca", "ridge pwcca"):
        assert_close(metric(x, x), 1, SAME)


@given(pairs(n=st.integers(2, 12)))
def test_procrustes_forms_agree(drawn):
    x, y = (z.values() for z in drawn)
    s = procrustes(x, y)
    norms = [np.linalg.norm(z - z.mean(0)) for z in (x, y)]
    assert_close(procrustes_distance(x, y), 2 - 2 * s, Tol(0, 1e-13))
    assert_close(np.cos(procrustes_distance(x, y, form="angular")), s, Tol(0, 1e-13))
    assert_close(
        procrustes_distance(x, y, form="size-and-shape") ** 2,
        norms[0] ** 2 + norms[1] ** 2 - 2 * norms[0] * norms[1] * s,
        Tol(0, 1e-12 * max(norms) ** 2),
    )


def test_a_rotated_copy_is_at_procrustes_distance_zero():
    x, _ = make_pair(12, 7, 1)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((7, 7)))[0]
    for form in ("squared", "angular", "size-and-shape"):
        assert procrustes_distance(x, x @ rotation + 5, form=form) < 1e-13


def test_a_vanishing_ridge_gives_plain_cca():
    x, y = make_pair(40, 6, 9)
    for metric in (cca, pwcca):
        assert_close(metric(x, y, ridge=1e-11), metric(x, y), Tol(1e-8))
        assert metric(x, y, ridge=1.0) < metric(x, y)
    n = len(x)
    assert_close(cca(x, x, ridge=0.5), cca(x, x, penalty=0.5 * n * np.var(x, 0).sum() / n), SAME)


def test_cca_is_invariant_to_invertible_maps():
    x, y = make_pair(40, 6, 9)
    assert_close(cca(x @ np.random.default_rng(1).standard_normal((6, 6)), y), cca(x, y), SAME)


def test_cca_is_1_with_as_many_neurons_as_stimuli():
    x, y = make_pair(8, 7, 30)
    assert_close([cca(x, y), pwcca(x, y)], [1, 1], SAME)


def test_pwcca_is_not_unique_when_correlations_tie():
    # 4 + 5 > 7 - 1: three correlations are 1, and permuted stimuli select other variates.
    x, y = make_pair(7, 4, 5)
    other = np.roll(np.arange(7), 3)
    assert abs(pwcca(x[other], y[other]) - pwcca(x, y)) > 1e-4
    assert_close(pwcca(x[other], y[other], ridge=1e-3), pwcca(x, y, ridge=1e-3), LOOSE)


def test_debiased_cka_of_independent_features_is_about_zero_and_may_be_negative():
    rng = np.random.default_rng(5)
    scores = [cka(*rng.standard_normal((2, 10, 400)), debiased=True) for _ in range(200)]
    assert abs(np.mean(scores)) < 0.05 < cka(*rng.standard_normal((2, 10, 400)))
    assert min(scores) < 0


def test_debiased_cka_of_equidistant_stimuli_is_nan():
    x, _ = make_pair(5, 3, 1)
    assert np.isnan(cka(np.eye(5), x, debiased=True))
    assert np.isnan(cka(x, 0.1 * np.eye(5)[:, :1], debiased=True))


# --- Grams, cells, ablations, probes ---------------------------------------------------------


@given(representations(dtypes=("float64", "float32", "float16"), layouts=("C", "F", "reversed")))
def test_linear_gram_matches_60_digits(drawn):
    x = drawn.numpy()
    assert x.dtype == drawn.dtype
    want = _oracle.gram(x[:6].astype(float))
    want = np.array(want.tolist(), dtype=float) if drawn.n <= 6 else centered_gram(drawn.values())
    assert_gram_close(centered_gram(x), want, 1e-12)


@given(st.data())
def test_cell_grams_sum_to_the_gram(data):
    x = data.draw(representations())
    cells, n_cells = data.draw(labels(x.p))
    x = x.values()
    grams = cell_grams(x, cells, n_cells=n_cells)
    assert grams.shape == (n_cells, len(x), len(x))
    for c, gram in enumerate(grams):
        if (cells == c).any():
            assert_gram_close(gram, centered_gram(x[:, cells == c]), 1e-12)
        else:
            assert not gram.any()
    members = membership(cells, n_cells)
    np.testing.assert_array_equal(cell_grams(x, members), grams)
    rest = x[:, cells < 0]
    whole = grams.sum(0) + (centered_gram(rest) if rest.size else 0)
    assert_gram_close(whole, centered_gram(x), 1e-12)


def test_class_means_of_three_stimuli():
    x = np.array([[1.0, 2], [3, 4], [5, 9]])
    np.testing.assert_array_equal(class_means(x, np.array([1, 0, 1])), [[3, 4], [3, 5.5]])


def test_selectivity_grid_of_five_neurons():
    # With two stimuli, selectivity sorts by the difference and magnitude by the sum.
    x = np.array([[0.0, 5, 4, 9, 8], [2.0, 1, 6, 3, 8]])
    cells = selectivity_grid(x, np.array([1, 0]), 1, grid=(2, 2))
    # differences -2, 4, -2, 6, 0; sums 2, 6, 10, 12, 16; strips {0, 2, 4} and {1, 3}
    np.testing.assert_array_equal(cells, [0, 2, 0, 3, 1])


@pytest.mark.parametrize(
    ("selectivity", "magnitude", "want"),
    [
        # Strips [0, 3] and [3, 5]. Neurons 1 and 2 are inside the first, with magnitudes 4 and 6:
        # its tiles [4, 6] and [6, 6] exclude 0 and 7. Neurons 4 and 5 are inside the second, with 2
        # and 8: tiles [2, 8] and [8, 8]. On the shared edge, 3 is in both strips and 7 in neither.
        (
            [0, 1, 2, 3, 4, 4, 5, 3],
            [10, 4, 6, 5, 2, 8, 3, 20],
            [{1, 2, 3}, {2}, {3, 4, 5, 6}, {5}],
        ),
        # Strip [0, 0] has no neuron inside; strip [0, 2] has neuron 3, so both tiles are [3, 3].
        ([0, 0, 0, 1, 2], [0, 0, 0, 3, 3], [set(), set(), {3, 4}, {3, 4}]),
    ],
)
def test_inclusive_edges_of_a_few_neurons(selectivity, magnitude, want):
    s, m = np.array(selectivity), np.array(magnitude)
    x = np.array([m + s, m - s]) / 2
    cells = selectivity_grid(x, np.array([1, 0]), 1, grid=(2, 2), edges="inclusive")
    assert [set(np.flatnonzero(cell)) for cell in cells] == want


@given(st.data(), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_selectivity_grid_is_an_even_partition(data, grid):
    x = data.draw(representations())
    y = data.draw(classes(x.n))
    cells = selectivity_grid(x.values(), y, 0, grid=grid)
    sizes = np.bincount(cells, minlength=grid[0] * grid[1])
    assert len(sizes) == grid[0] * grid[1]
    assert sizes.max() - sizes.min() <= 1


def test_selectivity_grid_cuts_by_rank():
    x, _ = make_pair(9, 120, 1)
    y = np.arange(9) % 3
    target, rest = x[y == 1].mean(0), x[y != 1].mean(0)
    strips = np.split(np.argsort(target - rest), 3)
    want = np.empty(120, int)
    for i, strip in enumerate(strips):
        for j, part in enumerate(np.split(strip[np.argsort((target + rest)[strip])], 4)):
            want[part] = 4 * i + j
    np.testing.assert_array_equal(selectivity_grid(x, y, 1, grid=(3, 4)), want)


def test_selectivity_grid_breaks_ties_by_index():
    level = np.arange(400) % 3
    x = np.full((6, 400), 0.1) + level
    cells = selectivity_grid(x, np.array([0, 0, 1, 1, 1, 1]), 0, grid=(2, 2))
    for strip in (0, 1):
        neurons = np.arange(200) + 200 * strip
        order = sorted(neurons, key=lambda j: (level[j], j))
        np.testing.assert_array_equal(cells[order], 2 * strip + np.arange(2).repeat(100))


def compute_distances(x, cells, **options):
    return {name: result.values for name, result in ablation_distances(x, cells, **options).items()}


@given(st.data())
def test_ablation_distances_are_those_of_the_remaining_neurons(data):
    x = data.draw(representations(n=st.integers(4, 10), kinds=REGULAR))
    members = data.draw(memberships(x.p))
    x = x.values()
    got = compute_distances(x, members)
    assert set(got) == set(ALL_METRICS)
    for c, cell in enumerate(members):
        rest = x[:, ~cell]
        if cell.all():
            assert all(np.isnan(v[c]) for v in got.values())
        elif not cell.any():
            ridged = [1 - cca(x, x, ridge=0.1), 1 - cca(x, x, ridge=0.1, squared=True)]
            assert_close([got["cca"][c], got["cca_squared"][c]], ridged, SAME)
            assert got["pwcca"][c] == 1 - pwcca(x, x, ridge=0.1)
            exact = [got[m][c] for m in ("cka", "cka_debiased", "procrustes", "svcca")]
            assert exact == [0, 0, 0, 0]
        else:
            # Zeroing and removing differ only in the count that ridge CCA divides by.
            directions = min(len(x) - 1, rest.shape[1]) / min(len(x) - 1, x.shape[1])
            want = [
                1 - cka(x, rest),
                procrustes_distance(x, rest),
                1 - svcca(x, rest),
                1 - pwcca(x, rest, ridge=0.1),
                1 - cca(x, rest, ridge=0.1) * directions,
                1 - cca(x, rest, ridge=0.1, squared=True) * directions,
            ]
            names = ("cka", "procrustes", "svcca", "pwcca", "cca", "cca_squared")
            assert_close([got[m][c] for m in names], want, LOOSE)


def test_penalty_overrides_ridge_and_constant_cells_change_nothing():
    x, _ = make_pair(8, 12, 1)
    x[:, :3] = [0, 0.1, 7]
    cells = np.array([0] * 3 + [1] * 9)
    got = compute_distances(x, cells, n_cells=3, penalty=2.0, ridge=0.5)
    penalised = compute_distances(x, cells, n_cells=3, penalty=2.0)
    plain = compute_distances(x, cells, n_cells=3, ridge=0.0)
    for name in METRICS:
        np.testing.assert_array_equal(got[name], penalised[name])
        assert np.isnan(got[name][1])
        assert got[name][0] == got[name][2]
        assert plain[name][0] == plain[name][2] == 0
    assert got["cca"][0] == 1 - cca(x, x, penalty=2.0) > 0


@given(st.data())
def test_decodability_without_empty_cells_is_intact_and_without_all_nan(data):
    x = data.draw(representations(n=st.integers(4, 10), kinds=REGULAR))
    y = data.draw(classes(x.n))
    x = np.hstack([x.values(), np.full((x.n, 1), 0.1)])
    p = x.shape[1]
    members = np.array([np.zeros(p), np.arange(p) == p - 1, np.arange(p) < p - 1]).astype(bool)
    for target in (None, 0):
        got = ablation_decodability(x, members, y, target=target)
        assert got["refit"][0] == got["refit"][1] == got["frozen"][0] == got["intact"]
        assert np.isnan(got["refit"][2])
        assert 0 <= got["frozen"][2] <= 1


def test_pairwise_compares_rows_with_columns():
    xs = [make_pair(9, p, 1, seed=p)[0] for p in (3, 12, 5)]
    got = pairwise(xs, metrics={"cka": {}})["cka"]
    assert_close(np.diag(got), [1, 1, 1], SAME)
    assert got[0, 1] == cka(xs[0], xs[1])
    got = pairwise(xs[:2], xs, metrics={"pwcca": {"ridge": 0.2}})["pwcca"]
    assert got.shape == (2, 3)
    assert got[1, 2] == pwcca(xs[1], xs[2], ridge=0.2) != pwcca(xs[2], xs[1], ridge=0.2)
