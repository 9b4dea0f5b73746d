"""The reference against 60-digit arithmetic, SciPy and scikit-learn."""

from __future__ import annotations

import _oracle
import numpy as np
import pytest
from _draw import (
    NUMPY_DTYPES,
    NUMPY_LAYOUTS,
    TORCH_DTYPES,
    TORCH_LAYOUTS,
    representations,
)
from hypothesis import given
from scipy.spatial.distance import pdist, squareform
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from bench.common.tolerances import (
    DISTANCE,
    SAME,
    SMALL_DISTANCE,
    Tol,
    assert_close,
    assert_gram_close,
    assert_rank_fidelity,
)
from repsim_kernels.reference.ablation import ablation_distances
from repsim_kernels.reference.cca import cca, decompose, pwcca, svcca
from repsim_kernels.reference.cka import cka
from repsim_kernels.reference.gram import cell_grams, centered_gram, centre, contrasts
from repsim_kernels.reference.probe import ablation_decodability, predict_held_out
from repsim_kernels.reference.procrustes import procrustes, procrustes_distance
from repsim_kernels.reference.rsa import rsa

RIDGE = {"ridge": 0.1}
PENALTY = {"penalty": 3.0}
# For float64 arithmetic on matrices with a spread of singular values.
LOOSE = Tol(1e-7, 1e-9)


def make_pair(n, p, q, seed=0):
    """Draw x (n, p), and y (n, q) that depends on it in part."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x, x @ rng.standard_normal((p, q)) / np.sqrt(p) + rng.standard_normal((n, q))


def test_assertions_fail_when_they_should():
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
def test_drawn_arrays_have_the_same_values_in_every_layout(representation):
    assert (representation.values() != representation.values()[0]).any()
    if representation.dtype in NUMPY_DTYPES:
        np.testing.assert_array_equal(representation.numpy(), representation.values())
    if representation.layout in TORCH_LAYOUTS:
        np.testing.assert_array_equal(
            representation.torch().double().numpy(), representation.values()
        )


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
def test_metrics_match_60_digits(function, options, n, p, q):
    x, y = make_pair(n, p, q)
    want = getattr(_oracle, function.__name__)(x + 10, y, **options)
    assert_close(function(x + 10, y, **options), want, SAME)


@pytest.mark.parametrize(("n", "p", "q"), [(6, 20, 15), (7, 3, 4)])
def test_debiased_cka_matches_60_digits(n, p, q):
    x, y = make_pair(n, p, q)
    assert_close(cka(x, y, debiased=True), _oracle.cka_debiased(x, y), SAME)


@pytest.mark.parametrize(("p", "size"), [(30, 4), (5, 2)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_ablation_distances_match_60_digits(p, size, scale):
    x, _ = make_pair(7, p, 1)
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
            assert_close(got[name].values, [value], DISTANCE["float64"])


def test_constant_columns_are_exact_zeros():
    constant = [np.full((n, 3), 0.1) for n in range(2, 40)]
    assert any((x - x.mean(0)).any() for x in constant)
    for x in constant:
        assert not centre(x).any()
        assert not centered_gram(x).any()
        assert not cell_grams(x, np.zeros(3, int)).any()


def test_tiny_singular_values_do_not_count_in_the_rank():
    # Squared singular values 1, 1e-12 and 1e-20 of the largest; the last is below n · eps.
    q = contrasts(9)[:, :3]
    assert decompose(q * [1, 1e-6, 1e-10])[2] == 2
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
    x, y = make_pair(40, 6, 9)
    bases = [np.linalg.qr(z - z.mean(0))[0] for z in (x, y)]
    rho = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    assert_close(cca(x, y, squared=squared), np.mean(rho**2 if squared else rho), SAME)


def test_svcca_is_cca_of_the_leading_components():
    x, y = make_pair(40, 6, 9)
    leading = []
    for z in (x, y):
        _, s, vt = np.linalg.svd(z - z.mean(0), full_matrices=False)
        count = next(k for k in range(1, 10) if sum(s[:k] ** 2) >= 0.8 * sum(s**2))
        leading.append(z @ vt[:count].T)
    assert 1 < leading[0].shape[1] < 6
    assert_close(svcca(x, y, variance=0.8), cca(*leading), SAME)
    assert_close(svcca(x, y, variance=1.0), cca(x, y), SAME)


def test_rbf_gram_matches_kornblith_et_al():
    x, _ = make_pair(9, 5, 1)
    d2 = squareform(pdist(x, "sqeuclidean"))
    k = np.exp(-d2 / (2 * 0.5**2 * np.median(d2)))
    h = np.eye(9) - 1 / 9
    assert_gram_close(centered_gram(x, kernel="rbf", sigma=0.5), h @ k @ h, 1e-12)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "correlation", "cosine"])
def test_rsa_matches_scipy(distance):
    x, y = make_pair(12, 7, 30)
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
    x, y = make_pair(6, 7, 3)
    x[2] = row
    with np.errstate(invalid="ignore"):
        assert np.isnan(rsa(x, y, distance=distance, compare=compare))


@pytest.mark.parametrize("p", [4, 30])
@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_decodability_matches_scikit_learn(p, target, ridge):
    n, k = 24, 3
    rng = np.random.default_rng(3)
    y = rng.permutation(np.arange(n) % k)
    x = np.maximum(rng.standard_normal((n, p)) + rng.standard_normal((k, p))[y] + 0.3, 0)
    cells = np.arange(p) % 4 - 1
    truth = y if target is None else (y != target).astype(int)
    score = accuracy_score if target is None else balanced_accuracy_score

    def predictions(x_fit, x_test):
        alpha = ridge * np.var(x_fit, axis=0).sum()
        scores = []
        for i in range(n):
            rest = np.delete(np.arange(n), i)
            probe = Ridge(alpha=alpha).fit(x_fit[rest], np.eye(k)[truth][rest])
            scores.append(probe.predict(x_test[[i]])[0])
        return np.array(scores)

    got = ablation_decodability(x, cells, y, target=target, ridge=ridge)
    ablated = [np.where(cells == c, 0, x) for c in range(3)]
    want = {
        "refit": [score(truth, predictions(a, a).argmax(1)) for a in ablated],
        "frozen": [score(truth, predictions(x, a).argmax(1)) for a in ablated],
        "intact": score(truth, predictions(x, x).argmax(1)),
    }
    for name, value in want.items():
        assert_close(got[name], value, SAME)
    assert_close(
        predict_held_out(x, ablated[0], np.eye(truth.max() + 1)[truth], ridge),
        predictions(x, ablated[0])[:, : truth.max() + 1],
        LOOSE,
    )
