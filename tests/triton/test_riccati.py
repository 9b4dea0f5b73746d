"""Riccati iterations by a kernel and as graphs: against NumPy, LAPACK and the torch backend."""

from __future__ import annotations

import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
from _draw import SEEDS
from _guard import far_apart, guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.tolerances import Tol, assert_close
from repsim_kernels.kernels.torch import riccati as plain
from repsim_kernels.kernels.triton import riccati

few = settings(max_examples=15)
SMALL = riccati.Launch(block_m=16, block_n=16, num_warps=4, captured=True)


@pytest.fixture(autouse=True)
def roots_of_negative_numbers():
    """Are NaN, as they should be; the interpreter's NumPy would warn of them."""
    with np.errstate(invalid="ignore"):
        yield


def drawn_step(seed, batch, m, fail):
    """v, diagonal, F and P, some of whose g are above v²."""
    rng = np.random.default_rng(seed)
    v = rng.uniform(0.5, 2, m)
    p, f = rng.standard_normal((2, batch, m, m))  # not symmetric: rows are not columns
    diagonal = v**2 * rng.uniform(-1, 0.9, (batch, m)) - np.diagonal(p, axis1=1, axis2=2)
    diagonal[rng.random((batch, m)) < fail] += 5
    return v, diagonal, f, p


def numpy_step(v, diagonal, f, p):
    g = diagonal + np.diagonal(p, axis1=1, axis2=2)
    mu = np.sqrt(v**2 - g)
    o = (f + p) / (mu[:, :, None] + mu[:, None, :])
    o[:, np.arange(len(v)), np.arange(len(v))] = 0
    return o, g / (v + mu)


def by_layout(a, layout, dtype, device):
    """Matrices (B, m, m) by rows, by columns, or with gaps between their elements."""
    a = torch.from_numpy(a).to(device, dtype)
    if layout == "columns":
        return a.mT.contiguous().mT
    if layout == "gaps":
        return a.repeat_interleave(2, 2)[:, :, ::2]
    return a


@few
@given(st.data(), SEEDS, st.integers(1, 5), st.integers(1, 40))
def test_a_step(device, data, seed, batch, m):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    layouts = [data.draw(st.sampled_from(["rows", "columns", "gaps"])) for _ in range(3)]
    v, diagonal, f, p = drawn_step(seed, batch, m, data.draw(st.sampled_from([0, 0.02])))
    matrices = zip((f, p, np.full_like(p, np.nan)), layouts, strict=True)
    f, p, o = (guarded(by_layout(*a, dtype, device)) for a in matrices)
    want = numpy_step(v, diagonal, *(a.cpu().double().numpy() for a in (f, p)))
    v, diagonal = (guarded(torch.from_numpy(a).to(device)) for a in (v, diagonal))
    d = guarded(torch.full_like(diagonal, torch.nan))
    before = p.clone()
    launch = data.draw(st.sampled_from([None, SMALL]))
    riccati.step(p, f, diagonal, v, o, d, launch=launch)
    assert_close(o, want[0], Tol(1e-14 if dtype == torch.float64 else 1e-6), nan=True)
    assert_close(d, want[1], Tol(1e-14), nan=True)
    assert torch.equal(p, before)  # whose diagonal all programs need
    assert not o.diagonal(dim1=1, dim2=2).any()
    for written in (o, d):
        assert int(written._base.isfinite().sum()) == int(written.isfinite().sum())


@pytest.mark.parametrize("m", [1, 15, 16, 17, 63, 64, 65, 130])
def test_edges_of_tiles(device, m):
    inputs = drawn_step(m, 2, m, 0)
    v, diagonal, f, p = (torch.from_numpy(a).to(device) for a in inputs)
    o, d = torch.empty_like(p), torch.empty_like(diagonal)
    riccati.step(p, f, diagonal, v, o, d)
    want = numpy_step(*inputs)
    assert_close(o, want[0], Tol(1e-14))
    assert_close(d, want[1], Tol(1e-14))


@pytest.mark.parametrize("strides", [(2**30 + 1, 3, 1), (3, 2**30 + 1, 1), (3, 1, 2**30 + 1)])
def test_elements_beyond_32_bits(device, strides):
    v, diagonal, f, p = drawn_step(3, 4, 3, 0)
    f, p = (a.astype(np.float16) for a in (f, p))
    want = numpy_step(v, diagonal, f.astype(np.float64), p.astype(np.float64))
    values = torch.from_numpy(np.stack([f, p, np.full_like(p, np.nan)]))
    f, p, o = far_apart(values.to(device), (100, *strides))
    v, diagonal = (torch.from_numpy(a).to(device) for a in (v, diagonal))
    d = torch.empty_like(diagonal)
    riccati.step(p, f, diagonal, v, o, d)
    assert_close(o, want[0], Tol(1e-3))
    assert_close(d, want[1], Tol(1e-14))


