"""The chance level of CKA, and outlying stimuli under debiased and RBF CKA."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest

import repsim_kernels as rk
from repsim_kernels import _check, _dispatch, _options

DEFAULTS = {"debiased": False, "kernel": "linear", "sigma": None, "precision": "float32"}
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])


@pytest.fixture
def fresh_warnings(monkeypatch):
    """Reset the record of warnings that are issued once per process."""
    monkeypatch.setattr(_options, "_warnings_shown", set())


def compare_with_chance(x, y, backend, **options):
    """Return the similarity, and its mean over permutations from the closed form."""
    options = DEFAULTS | options
    x, y, source = _check.check_pair(x, y)
    result = _dispatch.call("cka", backend, source, x, y, **options, chance=True)
    return float(result["similarity"]), float(result["chance"])


@EACH_BACKEND
@pytest.mark.parametrize("options", [{}, {"kernel": "rbf", "sigma": 0.7}], ids=["linear", "rbf"])
@pytest.mark.parametrize(("p", "q"), [(2, 2), (3, 40), (40, 60)])
def test_chance_is_the_mean_over_all_permutations(p, q, options, backend):
    rng = np.random.default_rng(p)
    x, y = rng.standard_normal((5, p)), rng.standard_normal((5, q)) ** 2
    want = np.mean(
        [rk.cka(x, y[list(order)], **options) for order in itertools.permutations(range(5))]
    )
    similarity, chance = compare_with_chance(x, y, backend, **options)
    assert similarity == pytest.approx(float(rk.cka(x, y, **options)), rel=1e-12)
    assert chance == pytest.approx(want, rel=1e-10)
    xs, source = _check.check_representations([x, y], "xs")
    for ys in (None, _check.check_representations([y, x[:, :1]], "ys")[0]):
        metrics = {"cka": DEFAULTS | options | {"chance": True}}
        precision = metrics["cka"].pop("precision")
        result = _dispatch.call(
            "pairwise", backend, source, xs, ys, metrics=metrics, precision=precision
        )["cka"]
        for i, a in enumerate(xs):
            for j, b in enumerate(ys or xs):
                expected = compare_with_chance(a, b, "reference", **options)
                assert result["similarity"][i, j] == pytest.approx(expected[0], rel=1e-10)
                assert result["chance"][i, j] == pytest.approx(expected[1], rel=1e-10)


@EACH_BACKEND
def test_noise_in_many_neurons_warns_once_per_process(fresh_warnings, backend):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 50, 5000))
    with pytest.warns(rk.DegenerateWarning, match=r"0\.990 is the mean .*debiased=True") as caught:
        value = rk.cka(x, y, backend=backend)
    assert caught[0].filename == __file__
    assert value == pytest.approx(0.990, abs=1e-3)
    assert rk.cka(x, y, backend=backend) == value  # pytest would raise a second warning


@EACH_BACKEND
def test_pairwise_warns_about_the_worst_pair(fresh_warnings, backend):
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 30, 900))
    with pytest.warns(rk.DegenerateWarning, match=r"0\.969 is the mean"):
        rk.pairwise([x[:, :3], x, y], backend=backend)


@EACH_BACKEND
def test_narrow_rbf_kernel_warns(fresh_warnings, backend):
    """The Grams are nearly the identity."""
    x, y = np.random.default_rng(4).standard_normal((2, 40, 3))
    options = {"kernel": "rbf", "sigma": 0.05, "backend": backend}
    with pytest.warns(rk.DegenerateWarning, match=r"(0\.9|1\.0)\d\d is the mean"):
        rk.cka(x, y, **options)


def test_no_warning_when_similarity_is_not_chance(fresh_warnings):
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 30, 900))
    rank_two = x @ rng.standard_normal((900, 2)) @ rng.standard_normal((2, 900))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.cka(x, y, debiased=True)
        rk.pairwise([x, y], debiased=True)
        rk.cka(rank_two, rank_two + 0.01 * y)  # many neurons in two dimensions
        rk.pairwise([x])  # a representation and itself
        rk.ablation_distances(x, np.arange(900) % 3, metrics=["cka"])
        assert not _options._warnings_shown


@pytest.mark.parametrize("far", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize(("n", "p"), [(40, 3), (150, 20)])
def test_debiased_cka_is_accurate_with_an_outlying_stimulus(n, p, far):
    """Against U-centred Grams in long double."""

    def u_centred(x):
        k = x @ x.T
        np.fill_diagonal(k, 0)
        u = k - (k.sum(0) + k.sum(1)[:, None]) / (n - 2) + k.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(u, 0)
        return u

    rng = np.random.default_rng(5)
    x = rng.standard_normal((n, p))
    y = x[:, ::-1] + rng.standard_normal((n, p))
    x[3] += far
    u, v = (u_centred((z - z.mean(0)).astype(np.longdouble)) for z in (x, y))
    want = float((u * v).sum() / np.sqrt((u * u).sum() * (v * v).sum()))
    tolerance = {"rel": 1e-9 * max(1, far / 1e4), "abs": 1e-12}
    assert rk.cka(x, y, debiased=True) == pytest.approx(want, **tolerance)
    assert rk.pairwise([x, y], debiased=True)[0, 1] == pytest.approx(want, **tolerance)


@EACH_BACKEND
@pytest.mark.parametrize("far", [1e3, 1e6, 1e7, 1e9, 1e12])
@pytest.mark.parametrize("which", [0, 11])
def test_rbf_cka_is_accurate_with_an_outlying_stimulus(which, far, backend):
    """Against differences of features in long double."""

    def kernel(x):
        d2 = ((x[:, None] - x[None]) ** 2).sum(-1)
        k = np.exp(-d2 / (2 * np.median(d2)))
        return k - k.mean(0) - k.mean(1)[:, None] + k.mean()

    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((20, 5)), rng.standard_normal((20, 6))
    x[which] += far
    k, m = (kernel(z.astype(np.longdouble)) for z in (x, y))
    want = float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))
    assert rk.cka(x, y, kernel="rbf", backend=backend) == pytest.approx(want, abs=1e-9)
    pair = rk.pairwise([x, y], kernel="rbf", backend=backend)
    assert pair[0, 1] == pytest.approx(want, abs=1e-9)
    gram = rk.centered_gram(x, kernel="rbf", backend=backend)
    np.testing.assert_allclose(gram, k.astype(float), rtol=0, atol=1e-9)
