"""Metrics between two representations: each backend against the reference."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.spatial.distance
import torch
from _draw import NUMPY_LAYOUTS, TORCH_DTYPES, TORCH_LAYOUTS, pairs, representations
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import DISTANCE, SAME, Tol, assert_close
from repsim_kernels import _metrics
from repsim_kernels.kernels.torch import panels

METRICS = [
    ("cka", {"precision": "float64"}),  # test_cka_precision.py has the default
    ("cka", {"precision": "float64", "debiased": True}),
    ("cka", {"kernel": "rbf", "sigma": 0.5}),
    ("cka", {"kernel": "rbf", "debiased": True}),
    ("cca", {}),
    ("cca", {"squared": True}),
    ("cca", {"ridge": 0.1}),
    ("cca", {"penalty": 3.0, "squared": True}),
    ("svcca", {}),
    ("svcca", {"variance": 0.6}),
    ("pwcca", {}),
    ("pwcca", {"ridge": 0.1}),
    ("pwcca", {"penalty": 3.0}),
    ("procrustes", {}),
    ("procrustes_distance", {"form": "squared"}),
    ("procrustes_distance", {"form": "angular"}),
    ("procrustes_distance", {"form": "size-and-shape"}),
    ("rsa", {}),
    ("rsa", {"distance": "sqeuclidean", "compare": "pearson"}),
    ("rsa", {"distance": "cosine", "compare": "cosine"}),
    ("rsa", {"distance": "correlation", "compare": "pearson"}),
    ("linear_predictivity", {"folds": 3}),
    ("linear_predictivity", {"ridge": "gcv", "folds": 3}),
    ("mutual_knn", {"k": 2}),
    ("mutual_knn", {"k": 3, "distance": "euclidean"}),
    ("cknna", {"k": 2}),
    ("jaccard_knn", {"k": 3, "distance": "sqeuclidean"}),
]
EACH_METRIC = pytest.mark.parametrize(("name", "options"), METRICS, ids=lambda v: str(v))


def run_metric(name, x, y, backend=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        return getattr(rk, name)(x, y, backend=backend, **options)


def assert_matches_reference(name, options, x, y, xv, yv, tol):
    """Compare with the reference; if it raises ConstantError, the other backend must too."""
    n, p, q = len(xv), xv.shape[1], yv.shape[1]
    if (name, options) == ("pwcca", {}) and p + q >= n:
        # Correlations tie at 1, so the variates and their weights are not unique.
        assert -1e-12 <= run_metric(name, x, y) <= 1 + 1e-12
        return
    try:
        want = run_metric(name, xv, yv, "reference", **options)
    except rk.ConstantError:
        with pytest.raises(rk.ConstantError):
            run_metric(name, x, y, **options)
        return
    assert_close(run_metric(name, x, y, **options), want, tol)


# Where rounding breaks ties or decides the rank, there is no single right answer.
SMOOTH = ("gaussian", "relu", "large mean", "constant columns")


def choose_tolerance(name, options, dtype="float64"):
    if options.get("form") in ("angular", "size-and-shape"):
        return Tol(1e-7, 1e-7)  # their slope is infinite at 0, which costs half of the digits
    if options.get("ridge") == "gcv":
        return Tol(1e-5, 1e-5)  # a flat minimum is located with only half of the digits
    if name == "cknna":
        return Tol(1e-7, 1e-9)  # of unit rows with a large mean, small centred products remain
    # PWCCA multiplies by the neurons in the precision of the input.
    return DISTANCE["float32"] if name == "pwcca" and dtype != "float64" else SAME


def test_every_registered_metric_is_tested():
    assert {name for name, _ in METRICS} == {m.name for m in _metrics.METRICS if m.has_function}


@EACH_METRIC
@given(pairs(n=st.integers(4, 12), kinds=SMOOTH, layouts=NUMPY_LAYOUTS))
def test_numpy_arrays_match_the_reference(name, options, pair):
    x, y = pair
    tol = choose_tolerance(name, options)
    assert_matches_reference(name, options, x.numpy(), y.numpy(), x.values(), y.values(), tol)


@EACH_METRIC
@given(pairs(n=st.integers(4, 12), kinds=SMOOTH[:2], dtypes=TORCH_DTYPES, layouts=TORCH_LAYOUTS))
def test_tensors_match_the_reference(name, options, pair):
    x, y = pair
    if "k" in options:  # the reference takes 16-bit distances that nearly tie for different ones
        assume({x.dtype, y.dtype} <= {"float32", "float64"})
    tol = choose_tolerance(name, options, x.dtype)
    assert_matches_reference(name, options, x.torch(), y.torch(), x.values(), y.values(), tol)


@EACH_METRIC
@pytest.mark.parametrize(("p", "q"), [(3, 5), (3, 60), (60, 3), (40, 60)])
def test_any_number_of_neurons_matches_the_reference(name, options, p, q):
    """Fewer neurons than stimuli in both representations, in one, and in neither."""
    rng = np.random.default_rng(p * q)
    x = rng.standard_normal((20, p))
    y = x[:, :3] @ rng.standard_normal((3, q)) + rng.standard_normal((20, q))
    assert_matches_reference(name, options, x, y, x, y, choose_tolerance(name, options))


@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize("n", [20, 150])
def test_splitting_long_sums_over_cores_matches_the_reference(monkeypatch, n, cores):
    """Few stimuli, and a number of neurons that the number of cores does not divide."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 6200))
    y = x[:, :5000] + rng.standard_normal((n, 5000))
    for options in ({}, {"debiased": True}):
        assert_matches_reference("cka", options, x, y, x, y, choose_tolerance("cka", options))


