"""Logistic regressions by the kernel against scikit-learn in float64 on the same inputs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import triton
from _draw import KINDS, SEEDS, representations
from _guard import pad_with_nan, spread_in_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from repsim_kernels.kernels.triton import _launch, logistic

SMALL = logistic.Launch(block_d=16, block_n=16, rows=4, num_warps=4, num_stages=2)
OPTIONS = {"C": 1.0, "tol": 1e-5, "max_iter": 100}
DTYPES = ("float32", "float16", "bfloat16")


def fit_sklearn(x, y, C=1.0):
    """Fit by scikit-learn: coefficients, intercept and decision values."""
    # On principal components of magnitude 1 its Newton steps are exact; then rotate back.
    mean = x.mean(0)
    u, s, v = np.linalg.svd(x - mean, full_matrices=False)
    nonzero = s > 1e-12 * s[0]
    u, s, v = u[:, nonzero], s[nonzero], v[nonzero]
    if not nonzero.any() or s[0] == 0:
        c = np.log(y.sum() / (~y).sum())
        return np.zeros(x.shape[1]), c, np.full(len(y), c)
    model = LogisticRegression(C=C * s[0] ** 2, solver="newton-cholesky", tol=1e-14, max_iter=1000)
    with warnings.catch_warnings():
        # The last steps can't improve the result in float64.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(u * (s / s[0]), y)
    w = model.coef_[0] @ v / s[0]
    z = model.decision_function(u * (s / s[0]))
    return w, model.intercept_[0] - mean @ w, z


def max_error(got, x, targets, columns, C=1.0):
    """Return the largest error of all fits relative to its tolerance, or NaN if any is NaN.

    Coefficients are relative to the largest one, the intercept to the terms that it sums. The
    number of misclassified stimuli must match scikit-learn's, except for stimuli on the boundary.
    """
    errors = [0.0]
    coef, intercept = (got[name].cpu().double().numpy() for name in ("coef", "intercept"))
    for b, t in np.ndindex(coef.shape[:2]):
        neurons = x[:, columns[b]]
        w, c, z = fit_sklearn(neurons, targets[t], C)
        errors.append(np.abs(coef[b, t] - w).max() / (1e-4 * np.abs(w).max() + 1e-12))
        parts = max(1, abs(c), np.abs(neurons.mean(0) * w).sum())
        errors.append(abs(intercept[b, t] - c) / (1e-4 * parts))
        near = np.abs(z) < 1e-3 * np.abs(z).max() + 1e-6
        wrong = (z > 0) != targets[t]
        extra = int(got["errors"][b, t]) - (wrong & ~near).sum()
        errors.append(0.0 if 0 <= extra <= near.sum() else np.inf)
    return float(np.max(errors))


def draw_targets(rng, n, t, share):
    """Draw targets that contain both classes."""
    count = min(max(1, round(share * n)), n - 1)
    return np.stack([rng.permutation(n) < count for _ in range(t)])


def draw_columns(rng, p, b, d):
    return np.stack([rng.permutation(p)[:d] for _ in range(b)])


def gaussian(seed, n, p, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((n, p)).astype(dtype)


def fit(x, targets, columns, device, launch=None, **options):
    """Fit on a neuron-major x, as the package stores it."""
    x = torch.from_numpy(np.ascontiguousarray(x.T)).to(device).mT
    options = OPTIONS | options
    return logistic.logistic_fits(x, targets=targets, columns=columns, launch=launch, **options)


@settings(max_examples=15)
@given(
    st.data(),
    representations(st.integers(2, 30), st.integers(1, 20), KINDS, DTYPES, ("C", "F", "steps")),
    st.sampled_from([0.5, 0.1]),
    st.sampled_from([0.01, 1.0, 100.0]),
    SEEDS,
)
def test_fits(device, data, x, share, C, seed):
    rng = np.random.default_rng(seed)
    launch = data.draw(st.sampled_from([None, SMALL]))
    d = data.draw(st.integers(1, min(x.p, 16 if launch else 20)))
    columns, targets = draw_columns(rng, x.p, 2, d), draw_targets(rng, x.n, 2, share)
    got = logistic.logistic_fits(
        pad_with_nan(x.torch().to(device)),
        targets=targets,
        columns=columns,
        launch=launch,
        **OPTIONS | {"C": C},
    )
    assert got["coef"].shape == (2, 2, d)
    assert bool(got["converged"].all())
    assert max_error(got, x.values(), targets, columns, C) <= 1


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_scales_and_means(device, scale, mean, share):
    rng = np.random.default_rng(1)
    x = ((rng.standard_normal((60, 12)) + mean) * scale).astype(np.float32)
    targets, columns = draw_targets(rng, 60, 2, share), draw_columns(rng, 12, 1, 9)
    got = fit(x, targets, columns, device)
    assert bool(got["converged"].all())
    assert max_error(got, x.astype(np.float64), targets, columns) <= 1


@pytest.mark.parametrize("power", [-60, 66])
@pytest.mark.parametrize("C", [3e-6, 1.0, 3e6])
def test_scales_whose_squares_overflow_float32(device, power, C):
    """Scaling x by s scales the coefficients by 1 / s and is equivalent to scaling C by s²."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((60, 6)).astype(np.float32)
    targets, columns = draw_targets(rng, 60, 1, 0.5), draw_columns(rng, 6, 1, 4)
    factor = 2.0**power
    got = fit(x * np.float32(factor), targets, columns, device, C=C)
    if power < 0:  # x is too small for scikit-learn's penalty: take one step from zero
        # The gradient at w = 0, where the intercept is the class's log-odds.
        c = targets[0].mean()
        want = C * factor * x[:, columns[0]].T.astype(np.float64) @ (targets[0] - c)
    else:
        values = x[:, columns[0]].astype(np.float64)
        want = fit_sklearn(values, targets[0], C * factor**2)[0] / factor
    error = np.abs(got["coef"][0, 0].cpu().double().numpy() - want).max()
    assert error <= 1e-4 * np.abs(want).max()
    assert bool(got["converged"].all())


