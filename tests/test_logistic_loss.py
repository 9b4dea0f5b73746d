"""The objective of logistic fits and its derivatives, against automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from _draw import SEEDS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repsim_kernels.kernels.torch import _logistic_loss
from repsim_kernels.kernels.torch._logistic_loss import Objective


def draw(seed: int, b: int, d: int, n: int = 9) -> tuple[Objective, Tensor]:
    """Draw an objective in float64 and a point."""
    g = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(*shape, generator=g).double() for shape in ((b, d + 1, n), (b, d + 1)))
    x[:, -1] = 1
    penalty = torch.rand(b, d + 1, generator=g).double()
    penalty[:, -1] = 0
    return Objective(x, 1.0 - 2 * (torch.arange(n) % 3 == 0), penalty), v


def make_symmetric(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).mT


def evaluate(objective: Objective, v: Tensor) -> Tensor:
    """Return the objective as its definition reads."""
    z = (objective.x * v[:, :, None]).sum(1)
    penalties = (objective.penalty[:, :-1] * v[:, :-1] ** 2).sum(1) / 2
    return torch.log1p(torch.exp(objective.flip * z)).sum(1) + penalties


@given(SEEDS, st.integers(1, 5), st.integers(1, 4))
def test_derivatives_match_automatic_differentiation(seed, b, d):
    objective, v = draw(seed, b, d)
    m = objective.margins(v)
    torch.testing.assert_close(objective.value(m, v), evaluate(objective, v))
    v.requires_grad_()
    (gradient,) = torch.autograd.grad(evaluate(objective, v).sum(), v)
    torch.testing.assert_close(objective.gradient(m.sigmoid(), v.detach()), gradient)
    hessians = torch.autograd.functional.hessian(lambda v: evaluate(objective, v).sum(), v)
    for i in range(b):
        torch.testing.assert_close(objective.hessian(m)[i].triu(), hessians[i, :, i].triu())


@pytest.mark.parametrize("b", [1, 2, 7])
def test_parts_do_not_change_hessians(monkeypatch, b):
    objective, v = draw(0, b, 3)
    m = objective.margins(v)
    whole = objective.hessian(m).triu()
    monkeypatch.setattr(_logistic_loss, "_CPU_PART", 2 * objective.x[0].nbytes)
    parts = list(objective.iter_weighted(torch.ones_like(m)))
    assert len(parts) == (b + 1) // 2
    torch.testing.assert_close(torch.cat([weighted for _, weighted in parts]), objective.x[:, :-1])
    torch.testing.assert_close(objective.hessian(m).triu(), whole)


@given(SEEDS, st.integers(1, 5))
def test_flat_diagonal_is_exact_where_all_weights_are_equal(seed, d):
    objective, v = draw(seed, 3, d)
    v[:, :-1] = 0
    m = objective.margins(v)
    want = objective.hessian(m).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(objective.flat_diagonal(m), want)


@given(SEEDS, st.floats(0.05, 20))
def test_search_comes_near_the_minimum_along_a_newton_step(seed, scale):
    """However long the step is, the slope at the place found is less than half of that before."""
    objective, _ = draw(seed, 4, 3)
    v = torch.zeros(4, 4, dtype=torch.float64)
    m = objective.margins(v)
    gradient = objective.gradient(m.sigmoid(), v)
    step = -scale * torch.linalg.solve(make_symmetric(objective.hessian(m)), gradient)
    change = objective.margins(step)
    slope = (gradient * step).sum(1)
    t = objective.search(m, m.sigmoid(), change, step, slope)
    m2, v2 = m + t[:, None] * change, v + t[:, None] * step
    slope2 = (objective.gradient(m2.sigmoid(), v2) * step).sum(1)
    assert (slope2.abs() <= 0.5 * slope.abs()).all()


def test_search_takes_whole_newton_steps_whatever_the_penalty():
    """A penalty of 1e36 makes the slope of the coefficients smaller than the intercept's noise."""
    objective, _ = draw(0, 4, 3)
    penalty = torch.tensor([1e36, 1e36, 1e36, 0]).expand(4, 4)
    objective = Objective(objective.x.float(), objective.flip.float(), penalty)
    v = torch.zeros(4, 4)
    v[:, -1] = torch.tensor(1 / 2).log()  # the log-odds: 3 of 9 stimuli
    m = objective.margins(v)
    gradient = objective.gradient(m.sigmoid(), v)
    step = -gradient / objective.flat_diagonal(m)
    slope = (gradient * step).sum(1)
    t = objective.search(m, m.sigmoid(), objective.margins(step), step, slope)
    torch.testing.assert_close(t, torch.ones(4), rtol=1e-2, atol=0)
