"""cuda/cell_grams.cu on the CPU, through its launcher, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import KINDS, TORCH_LAYOUTS, labels, memberships, representations
from _guard import pad_with_nan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import GRAM, assert_gram_close
from repsim_kernels.kernels.cupy import gram

pytestmark = pytest.mark.usefixtures("native")
few_examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOLERANCE = {"float64": GRAM["float64"], "float32": GRAM["ieee"]}
SMALL = gram.Launch(chunk=7)  # several chunks per cell, each shorter than a step


def assert_matches_reference(x, values, cells, n_cells, dtype, launch=None):
    got = gram.cell_grams(x, cells=cells, n_cells=n_cells, launch=launch)
    want = rk.cell_grams(values, cells, n_cells=n_cells, backend="reference")
    centred = values - values.mean(0)
    scale = np.full(want.shape[:-2], (centred**2).sum(1).max())
    assert torch.equal(got, got.mT)
    assert_gram_close(got, want, TOLERANCE[dtype], scale=scale)
    assert not got.numpy()[~want.any((-2, -1))].any()  # empty or constant cells give exact zeros


@few_examples
@given(st.data())
def test_labels(data):
    x = data.draw(
        representations(
            st.integers(2, 70), st.integers(1, 40), KINDS, ("float64", "float32"), TORCH_LAYOUTS
        )
    )
    cells, n_cells = data.draw(labels(x.p))
    assert_matches_reference(pad_with_nan(x.torch()), x.values(), cells, n_cells, x.dtype, SMALL)


@few_examples
@given(st.data())
def test_memberships(data):
    x = data.draw(representations(st.integers(2, 20), dtypes=("float64", "float32")))
    cells = data.draw(memberships(x.p))
    assert_matches_reference(pad_with_nan(x.torch()), x.values(), cells, len(cells), x.dtype, SMALL)


def test_partitions_and_no_cells():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 20)))
    tables = np.random.default_rng(1).integers(-1, 3, (2, 20))
    assert_matches_reference(x, x.numpy(), tables, 3, "float64")
    assert gram.cell_grams(x, cells=tables[0] * 0 - 1, n_cells=0).shape == (0, 6, 6)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_several_runs_of_neurons(dtype):
    """Chunks of 512 neurons, and means that are large relative to the differences."""
    rng = np.random.default_rng(2)
    values = (rng.standard_normal((5, 1200)) + 1000).astype(dtype).astype(float)
    cells = np.where(np.arange(1200) < 1100, 0, 1)
    x = torch.from_numpy(values).to(getattr(torch, dtype))
    assert_matches_reference(x.mT.contiguous().mT, values, cells, 2, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_constant_neurons_give_exact_zeros(dtype):
    x = torch.full((9, 40), 0.1, dtype=getattr(torch, dtype))
    x[:, :10] = torch.randn(9, 10, generator=torch.Generator().manual_seed(0))
    got = gram.cell_grams(x, cells=np.arange(40) // 10, n_cells=4)
    assert not got[1:].any()
    assert (got[0].diagonal() > 0).all()


def test_long_sums_of_float32():
    """Equal terms, whose rounding errors would accumulate in a float32 sum."""
    values = np.tile(np.float32([[0], [0.7], [0.3]]), 20_000).astype(float)
    cells, whole = np.zeros(20_000, int), gram.Launch(chunk=20_000)
    assert_matches_reference(torch.from_numpy(values).float(), values, cells, 1, "float32", whole)


def test_offsets_beyond_32_bits():
    memory = np.empty(2**31 + 16, np.float32)  # only six elements are touched
    x = torch.from_numpy(memory).as_strided((2, 3), (1, 2**30 + 1))
    values = np.random.default_rng(6).standard_normal((2, 3)).astype(np.float32)
    x.copy_(torch.from_numpy(values))
    assert_matches_reference(x, values.astype(float), np.array([0, 1, 0]), 2, "float32")


@pytest.mark.parametrize("scale", [1e-30, 1e25, 7e37])
def test_float32_magnitudes(scale):
    values = np.random.default_rng(3).standard_normal((9, 30)).astype(np.float32) * scale
    x = torch.from_numpy(values.astype(np.float32))
    values = x.double().numpy()
    assert_matches_reference(x, values, np.arange(30) % 3, 3, "float32")


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_sanitizers_find_nothing(native, sanitizer, dtype):
    """No access out of bounds and no race; 70 stimuli make four tiles, three of them computed."""
    native(sanitizer)
    values = np.random.default_rng(4).standard_normal((70, 25)).astype(dtype).astype(float)
    x = torch.from_numpy(values).to(getattr(torch, dtype)).mT.contiguous().mT
    cells = np.random.default_rng(5).integers(-1, 2, 25)
    cells[-1] = 0  # the last element of x is read
    assert_matches_reference(x, values, cells, 2, dtype, SMALL)


def test_unsupported_dtypes():
    assert "float32 and float64, not float16" in gram.unsupported(torch.zeros(2, 2).half())


@pytest.mark.parametrize(("n", "columns"), [(50, 193_600), (500, 100_352), (2, 1)])
def test_launch_settings(n, columns):
    chunk = gram.choose(n, columns).chunk
    assert chunk % 512 == 0
    assert 512 <= chunk <= 8192
