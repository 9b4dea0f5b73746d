"""Gram matrices of all neurons and of cells: each backend against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from _draw import (
    NUMPY_DTYPES,
    NUMPY_LAYOUTS,
    TORCH_DTYPES,
    TORCH_LAYOUTS,
    labels,
    memberships,
    representations,
)
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import GRAM, as_numpy, assert_gram_close
from repsim_kernels.kernels.torch import columns, memory


@given(representations(dtypes=NUMPY_DTYPES, layouts=NUMPY_LAYOUTS))
def test_centered_gram_of_numpy_arrays_matches_the_reference(x):
    got = rk.centered_gram(x.numpy())
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float64
    assert_gram_close(got, rk.centered_gram(x.values(), backend="reference"), GRAM["float64"])


@given(representations(dtypes=TORCH_DTYPES, layouts=TORCH_LAYOUTS))
def test_centered_gram_of_tensors_matches_the_reference(x):
    got = rk.centered_gram(x.torch())
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.float64
    assert_gram_close(got, rk.centered_gram(x.values(), backend="reference"), GRAM["float64"])


@given(representations(n=st.integers(4, 12)), st.sampled_from([0.3, 1.0, 2.5]))
def test_rbf_gram_matches_the_reference(x, sigma):
    options = {"kernel": "rbf", "sigma": sigma}
    x = x.values()
    try:
        want = rk.centered_gram(x, backend="reference", **options)
    except rk.ConstantError:
        with pytest.raises(rk.ConstantError, match="median"):
            rk.centered_gram(x, **options)
        return
    got = rk.centered_gram(x, **options)
    np.testing.assert_allclose(got, want, atol=1e-10)


@given(st.data())
def test_cell_grams_match_the_reference(data):
    x = data.draw(representations(dtypes=TORCH_DTYPES, layouts=TORCH_LAYOUTS))
    cells, n_cells = data.draw(labels(x.p))
    got = rk.cell_grams(x.torch(), cells, n_cells=n_cells)
    want = rk.cell_grams(x.values(), cells, n_cells=n_cells, backend="reference")
    scale = np.linalg.norm(x.values() - x.values().mean(0), axis=1).max() ** 2
    np.testing.assert_allclose(as_numpy(got), want, atol=1e-12 * scale, rtol=0)
    whole = rk.cell_grams(x.torch(), cells + 1, n_cells=n_cells + 1).sum(0)
    assert_gram_close(whole, rk.centered_gram(x.values(), backend="reference"), 1e-12)
    for c in range(n_cells):
        if not (cells == c).any():
            assert (got[c] == 0).all()


@given(st.data())
def test_cell_grams_of_a_membership_match_the_reference(data):
    x = data.draw(representations())
    cells = data.draw(memberships(x.p))
    got = rk.cell_grams(x.values(), cells)
    want = rk.cell_grams(x.values(), cells, backend="reference")
    scale = np.linalg.norm(x.values() - x.values().mean(0), axis=1).max() ** 2
    np.testing.assert_allclose(got, want, atol=1e-12 * scale, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_cell_grams_of_partitions_match_the_reference(backend):
    rng = np.random.default_rng(6)
    x, cells = rng.standard_normal((2, 6, 20)), rng.integers(-1, 3, (4, 20))
    got = rk.cell_grams(x, cells, batched=True, backend=backend)
    assert got.shape == (2, 4, 3, 6, 6)
    want = rk.cell_grams(x[1], cells[2], n_cells=3, backend="reference")
    np.testing.assert_allclose(got[1, 2], want, atol=1e-12)
    with pytest.raises(rk.CellError, match=r"shape \(4, 19\).* or partitions as integers"):
        rk.cell_grams(x, cells[:, 1:], batched=True)
    with pytest.raises(rk.CellError, match=r"shape \(4, 20\)"):
        rk.probe_paper(x[0], cells, np.arange(6) % 2, 1)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("block", [1, 7, 40])
@pytest.mark.parametrize("sizes", [(9, 0, 1, 8, 5), (4, 4, 5, 5, 5), (23,)])
@pytest.mark.parametrize(("n", "dtype"), [(5, "float64"), (50, "float32")])
def test_blocks_do_not_change_the_result(monkeypatch, block, order, sizes, n, dtype):
    """Several blocks of neurons, and runs of cells of equal or unequal size, some empty.

    Columns are gathered row by row, or neuron by neuron if x is stored that way.
    """
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((n, 23)) + 3).astype(dtype).astype(np.float64)
    cells = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)) - 1
    n_cells = len(sizes)
    membership = rng.random((4, 23)) < 0.4
    wants = [
        rk.cell_grams(x, c, n_cells=k, backend="reference")
        for c, k in ((cells, n_cells), (membership, 4))
    ]
    monkeypatch.setattr(memory, "BLOCK", block)
    monkeypatch.setattr(columns, "_COLUMNS", 1)
    monkeypatch.setattr(columns, "_SPAN", block)
    monkeypatch.setattr(columns, "_SMALL", block)
    z = x.astype(dtype, order=order)
    np.testing.assert_allclose(rk.cell_grams(z, cells, n_cells=n_cells), wants[0], atol=1e-12)
    np.testing.assert_allclose(rk.cell_grams(z, membership), wants[1], atol=1e-12)
    sparse = scipy.sparse.csr_array(membership)
    np.testing.assert_allclose(rk.cell_grams(z, sparse), wants[1], atol=1e-12)
    np.testing.assert_allclose(rk.centered_gram(z), (x - x.mean(0)) @ (x - x.mean(0)).T, atol=1e-12)


@pytest.mark.parametrize(
    ("mean", "dtype"),
    [*((m, "float64") for m in (0, 10, 1000, 1e6)), *((m, "float32") for m in (10, 1e4))],
)
def test_a_feature_mean_costs_no_digits(mean, dtype):
    """The shift is exact because the values have few bits, so the Gram must not change."""
    bits = 20 if dtype == "float64" else 8
    x = np.random.default_rng(2).integers(-(2**bits), 2**bits, (9, 50)) / 2**bits
    shifted = (x + mean).astype(dtype)
    assert (shifted - mean == x).all()
    np.testing.assert_allclose(rk.centered_gram(shifted), rk.centered_gram(x), rtol=1e-9)
    cells = np.arange(50) % 7
    got, want = (rk.cell_grams(z, cells) for z in (shifted, x))
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


def test_constant_columns_give_exact_zeros():
    x = np.random.default_rng(3).standard_normal((6, 8)).astype(np.float32)
    x[:, 2:] = np.float32(0.1)
    cells = [0, 0, 1, 1, 1, 2, 2, 2]
    assert (rk.cell_grams(x, cells)[1:] == 0).all()


def test_batches_match_single_calls():
    x = np.random.default_rng(4).standard_normal((2, 3, 5, 7))
    cells = [0, 1, 1, 0, 2, 2, -1]
    for got, want in (
        (rk.centered_gram(x, batched=True), [[rk.centered_gram(b) for b in a] for a in x]),
        (rk.cell_grams(x, cells, batched=True), [[rk.cell_grams(b, cells) for b in a] for a in x]),
        (
            rk.cell_grams(x, cells, batched=True, backend="reference"),
            rk.cell_grams(x, cells, batched=True),
        ),
    ):
        np.testing.assert_allclose(got, np.array(want), atol=1e-12)
