"""Distances between conditions against SciPy, rsatoolbox and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance
import torch
from _draw import NUMPY_LAYOUTS, SEEDS, TORCH_DTYPES, TORCH_LAYOUTS, representations
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import SAME, Tol, assert_close

PLAIN = ("euclidean", "sqeuclidean", "correlation", "cosine")
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])
# SciPy's distances of rows that are 1,000 from the origin lose digits, as do those of rows of two
# neurons that are nearly constant.
AS_SCIPY = Tol(1e-6, 1e-9)


def average(x, labels):
    """Return the mean of the rows of each condition, in sorted order."""
    return np.array([x[[a == c for a in labels]].mean(0) for c in sorted(set(labels))])


def define_crossnobis(x, labels, folds, precision):
    """Return crossnobis distances, one product of differences at a time."""
    values = []
    names, runs = sorted(set(labels)), sorted(set(folds))
    patterns = {
        (c, f): np.mean(
            [r for r, a, b in zip(x, labels, folds, strict=True) if (a, b) == (c, f)], 0
        )
        for c in names
        for f in runs
    }
    for k, a in enumerate(names):
        for b in names[k + 1 :]:
            delta = [patterns[a, f] - patterns[b, f] for f in runs]
            products = [
                u @ precision @ v / x.shape[1]
                for i, u in enumerate(delta)
                for j, v in enumerate(delta)
                if i != j
            ]
            values.append(np.mean(products))
    return np.array(values)


def name_conditions(index, as_text):
    """Return integer labels, or strings in another order than theirs."""
    return [f"{'zyxwvutsrq'[i]}{i}" for i in index] if as_text else [int(i) - 2 for i in index]


@st.composite
def designs(draw):
    """Draw labels and folds: every condition in every fold, with unequal numbers of repeats."""
    n_cond, n_folds = draw(st.integers(2, 5)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(SEEDS))
    cells = np.repeat(np.arange(n_cond * n_folds), rng.integers(1, 4, n_cond * n_folds))
    cells = rng.permutation(cells)
    labels = name_conditions(cells // n_folds, draw(st.booleans()))
    return labels, name_conditions(cells % n_folds, draw(st.booleans())), rng


def draw_covariance(rng, p):
    a = rng.standard_normal((p, p + 3))
    return a @ a.T / p


@EACH_BACKEND
@pytest.mark.parametrize("distance", PLAIN)
@given(representations(p=st.integers(3, 30), dtypes=("float64", "float32"), layouts=NUMPY_LAYOUTS))
def test_distances_match_scipy(backend, distance, x):
    values = x.values()
    centred = values - values[:, :1] if distance == "correlation" else values
    if distance in PLAIN[2:] and not centred.any(1).all():
        with pytest.raises(rk.ConstantError, match="x: stimulus"):
            rk.rdm(x.numpy(), distance=distance, backend=backend)
        return
    got = rk.rdm(x.numpy(), distance=distance, backend=backend)
    assert got.dtype == np.float64
    tolerance = Tol(1e-7, 1e-7) if x.kind == "large mean" else AS_SCIPY
    assert_close(got, scipy.spatial.distance.pdist(values, distance), tolerance)


def test_undefined_distances_are_refused():
    x = np.random.default_rng(0).standard_normal((5, 4))
    x[1], x[3] = 0, 7.3
    for distance, bad in (
        ("cosine", "1 is zero"),
        ("correlation", "1 is the same in every neuron"),
    ):
        with pytest.raises(rk.ConstantError, match=f"x: stimulus {bad}"):
            rk.rdm(x, distance=distance)
        assert np.isfinite(rk.rdm(np.delete(x, [1, 3], 0), distance=distance)).all()
    with pytest.raises(rk.ConstantError, match=r"x: condition 'd' is the same"):
        rk.rdm(np.delete(x, 1, 0), distance="correlation", labels=list("abdc"))
    with pytest.raises(rk.ConstantError, match="x: stimulus 0 or 1 is zero"):
        rk.rdm(x[:2], distance="cosine")


@given(representations(dtypes=TORCH_DTYPES, layouts=TORCH_LAYOUTS), st.sampled_from(PLAIN[:2]))
def test_tensors_of_all_dtypes_are_accepted(x, distance):
    got = rk.rdm(x.torch(), distance=distance)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.float64
    assert_close(got, scipy.spatial.distance.pdist(x.values(), distance), AS_SCIPY)


@EACH_BACKEND
@pytest.mark.parametrize("distance", PLAIN)
@given(designs(), st.integers(3, 30))
def test_rows_of_a_condition_are_averaged(backend, distance, design, p):
    labels, _, rng = design
    x = rng.standard_normal((len(labels), p))
    want = scipy.spatial.distance.pdist(average(x, labels), distance)
    assert_close(rk.rdm(x, distance=distance, labels=labels, backend=backend), want, AS_SCIPY)


@EACH_BACKEND
@given(st.integers(2, 12), st.integers(1, 20), SEEDS, st.booleans())
def test_mahalanobis_matches_scipy(backend, n, p, seed, single):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)).astype(np.float32 if single else np.float64)
    covariance = draw_covariance(rng, p)
    want = scipy.spatial.distance.pdist(
        x.astype(float), "mahalanobis", VI=np.linalg.inv(covariance)
    )
    got = rk.rdm(x, distance="mahalanobis", noise=covariance, backend=backend)
    assert_close(got, want, Tol(1e-8, 1e-10))


@EACH_BACKEND
@given(designs(), st.integers(1, 20), st.sampled_from([None, "covariance", "diagonal"]))
def test_crossnobis_matches_its_definition(backend, design, p, form):
    labels, folds, rng = design
    x = rng.standard_normal((len(labels), p))
    covariance = np.eye(p) if form is None else draw_covariance(rng, p)
    kept = np.diag(covariance.diagonal()) if form == "diagonal" else covariance
    got = rk.rdm(
        x,
        distance="crossnobis",
        labels=labels,
        folds=folds,
        noise=None if form is None else covariance,
        shrinkage="diagonal" if form == "diagonal" else None,
        backend=backend,
    )
    want = define_crossnobis(x, labels, folds, np.linalg.inv(kept))
    assert_close(got, want, Tol(1e-8, 1e-9 * float(np.abs(want).max())))


@given(st.integers(2, 5), st.integers(2, 4), st.booleans(), SEEDS)
def test_without_folds_the_kth_repeat_is_in_fold_k(n_cond, repeats, as_text, seed):
    rng = np.random.default_rng(seed)
    index = rng.permutation(np.repeat(np.arange(n_cond), repeats))
    folds = [int((index[:i] == c).sum()) for i, c in enumerate(index)]
    x, labels = rng.standard_normal((len(index), 7)), name_conditions(index, as_text)
    got = rk.rdm(x, distance="crossnobis", labels=labels)
    assert_close(got, define_crossnobis(x, labels, folds, np.eye(7)), SAME)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # by rsatoolbox itself
@EACH_BACKEND
@given(st.integers(2, 5), st.integers(2, 4), st.integers(1, 3), st.integers(1, 12), SEEDS)
def test_balanced_designs_match_rsatoolbox(backend, n_cond, n_folds, repeats, p, seed):
    """Its noise is a precision, and its distances are squared and divided by p."""
    rsatoolbox = pytest.importorskip("rsatoolbox")
    rng = np.random.default_rng(seed)
    labels, folds = (np.repeat(a, repeats) for a in np.indices((n_cond, n_folds)).reshape(2, -1))
    order = rng.permutation(len(labels))
    labels, folds = labels[order], folds[order]
    x, covariance = rng.standard_normal((len(labels), p)) + 3, draw_covariance(rng, p)
    dataset = rsatoolbox.data.Dataset(x, obs_descriptors={"condition": labels, "run": folds})

    def compute(method, **options):
        rdms = rsatoolbox.rdm.calc_rdm(dataset, method, descriptor="condition", **options)
        return rdms.dissimilarities[0]

    options = {"labels": labels, "backend": backend}
    got = rk.rdm(x, distance="sqeuclidean", **options) / p
    assert_close(got, compute("euclidean"), AS_SCIPY)
    if p > 2:
        got = rk.rdm(x, distance="correlation", **options)
        assert_close(got, compute("correlation"), Tol(1e-6, 1e-7))
    precision = np.linalg.inv(covariance)
    got = rk.rdm(x, distance="mahalanobis", noise=covariance, **options) ** 2 / p
    assert_close(got, compute("mahalanobis", noise=precision), Tol(1e-6, 1e-8))
    for noise, theirs in ((covariance, precision), (None, None)):
        got = rk.rdm(x, distance="crossnobis", folds=folds, noise=noise, **options)
        want = compute("crossnobis", cv_descriptor="run", noise=theirs)
        assert_close(got, want, Tol(1e-7, 1e-8))
    if repeats == 1:
        got = rk.rdm(x, distance="crossnobis", **options)
        assert_close(got, compute("crossnobis"), Tol(1e-7, 1e-8))


@pytest.mark.parametrize("distance", PLAIN)
def test_rsa_compares_these_distances(distance):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 20, 9))
    got = np.corrcoef(rk.rdm(x, distance=distance), rk.rdm(y, distance=distance))[0, 1]
    want = rk.rsa(x, y, distance=distance, compare="pearson")
    assert got == pytest.approx(float(want), rel=1e-12)


@EACH_BACKEND
@pytest.mark.parametrize("distance", [*PLAIN, "mahalanobis", "crossnobis"])
@given(st.integers(2, 6), st.integers(3, 30), SEEDS)
def test_equal_patterns_have_distance_zero(backend, distance, n, p, seed):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((3 * n, p)) + 100 * rng.standard_normal(p)
    x = np.concatenate([base, base])  # conditions 0 to n - 1 in 3 folds, and their copies
    options = {"noise": draw_covariance(rng, p)} if distance == "mahalanobis" else {}
    if distance == "crossnobis":
        labels = np.concatenate([np.tile(np.arange(n), 3), np.tile(np.arange(n), 3) + n])
        options = {"noise": draw_covariance(rng, p), "labels": labels}
        options["folds"] = np.tile(np.repeat(np.arange(3), n), 2)
    d = rk.rdm(x, distance=distance, backend=backend, **options)
    square = scipy.spatial.distance.squareform(d, checks=False)
    half = len(square) // 2
    np.testing.assert_array_equal(square[np.arange(half), np.arange(half) + half], 0)
    assert (d == 0).sum() == half


@EACH_BACKEND
def test_close_patterns_keep_their_digits(backend):
    rng = np.random.default_rng(2)
    n, p = 6, 12
    covariance = draw_covariance(rng, p)
    exact = np.linalg.inv(covariance)
    x = rng.standard_normal((3, n, p)) + 10
    x[:, 1] = x[:, 0] + 1e-7 * rng.standard_normal((3, p))
    delta = x[:, 0] - x[:, 1]  # exact, by Sterbenz's lemma
    got = rk.rdm(x[0], distance="mahalanobis", noise=covariance, backend=backend)[0]
    assert got == pytest.approx(np.sqrt(delta[0] @ exact @ delta[0]), rel=1e-9)
    options = {"labels": np.tile(np.arange(n), 3), "noise": covariance, "backend": backend}
    got = rk.rdm(x.reshape(-1, p), distance="crossnobis", **options)[0]
    products = [delta[f] @ exact @ delta[g] for f in range(3) for g in range(3) if f != g]
    assert got == pytest.approx(np.mean(products) / p, rel=1e-7)


@given(designs(), st.integers(1, 12))
def test_offsets_of_runs_and_the_order_of_rows_do_not_matter(design, p):
    labels, folds, rng = design
    x = rng.standard_normal((len(labels), p))
    options = {"distance": "crossnobis", "noise": draw_covariance(rng, p)}
    want = rk.rdm(x, labels=labels, folds=folds, **options)
    shift = {f: 1e3 * rng.standard_normal(p) for f in set(folds)}
    order = rng.permutation(len(x))
    got = rk.rdm(
        (x + [shift[f] for f in folds])[order],
        labels=[labels[i] for i in order],
        folds=[folds[i] for i in order],
        **options,
    )
    np.testing.assert_allclose(got, want, atol=1e-8 * np.abs(want).max())


@EACH_BACKEND
@given(designs(), st.integers(1, 12))
def test_linear_maps_of_neurons_do_not_matter(backend, design, p):
    """If the covariance of the noise is mapped too."""
    labels, folds, rng = design
    x, covariance = rng.standard_normal((len(labels), p)), draw_covariance(rng, p)
    mixing = np.linalg.qr(rng.standard_normal((p, p)))[0] * 10 ** rng.uniform(-2, 2, p)
    for options in ({"distance": "mahalanobis"}, {"distance": "crossnobis", "folds": folds}):
        options |= {"labels": labels, "backend": backend}
        want = rk.rdm(x, noise=covariance, **options)
        got = rk.rdm(x @ mixing, noise=mixing.T @ covariance @ mixing, **options)
        assert_close(got, want, Tol(1e-6, 1e-6 * float(np.abs(want).max())))


def test_crossnobis_is_unbiased():
    """Unlike squared distances, unless Σ comes from what differs between folds."""
    labels = np.tile(np.arange(3), 8)
    plain, crossed, of_rows = [], [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x = (labels == 2)[:, None] + rng.standard_normal((24, 50))
        residuals = rng.standard_normal((300, 50))
        plain.append(rk.rdm(x, distance="sqeuclidean", labels=labels) / 50)
        crossed.append(rk.rdm(x, distance="crossnobis", labels=labels, noise=residuals))
        with pytest.warns(rk.DegenerateWarning, match="^noise: residuals within conditions"):
            of_rows.append(rk.rdm(x, distance="crossnobis", labels=labels, noise=labels))
    # Standard errors are 0.004 for the first pair and 0.012 for the others.
    np.testing.assert_allclose(np.mean(plain, 0), [0.25, 1.25, 1.25], atol=0.05)
    np.testing.assert_allclose(np.mean(crossed, 0), [0, 1, 1], atol=0.05)
    assert 0.06 < np.mean(of_rows, 0)[0] < 0.1
    assert 0.3 < (np.array(crossed)[:, 0] < 0).mean() < 0.7


def test_crossnobis_is_unbiased_with_residuals_within_folds():
    labels, folds = np.tile(np.arange(3), 8), np.repeat(np.arange(4), 6)
    distances = []
    for seed in range(200):
        x = np.random.default_rng(seed).standard_normal((24, 50))
        options = {"labels": labels, "folds": folds, "noise": 4 * labels + folds}
        distances.append(rk.rdm(x, distance="crossnobis", **options))
    # The standard error of the mean is 0.003.
    np.testing.assert_allclose(np.mean(distances), 0, atol=0.015)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(seed=SEEDS, distance=st.sampled_from(["euclidean", "cosine", "crossnobis"]))
def test_averages_of_equal_counts_are_equal(seed, distance, backend):
    """In whatever order and number, since sums of integers are exact."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3.0, (2, 3, 6)) + 1  # of two folds, three trials, six neurons
    first = np.concatenate([rng.permutation(t) for t in counts])
    second = np.concatenate([rng.permutation(t) for t in counts])
    other = rng.poisson(9.0, (6, 6))
    x = np.concatenate([first, second, other])
    labels, folds = np.repeat([0, 1, 2], 6), np.tile(np.repeat([0, 1], 3), 3)
    options = {"folds": folds} if distance == "crossnobis" else {}
    d = rk.rdm(x, labels=labels, distance=distance, backend=backend, **options)
    assert d[0] == 0
    assert d[1] == d[2]


def test_a_categorical_model_of_unequal_repeats_is_itself():
    rows = np.repeat(np.eye(2), 4, axis=0)  # four conditions in each of two categories
    repeats = np.arange(2, 10)
    d = rk.rdm(np.repeat(rows, repeats, axis=0), labels=np.repeat(np.arange(8), repeats))
    assert len(set(d)) == 2
    np.testing.assert_allclose(rk.compare_rdms(d, d > 0, method="spearman"), 1, rtol=1e-15)


def test_single_neurons_and_constant_representations():
    x = np.array([[1.0], [4.0], [2.0]])
    np.testing.assert_allclose(rk.rdm(x), [3, 1, 2])
    np.testing.assert_allclose(rk.rdm(x, distance="mahalanobis", noise=[[4.0]]), [1.5, 0.5, 1])
    with pytest.raises(rk.ConstantError, match="x: stimulus 0 is the same in every neuron"):
        rk.rdm(x, distance="correlation")
    np.testing.assert_array_equal(rk.rdm(np.ones((4, 5))), np.zeros(6))
