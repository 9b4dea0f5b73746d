"""The reference against 60-digit arithmetic, SciPy, scikit-learn, and what must not change it."""

from __future__ import annotations

import ast
from pathlib import Path

import _oracle
import numpy as np
import pytest
from _draw import (
    KINDS,
    NUMPY_DTYPES,
    NUMPY_LAYOUTS,
    TORCH_DTYPES,
    TORCH_LAYOUTS,
    classes,
    labels,
    memberships,
    pairs,
    representations,
)
from _tol import (
    DISTANCE,
    SAME,
    SMALL_DISTANCE,
    Tol,
    assert_close,
    assert_gram_close,
    assert_rank_fidelity,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from repsim_kernels.reference.ablation import METRICS, ablation_distances
from repsim_kernels.reference.cca import cca, factors, pwcca, svcca
from repsim_kernels.reference.cells import class_means, selectivity_grid
from repsim_kernels.reference.cka import cka
from repsim_kernels.reference.gram import cell_grams, centered, centered_gram, contrasts, membership
from repsim_kernels.reference.pairwise import pairwise
from repsim_kernels.reference.probe import ablation_decodability, held_out
from repsim_kernels.reference.procrustes import procrustes, procrustes_distance
from repsim_kernels.reference.rsa import rsa

RIDGE = {"ridge": 0.1}
PENALTY = {"penalty": 3.0}
# Enough for a matrix with a spread of singular values, in float64.
LOOSE = Tol(1e-7, 1e-9)


def two(n, p, q, seed=0):
    """x (n, p) and a y (n, q) that has something of it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x, x @ rng.standard_normal((p, q)) / np.sqrt(p) + rng.standard_normal((n, q))


def test_reference_imports_numpy_only():
    import repsim_kernels.reference

    for path in Path(repsim_kernels.reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert [a.name for a in node.names] == ["numpy"], path
            elif isinstance(node, ast.ImportFrom):
                root = node.module.partition(".")[0]
                allowed = {"__future__", "collections", "typing", "numpy"}
                assert root in allowed or node.module.startswith("repsim_kernels.reference"), path


def test_gates_fail():
    tol = Tol(1e-3, 1e-6)
    assert_close([1.0, 0.0, np.nan], [1.0009, 1e-7, np.nan], tol, nan=True)
    for got, want in [(1.0, 1.002), (2e-6, 0.0), (np.nan, 1.0), (1.0, np.nan), (np.nan, np.nan)]:
        with pytest.raises(AssertionError):
            assert_close(got, want, tol)
    gram = np.diag([1.0, 4.0])
    assert_gram_close(gram * (1 + 5e-4), gram, 1e-3)
    for wrong in (gram * 1.002, gram * np.nan, np.diag([1.0, np.inf]), gram[None]):
        with pytest.raises(AssertionError):
            assert_gram_close(wrong, gram, 1e-3)
    with pytest.raises(AssertionError):
        assert_gram_close(np.eye(2) * 1e-300, np.zeros((2, 2)), 1e-3)
    assert_rank_fidelity([1, 3, 2.9999], [1, 2, 2.0001], tol)
    for got in ([1, 3, 2], [1, 2, 2], [np.nan, 2, 3]):
        with pytest.raises(AssertionError):
            assert_rank_fidelity(got, [1, 2, 3], tol)


@given(representations(dtypes=TORCH_DTYPES, layouts=NUMPY_LAYOUTS))
def test_drawn_arrays_hold_their_values_in_any_layout(drawn):
    assert (drawn.values() != drawn.values()[0]).any()
    if drawn.dtype in NUMPY_DTYPES:
        np.testing.assert_array_equal(drawn.numpy(), drawn.values())
    if drawn.layout in TORCH_LAYOUTS:
        np.testing.assert_array_equal(drawn.torch().double().numpy(), drawn.values())


# --- against 60-digit arithmetic -------------------------------------------------------------


@pytest.mark.parametrize(("n", "p", "q"), [(6, 20, 15), (7, 3, 4), (6, 4, 12)])
@pytest.mark.parametrize(
    ("function", "options"),
    [
        (cka, {}),
        (procrustes, {}),
        (procrustes_distance, {}),
        (cca, RIDGE),
        (cca, PENALTY),
        (cca, RIDGE | {"squared": True}),
        (cca, {}),
        (cca, {"squared": True}),
        (svcca, {}),
        (svcca, {"variance": 0.8}),
        (pwcca, {}),
        (pwcca, RIDGE),
        (pwcca, PENALTY),
    ],
)
def test_against_60_digits(function, options, n, p, q):
    x, y = two(n, p, q)
    want = getattr(_oracle, function.__name__)(x + 10, y, **options)
    assert_close(function(x + 10, y, **options), want, SAME)


@pytest.mark.parametrize(("n", "p", "q"), [(6, 20, 15), (7, 3, 4)])
def test_debiased_against_60_digits(n, p, q):
    x, y = two(n, p, q)
    assert_close(cka(x, y, debiased=True), _oracle.cka_debiased(x, y), SAME)


@pytest.mark.parametrize(("p", "size"), [(30, 4), (5, 2)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_ablation_against_60_digits(p, size, scale):
    x, _ = two(7, p, 1)
    cell = np.arange(p) < size
    x = np.where(cell, scale * x, x)
    got = ablation_distances(x, cell[None])
    zeroed = np.where(cell, 0, x)
    want = {
        "cka": 1 - _oracle.cka(x, zeroed),
        "procrustes": _oracle.procrustes_distance(x, zeroed),
        "pwcca": 1 - _oracle.pwcca(x, zeroed, **RIDGE),
        "cca": 1 - _oracle.cca(x, zeroed, **RIDGE),
        "cca_squared": 1 - _oracle.cca(x, zeroed, **RIDGE, squared=True),
        "svcca": 1 - _oracle.svcca(x, zeroed),
        "cka_debiased": 1 - _oracle.cka_debiased(x, zeroed),
    }
    for name, value in want.items():
        if name == "procrustes" or value >= SMALL_DISTANCE:
            assert_close(got[name], [value], DISTANCE["float64"])


def test_constant_columns_are_exact_zeros():
    constant = [np.full((n, 3), 0.1) for n in range(2, 40)]
    assert any((x - x.mean(0)).any() for x in constant)
    for x in constant:
        assert not centered(x).any()
        assert not centered_gram(x).any()
        assert not cell_grams(x, np.zeros(3, int)).any()


def test_what_counts_as_a_direction():
    # Squared singular values 1, 1e-12 and 1e-20 of the largest; the last is below n · eps.
    q = contrasts(9)[:, :3]
    assert factors(q * [1, 1e-6, 1e-10])[2] == 2
    y = q[:, 1:] + q[:, :1]
    bases = [np.linalg.qr(z)[0] for z in (q[:, :2], y)]
    rho = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    assert_close(cca(q * [1, 1e-6, 1e-10], y), rho.mean(), SAME)


def test_contrasts_are_orthonormal_and_orthogonal_to_ones():
    for n in (2, 3, 40):
        q = contrasts(n)
        np.testing.assert_allclose(q.T @ q, np.eye(n - 1), atol=1e-14)
        np.testing.assert_allclose(q.sum(0), 0, atol=1e-14)


# --- against NumPy, SciPy and scikit-learn ---------------------------------------------------


@pytest.mark.parametrize("squared", [False, True])
def test_cca_is_the_svd_of_orthonormal_bases(squared):
    x, y = two(40, 6, 9)
    bases = [np.linalg.qr(z - z.mean(0))[0] for z in (x, y)]
    rho = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    assert_close(cca(x, y, squared=squared), np.mean(rho**2 if squared else rho), SAME)


def test_svcca_is_cca_of_the_leading_components():
    x, y = two(40, 6, 9)
    kept = []
    for z in (x, y):
        _, s, vt = np.linalg.svd(z - z.mean(0), full_matrices=False)
        count = next(k for k in range(1, 10) if sum(s[:k] ** 2) >= 0.8 * sum(s**2))
        kept.append(z @ vt[:count].T)
    assert 1 < kept[0].shape[1] < 6
    assert_close(svcca(x, y, variance=0.8), cca(*kept), SAME)
    assert_close(svcca(x, y, variance=1.0), cca(x, y), SAME)


def test_rbf_gram_is_kornbliths():
    x, _ = two(9, 5, 1)
    d2 = squareform(pdist(x, "sqeuclidean"))
    k = np.exp(-d2 / (2 * 0.5**2 * np.median(d2)))
    h = np.eye(9) - 1 / 9
    assert_gram_close(centered_gram(x, kernel="rbf", sigma=0.5), h @ k @ h, 1e-12)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "correlation", "cosine"])
def test_rsa_is_scipys(distance):
    x, y = two(12, 7, 30)
    u, v = pdist(x, distance), pdist(y, distance)
    got = [rsa(x, y, distance=distance, compare=c) for c in ("pearson", "spearman", "cosine")]
    cosine = u @ v / np.sqrt(u @ u * (v @ v))
    assert_close(got, [pearsonr(u, v).statistic, spearmanr(u, v).statistic, cosine], SAME)


def test_spearman_gives_ties_their_mean_rank():
    x = np.array([[0.0], [1], [2], [4], [5]])
    y = np.array([[0.0], [3], [1], [1], [2]])
    assert_close(rsa(x, y), spearmanr(pdist(x), pdist(y)).statistic, SAME)


@pytest.mark.parametrize("compare", ["spearman", "pearson", "cosine"])
@pytest.mark.parametrize(("distance", "row"), [("cosine", 0.0), ("correlation", 0.1)])
def test_rsa_of_a_row_without_direction_is_nan(distance, row, compare):
    x, y = two(6, 7, 3)
    x[2] = row
    with np.errstate(invalid="ignore"):
        assert np.isnan(rsa(x, y, distance=distance, compare=compare))


@pytest.mark.parametrize("p", [4, 30])
@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_decodability_is_sklearns_ridge(p, target, ridge):
    n, k = 24, 3
    rng = np.random.default_rng(3)
    y = rng.permutation(np.arange(n) % k)
    x = np.maximum(rng.standard_normal((n, p)) + rng.standard_normal((k, p))[y] + 0.3, 0)
    cells = np.arange(p) % 4 - 1
    shown = y if target is None else (y != target).astype(int)
    score = accuracy_score if target is None else balanced_accuracy_score

    def predictions(fitted, read):
        alpha = ridge * np.var(fitted, axis=0).sum()
        scores = []
        for i in range(n):
            rest = np.delete(np.arange(n), i)
            probe = Ridge(alpha=alpha).fit(fitted[rest], np.eye(k)[shown][rest])
            scores.append(probe.predict(read[[i]])[0])
        return np.array(scores)

    got = ablation_decodability(x, cells, y, target=target, ridge=ridge)
    ablated = [np.where(cells == c, 0, x) for c in range(3)]
    want = {
        "refit": [score(shown, predictions(a, a).argmax(1)) for a in ablated],
        "frozen": [score(shown, predictions(x, a).argmax(1)) for a in ablated],
        "intact": score(shown, predictions(x, x).argmax(1)),
    }
    for name, value in want.items():
        assert_close(got[name], value, SAME)
    assert_close(
        held_out(x, ablated[0], shown, ridge),
        predictions(x, ablated[0])[:, : shown.max() + 1],
        LOOSE,
    )


# --- what must not change them, bounds, limits -----------------------------------------------

SIMILARITIES = {
    "cka": cka,
    "rbf": lambda x, y: cka(x, y, kernel="rbf", sigma=0.8),
    "cca": cca,
    "ridge cca": lambda x, y: cca(x, y, **RIDGE),
    "svcca": svcca,
    "procrustes": procrustes,
    "rsa": lambda x, y: rsa(x, y, compare="pearson"),
    "debiased": lambda x, y: cka(x, y, debiased=True),
    "pwcca": pwcca,
    "ridge pwcca": lambda x, y: pwcca(x, y, **RIDGE),
}
# Where a metric is defined by its number alone: an RBF bandwidth may be 0 with duplicates, and the
# debiased HSIC 0 where most entries are.
REGULAR = ("gaussian", "large mean")
SINGULAR_TOO = {"cka", "cca", "ridge cca", "procrustes"}
AXIS_BOUND = {"pwcca", "ridge pwcca"}


def drawn_for(name):
    """Pairs for which the metric is well-conditioned."""
    kinds = KINDS if name in SINGULAR_TOO else REGULAR
    if name == "pwcca":  # from p + q > n on several correlations are 1 and share their variates
        return pairs(n=st.integers(8, 12), p=st.integers(1, 4), kinds=kinds)
    return pairs(n=st.integers(4, 12), kinds=kinds)


@pytest.mark.parametrize("name", SIMILARITIES)
@given(data=st.data())
def test_invariances(name, data):
    metric = SIMILARITIES[name]
    x, y = data.draw(drawn_for(name))
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
def test_bounds_and_self_similarity(name, data):
    metric = SIMILARITIES[name]
    x, y = data.draw(drawn_for(name))
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
    x, _ = two(12, 7, 1)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((7, 7)))[0]
    for form in ("squared", "angular", "size-and-shape"):
        assert procrustes_distance(x, x @ rotation + 5, form=form) < 1e-13


def test_a_ridge_that_vanishes_leaves_cca():
    x, y = two(40, 6, 9)
    for metric in (cca, pwcca):
        assert_close(metric(x, y, ridge=1e-11), metric(x, y), Tol(1e-8))
        assert metric(x, y, ridge=1.0) < metric(x, y)
    n = len(x)
    assert_close(cca(x, x, ridge=0.5), cca(x, x, penalty=0.5 * n * np.var(x, 0).sum() / n), SAME)


def test_cca_invariant_to_any_invertible_map():
    x, y = two(40, 6, 9)
    assert_close(cca(x @ np.random.default_rng(1).standard_normal((6, 6)), y), cca(x, y), SAME)


def test_cca_is_one_where_there_are_as_many_neurons_as_stimuli():
    x, y = two(8, 7, 30)
    assert_close([cca(x, y), pwcca(x, y)], [1, 1], SAME)


def test_pwcca_is_not_unique_where_variates_are_shared():
    # 4 + 5 > 7 - 1: three correlations are 1, and a permutation of the stimuli picks others.
    x, y = two(7, 4, 5)
    other = np.roll(np.arange(7), 3)
    assert abs(pwcca(x[other], y[other]) - pwcca(x, y)) > 1e-4
    assert_close(pwcca(x[other], y[other], ridge=1e-3), pwcca(x, y, ridge=1e-3), LOOSE)


def test_debiased_cka_of_independent_features_is_about_zero_and_may_be_negative():
    rng = np.random.default_rng(5)
    scores = [cka(*rng.standard_normal((2, 10, 400)), debiased=True) for _ in range(200)]
    assert abs(np.mean(scores)) < 0.05 < cka(*rng.standard_normal((2, 10, 400)))
    assert min(scores) < 0


def test_debiased_cka_of_equidistant_stimuli_is_nan():
    x, _ = two(5, 3, 1)
    assert np.isnan(cka(np.eye(5), x, debiased=True))
    assert np.isnan(cka(x, 0.1 * np.eye(5)[:, :1], debiased=True))


# --- Grams, cells, ablations, probes ---------------------------------------------------------


@given(representations(dtypes=("float64", "float32", "float16"), layouts=("C", "F", "reversed")))
def test_linear_gram(drawn):
    x = drawn.numpy()
    assert x.dtype == drawn.dtype
    want = _oracle.gram(x[:6].astype(float))
    want = np.array(want.tolist(), dtype=float) if drawn.n <= 6 else centered_gram(drawn.values())
    assert_gram_close(centered_gram(x), want, 1e-12)


@given(st.data())
def test_cell_grams_are_the_parts_of_the_gram(data):
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


def test_class_means():
    x = np.array([[1.0, 2], [3, 4], [5, 9]])
    np.testing.assert_array_equal(class_means(x, np.array([1, 0, 1])), [[3, 4], [3, 5.5]])


def test_selectivity_grid_by_hand():
    # Two stimuli: selectivity orders by the difference, magnitude by the sum.
    x = np.array([[0.0, 5, 4, 9, 8], [2.0, 1, 6, 3, 8]])
    cells = selectivity_grid(x, np.array([1, 0]), 1, grid=(2, 2))
    # differences -2, 4, -2, 6, 0; sums 2, 6, 10, 12, 16; strips {0, 2, 4} and {1, 3}
    np.testing.assert_array_equal(cells, [0, 2, 0, 3, 1])


@given(st.data(), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_selectivity_grid_is_an_even_partition(data, grid):
    x = data.draw(representations())
    y = data.draw(classes(x.n))
    cells = selectivity_grid(x.values(), y, 0, grid=grid)
    sizes = np.bincount(cells, minlength=grid[0] * grid[1])
    assert len(sizes) == grid[0] * grid[1]
    assert sizes.max() - sizes.min() <= 1


def test_selectivity_grid_cuts_by_rank():
    x, _ = two(9, 120, 1)
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
        half = np.arange(200) + 200 * strip
        order = sorted(half, key=lambda j: (level[j], j))
        np.testing.assert_array_equal(cells[order], 2 * strip + np.arange(2).repeat(100))


@given(st.data())
def test_ablation_distances_are_those_of_what_is_left(data):
    x = data.draw(representations(n=st.integers(4, 10), kinds=REGULAR))
    members = data.draw(memberships(x.p))
    x = x.values()
    got = ablation_distances(x, members)
    assert list(got) == list(METRICS)
    for c, cell in enumerate(members):
        left = x[:, ~cell]
        if cell.all():
            assert all(np.isnan(v[c]) for v in got.values())
        elif not cell.any():
            ridged = [1 - cca(x, x, ridge=0.1), 1 - cca(x, x, ridge=0.1, squared=True)]
            assert_close([got["cca"][c], got["cca_squared"][c]], ridged, SAME)
            assert got["pwcca"][c] == 1 - pwcca(x, x, ridge=0.1)
            exact = [got[m][c] for m in ("cka", "cka_debiased", "procrustes", "svcca")]
            assert exact == [0, 0, 0, 0]
        else:
            # Zero or left out is the same, but for the count that ridge CCA divides by.
            directions = min(len(x) - 1, left.shape[1]) / min(len(x) - 1, x.shape[1])
            want = [
                1 - cka(x, left),
                procrustes_distance(x, left),
                1 - svcca(x, left),
                1 - pwcca(x, left, ridge=0.1),
                1 - cca(x, left, ridge=0.1) * directions,
                1 - cca(x, left, ridge=0.1, squared=True) * directions,
            ]
            names = ("cka", "procrustes", "svcca", "pwcca", "cca", "cca_squared")
            assert_close([got[m][c] for m in names], want, LOOSE)


def test_penalty_goes_before_ridge_and_dead_cells_change_nothing():
    x, _ = two(8, 12, 1)
    x[:, :3] = [0, 0.1, 7]
    cells = np.array([0] * 3 + [1] * 9)
    got = ablation_distances(x, cells, n_cells=3, penalty=2.0, ridge=0.5)
    same = ablation_distances(x, cells, n_cells=3, penalty=2.0)
    plain = ablation_distances(x, cells, n_cells=3, ridge=0.0)
    for name in METRICS:
        np.testing.assert_array_equal(got[name], same[name])
        assert np.isnan(got[name][1])
        assert got[name][0] == got[name][2]
        assert plain[name][0] == plain[name][2] == 0
    assert got["cca"][0] == 1 - cca(x, x, penalty=2.0) > 0


@given(st.data())
def test_decodability_of_extreme_cells(data):
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


def test_pairwise():
    xs = [two(9, p, 1, seed=p)[0] for p in (3, 12, 5)]
    got = pairwise(xs)
    assert_close(np.diag(got), [1, 1, 1], SAME)
    assert got[0, 1] == cka(xs[0], xs[1])
    got = pairwise(xs[:2], xs, metric="pwcca", ridge=0.2)
    assert got.shape == (2, 3)
    assert got[1, 2] == pwcca(xs[1], xs[2], ridge=0.2) != pwcca(xs[2], xs[1], ridge=0.2)
