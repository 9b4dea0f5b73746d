"""Masked copies against the PyTorch path, and against the definition in NumPy."""

from __future__ import annotations

import numpy as np
import torch
from _draw import SEEDS, cells_and_ids
from _guard import pad_with_nan
from hypothesis import given
from hypothesis import strategies as st

from bench.common.tolerances import OUTPUT, Tol, as_numpy, assert_close
from repsim_kernels.forward.masks import mask_for_cells
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton.masked_copies import (
    AOT_CASES,
    Epilogue,
    Launch,
    ablate,
    choose,
    floor,
    unsupported,
)

DTYPES = ("float32", "float16", "bfloat16")
# Triton's interpreter truncates to bfloat16, where a GPU rounds.
ROUNDING = OUTPUT | ({"bfloat16": 2 * OUTPUT["bfloat16"]} if _launch.is_interpreted() else {})
BITS = {4: torch.int32, 2: torch.int16}
LAUNCHES = (None, Launch(16, 1, 4), Launch(16, 2, 4), Launch(32, 16, 4))


@st.composite
def activations(draw, special=True, layouts=("dense", "gaps", "expanded")):
    """Draw (n, …) in any memory order, with NaN, infinities and zeros of both signs."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
    order = draw(st.permutations(range(len(shape))))
    layout = draw(st.sampled_from(layouts))
    rng = np.random.default_rng(draw(SEEDS))
    x = rng.standard_normal([shape[d] for d in order]) * 4
    if special:
        replace = rng.random(x.shape) < 0.3
        x[replace] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 6.0], replace.sum())
    t = torch.from_numpy(x).to(dtype)
    if layout == "gaps":
        t = t.repeat_interleave(2, -1)[..., ::2]
    elif layout == "expanded":
        t = t[..., :1].expand(t.shape)
    return t.permute([order.index(d) for d in range(len(shape))])


def select_masks(table, ids, units):
    """Return the units of each cell in ids as masks (C, …)."""
    masks = table[ids] if table.dtype == torch.bool else table == ids[:, None]
    return masks.view(-1, *units)


def as_bits(t):
    return t.contiguous().view(BITS[t.dtype.itemsize])


def list_strides(t):
    """List the strides of dimensions larger than 1."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


@given(st.data())
def test_copies_keep_bits_and_memory_order(device, data):
    x = data.draw(activations()).to(device)
    table, ids = (
        t.to(device) for t in data.draw(cells_and_ids(x[0].numel(), min_size=0, max_size=5))
    )
    got = ablate(
        pad_with_nan(x) if 0 not in x.stride() else x,
        table,
        ids,
        launch=data.draw(st.sampled_from(LAUNCHES)),
    )
    assert len(got) == len(ids) * len(x)
    if len(ids):
        want = mask_for_cells(x, select_masks(table, ids, x.shape[1:]))
        assert torch.equal(as_bits(got), as_bits(want))
        assert list_strides(got) == list_strides(want)
    if len(ids) == 1:
        assert got.stride() == want.stride()  # the next layer's algorithm depends on the strides


@given(st.data(), st.sampled_from(["relu", "relu6"]))
def test_relu_is_exact_and_treats_nan_like_torch(device, data, activate):
    x = data.draw(activations()).to(device)
    table, ids = (
        t.to(device) for t in data.draw(cells_and_ids(x[0].numel(), min_size=0, max_size=5))
    )
    got = ablate(
        x,
        table,
        ids,
        epilogue=Epilogue(activate=activate),
        launch=data.draw(st.sampled_from(LAUNCHES)),
    )
    function = getattr(torch.nn.functional, activate)
    want = function(mask_for_cells(x, select_masks(table, ids, x.shape[1:]))) if len(ids) else x[:0]
    assert_same(got, want)


def assert_same(got, want):
    """Check that two tensors are equal; NaN equals NaN."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    np.testing.assert_array_equal(as_numpy(got), as_numpy(want))


@given(st.data(), st.sampled_from(["none", "relu", "relu6"]))
def test_batch_norm(device, data, activate):
    x = data.draw(activations(special=False).filter(lambda t: t.ndim > 1)).to(device)
    table, ids = (
        t.to(device) for t in data.draw(cells_and_ids(x[0].numel(), min_size=0, max_size=5))
    )
    rng = np.random.default_rng(data.draw(SEEDS))
    scale, shift = rng.standard_normal((2, x.shape[1])).astype(np.float32)
    got = ablate(
        x,
        table,
        ids,
        epilogue=Epilogue(
            (
                pad_with_nan(torch.from_numpy(scale).to(device)),
                pad_with_nan(torch.from_numpy(shift).to(device)),
            ),
            activate,
        ),
        launch=data.draw(st.sampled_from(LAUNCHES)),
    )
    masks = as_numpy(select_masks(table, ids, x.shape[1:])) > 0
    channel = (1, -1, *[1] * (x.ndim - 2))
    scaled = np.where(masks[:, None], 0, as_numpy(x)) * scale.reshape(channel)
    want = scaled + shift.reshape(channel)
    if activate != "none":
        want = np.clip(want, 0, 6 if activate == "relu6" else None)
    largest = np.abs(scaled).max(initial=0) + np.abs(shift).max()
    rounding = Tol(ROUNDING[str(x.dtype)[6:]], 2.0**-23 * largest)
    assert got.dtype == x.dtype
    assert_close(got, want.reshape(-1, *x.shape[1:]), rounding)


def test_nan_and_infinity_in_masked_units_become_zero(device):
    x = torch.tensor([[torch.nan, 2], [torch.inf, torch.nan]], device=device)
    ones = torch.ones(2, device=device)
    got = ablate(
        x,
        torch.tensor([1, 0], device=device),
        torch.tensor([0, 1], device=device),
        epilogue=Epilogue((ones, 3 * ones), "relu"),
    )
    nan, inf = torch.nan, torch.inf
    assert_same(got, torch.tensor([[nan, 3.0], [inf, 3.0], [3.0, 5.0], [3.0, nan]]))


def test_one_launch_for_any_number_of_cells(device, launches):
    x = torch.randn(3, 40, device=device)
    cells = torch.arange(40, device=device) % 7
    got = ablate(x, cells, torch.arange(7, device=device), launch=Launch(16, 3, 4))
    # 3 stimuli of 3 blocks each, 7 cells in groups of 3
    assert [launch["grid"] for launch in launches] == [(3 * 3, 3)]
    assert len(got) == 21


def test_launch_settings():
    many = choose(50, 96 * 112 * 112, 16, torch.float32, (9, 0))
    assert many == Launch(1024, 16, 4)
    assert choose(50, 4096, 16, torch.float32, (9, 0)) == Launch(1024, 3, 4)  # 1200 programs
    assert choose(1, 1, 1, torch.float16, (8, 0)) == Launch(16, 1, 4)
    assert floor(50, 1000, 16, torch.float16).bytes == 17 * 50 * 1000 * 2 + 8 * 1000


def test_unsupported_dtypes(device):
    assert unsupported(torch.zeros(2, 3, device=device)) is None
    assert "not float64" in unsupported(torch.zeros(2, 3, dtype=torch.float64, device=device))


def test_compile_cases_cover_the_study():
    names = [case.name for case in AOT_CASES]
    assert len(set(names)) == len(names)
    for network in ("alexnet", "mobilenet", "resnet"):
        assert {n.split(", ")[1] for n in names if n.startswith(network)} == {"float32", "bfloat16"}
