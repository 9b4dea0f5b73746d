"""The n x n stage by kernels and native solvers, against the reference and LAPACK."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import labels, representations
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import DISTANCE, Tol, assert_close, assert_rank_fidelity
from repsim_kernels import _dispatch
from repsim_kernels._arrays import Source
from repsim_kernels.kernels.triton import riccati, spectral


def list_kernels(launches):
    return {launch["kernel"] for launch in launches}


@settings(max_examples=6)
@given(st.data())
def test_distances_from_grams(device, data):
    x = data.draw(representations(st.integers(5, 12), st.integers(30, 60), ("gaussian", "relu")))
    cells, _ = data.draw(labels(x.p, 4))
    cells[:2] = -1  # no cell holds all neurons
    x = torch.from_numpy(x.values())
    k, parts = rk.centered_gram(x), rk.cell_grams(x, cells)
    got = rk.gram_ablation_distances(k.to(device), parts.to(device), backend="triton")
    want = rk.gram_ablation_distances(k, parts, backend="reference")
    for name, values in want.items():
        assert got[name].device.type == device.type
        assert_close(got[name], values, DISTANCE["float64"])
        assert_rank_fidelity(got[name], values, DISTANCE["float64"])


def test_both_operations_use_the_kernel(device, launches):
    x = np.random.default_rng(0).standard_normal((14, 80)).astype(np.float32)
    cells = np.arange(80) % 5
    x[:, cells == 2] *= 3
    tensor = torch.from_numpy(x).to(device)
    options = {"metrics": ("procrustes", "cca"), "info": True, "backend": "triton"}
    grams = torch.from_numpy(rk.centered_gram(x)), torch.from_numpy(rk.cell_grams(x, cells))
    want = rk.ablation_distances(x, cells, metrics=options["metrics"], backend="reference")
    for call in (
        lambda: rk.ablation_distances(tensor, cells, **options),
        lambda: rk.gram_ablation_distances(*(t.to(device) for t in grams), **options),
    ):
        launches.clear()
        got, info = call()
        assert "_riccati_step_kernel" in list_kernels(launches)
        for name, values in want.items():
            assert_close(got[name], values, DISTANCE["float32"])
            iterated = info[name].route == "iterations"
            assert bool(iterated.any())
            assert not bool((info[name].steps[iterated] % riccati.STEPS).any())


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes(device, dtype):
    a = torch.eye(4, dtype=getattr(torch, dtype), device=device)
    source = Source("torch", str(a.device))
    assert spectral.unsupported(a, a[None]) is None
    assert (
        _dispatch.choose_backend("gram_ablation_distances", "triton", source, a, a[None])
        == "triton"
    )
    default = "triton" if device.type == "cuda" else "torch"
    assert _dispatch.choose_backend("gram_ablation_distances", None, source, a, a[None]) == default


def test_unsupported_tensors_give_the_reason(device):
    a = torch.eye(4, device=device, dtype=torch.float64)
    assert "not int64" in spectral.unsupported(a, a.to(torch.int64))
    assert "not meta" in spectral.unsupported(a.to("meta"))


def symmetric(rng, batch, m):
    a = rng.standard_normal((batch, m, m))
    return a + a.swapaxes(1, 2)


@pytest.fixture
def native(monkeypatch):
    """Native solvers that fail on some matrices and return NaN for them."""
    from repsim_kernels.kernels.cupy import spectral as module

    calls = []

    def mark_failures(name, a, **results):
        calls.append(name)
        failed = a[..., 0, 0] < 0
        for t in results.values():
            t[failed] = torch.nan
        return results | {"failed": failed}

    def eigh(a, *, vectors, check):
        values, vectors = torch.linalg.eigh(a)
        return mark_failures("eigh", a, values=values, vectors=vectors)

    def svd(a, *, vectors):
        assert not vectors
        result = mark_failures("svd", a, values=torch.linalg.svdvals(a))
        # For large matrices PyTorch raises an error instead, and there is no "failed".
        return result if bool(result["failed"].any()) else {"values": result["values"]}

    monkeypatch.setattr(module, "unsupported", lambda *tensors: None)
    monkeypatch.setattr(module, "solve_batch", eigh)
    monkeypatch.setattr(module, "svd", svd)
    return calls


@pytest.mark.parametrize("failed", [[], [1], [0, 1, 2]])
def test_failed_matrices_are_solved_again(device, native, failed):
    rng = np.random.default_rng(2)
    a = torch.from_numpy(symmetric(rng, 3, 6)).to(device)
    a[:, 0, 0] = 1
    a[failed, 0, 0] = -1
    w, v = spectral.SOLVERS.eigh(a)
    assert_close((v * w[:, None, :]) @ v.mT, a, Tol(1e-12, 1e-12))
    s = spectral.SOLVERS.svdvals(a)
    assert_close(s, np.linalg.svd(a.cpu().numpy(), compute_uv=False), Tol(1e-12, 1e-12))
    single = spectral.SOLVERS.svdvals(a[0])  # without a batch
    assert torch.equal(single, s[0])
    assert native == ["eigh", "svd", "svd"]


def test_error_if_no_solver_converges(device, native, monkeypatch):
    def fail(a):
        raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")

    a = -torch.eye(4, device=device, dtype=torch.float64).expand(3, 4, 4).clone()
    a[1, 0, 0] = 1
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: eigh(a) if a.ndim > 2 else fail(a))
    with pytest.raises(torch.linalg.LinAlgError, match="eigh: 2 matrices did not converge"):
        spectral.SOLVERS.eigh(a)


def test_without_native_solvers(device, monkeypatch):
    from repsim_kernels.kernels.cupy import spectral as module

    monkeypatch.setattr(module, "unsupported", lambda *tensors: "no CuPy")
    a = torch.from_numpy(symmetric(np.random.default_rng(3), 2, 5)).to(device)
    w, _ = spectral.SOLVERS.eigh(a)
    s = spectral.SOLVERS.svdvals(a)
    assert_close(w, np.linalg.eigvalsh(a.cpu().numpy()), Tol(1e-12, 1e-12))
    assert_close(s, np.linalg.svd(a.cpu().numpy(), compute_uv=False), Tol(1e-12, 1e-12))
