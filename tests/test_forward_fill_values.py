"""The values that "mean" and "resample" write, and the Grams of what they leave."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import repsim_kernels as rk
from repsim_kernels.forward import AblatedForward
from repsim_kernels.forward.fills import draw_other_images


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_is_rounded_once(dtype):
    model = nn.Sequential(nn.Identity(), nn.Identity()).eval()
    forward = AblatedForward(model, "0")
    x = (torch.randn(301, 8) * 100 + 1000).to(dtype)
    got = forward.logits(forward.prefix(x), [0] * 8, fill="mean")[0]
    assert torch.equal(got, got[:1].expand_as(got))
    exact = [math.fsum(column) / 301 for column in x.double().mT.tolist()]
    want = torch.tensor(exact, dtype=torch.float64).to(dtype)
    assert torch.equal(got[0], want) or dtype == torch.float64
    torch.testing.assert_close(got[0], want, rtol=1e-15, atol=0)


@given(st.integers(2, 40), st.integers(0, 2**32))
def test_resampling_moves_every_image(n, seed):
    order = draw_other_images(n, seed)
    assert sorted(order) == list(range(n))
    assert not any(i == j for i, j in enumerate(order))
    rng = np.random.default_rng(seed)
    draws = (rng.permutation(n).tolist() for _ in range(1000))
    assert order == next(d for d in draws if all(i != j for i, j in enumerate(d)))


def test_resampling_is_the_same_for_every_cell_and_depends_on_the_seed():
    forward = AblatedForward(nn.Sequential(nn.Identity(), nn.Identity()).eval(), "0")
    x = torch.randn(9, 6)
    state = forward.prefix(x)
    whole = forward.logits(state, [0] * 6, fill="resample", seed=4)[0]
    assert torch.equal(whole, x[draw_other_images(9, 4)])
    parts = forward.logits(state, [0, 0, 1, 1, 1, -1], fill="resample", seed=4)
    assert torch.equal(parts[0], torch.cat([whole[:, :2], x[:, 2:]], 1))
    assert torch.equal(parts[1], torch.cat([x[:, :2], whole[:, 2:5], x[:, 5:]], 1))
    assert not torch.equal(forward.logits(state, [0] * 6, fill="resample", seed=5)[0], whole)


@given(st.integers(3, 8), st.integers(0, 2**16))
def test_grams_of_filled_representations_follow_from_cell_grams(n, seed):
    torch.manual_seed(seed)
    x = torch.randn(n, 12, dtype=torch.float64)
    forward = AblatedForward(nn.Sequential(nn.Identity(), nn.Identity()).eval(), "0")
    state, labels = forward.prefix(x), np.arange(12) % 3
    grams, whole = rk.cell_grams(x, labels), rk.centered_gram(x)
    order = draw_other_images(n, seed)
    copies = forward.logits(state, labels, fill="resample", seed=seed)
    means = forward.logits(state, labels, fill="mean")
    for gram, copy, mean in zip(grams, copies, means, strict=True):
        left = whole - gram
        torch.testing.assert_close(rk.centered_gram(copy), left + gram[order][:, order])
        torch.testing.assert_close(rk.centered_gram(mean), left)
