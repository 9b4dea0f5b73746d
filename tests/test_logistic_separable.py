"""Separable classes with a penalty so weak that rounding hides it."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from _draw import SEEDS
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk


def optimum(x, y, C):
    """Return coefficients and intercept from Newton's method in 80 digits."""
    with mpmath.workdps(80):
        a = mpmath.matrix(np.column_stack([x, np.ones(len(x))]).tolist())
        sign = [mpmath.mpf(1 if t else -1) for t in y]
        v = mpmath.matrix(a.cols, 1)

        def value(v):
            loss = sum(mpmath.log1p(mpmath.exp(-s * z)) for s, z in zip(sign, a * v, strict=True))
            return C * loss + sum(v[i] ** 2 for i in range(a.cols - 1)) / 2

        for _ in range(400):
            gradient, hessian = mpmath.matrix(a.cols, 1), mpmath.matrix(a.cols, a.cols)
            for j, z in enumerate(a * v):
                p_wrong = 1 / (1 + mpmath.exp(sign[j] * z))
                row = a[j, :]
                gradient -= C * sign[j] * p_wrong * row.T
                hessian += C * p_wrong * (1 - p_wrong) * (row.T * row)
            for i in range(a.cols - 1):
                gradient[i] += v[i]
                hessian[i, i] += 1
            step, size = mpmath.lu_solve(hessian, -gradient), mpmath.mpf(1)
            while value(v + size * step) > value(v) and size > 1e-30:
                size /= 2
            v += size * step
            if mpmath.norm(step) < mpmath.mpf(10) ** -30 * mpmath.norm(v):
                return [float(c) for c in v]
    raise AssertionError("no optimum")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("C", [1e12, 1e16, 1e20, 1e40, 1e100, 1e300])
@settings(max_examples=8)
@given(SEEDS, st.integers(1, 3), st.booleans())
def test_separable_classes_with_a_vanishing_penalty(backend, C, seed, d, duplicate):
    """A fit is optimal or its ``converged`` is False; no solver error is raised."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8, d))
    if duplicate:
        x = np.column_stack([x, x[:, 0]])
    y = (x @ rng.standard_normal(x.shape[1]) > 0).astype(int)
    y[:2] = [0, 1]
    fit = rk.logistic_fits(x, y, [list(range(x.shape[1]))], C=C, backend=backend)
    assert all(np.isfinite(values).all() for values in fit.values())
    if fit["converged"][0]:
        *coef, intercept = optimum(x, y, C)
        np.testing.assert_allclose(fit["coef"][0], coef, rtol=0, atol=1e-6 * np.abs(coef).max())
        assert fit["intercept"][0] == pytest.approx(intercept, rel=1e-6, abs=1e-6)
    else:
        assert C > 1e15
