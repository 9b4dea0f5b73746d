"""Grams of all layers and the products of all pairs by the kernels, against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from _draw import TORCH_DTYPES
from _guard import pad_with_nan, spread_in_memory
from _layer_grams import assert_products_close, compare, layers, make_grams, multiply_grams
from hypothesis import example, given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import GRAM, SAME, assert_close
from repsim_kernels.kernels.triton import layer_grams
from repsim_kernels.kernels.triton._operand_kernels import find_tile
from repsim_kernels.kernels.triton.gram import Launch

few_examples = settings(max_examples=12)
# Tiles, accumulators and pieces smaller than the drawn sizes.
SMALL = Launch(block_n=16, block_p=16, inner=16, chunk=23, num_warps=4, num_stages=2)


def draw_normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def to_device(xs, device):
    return [pad_with_nan(x.to(device)) for x in xs]


def assert_grams_right(grams, xs, debiased, tolerance):
    """Assert that the products of Grams with each other are those of the reference.

    Relative to the Grams before U-centring, which may leave only rounding.
    """
    xs = [x.cpu() for x in xs]
    got = multiply_grams(grams, grams, len(xs[0]), "triton", debiased)
    norms = compare(xs, xs, "reference", False)[1:]
    assert_products_close(got, compare(xs, xs, "reference", debiased), norms, tolerance)


@few_examples
@given(data=st.data(), debiased=st.booleans(), precision=st.sampled_from(["float32", "float64"]))
def test_layers_match_the_reference(device, data, debiased, precision):
    xs = data.draw(layers(4 if debiased else 2, TORCH_DTYPES))
    grams, traces, floors = make_grams(to_device(xs, device), "triton", debiased, precision)
    exact = precision == "float64" or all(x.dtype == torch.float64 for x in xs)
    assert_grams_right(grams, xs, debiased, 1e-11 if exact else GRAM["tf32x3"])
    _, want_traces, want_floors = make_grams(xs, "reference", debiased)
    relative = SAME.relative if exact else GRAM["tf32x3"]
    assert_close(traces, want_traces, replace(SAME, relative=relative))
    assert_close(floors, want_floors, replace(SAME, relative=2 * relative))
    assert all(a.dtype == torch.float64 for a in (grams, traces, floors))


@few_examples
@given(data=st.data(), debiased=st.booleans())
def test_grams_of_neurons_add_up(device, data, debiased):
    xs = data.draw(layers(4 if debiased else 2, ("float64",)))
    whole = [torch.cat([x, x**2], 1) for x in xs]
    parts = [make_grams(to_device(ys, device), "triton", debiased)[0] for ys in (whole, xs)]
    rest = make_grams(to_device([x**2 for x in xs], device), "triton", debiased)[0]
    assert_grams_right(parts[1] + rest, whole, debiased, 1e-11)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pieces_and_tiles(device, dtype, debiased):
    """Several tiles of stimuli, and several pieces of most layers, the last one shorter."""
    widths = (1, 22, 23, 24, 100)
    xs = [draw_normal(37, p, seed=p).to(getattr(torch, dtype)) + 3 for p in widths]
    options = {"debiased": debiased, "precision": "float32", "launch": SMALL}
    first = layer_grams.layer_grams(to_device(xs, device), **options)
    assert_grams_right(first[0], xs, debiased, 1e-11 if dtype == "float64" else GRAM["tf32x3"])
    again = layer_grams.layer_grams(to_device(xs, device), **options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_one_launch_makes_all_grams_and_one_all_products(device, launches):
    xs = [draw_normal(20, p, seed=p).to(device) for p in (1, 19, 300)]
    grams, _, _ = make_grams(xs, "triton", False, "float32")
    multiply_grams(grams, grams[:2], 20, "triton", False)
    assert [record["kernel"] for record in launches] == ["_grams_kernel", "_products_kernel"]


@pytest.mark.parametrize("rows", [1, 33])
def test_many_pairs(device, rows):
    xs = [draw_normal(9, 5, seed=i) for i in range(36)]
    grams, _, _ = make_grams(to_device(xs, device), "triton", True)
    got = multiply_grams(grams[:rows], grams, 9, "triton", True)
    want = compare(xs[:rows], xs, "reference", True)
    assert_products_close(got, want, want[1:], 1e-11)


def test_grams_may_be_stored_in_float32(device):
    xs = [draw_normal(20, p, seed=p) for p in (19, 300)]
    grams, _, _ = make_grams(to_device(xs, device), "triton", True)
    assert_grams_right(grams.float(), xs, True, 1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_layer_that_is_not_finite_affects_its_own_products_alone(device, bad):
    xs = [draw_normal(9, 12, seed=i) for i in range(3)]
    want = compare(to_device(xs, device), to_device(xs, device), "triton", True)
    xs[1][3, 4] = bad
    _, traces, _ = make_grams(to_device(xs, device), "triton", True)
    assert torch.equal(traces.isfinite().cpu(), torch.tensor([True, False, True]))
    got = compare(to_device(xs, device), to_device(xs, device), "triton", True)
    for a, b in zip(got, want, strict=True):
        assert a[1].isnan().all()
        others = np.ix_(*[[0, 2]] * a.ndim)
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("debiased", [False, True])
def test_the_gram_of_a_constant_layer_is_zero(device, debiased):
    xs = to_device([torch.full((5, 3), 0.1), torch.eye(5)[:, :4]], device)
    grams, traces, floors = make_grams(xs, "triton", debiased, "float32")
    assert (grams[0] == 0).all()
    assert traces[0] == floors[0] == 0


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_layers_out_of_range_of_float32_are_multiplied_in_float64(device, launches, magnitude):
    xs = [draw_normal(9, 12), draw_normal(9, 12, seed=1) * magnitude]
    grams, _, _ = make_grams(to_device(xs, device), "triton", True, "float32")
    assert [str(record["SUM"]) for record in launches] == ["fp32", "fp64"]
    got = multiply_grams(grams, grams, 9, "triton", True)
    want = compare(xs, xs, "reference", True)
    assert_products_close(got, want, want[1:], GRAM["tf32x3"])


def test_layers_of_which_float32_keeps_too_few_digits_are_multiplied_in_float64(device, launches):
    xs = [torch.eye(9) + 1e-4 * draw_normal(9, 9)]
    grams, _, _ = make_grams(to_device(xs, device), "triton", True, "float32")
    assert [str(record["SUM"]) for record in launches] == ["fp32", "fp64"]
    got = multiply_grams(grams, grams, 9, "triton", True)
    want = compare(xs, xs, "reference", True)
    assert_products_close(got, want, want[1:], 1e-7)


def test_views_are_read_in_place_or_copied(device):
    x = draw_normal(12, 40).to(device)
    for view in (x[:, 3:17], x[2:9], x.mT, x[:, ::2], x[::2], x[:1].expand(6, 40)):
        grams, _, _ = make_grams([view], "triton", False)
        assert_grams_right(grams, [view], False, 1e-11)


@pytest.mark.parametrize("strides", [(2**30 + 1, 1), (1, 2**30 + 1)])
def test_offsets_beyond_32_bits(device, strides):
    x = spread_in_memory(draw_normal(4, 4).to(device), strides)
    grams, _, _ = make_grams([x], "triton", False)
    assert_grams_right(grams, [x.contiguous()], False, 1e-11)


@triton.jit
def _find_kernel(at_ptr, i_ptr, j_ptr):
    i, j = find_tile(tl.load(at_ptr))
    tl.store(i_ptr, i)
    tl.store(j_ptr, j)


@given(row=st.integers(0, layer_grams.MAX_STIMULI - 1), data=st.data())
@example(row=layer_grams.MAX_STIMULI - 1, data=None)
def test_entries_are_numbered_row_by_row(device, row, data):
    col = row if data is None else data.draw(st.sampled_from([0, row]) | st.integers(0, row))
    at, i, j = torch.zeros(3, 1, dtype=torch.int32, device=device)
    at.fill_(row * (row + 1) // 2 + col)
    _find_kernel[(1,)](at, i, j)
    assert (i.item(), j.item()) == (row, col)


def test_more_entries_than_32_bits_can_number_are_refused(device):
    n = layer_grams.MAX_STIMULI
    x = torch.ones(1, 1, device=device)
    assert layer_grams.unsupported([x.expand(n, 1)]) is None
    assert layer_grams.unsupported([x.expand(2, 10**9)]) is None
    assert layer_grams.unsupported(*[x.expand(2, n * (n + 3) // 2)] * 2) is None
    # From the torch backend, whose rows have no shifts.
    grams = x.expand(2, (n + 1) * (n + 2) // 2)
    for arguments in ([[x.expand(n + 1, 1)]], [grams, grams]):
        assert "at most 46,339 stimuli" in layer_grams.unsupported(*arguments)
    xs = [draw_normal(9, 5)]
    assert make_grams(xs, "torch", True)[0].shape[1] >= 9 * 10 // 2


def test_minibatches_agree_with_the_torch_backend(device, monkeypatch):
    layers = [draw_normal(16, p, seed=p).to(device) for p in (3, 16, 200)]
    maps = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("REPSIM_BACKEND", backend)
        accumulator = rk.MinibatchCKA()
        for batch in (slice(0, 9), slice(9, 16)):
            accumulator.update([x[batch] for x in layers], [(x**2)[batch] for x in layers])
        maps.append(accumulator.compute().values)
    np.testing.assert_allclose(maps[1], maps[0], rtol=0, atol=1e-5)


def test_launch_settings():
    settings = [layer_grams.choose(n, 10**6) for n in (2, 17, 50, 500)]
    assert [s.block_n for s in settings] == [16, 32, 64, 64]
    assert [s.num_warps for s in settings] == [4, 8, 8, 8]
    assert [layer_grams.choose(50, p).chunk for p in (10, 10**6, 10**9)] == [512, 3584, 8192]
    assert layer_grams.choose(1000, 10**9).chunk == 32_000