@pytest.mark.parametrize("options", [{}, {"debiased": True}, {"kernel": "rbf"}])
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_batched_products_of_equal_shapes_match_the_reference(monkeypatch, cores, options):
    """A run ends where the shape changes; dtypes may differ within it. Batches form runs too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    rng = np.random.default_rng(cores)
    shared = rng.standard_normal((150, 3))
    xs = [
        (shared @ rng.standard_normal((3, p)) + rng.standard_normal((150, p))).astype(dtype)
        for p, dtype in ((160, "f8"), (160, "f4"), (160, "f8"), (170, "f8"), (170, "f8"))
    ]
    tol = choose_tolerance("cka", options)
    for ys in (None, xs[3:]):
        want = rk.pairwise(xs, ys, backend="reference", **options)
        assert_close(rk.pairwise(xs, ys, **options), want, tol)
    x, y = np.stack(xs[:2]), np.stack(xs[1:3])
    want = rk.cka(x, y, batched=True, backend="reference", **options)
    assert_close(rk.cka(x, y, batched=True, **options), want, tol)


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_splitting_many_stimuli_over_cores_matches_numpy(monkeypatch, cores):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6200, 3)) + 5
    y = x @ rng.standard_normal((3, 4)) + rng.standard_normal((6200, 4))
    a, b = (z - z.mean(0) for z in (x, y))
    xy, xx, yy = (np.linalg.norm(u.T @ v) for u, v in ((a, b), (a, a), (b, b)))
    assert_close(rk.cka(x, y), xy**2 / (xx * yy), Tol(1e-12))
    assert_close(rk.pairwise([x, y]), [[1, rk.cka(x, y)], [rk.cka(x, y), 1]], Tol(1e-12))


@EACH_METRIC
def test_batches_broadcast_like_separate_calls(name, options):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3, 1, 8, 5)), rng.standard_normal((2, 8, 11))
    got = run_metric(name, x, y, batched=True, **options)
    want = [[run_metric(name, a[0], b, **options) for b in y] for a in x]
    tol = choose_tolerance(name, options)
    assert_close(got, want, tol)
    assert_close(run_metric(name, x, y, "reference", batched=True, **options), want, tol)
    # A 2-D input is compared with each item of the batch.
    mixed = run_metric(name, x[:, 0], y[0], batched=True, **options)
    assert_close(mixed, [row[0] for row in want], tol)


@EACH_METRIC
def test_pairwise_equals_separate_calls(name, options):
    rng = np.random.default_rng(1)
    xs = [rng.standard_normal((9, p)) for p in (4, 30, 2, 12, 4)]
    ys = [rng.standard_normal((9, p)) for p in (3, 12, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        for others in (ys, None):
            got = rk.pairwise(xs, others, metric=name, **options)
            want = [[run_metric(name, x, y, **options) for y in others or xs] for x in xs]
            assert_close(got, want, choose_tolerance(name, options))
            reference = rk.pairwise(xs, others, metric=name, backend="reference", **options)
            assert_close(reference, want, choose_tolerance(name, options))


def test_pairwise_from_features_equals_pairwise_from_grams():
    rng = np.random.default_rng(2)
    xs = [rng.standard_normal((60, p)) for p in (2, 3, 5)]
    wide = [*xs, rng.standard_normal((60, 200))]
    for debiased in (False, True):
        got = rk.pairwise(xs, debiased=debiased)
        np.testing.assert_allclose(got, rk.pairwise(wide, debiased=debiased)[:3, :3], atol=1e-12)
        np.testing.assert_allclose(rk.pairwise(xs, xs[:1], debiased=debiased)[:, 0], got[:, 0])


def test_a_constant_float64_feature_does_not_matter_next_to_float32(monkeypatch):
    """With one core per representation, both are centred in one batch."""
    monkeypatch.setattr(panels, "count_cores", lambda x: 2)
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((2, 30, 60))
    large = y.copy()
    large[:, 0], y[:, 0] = 1e17 / 3, 0
    x = x.astype(np.float32)
    want = rk.cka(x, y)
    assert rk.cka(x, large) == pytest.approx(float(want), rel=1e-12)
    assert rk.pairwise([x, large])[0, 1] == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shift", [0, 10, 1000])
def test_debiased_cka_ignores_shifts_of_features(dtype, shift):
    """Only the rounding of the shifted input loses digits; the arithmetic is float64."""
    rng = np.random.default_rng(4)
    x = torch.from_numpy(rng.standard_normal((20, 30)) + shift).to(getattr(torch, dtype))
    y = torch.from_numpy(rng.standard_normal((20, 25))) + x.double()[:, :25] - shift
    want = rk.cka(x.double().numpy() - shift, y.numpy(), debiased=True, backend="reference")
    assert_close(rk.cka(x, y.to(x.dtype).double().to(x.dtype), debiased=True), want, Tol(0.05))
    assert_close(rk.cka(x.double(), y, debiased=True), want, SAME)


@EACH_METRIC
def test_results_have_the_kind_of_the_input(name, options):
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((8, 5)), rng.standard_normal((8, 6))
    value = run_metric(name, x, y, **options)
    assert isinstance(value, np.float64)
    tensor = run_metric(name, torch.from_numpy(x), torch.from_numpy(y), **options)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float64
    assert tensor.shape == ()
    assert float(tensor) == pytest.approx(float(value), rel=1e-12)
    assert run_metric(name, x.tolist(), y.tolist(), **options) == value


@given(representations(n=st.integers(3, 9), dtypes=("float32",), layouts=TORCH_LAYOUTS))
def test_inputs_are_not_modified(x):
    a, b = x.torch(), torch.from_numpy(x.values())
    before = a.clone()
    for name, options in METRICS:
        if name != "rsa" and not options.get("debiased") and not {"kernel", "k"} & set(options):
            run_metric(name, a, b.float(), **options)
    assert torch.equal(a, before)


def test_integers_and_booleans_equal_floats():
    rng = np.random.default_rng(6)
    x = rng.integers(0, 200, (9, 5))
    for dtype in (np.uint8, np.int32, np.int64):
        assert rk.cka(x.astype(dtype), x[:, :2].astype(dtype)) == rk.cka(x * 1.0, x[:, :2] * 1.0)
    assert rk.cka(torch.from_numpy(x), torch.from_numpy(x > 9)) == rk.cka(x * 1.0, (x > 9) * 1.0)


@pytest.mark.parametrize("name", ["cca", "pwcca"])
def test_cca_warns_that_it_is_1_with_as_many_neurons_as_stimuli(name):
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((6, 6)), rng.standard_normal((6, 3))
    with pytest.warns(rk.DegenerateWarning, match="every .* is 1.*ridge= or use svcca"):
        assert getattr(rk, name)(x, y) == pytest.approx(1)


def test_pwcca_warns_that_its_weights_are_not_unique():
    rng = np.random.default_rng(9)
    with pytest.warns(rk.DegenerateWarning, match="not unique"):
        rk.pwcca(rng.standard_normal((9, 5)), rng.standard_normal((9, 6)))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_constant_input_raises(backend):
    rng = np.random.default_rng(10)
    x, y = rng.standard_normal((5, 4)), rng.standard_normal((5, 8))
    x[2] = 0.1
    with pytest.raises(rk.ConstantError, match=r"constant \(for 'correlation'\)"):
        rk.rsa(x, y, distance="correlation", backend=backend)
    x[2] = 0
    with pytest.raises(rk.ConstantError, match="a stimulus is zero"):
        rk.rsa(y, x, distance="cosine", backend=backend)
    for metric in (rk.cka, rk.rsa):
        options = {"debiased": True} if metric is rk.cka else {}
        with pytest.raises(rk.ConstantError):
            metric(np.eye(5), y, backend=backend, **options)
        with pytest.raises(rk.ConstantError):
            metric(y, np.eye(5), backend=backend, **options)
    line = np.array([[1.3], [0.7], [1000.1], [2.9], [0.1]])  # a single direction
    for compare in ("cosine", "pearson", "spearman"):
        with pytest.raises(rk.ConstantError):
            rk.rsa(line, y, distance="cosine", compare=compare, backend=backend)
    x[:4] = x[0]
    with pytest.raises(rk.ConstantError, match="bandwidth"):
        rk.cka(x, y, kernel="rbf", backend=backend)


def test_large_and_small_float32_input_does_not_overflow():
    rng = np.random.default_rng(8)
    x, y = (rng.standard_normal((9, 4)).astype(np.float32) for _ in range(2))
    for name, options in METRICS:
        if "penalty" not in options and options.get("form") != "size-and-shape":
            big = run_metric(name, x * np.float32(2.0**120), y * np.float32(2.0**-100), **options)
            assert_close(big, run_metric(name, x, y, **options), Tol(1e-6, 1e-7))


@EACH_METRIC
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_extreme_magnitudes_do_not_overflow(name, options, backend, scale):
    """Squared Gram entries fit float64, and no larger intermediate occurs."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((9, 30)), rng.standard_normal((9, 4))
    if "penalty" in options or options.get("form") == "size-and-shape":
        return  # not invariant to scale
    for a, b in ((x, y), (y, y + x[:, :4])):
        want = run_metric(name, a, b, backend, **options)
        got = run_metric(name, scale * a, scale * b, backend, **options)
        assert_close(got, want, choose_tolerance(name, options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rk.DegenerateWarning)
            pair = rk.pairwise([scale * a, scale * b], metric=name, backend=backend, **options)
        assert_close(pair[0, 1], want, choose_tolerance(name, options))


EXACT = (
    *("cka", "svcca", "procrustes", "rsa", "cca", "pwcca"),
    *({"form": form} for form in ("squared", "angular", "size-and-shape")),
)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("metric", EXACT, ids=str)
@settings(max_examples=15)
@given(st.integers(4, 30), st.integers(2, 40), st.integers(0, 2**16))
def test_similarities_are_at_most_1_and_exactly_1_for_a_copy(backend, metric, n, p, seed):
    """SciPy's squareform refuses a diagonal that is not exactly 0."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, p)) * rng.lognormal()).astype(rng.choice(["f4", "f8"]))
    rotated = x @ np.linalg.qr(rng.standard_normal((p, p)))[0].astype(x.dtype) * 3
    layers = [x, rotated, x * 2 + 1, x[:, ::-1].copy(), rng.standard_normal((n, p))]
    name, options = (metric, {}) if isinstance(metric, str) else ("procrustes_distance", metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        values = rk.pairwise(layers, metric=name, backend=backend, **options)
        pairs = [getattr(rk, name)(x, z, backend=backend, **options) for z in layers]
    distances = values if options else 1 - values
    assert (distances >= 0).all()
    assert (distances.diagonal() == 0).all()
    assert all(value >= 0 if options else value <= 1 for value in pairs)
    if name != "pwcca":
        scipy.spatial.distance.squareform(distances, checks=True)


@given(st.integers(4, 12), st.integers(2, 30), st.sampled_from([0.0, 0.1]), st.integers(0, 2**16))
def test_ablation_distances_are_not_negative(n, p, ridge, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) * 10.0 ** rng.uniform(-12, 3, p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        distances = rk.ablation_distances(x, rng.integers(-1, 4, p), ridge=ridge)
    for name, values in distances.items():
        assert not (values < 0).any(), name
