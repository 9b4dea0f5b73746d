"""Products of masked activations against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import SEEDS, cells_and_ids
from _guard import pad_with_nan
from hypothesis import given
from hypothesis import strategies as st

from bench.common.tolerances import GRAM, OUTPUT, Tol, as_numpy, assert_close
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton.masked_pointwise import (
    AOT_CASES,
    Launch,
    _pack_bits,
    choose,
    floor,
    masked_pointwise,
    unsupported,
)

# Triton's interpreter truncates to bfloat16, where a GPU rounds.
ROUNDING = OUTPUT | ({"bfloat16": 2 * OUTPUT["bfloat16"]} if _launch.is_interpreted() else {})
DTYPES = ("float32", "float16", "bfloat16")
# Several tiles of cells, pixels, outputs, steps and accumulators.
LAUNCHES = (
    Launch(1, 16, 16, 16, 16, 4, 1),
    Launch(2, 16, 16, 16, 32, 4, 2),
    Launch(4, 8, 16, 16, 16, 4, 1),
    Launch(8, 4, 32, 32, 32, 4, 1),
)


@st.composite
def layers(draw):
    """Draw an activation, the weight of a layer for it, and optional bias and scale."""
    dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
    n, channels, outs = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.integers(1, 20))
    inner = draw(st.lists(st.integers(1, 4), max_size=2))  # pixels or tokens
    convolution = bool(inner) and draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(SEEDS))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x = normal(n, *inner, channels).to(dtype)
    layout = draw(st.sampled_from(["last", "first", "stimuli inside", "gaps"]))
    if layout == "first":
        x = x.movedim(-1, 1).contiguous().movedim(1, -1)
    elif layout == "stimuli inside":
        x = x.movedim(0, -1).contiguous().movedim(-1, 0)
    elif layout == "gaps":
        x = x.repeat_interleave(2, -1)[..., ::2]
    kernel = (1,) * len(inner) if convolution else ()
    weight = normal(outs, channels, *kernel).to(dtype)
    bias = normal(outs).to(dtype) if draw(st.booleans()) else None
    scale = normal(outs) if draw(st.booleans()) else None
    return x.movedim(-1, 1) if convolution else x, weight, bias, scale


def mask_copies(x, table, ids):
    """Return the masked copies of x, (C, n, …) in float64."""
    masks = as_numpy(table[ids] if table.dtype == torch.bool else table == ids[:, None]) > 0
    return np.where(masks.reshape(-1, 1, *x.shape[1:]), 0, as_numpy(x))


def assert_is_layer(got, x, table, ids, weight, bias, scale, activate, precision="tf32x3"):
    """Compare with the layer's output on the masked activation, channels in the same place."""
    at = 2 if weight.ndim > 2 else -1
    rows = np.moveaxis(mask_copies(x, table, ids), at, -1)
    w = as_numpy(weight.flatten(1))
    want = rows @ w.T
    # Rounding in the products is relative to the norms of the factors.
    size = np.linalg.norm(rows, axis=-1).max() * np.linalg.norm(w, axis=-1).max()
    if scale is not None:
        want, size = want * as_numpy(scale), size * np.abs(as_numpy(scale)).max()
    if bias is not None:
        want = want + as_numpy(bias)
    if activate != "none":
        want = np.clip(want, 0, 6 if activate == "relu6" else None)
    want = np.moveaxis(want, -1, at).reshape(got.shape)
    assert got.dtype == x.dtype
    assert_close(got, want, Tol(max(ROUNDING[str(x.dtype)[6:]], 1e-6), GRAM[precision] * size))


def pad_on_device(device, *tensors):
    return [None if t is None else pad_with_nan(t.to(device)) for t in tensors]


@given(st.data(), st.sampled_from(["none", "relu", "relu6"]), st.sampled_from(LAUNCHES))
def test_layers_in_every_layout(device, data, activate, launch):
    x, weight, bias, scale = pad_on_device(device, *data.draw(layers()))
    table, ids = (t.to(device) for t in data.draw(cells_and_ids(x[0].numel())))
    got = masked_pointwise(
        x, table, ids, weight, bias, scale=scale, activate=activate, launch=launch
    )
    assert_is_layer(got, x, table, ids, weight, bias, scale, activate)


