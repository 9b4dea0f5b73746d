"""The judge of Riccati steps and the correction of the trace, against torch and LAPACK."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import SEEDS
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.tolerances import Tol, assert_close
from repsim_kernels.kernels.torch import riccati as torch_riccati
from repsim_kernels.kernels.triton import riccati, riccati_trace

few_examples = settings(max_examples=15)


@pytest.fixture(autouse=True)
def ignore_invalid_roots():
    """Roots of negative numbers are NaN on purpose; the interpreter's NumPy would warn."""
    with np.errstate(invalid="ignore", divide="ignore"):
        yield


@few_examples
@given(SEEDS, st.integers(1, 300), st.integers(0, 28))
def test_verdicts_match_the_torch_backend(device, seed, m, steps_left):
    """Traces that converge by ratios from 1e-3 to 1.1, that have converged, and that are NaN."""
    rng = np.random.default_rng(seed)
    v = np.sort(rng.uniform(0.1, 1, m))[::-1]
    limit = 0.3 * v * rng.random((8, m))
    ratios = np.array([1e-3, 0.01, 0.1, 0.3, 0.6, 0.9, 1.1, 0.0])
    changes = 0.1 * ratios ** np.arange(1, riccati.STEPS + 1)[:, None]  # (steps, B)
    d = limit - changes[:, :, None] * limit
    if rng.random() < 0.5:
        d[:, rng.integers(8), rng.integers(m)] = np.nan
    v, d = (torch.from_numpy(a.copy()).to(device) for a in (v, d))
    history = v.new_empty(0, 8)
    for close_to in (3e-8, 1e-3):
        _, got = riccati_trace.judge(history, v, d, steps_left, close_to)
        _, want = torch_riccati.judge(history, v, d, steps_left, close_to)
        assert got.tolist() == want.tolist()


def draw_iterate(seed, m, noise, device):
    """Draw v, F with a zero diagonal, its diagonal, and O near the solution of the equation."""
    rng = np.random.default_rng(seed)
    v = np.sort(rng.uniform(0.3, 1, m))[::-1].copy()
    d = rng.standard_normal((3, m, m)) / (8 * m)
    d = d + d.swapaxes(1, 2)
    f = v[:, None] * d + d * v - d @ d
    diagonal = np.diagonal(f, axis1=1, axis2=2).copy()
    index = np.arange(m)
    o = d * (1 + noise * rng.standard_normal(d.shape))
    o = (o + o.swapaxes(1, 2)) / 2
    o[:, index, index] = f[:, index, index] = 0
    trace = np.trace(d, axis1=1, axis2=2)
    return *(torch.from_numpy(a).to(device) for a in (v, f, diagonal, o)), trace


@few_examples
@given(SEEDS, st.integers(1, 70))
def test_a_correction_squares_the_error(device, seed, m):
    v, f, diagonal, o, want = draw_iterate(seed, m, 1e-7, device)
    torch_got = torch_riccati.correct_trace(v, f, diagonal, o.clone())
    got = riccati_trace.correct_trace(v, f, diagonal, o.clone())
    assert_close(got, want, Tol(1e-12, 1e-13))
    assert_close(got, torch_got, Tol(1e-12, 1e-13))


@pytest.mark.parametrize("m", [1, 15, 16, 17, 63, 64, 65, 257])
def test_tile_edges(device, m):
    v, f, diagonal, o, want = draw_iterate(m, m, 1e-7, device)
    assert_close(riccati_trace.correct_trace(v, f, diagonal, o), want, Tol(1e-12, 1e-13))


def test_wrong_traces_are_nan(device):
    """One is far from the solution, one has no root, and the factor of one has failed."""
    v, f, diagonal, o, want = draw_iterate(0, 12, 1e-7, device)
    o[0] *= 1.5
    diagonal[1, 3] = 2
    got = riccati_trace.correct_trace(v, f, diagonal, o.clone())
    assert got.isnan().tolist() == [True, True, False]
    assert_close(got[2:], want[2:], Tol(1e-12))
    p = torch.baddbmm(f, o, o)
    _, error = riccati_trace.prepare(p, diagonal, v, o)
    info = torch.tensor([0, 0, 1], dtype=torch.int32, device=device)
    assert riccati_trace.finish(p, diagonal, v, error, info, v.new_zeros(3)).isnan().all()


@few_examples
@given(SEEDS, st.integers(1, 30), st.floats(0.01, 0.9))
def test_deficits_match_eigenvalues(device, seed, m, size):
    rng = np.random.default_rng(seed)
    v = np.sort(rng.uniform(1, 10, m))[::-1].copy()
    a = rng.standard_normal((4, m, m + 2))
    f = size * v[:, None] * (a @ a.swapaxes(1, 2) / (4 * m + 4)) * v
    v_device, f_device = torch.from_numpy(v).to(device), torch.from_numpy(f).to(device)
    got, steps = torch_riccati.solve_deficit(
        v_device, f_device, riccati.advance, riccati_trace.TRACE_SOLVERS
    )
    _, want_steps = torch_riccati.solve_deficit(v_device, f_device, riccati.advance)
    assert torch.equal(steps, want_steps)
    w = np.linalg.eigvalsh(np.diag(v**2) - f)
    want = v.sum() - np.sqrt(np.maximum(w, 0)).sum(1)
    known = got.isfinite().cpu().numpy()
    assert (w[known] > 0).all()
    assert_close(got.cpu()[known], want[known], Tol(1e-9, 1e-12 * v.sum()))
