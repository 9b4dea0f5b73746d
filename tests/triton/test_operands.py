"""Operands of products: their layout, scales and halves, and the accuracy of products of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from _draw import KINDS, TORCH_LAYOUTS, labels, representations
from _guard import pad_with_nan
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import GRAM, assert_gram_close
from repsim_kernels.kernels.triton import gram, operands

few_examples = settings(max_examples=12)
FORM = operands.Format(width=16, pad=32, chunk=32, dtype=torch.float16, split=True, mixed=False)
DTYPES = ("float32", "float16", "bfloat16")
inputs = representations(st.integers(2, 40), st.integers(1, 90), KINDS, DTYPES, TORCH_LAYOUTS)


def make(x, cells, n_cells, form=FORM, shifts=False):
    """Return the operands of all neurons, and the labels that they are made from."""
    numbers, total = operands.number_cells(cells, n_cells, x.device)
    (made,) = operands.iter_operands(x, numbers, total, form, shifts)
    return made, numbers.cpu().numpy()


def read_rows(made, cell):
    """Return the rows of a cell, padding included, in units of x: (rows, planes x width)."""
    first, last = (int(i) for i in made.slots[cell : cell + 2])
    items = made.items[first:last].cpu().numpy()
    rows = np.concatenate([np.arange(a, b) for a, b, _ in items]) if len(items) else []
    assert all(items[:, 2] == cell)
    halves = made.hi.double() + (made.lo.double() if made.format.split else 0)
    factor = math.ldexp(1, 14 - math.frexp(float(made.maxima[0, cell]))[1]) / 2
    return halves.movedim(0, 1).flatten(1).cpu().numpy()[rows] / factor


@few_examples
@given(st.data())
def test_rows_are_the_neurons_of_a_cell_relative_to_the_first_stimulus(device, data):
    x = data.draw(inputs)
    cells, n_cells = data.draw(labels(x.p))
    made, _ = make(pad_with_nan(x.torch().to(device)), cells, n_cells)
    values = x.values()
    difference = (values - values[0]).T
    for c in range(n_cells):
        rows, want = read_rows(made, c), difference[cells == c]
        assert len(rows) == -(-len(want) // 32) * 32
        assert not rows[len(want) :].any()
        assert not rows[:, x.n :].any()
        # Two halves keep 22 bits, down to a 2^-24th of the units of the largest.
        largest = np.abs(want).max(initial=0)
        np.testing.assert_allclose(
            rows[: len(want), : x.n], want, rtol=2.0**-21, atol=2.0**-37 * largest
        )
        assert made.sums[0, c] == want.any(1).sum()


@few_examples
@given(st.data())
def test_overlapping_cells_and_partitions(device, data):
    """Both become partitions, of which each has its own copy of a neuron."""
    x = data.draw(inputs)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    member = rng.random((3, x.p)) < 0.5
    tables = rng.integers(-1, 3, (2, x.p))
    difference = (x.values() - x.values()[0]).T
    values = x.torch().to(device)
    for cells, n_cells, chosen in (
        (member, 3, list(member)),
        (tables, 3, [table == c for table in tables for c in range(3)]),
    ):
        made, _ = make(values, cells, n_cells)
        assert made.n_cells == len(chosen)
        for c, own in enumerate(chosen):
            rows = read_rows(made, c)[: own.sum(), : x.n]
            largest = np.abs(difference[own]).max(initial=0)
            np.testing.assert_allclose(
                rows, difference[own], rtol=2.0**-21, atol=2.0**-37 * largest
            )


def test_halves_fit_in_float16(device):
    """The largest difference becomes 2^13 … 2^14, whatever its magnitude."""
    values = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    for magnitude in (1e-33, 1.0, 1e30, 1e38):
        made, _ = make((values * magnitude).clamp(-3.4e38, 3.4e38).to(device), np.zeros(40, int), 1)
        assert 2.0**13 <= float(made.hi[:, :40].abs().max()) <= 2.0**15
        assert torch.isfinite(made.hi[:, :40]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_stored_exactly_unless_means_are_large(device, dtype):
    rng = torch.Generator().manual_seed(0)
    small, large = torch.randn(9, 30, generator=rng), torch.randn(9, 30, generator=rng) + 50
    x = torch.cat([small, large], 1).to(dtype)
    form = replace(FORM, mixed=True)
    made, _ = make(x.to(device), np.repeat([0, 1], 30), 2, form)
    before, after = made.sums[1:].cpu().double()
    centred = x.double() - x.double().mean(0)
    for c in (0, 1):
        own = slice(30 * c, 30 * c + 30)
        np.testing.assert_allclose(before[c], x[:, own].double().square().sum(), rtol=1e-5)
        np.testing.assert_allclose(after[c], centred[:, own].square().sum(), rtol=1e-4)
    assert (before <= 4 * after).tolist() == [True, False]
    stored = made.hi.movedim(0, 1).flatten(1)[:30, :9].cpu().double()
    ratio = stored / x[:, :30].T.double()
    assert (ratio == ratio[0, 0]).all()
    assert math.frexp(float(ratio[0, 0]))[0] == 0.5  # a power of two


def draw_hard(kind: str, n: int, p: int) -> np.ndarray:
    """Return rectified activations, float64, with what is hard for short products."""
    rng = np.random.default_rng(7)
    x = np.maximum(rng.standard_normal((n, p)), 0)
    if kind == "spread":
        x *= 10.0 ** rng.uniform(-4, 4, p)
    elif kind == "outlier":
        x[3, 5] = 1e6
    elif kind == "outlying first stimulus":
        x[0] *= 1e3
    elif kind == "large means":
        x += 100
    elif kind == "huge constant":
        x[:, ::7] = 1e30
    return x


HARD = ("relu", "spread", "outlier", "outlying first stimulus", "large means", "huge constant")


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hard_inputs_stay_within_the_budget(device, kind, dtype):
    x = torch.from_numpy(draw_hard(kind, 30, 700)).to(dtype)
    if dtype == torch.float16:
        x = x.clamp(-6e4, 6e4)
    want = rk.centered_gram(x.double(), backend="reference")
    got = gram.centered_gram(x.to(device), kernel="linear", sigma=None)
    assert_gram_close(got, want, GRAM["tf32x3"])
    single = gram.centered_gram(x.to(device), kernel="linear", sigma=None, precision="tf32")
    assert_gram_close(single, want, GRAM["tf32"])


@pytest.mark.parametrize("ratio", [1e-8, 1e-20])
def test_a_cell_of_tiny_neurons_keeps_its_digits(device, ratio):
    x = torch.from_numpy(draw_hard("relu", 20, 300)).float()
    x[:, 200:] *= ratio
    cells = np.repeat([0, 1], [200, 100])
    got = gram.cell_grams(x.to(device), cells=cells, n_cells=2)
    want = rk.cell_grams(x.double(), cells, backend="reference")
    assert_gram_close(got, want, GRAM["tf32x3"])


def split(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hi = y.astype(np.float16).astype(np.float32)
    return hi, (y - hi).astype(np.float16).astype(np.float32)


def truncate(value: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Cut a sum to float32 toward zero, as tensor cores do."""
    rounded = (like.astype(np.float64) + value).astype(np.float32)
    exact = like.astype(np.float64) + value
    return np.where(np.abs(rounded) > np.abs(exact), np.nextafter(rounded, np.float32(0)), rounded)


