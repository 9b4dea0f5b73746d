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
from repsim_kernels.kernels.triton import gram, operands
from repsim_kernels.reference.gram import squared_distances

few_examples = settings(max_examples=12)
DTYPES = ("float32", "float16", "bfloat16")
# Tiles, accumulators and programs smaller than the drawn sizes.
SMALL = gram.Launch(block_n=16, block_p=16, inner=32, chunk=48, num_warps=4, num_stages=2)
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
    x = data.draw(inputs)
    cells = np.stack([data.draw(labels(x.p, 3))[0] for _ in range(3)])
    got = rk.cell_grams(x.torch().to(device), cells, n_cells=3, backend="triton")
    want = rk.cell_grams(x.values(), cells, n_cells=3, backend="reference")
    assert got.shape == (3, 3, x.n, x.n)
    atol = GRAM["tf32x3"] * squared_norm(x.values())
    np.testing.assert_allclose(got.cpu(), want, rtol=0, atol=atol)


def test_spans_of_partitions_add_up(device, monkeypatch, launches):
    x = torch.randn(9, 400, generator=torch.Generator().manual_seed(9))
    cells = np.random.default_rng(9).integers(-1, 2, (2, 400))
    monkeypatch.setattr(operands, "_MEMORY", 250_000)
    got = gram.cell_grams(x.to(device), cells=cells, n_cells=2)
    want = rk.cell_grams(x.double(), cells, n_cells=2, backend="reference")
    assert_gram_close(got, want, GRAM["tf32x3"])
    assert [each["kernel"] for each in launches].count("_write_kernel") > 1


@pytest.mark.parametrize(("dtype", "memory"), [(torch.float32, 180_000), (torch.bfloat16, 250_000)])
def test_spans_of_neurons_and_batches_add_up(device, dtype, memory, monkeypatch, launches):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 9, 400, generator=generator).to(dtype).to(device)
    cells = np.arange(400) % 3 - 1

    def compute():
        return (
            gram.centered_gram(x, kernel="linear", sigma=None),
            *gram.cell_statistics(x[0], cells, 2, True),
        )

    want = compute()
    once = len(launches)
    monkeypatch.setattr(operands, "_MEMORY", memory)
    for got, expected in zip(compute(), want, strict=True):
        np.testing.assert_allclose(got.cpu(), expected.cpu(), atol=2e-4, rtol=1e-5)
    assert len(launches) - once > 2 * once


@few_examples
@given(st.data())
def test_varying_neurons_and_shifts(device, data):
    x = data.draw(inputs)
    cells, n_cells = data.draw(labels(x.p))
    values, launch = x.torch(), replace(SMALL, chunk=16)
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


def test_shifts_need_both_halves(device):
    """The frozen readout of `ablation_decodability` multiplies them with float64 weights."""
    x = torch.randn(12, 90, generator=torch.Generator().manual_seed(8)) + 1000
    cells = np.arange(90) % 2
    shift = gram.cell_statistics(x.to(device), cells, 2, True, precision="tf32")[2]
    want = torch_gram.cell_statistics(x.double(), cells, 2, True)[2]
    size = float((x - x.mean(0)).norm() * x.norm())
    np.testing.assert_allclose(shift.cpu(), want, rtol=0, atol=1e-6 * size)


def test_launch_settings():
    half, single = torch.float16, torch.float32
    by_shape = [gram.choose(n, 100_000, 3, half, (9, 0)) for n in (2, 64, 65, 500)]
    assert [c.block_n for c in by_shape] == [64, 64, 128, 128]
    assert gram.choose(500, 100_000, 3, half, (10, 0)) == replace(by_shape[3], num_stages=2)
    assert gram.choose(500, 100_000, 1, half, (9, 0)).block_p == 128
    assert gram.choose(500, 100_000, 1, half, (8, 0)).block_n == 64
    assert gram.choose(50, 10**9, 1, single, (8, 0)).chunk == 8192
    for capability in ((8, 0), (9, 0), (10, 0)):
        for n in (50, 500):
            for dtype, products in ((half, 3), (half, 1), (single, 1)):
                c = gram.choose(n, 10**6, products, dtype, capability)
                assert c.inner % c.block_p == c.chunk % c.inner == 0


def test_formats():
    x = torch.empty(50, 300)
    short = x.to(torch.bfloat16)
    assert gram.make_plan(x, 300, "tf32x3", False).form.split
    assert not gram.make_plan(x, 300, "tf32", False).form.split
    assert gram.make_plan(x, 300, "tf32", True).form.split
    assert gram.make_plan(x, 300, "ieee", True).form.dtype == torch.float32
    assert [both for _, both in gram.make_plan(short, 300, "tf32", False).launches] == [True, False]
    assert not gram.make_plan(short, 300, "ieee", False).form.mixed


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
