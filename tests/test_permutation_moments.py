"""Moments of the permutation null of linear CKA, and the Pearson III distribution."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from repsim_kernels.kernels.torch import permutation_moments as moments
from repsim_kernels.reference.cka import u_centre
from repsim_kernels.reference.gram import centered_gram


def draw_gram(rng, n, p, debiased=False):
    """Return the Gram of skewed features, centred or U-centred."""
    k = centered_gram(rng.standard_normal((n, p)) ** 3)
    return u_centre(k) if debiased else k


def compute(ks, ls):
    """Return the moments of the permuted similarities of two lists of Grams."""
    sides = [moments.compute_invariants(torch.from_numpy(np.stack(side))) for side in (ks, ls)]
    return moments.compute_moments(*sides, len(ks[0]))


def permute(k, m, permutations):
    """Return the cosine of k with m under each permutation."""
    values = [np.sum(k * m[np.ix_(p, p)]) for p in permutations]
    return np.array(values) / np.linalg.norm(k) / np.linalg.norm(m)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("n", [4, 5, 6, 7])
def test_moments_are_those_of_all_permutations(n, debiased):
    rng = np.random.default_rng(n)
    ks, ls = ([draw_gram(rng, n, p, debiased) for p in ps] for ps in ((1, 3), (2, 5, 9)))
    result = compute(ks, ls)
    permutations = list(map(list, itertools.permutations(range(n))))
    for (i, k), (j, m) in itertools.product(enumerate(ks), enumerate(ls)):
        values = permute(k, m, permutations)
        expected = values.mean(), values.var(), stats.skew(values)
        np.testing.assert_allclose([float(r[i, j]) for r in result], expected, 1e-9, 1e-13)


@given(st.integers(4, 40), st.integers(1, 60), st.integers(0, 2**32))
def test_variances_are_those_of_kazi_aoual_and_of_the_u_centred_null(n, p, seed):
    rng = np.random.default_rng(seed)
    k, m = draw_gram(rng, n, p), draw_gram(rng, n, 3)
    mean, variance, _ = compute([k], [m])

    def summarise(g):
        beta = np.trace(g) ** 2 / np.sum(g * g)
        total = n * (n + 1) * np.sum(np.diag(g) ** 2) / np.sum(g * g)
        return beta, (n - 1) * (total - (n - 1) * (beta + 2)) / ((n - 3) * (n - 1 - beta))

    (b1, t1), (b2, t2) = summarise(k), summarise(m)
    factor = 2 * (n - 1 - b1) * (n - 1 - b2) / ((n + 1) * (n - 1) ** 2 * (n - 2))
    expected = factor * (1 + (n - 3) * t1 * t2 / (2 * n * (n - 1)))
    np.testing.assert_allclose(mean, math.sqrt(b1 * b2) / (n - 1), rtol=1e-12)
    np.testing.assert_allclose(variance, expected, rtol=1e-8)

    mean, variance, _ = compute([u_centre(k)], [u_centre(m)])
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    np.testing.assert_allclose(variance, 2 / (n * (n - 3)), rtol=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
def test_moments_and_p_are_those_of_drawn_permutations(debiased):
    """Those of 100,000, up to the errors that their number allows."""
    rng, n, draws = np.random.default_rng(3), 20, 100_000
    k, m = (centered_gram(rng.standard_normal((n, p))) for p in (2, 4))
    if debiased:
        k, m = u_centre(k), u_centre(m)
    result = compute([k], [m])
    values = permute(k, m, rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1))
    mean, variance, skewness = (float(r[0, 0]) for r in result)
    sd = math.sqrt(variance)
    kurtosis = stats.kurtosis(values) + 2
    assert abs(values.mean() - mean) < 5 * sd / math.sqrt(draws)
    assert abs(values.var() / variance - 1) < 5 * math.sqrt(kurtosis / draws)
    assert abs(stats.skew(values) - skewness) < 0.1
    assert skewness > 0.5
    for alpha in (0.05, 0.01):
        observed = torch.tensor([[np.quantile(values, 1 - alpha)]])
        assert float(moments.compute_p_value(observed, result)) == pytest.approx(alpha, rel=0.1)
        share = np.mean(values > float(moments.compute_threshold(result.mean, alpha, result)))
        assert share == pytest.approx(alpha, rel=0.1)
    # What the skewness is for: a normal p is several times too small in the tail.
    z = (np.quantile(values, 0.99) - mean) / sd
    assert stats.norm.sf(z) < 0.005


def test_scale_and_a_multiple_of_the_centring_matrix():
    """Scale has no effect. Equal eigenvalues leave nothing to permute: p is 1."""
    rng, n = np.random.default_rng(0), 8
    k, m = draw_gram(rng, n, 3), draw_gram(rng, n, 5)
    for plain, scaled in zip(compute([k], [m]), compute([k * 1e140], [m * 1e-140]), strict=True):
        np.testing.assert_allclose(scaled, plain, rtol=1e-12)
    sphere = np.eye(n) - 1 / n
    result = compute([sphere], [m])
    observed = torch.from_numpy(permute(sphere, m, [np.arange(n)]))[None]
    torch.testing.assert_close(result.mean, observed)
    assert float(result.variance) < 1e-15
    exact = moments.Moments(result.mean, torch.zeros(1, 1), torch.zeros(1, 1))
    assert float(moments.compute_p_value(observed, exact)) == 1


SKEWNESSES = (-3.0, -0.8, -0.2, -0.05, 0.0, 0.001, 0.05, 0.3, 1.0, 4.0)


def compute_tail(z, skewness):
    z, skewness = torch.tensor([z, skewness], dtype=torch.float64)
    return float(moments.compute_pearson_iii_tail(z, skewness))


@pytest.mark.parametrize("skewness", SKEWNESSES)
@given(z=st.floats(-8, 8))
def test_tail_is_that_of_scipy(skewness, z):
    want = stats.pearson3.sf(z, skewness)
    assert compute_tail(z, skewness) == pytest.approx(want, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("z", [-3.0, 0.0, 2.0, 6.0, 12.0, 20.0])
@pytest.mark.parametrize("size", [0.0099, 0.0101, 0.02, 0.05, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_tail_keeps_its_relative_precision(z, size, sign):
    with mpmath.workdps(40):
        shape = 4 / mpmath.mpf(size) ** 2
        x = shape + sign * 2 * z / mpmath.mpf(size)
        bounds = (0, x) if sign < 0 else (x, mpmath.inf)
        inside = mpmath.gammainc(shape, *bounds, regularized=True) if x > 0 else sign > 0
    assert compute_tail(z, sign * size) == pytest.approx(float(inside), rel=1e-8, abs=1e-300)


@pytest.mark.parametrize("z", [-3.0, 0.0, 2.0, 6.0, 12.0])
@pytest.mark.parametrize("skewness", [-1e-3, 1e-5, 1e-9])
def test_tail_of_a_small_skewness(z, skewness):
    """Against the integral of the density, where the incomplete gamma function is out of reach."""
    with mpmath.workdps(60):
        shape, scale = 4 / mpmath.mpf(skewness) ** 2, 2 / mpmath.mpf(skewness)

        def density(t):
            x = shape + t * scale
            log = (shape - 1) * mpmath.log(x) - x - mpmath.loggamma(shape)
            return mpmath.exp(log) * abs(scale)

        steps = (0, 0.05, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20)
        want = mpmath.quad(density, [z + step for step in steps])
    assert compute_tail(z, skewness) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize("alpha", [1e-12, 0.001, 0.05, 0.5, 0.99])
def test_quantile_inverts_the_tail(alpha):
    skewness = torch.tensor(SKEWNESSES, dtype=torch.float64)
    z = moments.find_pearson_iii_quantile(alpha, skewness)
    np.testing.assert_allclose(z, stats.pearson3.isf(alpha, SKEWNESSES), rtol=1e-6, atol=1e-6)
    # The upper end of a distribution of skewness -3 is too steep to invert.
    tail = moments.compute_pearson_iii_tail(z, skewness)[1:]
    torch.testing.assert_close(tail, torch.full_like(tail, alpha), rtol=1e-7, atol=0)