def emulate(x: np.ndarray, inner: int = 512) -> np.ndarray:
    """Return the Gram of x as a GPU computes it: accumulators are cut after every 16 neurons."""
    d = (x.astype(np.float32) - x[0].astype(np.float32)).astype(np.float32)
    factor = 2.0 ** (13 - np.floor(np.log2(np.abs(d).max())))
    hi, lo = split((d * np.float32(factor)).astype(np.float32))
    total = np.zeros((len(x), len(x)), np.float32)
    for start in range(0, x.shape[1], inner):
        part = np.zeros_like(total)
        for step in range(start, min(start + inner, x.shape[1]), 16):
            a, b = (half[:, step : step + 16].astype(np.float64) for half in (hi, lo))
            for product in (a @ a.T, a @ b.T, b @ a.T):
                part = truncate(product, part)
        total += part
    g = total.astype(np.float64) / factor**2
    return g - g.mean(0) - g.mean(1)[:, None] + g.mean()


@pytest.mark.parametrize("kind", HARD[:5])
def test_truncation_by_tensor_cores_stays_within_the_budget(kind):
    """The interpreter rounds to nearest, so this emulates the tensor cores."""
    x = draw_hard(kind, 40, 4096).astype(np.float32)
    want = rk.centered_gram(x.astype(np.float64), backend="reference")
    assert_gram_close(emulate(x), want, GRAM["tf32x3"])


def emulate_one_product(x: np.ndarray, inner: int = 512) -> np.ndarray:
    """Return the Gram of 16-bit x as a GPU computes it from the values as they are."""
    total = np.zeros((len(x), len(x)), np.float32)
    for start in range(0, x.shape[1], inner):
        part = np.zeros_like(total)
        for step in range(start, min(start + inner, x.shape[1]), 16):
            a = x[:, step : step + 16].astype(np.float64)
            part = truncate(a @ a.T, part)
        total += part
    g = total.astype(np.float64)
    return g - g.mean(0) - g.mean(1)[:, None] + g.mean()


@pytest.mark.parametrize("n", [40, 300])
def test_one_product_is_accurate_where_cells_keep_their_digits(n):
    """The mean has 3 times the energy of the deviations, the most that `keeps_digits` accepts."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((n, 2048)) + 3**0.5).astype(np.float16).astype(np.float64)
    want = rk.centered_gram(x, backend="reference")
    assert_gram_close(emulate_one_product(x), want, GRAM["tf32x3"])