@pytest.mark.parametrize("scale", [1, 1e4])
@pytest.mark.parametrize(("n", "d"), [(30, 4), (12, 20)])
def test_separable_classes(device, scale, n, d):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((n, d)) * scale
    targets = x[None, :, 0] > np.median(x[:, 0])
    x[:, 0] += np.where(targets[0], 1, -1) * scale
    columns = draw_columns(rng, d, 1, d)
    x = x.astype(np.float32)
    got = fit(x, targets, columns, device)
    assert max_error(got, x.astype(np.float64), targets, columns) <= 1
    assert bool(got["converged"].all())
    assert not got["errors"].any()


@pytest.mark.parametrize("n", [40, 41])
def test_constant_and_equal_columns(device, n):
    rng = np.random.default_rng(4)
    x = gaussian(4, n, 6)
    x[:, 2] = 1e30  # constant, so its scale must not affect the others
    x[:, 4] = x[:, 1]
    targets = draw_targets(rng, n, 1, 0.3)
    columns = np.array([[0, 1, 2, 4, 5], [2, 2, 2, 2, 2]])
    got = fit(x, targets, columns, device)
    coef = got["coef"].cpu()
    x[:, 2] = 0
    first = {name: value[:1] for name, value in got.items()}
    assert max_error(first, x.astype(np.float64), targets, columns[:1]) <= 1
    assert float(coef[0, 0, 2]) == 0
    assert abs(float(coef[0, 0, 1] - coef[0, 0, 3])) <= 1e-6
    assert not coef[1].any()
    share = targets.mean()
    assert float(got["intercept"][1, 0]) == pytest.approx(np.log(share / (1 - share)), rel=1e-6)
    assert int(got["errors"][1, 0]) == targets.sum()
    assert bool(got["converged"].all())


