"""RDMs of searchlights against SciPy, rsatoolbox and `rdm`, sphere by sphere."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from _draw import SEEDS
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

import repsim_kernels as rk
from bench.common.tolerances import Tol, assert_close
from repsim_kernels.kernels.torch import searchlight as kernel
from repsim_kernels.ops.rdm_comparison import METHODS

PLAIN = ("euclidean", "sqeuclidean", "correlation", "cosine")
NOISE = ("none", "covariance", "residuals", "few residuals", "labels", "diagonal")
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])
ROUNDED = Tol(3e-7, 1e-9)  # to float32; distances near 0 are differences of larger numbers
# SciPy's distances of rows that are 1,000 from the origin lose digits.
AS_SCIPY = Tol(1e-6, 1e-6)


@pytest.fixture(params=["together", "small batches"], autouse=True)
def batches(request, monkeypatch):
    """Run each test with all spheres together, and with a few of them at a time."""
    if request.param == "small batches":
        monkeypatch.setattr(kernel, "_CPU_BATCH", 100)


@st.composite
def searchlights(draw, folds=1):
    """Draw x (folds * n, p) and ragged spheres, some of them empty and some of a single voxel."""
    n, p = draw(st.integers(2, 6)), draw(st.integers(1, 20))
    sizes = draw(st.lists(st.integers(0, p), min_size=1, max_size=10))
    rng = np.random.default_rng(draw(SEEDS))
    x = rng.standard_normal((folds * n, p)) + draw(st.sampled_from([0, 1000]))
    if draw(st.booleans()):  # some distances are 0, and some patterns don't vary in a sphere
        x = x.round()
    return x, [rng.permutation(p)[:k] for k in sizes], rng


def list_pairs_with(condition):
    """Return which pairs have a stimulus for which a condition (n,) is true."""
    i, j = np.triu_indices(len(condition), 1)
    return condition[i] | condition[j]


@EACH_BACKEND
@pytest.mark.parametrize("distance", PLAIN)
@given(searchlights())
def test_rdms_are_those_of_scipy(distance, backend, case):
    x, spheres, _ = case
    got = rk.searchlight(x, spheres, distance=distance, backend=backend)
    assert got.dtype == np.float32
    assert got.shape == (len(spheres), len(x) * (len(x) - 1) // 2)
    for row, sphere in zip(got, spheres, strict=True):
        z = x[:, sphere]
        undefined = np.full(len(x), len(sphere) == 0)
        if distance == "correlation" and len(sphere):
            undefined = (z == z[:, :1]).all(1)
        elif distance == "cosine":
            undefined = ~z.any(1)
        pairs = list_pairs_with(undefined)
        assert np.isnan(row[pairs]).all()
        if not pairs.all():
            assert_close(row[~pairs], pdist(z, distance)[~pairs], AS_SCIPY)


def make_noise(kind, rng, p, labels):
    """Return the options `noise` and `shrinkage` for p voxels."""
    residuals = rng.standard_normal((3 if kind == "few residuals" else 2 * p + 9, p)) @ (
        np.eye(p) + rng.standard_normal((p, p)) / 4
    )
    match kind:
        case "none":
            return {}
        case "covariance":
            covariance = residuals.T @ residuals
            return {"noise": covariance + covariance.T}
        case "labels":
            return {"noise": labels}
        case "diagonal":
            return {"noise": residuals, "shrinkage": "diagonal"}
    return {"noise": residuals}


def select_noise(options, sphere):
    """Return the noise of the voxels of a sphere."""
    noise = options.get("noise")
    if noise is None or np.ndim(noise) == 1:
        return options
    if np.array_equal(noise, noise.T):
        return options | {"noise": noise[np.ix_(sphere, sphere)]}
    return options | {"noise": noise[:, sphere]}


@pytest.mark.filterwarnings("ignore:noise. residuals")  # within conditions, but across folds
@EACH_BACKEND
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("distance", ["mahalanobis", "crossnobis"])
@given(searchlights(folds=3))
def test_noise_is_that_of_each_sphere(distance, noise, backend, case):
    x, spheres, rng = case
    labels = np.tile(np.arange(len(x) // 3), 3)
    if noise == "none" and distance == "mahalanobis":
        return
    if noise == "labels":
        x = x + rng.standard_normal(x.shape)  # so that no voxel is without noise
    options = make_noise(noise, rng, x.shape[1], labels) | {"distance": distance, "labels": labels}
    got = rk.searchlight(x, spheres, backend=backend, **options)
    for row, sphere in zip(got, spheres, strict=True):
        if not len(sphere):
            assert np.isnan(row).all()
            continue
        want = rk.rdm(x[:, sphere], backend="reference", **select_noise(options, sphere))
        # Distances are of order 1; a covariance of few residuals may be badly conditioned.
        assert_close(row, want, Tol(1e-5, 1e-5))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("distance", ["crossnobis", "mahalanobis", "correlation", "euclidean"])
@given(searchlights(folds=4))
def test_rdms_are_those_of_rsatoolbox(distance, case):
    rsatoolbox = pytest.importorskip("rsatoolbox")
    x, spheres, rng = case
    n = len(x) // 4
    x = x + rng.standard_normal(x.shape)
    labels, runs = np.tile(np.arange(n), 4), np.repeat(np.arange(4), n)
    noise = make_noise("covariance", rng, x.shape[1], labels)["noise"]
    whitened = distance in ("crossnobis", "mahalanobis")
    options = {"noise": noise} if whitened else {}
    if distance == "crossnobis":
        options["folds"] = runs
    got = rk.searchlight(x, spheres, distance=distance, labels=labels, **options)
    for row, sphere in zip(got, spheres, strict=True):
        if (len(sphere) < 3 and distance == "correlation") or not len(sphere):
            continue
        data = rsatoolbox.data.Dataset(
            x[:, sphere], obs_descriptors={"condition": labels, "run": runs}
        )
        more = {"noise": np.linalg.inv(noise[np.ix_(sphere, sphere)])} if whitened else {}
        if distance == "crossnobis":
            more["cv_descriptor"] = "run"
        rdms = rsatoolbox.rdm.calc_rdm(data, distance, descriptor="condition", **more)
        want = rdms.dissimilarities[0]
        if distance in ("euclidean", "mahalanobis"):  # the squares, divided by the voxels
            want = np.sqrt(np.maximum(want, 0) * len(sphere))
        assert_close(row, want, Tol(1e-4, 1e-4))


@EACH_BACKEND
@pytest.mark.parametrize("method", METHODS)
@given(searchlights(), st.integers(1, 3))
def test_similarities_are_those_of_the_rdms(method, backend, case, n_models):
    x, spheres, rng = case
    x = np.concatenate([x, x[:1] + 1])  # at least three conditions
    n_pairs = len(x) * (len(x) - 1) // 2
    models = rng.integers(0, 3, (n_models, n_pairs))
    models[:, :2] = [1, 2]  # no model is constant
    got = rk.searchlight(x, spheres, compare_to=models, method=method, backend=backend)
    rdms = rk.searchlight(x, spheres, backend=backend)
    assert got.shape == (len(spheres), n_models)
    assert got.dtype == np.float64
    for row, rdm in zip(got, rdms, strict=True):
        try:
            want = rk.compare_rdms(rdm, models, method=method, backend=backend)
        except (rk.ConstantError, rk.NonFiniteError):
            assert np.isnan(row).all()
        else:
            np.testing.assert_allclose(row, want, rtol=1e-13, atol=1e-15)
    one = rk.searchlight(x, spheres, compare_to=models[0], method=method, backend=backend)
    np.testing.assert_allclose(one, got[:, 0], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("distance", [*PLAIN, "mahalanobis", "crossnobis"])
@given(SEEDS)
def test_equal_patterns_have_distance_zero(distance, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 30)) + 100
    x[2] = x[0]
    options = {}
    if distance == "crossnobis":
        x = np.concatenate([x, x + rng.standard_normal(30)])
        options["labels"] = np.tile(np.arange(4), 2)
    if distance in ("mahalanobis", "crossnobis"):
        options["noise"] = rng.standard_normal((20, 30))
    spheres = [rng.permutation(30)[:k] for k in (3, 7, 7, 30)]
    rdms = rk.searchlight(x, spheres, distance=distance, **options)
    assert (rdms[:, 1] == 0).all()  # the pair (0, 2)
    if distance != "crossnobis":
        assert (np.delete(rdms, [1], 1) > 0).all()


@pytest.mark.parametrize("distance", PLAIN)
def test_close_patterns_keep_their_digits(distance):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 40)) + (0 if distance == "cosine" else 1e5)
    x[1] = x[0] + 1e-9 * rng.standard_normal(40)
    row = rk.searchlight(x, [np.arange(40)], distance=distance)[0]
    exact = x.astype(np.longdouble)
    if distance in ("correlation", "cosine"):
        exact -= exact.mean(1, keepdims=True) if distance == "correlation" else 0
        exact /= np.sqrt((exact**2).sum(1, keepdims=True))
    want = ((exact[0] - exact[1]) ** 2).sum()
    want = {"euclidean": np.sqrt(want), "sqeuclidean": want}.get(distance, want / 2)
    assert_close(row[:1], [float(want)], Tol(1e-5, 0) if distance in PLAIN[2:] else Tol(1e-6, 0))


def test_every_form_of_neighbours_gives_the_same_rdms():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 12))
    spheres = [np.sort(rng.permutation(12)[:4]) for _ in range(3)]
    indptr, indices = np.arange(4) * 4, np.concatenate(spheres)
    member = np.zeros((3, 12), bool)
    member[np.repeat(np.arange(3), 4), indices] = True
    stored_zeros = scipy.sparse.csr_array(np.ones_like(member, dtype=float))
    stored_zeros.data[:] = member.reshape(-1)
    want = rk.searchlight(x, spheres)
    for form in (
        tuple(spheres),
        np.stack(spheres),
        [s[::-1].tolist() for s in spheres],
        [np.concatenate([s, s[:2]]) for s in spheres],
        [torch.from_numpy(s) for s in spheres],
        (indptr, indices),
        (indptr.astype(np.int32), indices.astype(np.uint8)),
        (torch.from_numpy(indptr), indices.tolist()),
        scipy.sparse.csr_array(member),
        scipy.sparse.coo_array(member.astype(float)),
        stored_zeros,
    ):
        np.testing.assert_array_equal(rk.searchlight(x, form), want)
    assert isinstance(rk.searchlight(torch.from_numpy(x), spheres), torch.Tensor)


@pytest.mark.parametrize("block", [1, 7])
@given(searchlights())
def test_large_neighbours_are_sorted_in_blocks(monkeypatch_module, block, case):
    x, spheres, rng = case
    monkeypatch_module.setattr("repsim_kernels._check_neighbours._BLOCK", block)
    repeated = [np.concatenate([s, s[: rng.integers(0, 3)]]) for s in spheres]
    for given_ in (spheres, repeated):
        got = rk.searchlight(x, given_)
        np.testing.assert_array_equal(got, rk.searchlight(x, [np.sort(s) for s in spheres]))


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@given(searchlights(), st.integers(1, 3000))
def test_memory_does_not_change_results(case, memory):
    x, spheres, _ = case
    got = rk.searchlight(x, spheres, memory=memory)
    np.testing.assert_array_equal(got, rk.searchlight(x, spheres))


def test_a_singular_covariance_is_undefined_in_its_spheres_alone():
    x = np.random.default_rng(0).standard_normal((4, 6))
    covariance = np.eye(6)
    covariance[0, 1] = covariance[1, 0] = 1
    rdms = rk.searchlight(x, [[0, 1], [1, 2]], distance="mahalanobis", noise=covariance)
    assert np.isnan(rdms[0]).all()
    assert_close(rdms[1], pdist(x[:, 1:3]), ROUNDED)


@pytest.mark.parametrize(
    ("neighbours", "match"),
    [
        ([[0, 4]], "neighbours: index 4 is out of range; expected 0 … 3"),
        ([[0], [-1]], "neighbours: index -1 is out of range"),
        ([], "neighbours: no spheres"),
        (([0, 2, 1], [0, 1]), "neighbours: offsets"),
        (([0, 1], [0, 1]), "for two spheres, pass a list"),
        ([0, 1], r"neighbours: \[0, 1\]; expected a list"),
        ("ab", "neighbours: 'ab'; expected a list"),
        (None, "neighbours: None; expected a list"),
        ([[[0, 1]]], r"neighbours\[0\]: shape \(1, 2\); expected the indices"),
        (scipy.sparse.csr_array(np.ones((2, 5))), r"neighbours: a sparse .*expected \(C, 4\)"),
    ],
)
def test_wrong_neighbours_are_refused(neighbours, match):
    with pytest.raises(rk.CellError, match=match):
        rk.searchlight(np.eye(3, 4), neighbours)


@pytest.mark.parametrize(
    ("neighbours", "match"),
    [
        ([[0.0, 1.0]], r"neighbours\[0\]: dtype float64; expected integers"),
        ([[True, False]], r"neighbours\[0\]: dtype bool; expected the indices"),
        (scipy.sparse.csr_array(2 * np.eye(4)), "neighbours: a sparse csr_array with the value 2"),
    ],
)
def test_neighbours_of_wrong_numbers_are_refused(neighbours, match):
    with pytest.raises(rk.DtypeError, match=match):
        rk.searchlight(np.eye(3, 4), neighbours)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"distance": "cityblock"}, rk.OptionError, "distance: 'cityblock'"),
        ({"method": "tau"}, rk.OptionError, "method: 'tau'"),
        ({"compare_to": [1, 2, 3, 4, 5, 6]}, rk.ShapeError, "compare_to: 6 diss.* expected 3"),
        ({"compare_to": [1, 1, 1]}, rk.ConstantError, "compare_to: all its values are equal"),
        ({"compare_to": torch.arange(3)}, rk.DeviceError, "compare_to: a torch array"),
        ({"memory": 0}, rk.OptionError, "memory: 0"),
        ({"progress": "yes"}, rk.OptionError, "progress: 'yes'; expected True or False"),
        ({"out": 3}, rk.OptionError, "out: 3; expected the path of a .npy file"),
        ({"out": "a.txt"}, rk.OptionError, "out: 'a.txt'; expected the path"),
        ({"out": "none/a.npy"}, rk.OptionError, "out: there is no folder none"),
        ({"noise": np.eye(4)}, rk.OptionError, "noise: given with distance='euclidean'"),
        ({"backend": "triton"}, rk.BackendUnavailable, "can't serve searchlight"),
    ],
)
def test_wrong_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        rk.searchlight(np.eye(3, 4), [[0, 1]], **options)


def test_a_condition_with_one_repeat_has_no_crossnobis_distance():
    with pytest.raises(rk.LabelError, match="labels: condition 2 has a single row"):
        rk.searchlight(np.eye(5, 4), [[0, 1]], distance="crossnobis", labels=[0, 0, 1, 1, 2])


@EACH_BACKEND
@pytest.mark.parametrize("distance", ["sqeuclidean", "crossnobis"])
def test_similarities_do_not_depend_on_the_scale(distance, backend):
    """Although distances may leave the range of float32."""
    rng = np.random.default_rng(0)
    x, models = rng.standard_normal((12, 20)), rng.random((2, 15))
    options = {"labels": np.tile(np.arange(6), 2), "distance": distance, "backend": backend}
    spheres = [[0, 1, 2], [3, 4], np.arange(20)]
    for method in ("spearman", "pearson"):
        want = rk.searchlight(x, spheres, compare_to=models, method=method, **options)
        for scale in (2.0**-80, 2.0**80):
            got = rk.searchlight(x * scale, spheres, compare_to=models, method=method, **options)
            np.testing.assert_array_equal(got, want)
