"""Inner products with permuted Grams by one kernel, against the definition in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from _guard import pad_with_nan, spread_in_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from repsim_kernels.kernels.triton import calibration
from repsim_kernels.kernels.triton.calibration import Launch

# Blocks smaller than the drawn sizes, so that there are several of each.
SMALL = Launch(cols=4, permutations=4, block=16, parts=3, num_warps=4, num_stages=1)


def draw_grams(rng, layers, n):
    """Draw symmetric matrices (L, n, n); their scales differ."""
    x = rng.standard_normal((layers, n, n)) * 10.0 ** rng.integers(-2, 3, (layers, 1, 1))
    return x + x.swapaxes(1, 2)


def draw_permutations(rng, count, n):
    return np.stack([rng.permutation(n) for _ in range(count)])


def pack(grams):
    """Pack lower triangles row by row, with doubled entries below the diagonal."""
    doubled = 2 * grams - np.einsum("lij,ij->lij", grams, np.eye(grams.shape[1]))
    return doubled[:, *np.tril_indices(grams.shape[1])]


def multiply(device, h, k, indices, dtype=torch.float64, launch=None):
    n = k.shape[1]
    packed = torch.from_numpy(pack(h)).to(device, dtype)
    last = torch.from_numpy(k.reshape(len(k), n * n).T.copy()).to(device, dtype)
    return calibration.permuted_products(
        *(pad_with_nan(packed), pad_with_nan(last), torch.from_numpy(indices).to(device)),
        launch=launch,
    )


def assert_right(got, h, k, indices, tolerance=1e-13):
    want = np.stack([np.einsum("lij,mij->lm", h, k[:, index][:, :, index]) for index in indices])
    sizes = np.linalg.norm(h, axis=(1, 2))[:, None] * np.linalg.norm(k, axis=(1, 2))
    assert got.dtype == torch.float64
    assert got.shape == want.shape
    # Errors relative to the norms; zeros cost nothing.
    error = np.abs(got.cpu().numpy() - want)
    assert (error <= tolerance * sizes).all()


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    layers=st.tuples(st.sampled_from([1, 2, 17]), st.sampled_from([1, 2, 3, 5, 9])),
    permutations=st.sampled_from([1, 3, 9]),
    launch=st.sampled_from([None, SMALL]),
)
def test_products_match_the_definition(device, seed, n, layers, permutations, launch):
    rng = np.random.default_rng(seed)
    h, k = (draw_grams(rng, count, n) for count in layers)
    indices = draw_permutations(rng, permutations, n)
    assert_right(multiply(device, h, k, indices, launch=launch), h, k, indices)


@pytest.mark.parametrize("layers", [(1, 1), (33, 2), (2, 33), (3, 64)])
def test_more_layers_than_a_program_takes(device, layers):
    rng = np.random.default_rng(0)
    h, k = (draw_grams(rng, count, 18) for count in layers)
    indices = draw_permutations(rng, 3, 18)
    assert_right(multiply(device, h, k, indices), h, k, indices)


def test_more_permutations_than_a_program_takes(device):
    rng = np.random.default_rng(0)
    h, k = draw_grams(rng, 1, 7), draw_grams(rng, 1, 7)
    indices = draw_permutations(rng, 130, 7)
    assert_right(multiply(device, h, k, indices), h, k, indices)


def test_float32_is_added_in_float64(device):
    rng = np.random.default_rng(0)
    h, k = (draw_grams(rng, 2, 30).astype(np.float32).astype(np.float64) for _ in range(2))
    indices = draw_permutations(rng, 4, 30)
    assert_right(multiply(device, h, k, indices, torch.float32), h, k, indices)


def test_rows_may_be_selected_in_any_order_and_repeatedly(device):
    """Indices need not be permutations: the kernel gathers what they name."""
    rng = np.random.default_rng(0)
    h, k = draw_grams(rng, 2, 9), draw_grams(rng, 3, 9)
    indices = np.array([np.arange(9), np.arange(9)[::-1], np.zeros(9, dtype=int)])
    assert_right(multiply(device, h, k, indices), h, k, indices)


def test_views_are_read_as_they_are_or_copied(device):
    rng = np.random.default_rng(0)
    h, k = draw_grams(rng, 4, 12), draw_grams(rng, 6, 12)
    indices = draw_permutations(rng, 6, 12)
    packed = torch.from_numpy(pack(h)).to(device)
    last = torch.from_numpy(k.reshape(6, 144)).to(device).T
    rows = torch.from_numpy(indices).to(device)
    got = calibration.permuted_products(packed[::2], last[:, 1::2], rows[::3])
    assert_right(got, h[::2], k[1::2], indices[::3])
    got = calibration.permuted_products(packed.T.contiguous().T, last, rows)
    assert_right(got, h, k, indices)


def test_offsets_beyond_32_bits(device):
    rng = np.random.default_rng(0)
    h, k = (draw_grams(rng, 4, 6).astype(np.float16).astype(np.float64) for _ in range(2))
    indices = draw_permutations(rng, 2, 6)
    packed = spread_in_memory(torch.from_numpy(pack(h)).to(device), (2**30 + 1, 1))
    last = torch.from_numpy(k.reshape(4, 36).T.copy()).to(device)
    got = calibration.permuted_products(packed, last, torch.from_numpy(indices).to(device))
    h = packed.new_zeros(4, 6, 6, dtype=torch.float64).cpu().numpy()
    h[:, *np.tril_indices(6)] = packed.double().cpu()
    assert_right(got, (h + h.swapaxes(1, 2)) / 2, k, indices)


def test_runs_are_identical_and_one_launch_does_all(device, launches):
    rng = np.random.default_rng(0)
    h, k = draw_grams(rng, 3, 25), draw_grams(rng, 5, 25)
    indices = draw_permutations(rng, 7, 25)
    first = multiply(device, h, k, indices, launch=SMALL)
    assert [record["kernel"] for record in launches] == ["_permuted_products_kernel"]
    assert torch.equal(first, multiply(device, h, k, indices, launch=SMALL))


def test_a_layer_that_is_not_finite_affects_its_own_products_alone(device):
    rng = np.random.default_rng(0)
    h, k = draw_grams(rng, 3, 9), draw_grams(rng, 2, 9)
    indices = draw_permutations(rng, 2, 9)
    want = multiply(device, h, k, indices)
    h[1, 4, 4] = np.nan
    got = multiply(device, h, k, indices)
    assert got[:, 1].isnan().all()
    assert torch.equal(got[:, [0, 2]], want[:, [0, 2]])


def test_which_arrays_are_supported(device):
    h, k = torch.ones(1, 3, device=device), torch.ones(4, 1, device=device)
    indices = torch.tensor([[0, 1]], device=device)
    assert calibration.unsupported(h, k, indices) is None
    assert calibration.unsupported(h.double(), k.double(), indices) is None
    assert "not int32" in calibration.unsupported(h.int(), k, indices)


def test_launch_settings():
    large = calibration.choose(1024, 32, 24, 200, (9, 0))
    assert large == Launch(32, 2, 32, parts=11, num_warps=8, num_stages=2)
    assert calibration.choose(1024, 32, 24, 200, (8, 0)) == replace(large, num_stages=3)
    on_10 = replace(large, permutations=1, parts=6)
    assert calibration.choose(1024, 32, 24, 200, (10, 0)) == on_10
    single = calibration.choose(1024, 1, 1, 200, (9, 0))
    assert (single.cols, single.permutations, single.parts) == (2, 32, 151)
    assert calibration.choose(5, 1, 1, 200, (9, 0)).parts == 5
    assert [calibration.choose(9, 1, m, 9, (9, 0)).cols for m in (3, 9, 17, 99)] == [8, 16, 32, 32]