def test_nearly_collinear_neurons(device):
    """A gradient summed in float32 would be lost in rounding."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((400, 3)) @ rng.standard_normal((3, 24)) * 10
    x = (x + 0.01 * rng.standard_normal(x.shape)).astype(np.float32)
    targets = x[:, :1].T + 8 * rng.standard_normal((1, 400)) > 0
    columns = np.arange(24)[None]
    launch = logistic.Launch(block_d=32, block_n=64, rows=8, num_warps=4, num_stages=1)
    got = fit(x, targets, columns, device, launch=launch)
    assert max_error(got, x.astype(np.float64), targets, columns) <= 1
    assert bool(got["converged"].all())
    assert int(got["n_iter"].max()) <= 15


@pytest.mark.parametrize("place", ["one number", "one stimulus", "several", "one neuron"])
@pytest.mark.parametrize("size", [1e2, pytest.param(1e4, marks=pytest.mark.slow), 1e6])
def test_outliers(device, place, size):
    """If float32 can't resolve the optimum, the fit resumes in float64 and converges."""
    rng = np.random.default_rng(16)
    x = gaussian(16, 40, 6)
    at = {"one number": (7, 2), "one stimulus": 7, "several": ([1, 7, 9], [2, 2, 5])}
    x[at.get(place, np.s_[:, 2])] *= np.float32(size)
    targets, columns = draw_targets(rng, 40, 2, 0.4), draw_columns(rng, 6, 2, 5)
    got = fit(x, targets, columns, device)
    assert bool(got["converged"].all())
    assert max_error(got, x.astype(np.float64), targets, columns) <= 1


def test_ordinary_fits_are_not_resumed(device, monkeypatch):
    rng = np.random.default_rng(17)
    resumed = []

    def refit(neurons, y, C, fits, tol, max_iter):
        resumed.append(len(neurons))
        return fits

    monkeypatch.setattr(logistic, "refit", refit)
    targets, columns = draw_targets(rng, 60, 2, 0.4), draw_columns(rng, 30, 2, 12)
    g = gaussian(17, 60, 30)
    for x in (g, np.maximum(g, 0), 30 * np.maximum(g, 0), g + 100):
        assert bool(fit(x, targets, columns, device)["converged"].all())
    assert not resumed
    g[3] *= 1e6
    assert not fit(g, targets, columns, device)["converged"].any()
    assert resumed == [2, 2]


def test_zero_optimum(device):
    """If stimuli cancel, the coefficients are rounding error, and the steps stop early."""
    half = gaussian(6, 30, 8)
    x = np.concatenate([half, -half])
    x[0] += 2e-3
    y = np.random.default_rng(6).random(30) < 0.5
    got = fit(x, np.concatenate([y, y])[None], np.arange(8)[None], device)
    assert int(got["n_iter"]) < 20
    assert float(got["coef"].abs().max()) < 1e-3


def test_warm_start_saves_steps(device):
    rng = np.random.default_rng(7)
    x = gaussian(7, 32, 20)
    targets, columns = draw_targets(rng, 32, 2, 0.4), draw_columns(rng, 20, 2, 8)
    cold = fit(x, targets, columns, device)
    similar = columns.copy()
    similar[:, 0] = [np.setdiff1d(np.arange(20), row)[0] for row in columns]
    start = cold["coef"].clone(), cold["intercept"].double()
    before = [s.clone() for s in start]
    warm = fit(x, targets, similar, device, start=start)
    assert max_error(warm, x.astype(np.float64), targets, similar) <= 1
    assert all(torch.equal(a, b) for a, b in zip(start, before, strict=True))
    assert int(warm["n_iter"].sum()) < int(fit(x, targets, similar, device)["n_iter"].sum())
    repeated = fit(x, targets, columns, device, start=start)
    assert bool((repeated["n_iter"] == 1).all())
    assert bool(repeated["converged"].all())