def parts_of(seed, m, shares, device):
    """v, and F of parts that have some shares of the energy of their own directions."""
    rng = np.random.default_rng(seed)
    v = np.sort(rng.uniform(0.01, 1, m))[::-1] ** 2 * 50
    root = np.sqrt(v)
    f = []
    for share in shares:
        a = rng.standard_normal((m, m + 5))
        w, u = np.linalg.eigh(a @ a.T)
        # Its largest eigenvalue in the metric of L is the share.
        f.append(v[:, None] ** 0.5 * root[:, None] * (u * (share * w / w[-1])) @ u.T * root * root)
    return torch.from_numpy(v.copy()).to(device), torch.from_numpy(np.stack(f)).to(device)


def fourfold(o, f, diagonal, v, spare):
    """As many steps of the torch backend as a call of the kernel's makes."""
    found = []
    for _ in range(riccati.STEPS):
        o, spare, d = plain.advance(o, f, diagonal, v, spare)
        found.append(d)
    return o, spare, torch.cat(found)


@few
@given(SEEDS, st.integers(1, 20), st.lists(st.floats(0.001, 0.5), min_size=1, max_size=4))
def test_steps(device, seed, m, shares):
    v, f = parts_of(seed, m, shares, device)
    diagonal = f.diagonal(dim1=1, dim2=2).clone()
    f.diagonal(dim1=1, dim2=2).zero_()
    first = torch.zeros_like(f), f, diagonal, v, torch.empty_like(f)
    o, spare, d = riccati.advance(*first)
    want = fourfold(torch.zeros_like(f), f, diagonal, v, torch.empty_like(f))
    assert_close(o, want[0], Tol(1e-11, 1e-13))
    assert_close(d, want[2], Tol(1e-12))
    assert o.data_ptr() == first[0].data_ptr()
    assert spare.data_ptr() == first[4].data_ptr()


@few
@given(SEEDS, st.integers(1, 30), st.lists(st.floats(0.001, 1.2), min_size=1, max_size=5))
def test_deficits(device, seed, m, shares):
    """Also where there is no root, or the steps crawl."""
    v, f = parts_of(seed, m, shares, device)
    got, steps = plain.solve_deficit(v, f, riccati.advance)
    want, want_steps = plain.solve_deficit(v, f, fourfold)
    assert_close(got, want, Tol(1e-12), nan=True)
    assert torch.equal(steps, want_steps)
    assert not bool((steps % riccati.STEPS).any())
    w = torch.linalg.eigvalsh(torch.diag(v * v) - f).cpu()
    known = got.isfinite().cpu()
    assert bool((w[known] > 0).all())
    exact = v.sum().cpu() - w[known].sqrt().sum(-1)
    assert_close(got[known.to(device)], exact, Tol(1e-9, 1e-12 * float(v.sum())))


def test_deficits_are_found_and_are_not(device):
    """The shares that the tests above draw come to both ends."""
    v, f = parts_of(0, 12, [0.01, 0.3, 0.6, 1.2], device)
    got, _ = plain.solve_deficit(v, f, riccati.advance)
    assert got.isfinite().tolist() == [True, True, True, False]


def test_a_step_gives_the_same_bits_again(device):
    v, f = parts_of(1, 33, [0.1, 0.2], device)
    assert torch.equal(*(plain.solve_deficit(v, f, riccati.advance)[0] for _ in range(2)))


class Recorded:
    """A CUDA graph in which there is nothing but steps."""

    recording: ClassVar[Recorded | None] = None
    alive: ClassVar[weakref.WeakSet[Recorded]] = weakref.WeakSet()
    log: ClassVar[list[str]] = []

    def __init__(self):
        self.steps = []
        self.alive.add(self)

    def capture_begin(self, capture_error_mode):
        assert len(self.alive) == 1  # the one before is gone
        Recorded.recording = self

    def capture_end(self):
        Recorded.recording = None
        self.log.append("captured")

    def replay(self):
        self.log.append("replayed")
        for run in self.steps:
            run()


