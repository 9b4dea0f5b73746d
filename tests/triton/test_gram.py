"""Gram matrices by the kernels, whole and by cell, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from _draw import KINDS, TORCH_LAYOUTS, labels, memberships, representations
from _guard import pad_with_nan, spread_in_memory
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import GRAM, assert_gram_close
from repsim_kernels.kernels.torch import gram as torch_gram
from repsim_kernels.kernels.triton import gram
from repsim_kernels.reference.gram import squared_distances

few_examples = settings(max_examples=12)
DTYPES = ("float32", "float16", "bfloat16")
# Tiles, accumulators and programs smaller than the drawn sizes.
SMALL = gram.Launch(block_n=16, block_p=16, inner=16, chunk=23, num_warps=4, num_stages=2)
stimuli, neurons = st.integers(2, 40), st.integers(1, 60)
inputs = representations(stimuli, neurons, KINDS, DTYPES, TORCH_LAYOUTS)


def squared_norm(x: np.ndarray) -> float:
    return float(((x - x.mean(0)) ** 2).sum(1).max())


@few_examples
@given(inputs)
def test_centered_gram(device, x):
    got = gram.centered_gram(
        pad_with_nan(x.torch().to(device)), kernel="linear", sigma=None, launch=SMALL
    )
    assert got.dtype == torch.float64
    assert torch.equal(got, got.mT)
    assert_gram_close(got, rk.centered_gram(x.values(), backend="reference"), GRAM["tf32x3"])


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "ieee"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 70), (1, 20, 1), (2, 65, 33)])
def test_batches_and_precisions(device, shape, precision):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 5
    got = rk.centered_gram(x.to(device), batched=True, precision=precision, backend="triton")
    want = rk.centered_gram(x.double(), batched=True, backend="reference")
    assert got.device.type == device.type
    assert_gram_close(got, want, GRAM[precision])


@few_examples
@given(inputs, st.sampled_from([0.5, 1.0, 2.0]))
def test_rbf(device, x, sigma):
    if np.median(squared_distances(x.values())) <= 0:
        return
    got = rk.centered_gram(x.torch().to(device), kernel="rbf", sigma=sigma, backend="triton")
    want = rk.centered_gram(x.values(), kernel="rbf", sigma=sigma, backend="reference")
    np.testing.assert_allclose(got.cpu(), want, atol=1e-5)


@few_examples
@given(st.data())
def test_cell_grams(device, data):
    x = data.draw(inputs)
    cells, n_cells = data.draw(labels(x.p))
    got = gram.cell_grams(
        pad_with_nan(x.torch().to(device)), cells=cells, n_cells=n_cells, launch=SMALL
    )
    want = rk.cell_grams(x.values(), cells, n_cells=n_cells, backend="reference")
    largest = squared_norm(x.values())
    np.testing.assert_allclose(got.cpu(), want, rtol=0, atol=GRAM["tf32x3"] * largest)
    assert torch.equal(got, got.mT)
    for c in range(n_cells):
        if not (cells == c).any():
            assert (got[c] == 0).all()


@few_examples
@given(st.data())
def test_memberships(device, data):
    x = data.draw(inputs)
    cells = data.draw(memberships(x.p))
    got = gram.cell_grams(pad_with_nan(x.torch().to(device)), cells=cells, n_cells=len(cells))
    want = rk.cell_grams(x.values(), cells, backend="reference")
    atol = GRAM["tf32x3"] * squared_norm(x.values())
    np.testing.assert_allclose(got.cpu(), want, rtol=0, atol=atol)


@few_examples
@given(st.data())
def test_partitions(device, data):
    """Includes partitions whose neurons don't fit into the cache together."""
    x = data.draw(inputs)
    cells = np.stack([data.draw(labels(x.p, 3))[0] for _ in range(3)])
    before, gram._L2 = gram._L2, data.draw(st.sampled_from([1, 2000, gram._L2]))
    try:
        got = rk.cell_grams(x.torch().to(device), cells, n_cells=3, backend="triton")
    finally:
        gram._L2 = before
    want = rk.cell_grams(x.values(), cells, n_cells=3, backend="reference")
    assert got.shape == (3, 3, x.n, x.n)
    atol = GRAM["tf32x3"] * squared_norm(x.values())
    np.testing.assert_allclose(got.cpu(), want, rtol=0, atol=atol)