def test_warm_start_with_means(device):
    """The intercept refers to x, not to centred neurons."""
    rng = np.random.default_rng(8)
    x = gaussian(8, 40, 6) + np.float32(50)
    targets, columns = draw_targets(rng, 40, 1, 0.5), draw_columns(rng, 6, 1, 6)
    cold = fit(x, targets, columns, device)
    warm = fit(x, targets, columns, device, start=(cold["coef"], cold["intercept"]))
    assert int(warm["n_iter"]) <= 2
    assert max_error(warm, x.astype(np.float64), targets, columns) <= 1


@pytest.mark.parametrize("size", [5.0, 300.0])
def test_bad_start(device, size):
    """Full Newton steps from here would diverge."""
    rng = np.random.default_rng(9)
    x = gaussian(9, 40, 5)
    targets, columns = draw_targets(rng, 40, 2, 0.5), np.arange(5)[None]
    good = fit(x, targets, columns, device)
    coef = -size * good["coef"] / good["coef"].abs().amax(2, keepdim=True)
    got = fit(x, targets, columns, device, start=(coef, good["intercept"] + size))
    assert max_error(got, x.astype(np.float64), targets, columns) <= 1
    assert bool(got["converged"].all())


@pytest.mark.parametrize("max_iter", [1, 3])
def test_too_few_steps(device, max_iter):
    rng = np.random.default_rng(10)
    x = gaussian(10, 50, 10)
    targets, columns = draw_targets(rng, 50, 2, 0.2), draw_columns(rng, 10, 2, 10)
    got = fit(x, targets, columns, device, max_iter=max_iter)
    assert not got["converged"].any()
    assert bool((got["n_iter"] == max_iter).all())
    # The counted errors belong to the returned coefficients.
    coef, intercept = got["coef"].cpu().double().numpy(), got["intercept"].cpu().double().numpy()
    for b, t in np.ndindex(2, 2):
        z = x[:, columns[b]].astype(np.float64) @ coef[b, t] + intercept[b, t]
        assert int(got["errors"][b, t]) == ((z > 0) != targets[t]).sum()


@pytest.mark.parametrize(
    "d", [16, 17, *(pytest.param(d, marks=pytest.mark.slow) for d in (100, 128))]
)
def test_precision_does_not_change_the_result(device, d):
    """Precision only affects the steps."""
    rng = np.random.default_rng(11)
    x = gaussian(11, 70, 128)
    targets, columns = draw_targets(rng, 70, 1, 0.4), draw_columns(rng, 128, 1, d)
    steps = []
    for precision in ("tf32x3", "tf32", "ieee"):
        got = fit(x, targets, columns, device, precision=precision)
        assert max_error(got, x.astype(np.float64), targets, columns) <= 1
        assert bool(got["converged"].all())
        steps.append(int(got["n_iter"]))
    *others, exact = steps
    assert max(abs(count - exact) for count in others) <= 1


def test_old_triton(monkeypatch):
    x = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(_launch, "is_interpreted", lambda: True)
    for old, capability, reason in (
        (True, (10, 0), f"on this GPU it needs Triton 3.8 or newer, not {triton.__version__}"),
        (True, (9, 0), None),
        (True, (12, 0), None),
        (False, (10, 0), None),
    ):
        monkeypatch.setattr(logistic, "_OLD_TRITON", old)
        monkeypatch.setattr(_launch, "capability", lambda device, value=capability: value)
        assert logistic.unsupported(x) == reason


@pytest.mark.parametrize("n", [2, 3, 15, 16, 17, 31, 33, 64, 130])
def test_tile_edges(device, n):
    rng = np.random.default_rng(n)
    x = gaussian(n, n, 6)
    targets, columns = draw_targets(rng, n, 1, 0.5), draw_columns(rng, 6, 1, 5)
    got = fit(x, targets, columns, device)
    assert max_error(got, x.astype(np.float64), targets, columns) <= 1


