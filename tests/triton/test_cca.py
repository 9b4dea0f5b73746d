"""PWCCA's weights by the kernel against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import KINDS, SEEDS, TORCH_LAYOUTS, representations
from _guard import pad_with_nan, spread_in_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from repsim_kernels.kernels.triton import cca, gram, operands

SMALL = cca.Launch(block_k=16, block_p=16, block_n=16, num_warps=4, num_stages=2)
stimuli, neurons = st.integers(2, 40), st.integers(1, 70)
inputs = representations(stimuli, neurons, KINDS, ("float32", "float16", "bfloat16"), TORCH_LAYOUTS)


def compute_weights(h: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.abs(h @ (x - x.mean(0))).sum(1)


@settings(max_examples=15)
@given(inputs, st.integers(1, 40), SEEDS)
def test_weights(device, x, k, seed):
    h = np.random.default_rng(seed).standard_normal((k, x.n))
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    got = cca.variate_weights(
        torch.from_numpy(h).to(device), pad_with_nan(x.torch().to(device)), launch=SMALL
    )
    assert got.dtype == torch.float64
    # Each of the p products carries the float32 rounding of its terms.
    scale = np.linalg.norm(x.values() - x.values()[0], axis=0).sum()
    np.testing.assert_allclose(got.cpu(), compute_weights(h, x.values()), rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize(("precision", "error"), [("tf32x3", 1e-5), ("ieee", 1e-5), ("tf32", 1e-3)])
def test_precisions(device, precision, error):
    rng = np.random.default_rng(0)
    h, x = rng.standard_normal((9, 30)), rng.standard_normal((30, 150)) + 10
    h -= h.mean(1, keepdims=True)
    x = x.astype(np.float32)
    got = cca.variate_weights(
        torch.from_numpy(h).to(device), torch.from_numpy(x).to(device), precision=precision
    )
    np.testing.assert_allclose(got.cpu(), compute_weights(h, x.astype(np.float64)), rtol=error)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30, 7e37])
def test_magnitudes(device, magnitude):
    x = np.random.default_rng(1).standard_normal((8, 20)).astype(np.float32) * np.float32(magnitude)
    h = np.eye(8)[:3]
    got = cca.variate_weights(torch.from_numpy(h).to(device), torch.from_numpy(x).to(device))
    np.testing.assert_allclose(got.cpu(), compute_weights(h, x.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("strides", [(2**30 + 1, 1), (1, 2**30 + 1)])
def test_offsets_beyond_32_bits(device, strides):
    values = torch.randn(5, 5, generator=torch.Generator().manual_seed(4))
    x = spread_in_memory(values.to(device), strides)
    h = torch.eye(5, device=device)[:3]
    got = cca.variate_weights(h, x)
    want = compute_weights(np.eye(5)[:3], x.cpu().double().numpy())
    np.testing.assert_allclose(got.cpu(), want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [20, 80, 150])
def test_operands_of_grams_serve_weights(device, n, dtype, launches):
    """Their order is that of cells; cells with large means are multiplied in three products."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((n, 300))
    x[:, 100:200] += 50
    x = torch.from_numpy(x).to(dtype)
    h = torch.from_numpy(rng.standard_normal((30, n)))
    kept = []
    cells = np.repeat([2, 0, 1], 100)
    gram.cell_statistics(x.to(device), cells, 3, kept=kept)
    launches.clear()
    got = cca.variate_weights(h.to(device), x.to(device), operands=kept[0])
    name = "_variate_weights_kernel" if n > 128 else "_one_plane_weights_kernel"
    count = 2 if dtype == torch.bfloat16 else 1
    assert [each["kernel"] for each in launches] == ["_directions_kernel"] + [name] * count
    want = compute_weights(h.numpy() - h.numpy().mean(1, keepdims=True), x.double().numpy())
    np.testing.assert_allclose(got.cpu(), want, rtol=1e-5)


def test_spans_of_neurons_add_up(device, monkeypatch):
    rng = np.random.default_rng(5)
    x, h = rng.standard_normal((9, 400)).astype(np.float32), rng.standard_normal((4, 9))
    monkeypatch.setattr(operands, "_MEMORY", 100_000)
    got = cca.variate_weights(torch.from_numpy(h).to(device), torch.from_numpy(x).to(device))
    want = compute_weights(h - h.mean(1, keepdims=True), x.astype(np.float64))
    np.testing.assert_allclose(got.cpu(), want, rtol=1e-5)


def test_directions_of_any_size(device):
    x = np.random.default_rng(6).standard_normal((9, 40)).astype(np.float32)
    h = np.random.default_rng(7).standard_normal((3, 9)) * np.array([[1e-200], [1.0], [0.0]])
    got = cca.variate_weights(torch.from_numpy(h).to(device), torch.from_numpy(x).to(device))
    want = compute_weights(h - h.mean(1, keepdims=True), x.astype(np.float64))
    np.testing.assert_allclose(got.cpu()[1:], want[1:], rtol=1e-5)


def test_launch_settings():
    assert cca.choose(128, 4, 3, (9, 0)).block_n == 64
    assert cca.choose(128, 4, 1, (9, 0)).block_n == 128
    assert cca.choose(128, 1, 3, (9, 0)).block_n == 128
    assert cca.choose(128, 1, 3, (10, 0)).block_n == 64
    assert cca.choose(64, 1, 2, (9, 0)).num_stages == 3
    assert cca.choose(64, 4, 0, (9, 0)).block_k == 64