@pytest.mark.parametrize("precision", _launch.PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_settings(device, precision, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 5, 5, generator=generator).to(device, dtype)
    weight = torch.randn(70, 40, 1, 1, generator=generator).to(device, dtype)
    table = torch.randint(-1, 6, (1000,), generator=generator).to(device)
    ids = torch.tensor([5, 0, 1, 3, 2], device=device)
    got = masked_pointwise(x, table, ids, weight, precision=precision)
    assert_is_layer(got, x, table, ids, weight, None, None, "none", precision)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(device, layout):
    x = torch.randn(2, 3, 4, 5, device=device).to(memory_format=layout)
    weight = torch.randn(6, 3, 1, 1, device=device)
    cells = torch.arange(60, device=device) % 2
    got = masked_pointwise(x, cells, torch.tensor([0, 1, 1], device=device), weight)
    assert got.shape == (6, 6, 4, 5)
    assert got.is_contiguous(memory_format=layout)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # from NumPy, in the interpreter
def test_unmasked_nan_stays(device):
    x = torch.ones(2, 17, 1, 3, device=device)
    x[0, 16, 0, 1], x[1, 2, 0, 2] = torch.nan, torch.inf
    cells = torch.zeros(17, 1, 3, dtype=torch.int64, device=device)
    cells[16, 0, 1], cells[2, 0, 2] = 1, 2
    got = masked_pointwise(
        x,
        cells.flatten(),
        torch.tensor([1, 2], device=device),
        torch.ones(4, 17, 1, 1, device=device),
        activate="relu",
        launch=LAUNCHES[1],
    ).view(2, 2, 4, 3)
    nan, inf = torch.nan, torch.inf
    want = [[[17, 16, 17], [17, 16, inf]], [[17, nan, 16], [17, 17, 16]]]
    np.testing.assert_array_equal(as_numpy(got), np.repeat(np.array(want)[:, :, None], 4, 2))


def test_no_cells(device):
    x, weight = torch.ones(2, 3, device=device), torch.ones(4, 3, device=device)
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    assert masked_pointwise(x, torch.zeros(3, device=device).long(), ids, weight).shape == (0, 4)


def test_packed_bits():
    masks = torch.from_numpy(np.random.default_rng(0).random((11, 5)) < 0.5)
    bits = np.unpackbits(_pack_bits(masks).numpy()[:, None], axis=1, bitorder="little")
    np.testing.assert_array_equal(bits.reshape(16, 5)[:11], masks)
    assert not bits.reshape(16, 5)[11:].any()


def test_cells_share_reads_in_one_launch(device, launches):
    x = torch.randn(3, 5, 4, 4, device=device)
    masked_pointwise(
        x,
        torch.arange(80, device=device) % 5,
        torch.arange(5, device=device),
        torch.randn(20, 5, 1, 1, device=device),
        launch=Launch(4, 8, 16, 16, 16, 4, 1),
    )
    # 48 pixels in tiles of 8, 20 outputs in tiles of 16, 5 cells in groups of 4
    assert [launch["grid"] for launch in launches] == [(6 * 2 * 2,)]


def test_launch_settings():
    for cells, outs in ((1, 1), (3, 32), (16, 33), (100, 4096)):
        for dtype in (torch.float32, torch.bfloat16):
            for precision in _launch.PRECISIONS:
                conf = choose(outs, cells, dtype, precision, (9, 0))
                assert 8 % conf.cells == 0  # a program's cells share one byte
                assert conf.inner % conf.depth == 0
                assert conf.inner <= 1024
                assert conf.outs >= min(outs, 32)
    assert floor(50, 96, 24, 16, torch.float16, "tf32") == _launch.Floor(
        2 * (50 * 96 + 96 * 24 + 16 * 50 * 24), 2 * 16 * 50 * 96 * 24, "tf32"
    )


def test_unsupported_layers(device):
    x = torch.zeros(2, 3, 4, 4, device=device)
    point, three = torch.zeros(5, 3, 1, 1, device=device), torch.zeros(5, 3, 3, 3, device=device)
    assert unsupported(x, point) is None
    assert unsupported(x, torch.zeros(5, 4, device=device)) is None
    for weight in (three, point[..., 0]):
        assert "1x1 convolutions" in unsupported(x, weight)
    assert "dtype" in unsupported(x, point.half())
    assert "dtype" in unsupported(x, point, torch.zeros(5, device=device).half())
    assert "not float64" in unsupported(x.double(), point.double())


def test_compile_cases_cover_the_study():
    names = [case.name for case in AOT_CASES]
    assert len(set(names)) == len(names)
    for layer in ("mobilenet 96 to 24", "resnet 2048 to 512", "linear 9216 to 4096"):
        for dtype in ("float32", "bfloat16"):
            assert f"{layer}, {dtype}" in names