@few_examples
@given(st.data())
def test_varying_neurons_and_shifts(device, data):
    x = data.draw(inputs)
    cells, n_cells = data.draw(labels(x.p))
    values, launch = x.torch(), replace(SMALL, chunk=5)
    _, n_varying, shift = gram.cell_statistics(
        values.to(device), cells, n_cells, True, launch=launch
    )
    _, want_n_varying, want = torch_gram.cell_statistics(values.double(), cells, n_cells, True)
    np.testing.assert_array_equal(n_varying.cpu(), want_n_varying)
    size = np.linalg.norm(x.values() - x.values().mean(0)) * np.linalg.norm(x.values())
    np.testing.assert_allclose(shift.cpu(), want, rtol=0, atol=1e-6 * size)


def test_constant_columns_give_exact_zeros(device):
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(1)).to(device)
    x[:, 10:] = 0.1
    got = rk.cell_grams(x, [0] * 10 + [1] * 30, backend="triton")
    assert (got[1] == 0).all()
    assert (got[0].diagonal() > 0).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e30, 7e37])
def test_magnitudes(device, magnitude):
    x = torch.randn(7, 50, generator=torch.Generator().manual_seed(2)) * magnitude
    want = rk.centered_gram(x.double(), backend="reference")
    assert_gram_close(rk.centered_gram(x.to(device), backend="triton"), want, GRAM["tf32x3"])


@pytest.mark.parametrize("strides", [(2**30 + 1, 1), (1, 2**30 + 1)])
def test_offsets_beyond_32_bits(device, strides):
    values = torch.randn(5, 5, generator=torch.Generator().manual_seed(4))
    x = spread_in_memory(values.to(device), strides)
    want = rk.centered_gram(x.cpu().double(), backend="reference")
    whole = gram.centered_gram(x, kernel="linear", sigma=None)
    assert_gram_close(whole, want, GRAM["tf32x3"])
    cells = gram.cell_statistics(x, np.array([0, 1, 0, 1, 1]), 2, True)
    assert_gram_close(cells[0].sum(0), want, GRAM["tf32x3"])
    shift = torch_gram.cell_statistics(x.cpu().double(), np.array([0, 1, 0, 1, 1]), 2, True)[2]
    np.testing.assert_allclose(cells[2].cpu(), shift, atol=1e-5)


def test_runs_are_bit_identical(device):
    x = torch.randn(20, 90, generator=torch.Generator().manual_seed(3)).to(device)
    cells = np.arange(90) % 4
    first = gram.cell_grams(x, cells=cells, n_cells=4, launch=SMALL)
    assert torch.equal(first, gram.cell_grams(x, cells=cells, n_cells=4, launch=SMALL))


def test_launch_settings():
    by_shape = [gram.choose(n, 100_000, "tf32x3", (9, 0)) for n in (2, 17, 50, 500)]
    assert [c.block_n for c in by_shape] == [16, 32, 64, 64]
    assert gram.choose(500, 100_000, "tf32x3", (10, 0)) == replace(
        by_shape[3], num_warps=4, num_stages=3
    )
    assert gram.choose(50, 10**9, "ieee", (8, 0)).chunk == 8192


def test_unsupported_calls_give_the_reason(device):
    x = torch.randn(5, 6, dtype=torch.float64, device=device)
    with pytest.raises(rk.BackendUnavailable, match="cell_grams: it takes float16, bfloat16"):
        rk.cell_grams(x, [0] * 6, backend="triton")
    with pytest.raises(rk.BackendUnavailable, match="cka: it has no kernel for this operation"):
        rk.cka(x, x, backend="triton")


@pytest.mark.parametrize("far", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("which", [0, 4])
def test_rbf_with_a_distant_stimulus(device, which, far):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((12, 40)).astype(np.float32)
    x[which] += np.float32(far)
    got = rk.centered_gram(
        torch.from_numpy(x).to(device), kernel="rbf", backend="triton", precision="ieee"
    )
    want = rk.centered_gram(x, kernel="rbf", backend="reference")
    np.testing.assert_allclose(got.cpu(), want, rtol=0, atol=1e-5)