@pytest.mark.parametrize("n", [13, 14, 15, 16])
def test_rows_with_gaps(device, n):
    rng = np.random.default_rng(n)
    x = gaussian(n, n, 6)
    targets, columns = draw_targets(rng, n, 1, 0.5), draw_columns(rng, 6, 1, 5)
    rows = torch.full((6, 20), torch.nan, device=device)[:, :n]
    rows.copy_(torch.from_numpy(x.T))
    got = logistic.logistic_fits(rows.mT, targets=targets, columns=columns, **OPTIONS)
    assert max_error(got, x.astype(np.float64), targets, columns) <= 1


@pytest.mark.parametrize("strides", [(1, 2**30 + 4), (2**29 + 1, 1)])
def test_offsets_beyond_32_bits(device, strides):
    rng = np.random.default_rng(12)
    x = gaussian(12, 8, 4, np.float16)
    targets, columns = draw_targets(rng, 8, 1, 0.5), np.array([[3, 1, 0, 2]])
    far = spread_in_memory(torch.from_numpy(x).to(device), strides)
    got = logistic.logistic_fits(far, targets=targets, columns=columns, **OPTIONS)
    assert max_error(got, x.astype(np.float64), targets, columns) <= 1


def test_neuron_major_input_is_not_copied(device, launches):
    rng = np.random.default_rng(13)
    targets, columns = draw_targets(rng, 12, 1, 0.5), draw_columns(rng, 9, 1, 4)
    rows = torch.from_numpy(gaussian(13, 9, 12)).to(device)
    wide = torch.zeros(9, 16, device=device)[:, :12].copy_(rows)
    for x, same in ((rows.mT, True), (wide.mT, True), (rows.mT.contiguous(), False)):
        launches.clear()
        logistic.logistic_fits(x, targets=targets, columns=columns, **OPTIONS)
        (started,) = launches
        assert (started["x_ptr"].data_ptr() == x.data_ptr()) is same
        # A copy has only the neurons in use.
        assert len(started["x_ptr"]) == (9 if same else 4)


def test_several_launches_match_one(device, launches, monkeypatch):
    rng = np.random.default_rng(14)
    x = gaussian(14, 20, 12)
    targets, columns = draw_targets(rng, 20, 2, 0.5), draw_columns(rng, 12, 5, 3)
    whole = fit(x, targets, columns, device)
    monkeypatch.setattr(logistic, "_FITS", 4)
    launches.clear()
    got = fit(x, targets, columns, device)
    assert [launch["grid"] for launch in launches] == [(4,), (4,), (2,)]
    assert all(torch.equal(got[name], whole[name]) for name in whole)
    one = fit(x, targets[1:], columns[3:4], device)
    assert all(torch.equal(one[name][0, 0], whole[name][3, 1]) for name in whole)


def test_launch_settings():
    for n, d, capability in ((500, 100, (9, 0)), (2500, 128, (8, 0)), (2, 1, (10, 0))):
        for precision in ("tf32x3", "tf32", "ieee"):
            launch = logistic.choose(n, d, torch.float32, precision, capability)
            assert launch.block_d >= max(d, 16)
            assert launch.block_d < max(2 * d, 17)
            assert launch.rows * n <= 4096
    assert logistic.choose(500, 100, torch.float32, "tf32x3", (9, 0)).num_stages == 2
    assert logistic.choose(500, 100, torch.float32, "tf32x3", (8, 0)).num_stages == 1
    assert logistic.choose(500, 100, torch.float32, "tf32", (8, 0)).num_stages == 2
    assert logistic.choose(500, 100, torch.float32, "ieee", (9, 0)).num_stages == 1
    assert logistic.choose(500, 64, torch.float32, "tf32", (9, 0)).num_warps == 4