class NoStream:
    device = torch.device("cpu")

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


@pytest.fixture
def log(device, monkeypatch):
    """What graphs do; those of the interpreter record the steps in Python."""
    Recorded.log.clear()
    Recorded.alive.clear()
    if device.type == "cuda":
        return Recorded.log
    steps = riccati._steps

    def run(*arguments):
        if Recorded.recording is not None:
            Recorded.recording.steps.append(lambda: steps(*arguments))
        else:
            Recorded.log.append("run")
            steps(*arguments)

    monkeypatch.setattr(riccati, "_steps", run)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return Recorded.log


# Four that leave at once, one of them without a root, so that the rest is moved elsewhere.
SHARES = [0.001, 0.002, 0.003, 0.9, 0.97, 3.0]


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("m", [7, 24])
def test_graphs_change_nothing(device, m):
    """Of two batches in a row, each with its buffers moved on the way."""
    captured = riccati.Captured()
    for seed in range(2):
        v, f = parts_of(seed, m, SHARES, device)
        got = plain.solve_deficit(v, f, captured)
        want = plain.solve_deficit(v, f, fourfold)
        assert (want[1][[0, 1, 2, 5]] == riccati.STEPS).all()
        assert (want[1][[3, 4]] > riccati.STEPS).all()
        assert (want[1] > 2 * riccati.STEPS).any()
        assert torch.equal(got[1], want[1])
        assert_close(got[0], want[0], Tol(1e-12), nan=True)


def buffers(seed, device):
    v, f = parts_of(seed, 9, [0.3, 0.5], device)
    diagonal = f.diagonal(dim1=1, dim2=2).clone()
    f.diagonal(dim1=1, dim2=2).zero_()
    return [torch.zeros_like(f), f, diagonal, v, torch.empty_like(f)]


@pytest.mark.usefixtures("log")
def test_a_graph_serves_what_lies_at_its_addresses(device):
    captured = riccati.Captured()
    places = buffers(0, device)
    for seed in range(3):
        for place, values in zip(places, buffers(seed, device), strict=True):
            place.copy_(values)
        others = buffers(seed, device)
        for _ in range(3):
            got, want = captured(*places), fourfold(*others)
            assert_close(got[0], want[0], Tol(1e-10, 1e-13))
            assert_close(got[2], want[2], Tol(1e-12))


def test_the_second_call_of_the_same_buffers_captures(device, log):
    if device.type == "cuda":
        pytest.skip("the log is the interpreter's")
    captured = riccati.Captured()
    first, second = buffers(0, device), buffers(1, device)
    for _ in range(4):
        captured(*first)
    assert log == ["run", "captured", "replayed", "replayed", "replayed"]
    log.clear()
    for some in (second, first, first, second):
        captured(*some)
    assert log == ["run", "run", "captured", "replayed", "run"]
    log.clear()
    fewer = [t[:1] for t in second[:3]] + [second[3], second[4][:1]]
    captured(*fewer)
    captured(*(t.mT if t.dim() == 3 else t for t in fewer))
    captured(*fewer)
    for t in fewer:
        t.zero_()  # in every dtype
    captured(*(t.view(torch.float32).as_strided(t.shape, t.stride()) for t in fewer))
    assert log == ["run"] * 4


def test_small_matrices_are_replayed_on_a_gpu(device, launches):
    if device.type == "cpu":
        pytest.skip("no graph without a GPU")
    for other in (None, torch.cuda.Stream()):
        small = buffers(2, device)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            launches.clear()
            for _ in range(4):
                got = riccati.advance(*small)
            want = fourfold(*buffers(2, device))
            for _ in range(3):
                want = fourfold(want[0], *small[1:4], want[1])
        torch.cuda.synchronize()
        assert len(launches) == 2 * riccati.STEPS  # run, and captured
        assert_close(got[2], want[2], Tol(1e-12))
    large = [torch.ones(17, 499, 499, dtype=torch.float64, device=device) for _ in range(3)]
    launches.clear()
    for _ in range(3):
        riccati.advance(large[0], large[1], large[0][0].clone()[:17], large[0][0, 0], large[2])
    assert len(launches) == 3 * riccati.STEPS


def test_what_is_captured():
    assert riccati.choose(100, 49).captured
    assert riccati.choose(400, 49).captured
    assert not riccati.choose(16, 499).captured
    assert [riccati.choose(1, m).block_n for m in (1, 17, 64, 499)] == [16, 32, 64, 64]
