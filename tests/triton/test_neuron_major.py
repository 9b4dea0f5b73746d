"""Neuron-major activations are bit-identical to PyTorch's own copy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _draw import SEEDS
from _guard import pad_with_nan, spread_in_memory
from hypothesis import given
from hypothesis import strategies as st

from repsim_kernels.kernels.triton import neuron_major as module
from repsim_kernels.kernels.triton.neuron_major import Launch, neuron_major

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALL = Launch(block_p=4, block_n=8, num_warps=1)


def in_memory_order(
    shape: tuple[int, ...],
    order: tuple[int, ...],
    dtype: torch.dtype,
    steps: tuple[int, ...] = (1, 1, 1, 1),
    seed: int = 0,
) -> torch.Tensor:
    """Draw random bits with the dimensions in this memory order and a step along each."""
    memory = torch.zeros([shape[d] * steps[d] for d in order], dtype=dtype)
    strided = memory.permute(tuple(np.argsort(order)))
    x = strided[tuple(slice(None, None, step) for step in steps[: len(shape)])]
    bits = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    return x.copy_(torch.frombuffer(bytearray(bits), dtype=dtype).view(shape))


@st.composite
def activations(draw: st.DrawFn) -> torch.Tensor:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    steps = tuple(draw(st.sampled_from([1, 1, 1, 2])) for _ in shape)
    return in_memory_order(shape, order, draw(st.sampled_from(DTYPES)), steps, draw(SEEDS))


def assert_copied(x: torch.Tensor, launch: Launch | None = None) -> torch.Tensor:
    out = neuron_major(x, launch=launch)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    bits = f"int{8 * x.dtype.itemsize}"
    want = x.cpu().contiguous().view(getattr(torch, bits)).numpy().reshape(len(x), -1).T
    np.testing.assert_array_equal(out.cpu().view(getattr(torch, bits)).numpy(), want)
    return out


@given(x=activations(), launch=st.sampled_from([None, SMALL]))
def test_shapes_orders_and_dtypes(x, launch, device):
    assert_copied(pad_with_nan(x.to(device)), launch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["contiguous", "channels_last"])
def test_sizes_not_divisible_by_the_tile(order, dtype, device):
    """More stimuli, channels and pixels than a tile holds."""
    x = pad_with_nan(in_memory_order((19, 13, 3, 5), order, dtype).to(device))
    assert_copied(x, SMALL)
    assert_copied(x)


@pytest.mark.parametrize(
    ("order", "neurons", "step"),
    [((0, 1, 2, 3), 13 * 15, 1), ((0, 2, 3, 1), 13, 15), ((0, 3, 2, 1), None, None)],
    ids=["contiguous", "channels_last", "neither"],
)
def test_reads_along_memory(order, neurons, step, device, launches):
    x = in_memory_order((4, 13, 3, 5), order, torch.float32).to(device)
    assert_copied(x)
    read = [(launch["inner"], launch["stride_inner"], launch["step_inner"]) for launch in launches]
    assert read == ([] if neurons is None else [(neurons, 1, step)])


@pytest.mark.parametrize(
    ("shape", "order"), [((5, 7), (1, 0)), ((5, 2, 3, 4), (1, 2, 3, 0)), ((1, 6), (0, 1))]
)
def test_neuron_major_input_is_not_copied(shape, order, device, launches):
    x = in_memory_order(shape, order, torch.float32).to(device)
    out = assert_copied(x)
    assert out.data_ptr() == x.data_ptr()
    assert not launches


def test_rows_with_gaps_are_copied(device, launches):
    x = torch.arange(60.0, device=device).view(6, 10)[:, :7].t()
    assert_copied(x, SMALL)
    assert [launch["stride_n"] for launch in launches] == [1]


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((5, 2, 2), (2**30 + 1, 1, 2)),
        ((2, 5, 2), (1, 2**30 + 1, 2)),
        ((2, 5), (3, 2**30 + 1)),
    ],
)
def test_offsets_beyond_32_bits(shape, strides, device):
    values = torch.arange(math.prod(shape), device=device).view(shape)
    assert_copied(spread_in_memory(values, strides))


def test_tiles_are_no_larger_than_needed():
    for n, inner in ((2, 1), (50, 64), (50, 193_600), (500, 2048), (10_000, 3)):
        for dtype in DTYPES:
            launch = module.choose(n, inner, dtype, (9, 0))
            assert launch.block_p * launch.block_n <= 4096
            for block, size in ((launch.block_p, inner), (launch.block_n, n)):
                assert block < 2 * size
