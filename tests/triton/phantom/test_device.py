"""The phantom device computes, counts, and refuses what a GPU would refuse."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _phantom import DEVICE, PhantomError, PhantomTensor
from _phantom_cuda import Kernel, phantom_device
from torch import nn

from repsim_kernels.kernels.triton import _launch, riccati

A = torch.arange(12, dtype=torch.float64).view(3, 4) - 5
SYMMETRIC = A @ A.T + torch.eye(3)


@pytest.fixture
def a(phantom):
    return A.cuda()


def started(grids):
    """A kernel that records the grids it is started with."""

    class Stub:
        fn = SimpleNamespace(__name__="_stub_kernel")

        def __getitem__(self, grid):
            return lambda *arguments, **options: grids.append(grid)

    return Stub()


# Each call uses the device of x, so that it computes the same on the CPU.
COMPUTED = {
    "factories": lambda x: torch.eye(3, device=x.device) + torch.ones(3, 3, device=str(x.device)),
    "numbers": lambda x: torch.tensor([1, 2], device=x.device) + x.new_tensor(3).long(),
    "arrays": lambda x: torch.as_tensor(np.arange(3), device=x.device),
    "like": lambda x: torch.zeros_like(x) + x.new_full(x.shape, 2),
    "random": lambda x: torch.randn(3, generator=torch.Generator(x.device), device=x.device),
    "conversion": lambda x: x.to(torch.float32).to(x) + x.double(),
    "meta strides": lambda x: x.new_tensor(torch.empty_like(x, device="meta").stride()),
    "products": lambda x: x @ x.mT + (x @ x[0])[:, None] + x[0] @ x[0],
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "list index": lambda x: x[[0, 2]] + x[:, [1]][[0, 2]],
    "array index": lambda x: x[np.array([2, 1])],
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: (x > 0).nonzero(),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(3, device=x.device)),
    "solve": lambda x: torch.linalg.solve(x @ x.mT + torch.eye(3, device=x.device), x[:, 0]),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(x @ x.mT),
    "convolution": lambda x: F.conv2d(x[None, None], x[None, None, :2, :2]),
    "batch norm": lambda x: F.batch_norm(x, x[0], x[1].square(), training=False),
    "one-hot": lambda x: F.one_hot((x > 0).long()),
    "deep copy": copy.deepcopy,
    "unique": lambda x: (x > 0).long().unique(),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", COMPUTED)
def test_results_are_those_of_the_cpu(name, inference):
    with torch.inference_mode(inference):
        want = COMPUTED[name](A)
        with phantom_device():
            got = COMPUTED[name](A.cuda())
            assert got.device == DEVICE
    assert got.stride() == want.stride()
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.elem, want, rtol=1e-12, atol=1e-12)


def test_assignment(a):
    a[0] = 1
    a[1, :2] = torch.tensor([7.0, 8.0], device="cuda")
    a[:, 3] += 1
    a[a < 0] = 0
    a[[2], [0]] = 9
    want = A.clone()
    want[0], want[1, 0], want[1, 1], want[2, 0] = 1, 7, 8, 9
    want[:, 3] += 1
    want[want < 0] = 0
    assert a.tolist() == want.tolist()


def test_modules_move_to_the_device(phantom):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    want = model(A)
    model.to("cuda")
    assert all(t.is_cuda for t in model.state_dict().values())
    got = copy.deepcopy(model)(A.cuda())
    torch.testing.assert_close(got.detach().cpu(), want.detach(), rtol=0, atol=0)


def test_everything_is_restored():
    names = ("is_available", "Stream", "CUDAGraph", "graph", "synchronize", "mem_get_info")
    before = [getattr(torch.cuda, name) for name in names]
    before += [_launch.launch, riccati._step_graph, torch.Generator]
    with phantom_device():
        x = A.cuda()
    after = [getattr(torch.cuda, name) for name in names]
    after += [_launch.launch, riccati._step_graph, torch.Generator]
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert not torch.zeros(1).is_cuda
    with pytest.raises(PhantomError, match="used after the test"):
        x + 1


REFUSED = {
    "sum of two devices": lambda a: a + A,
    "product of two devices": lambda a: a @ A.T,
    "a number of the CPU in a product": lambda a: torch.addmm(A.sum(), a, a.mT),
    "concatenation": lambda a: torch.cat([a, A]),
    "a 0-dim tensor in a concatenation": lambda a: torch.stack([a.sum(), A.sum()]),
    "output on the CPU": lambda a: torch.mm(a, a.mT, out=torch.empty(3, 3).double()),
    "CPU tensor by an index on the device": lambda a: A[a.long()],
    "CPU values": lambda a: a.__setitem__(torch.tensor([0, 1], device="cuda"), A[:2]),
    "another device": lambda a: a.to("cuda:1"),
    "changed shape": lambda a: a.resize_(2, 2),
    "output of another shape": lambda a: torch.mm(a, a.mT, out=torch.empty_like(a)),
    "kernel with a CPU tensor": lambda a: _launch.launch(started([]), (1,), a, A),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(a, name):
    with pytest.raises(PhantomError):
        REFUSED[name](a)


def test_no_conversion_to_numpy(a):
    for convert in (np.asarray, lambda t: t.numpy()):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            convert(a)
    with pytest.raises((BufferError, RuntimeError)):  # by the version of NumPy
        np.from_dlpack(a)
    np.testing.assert_array_equal(a.cpu().numpy(), A)


@pytest.mark.parametrize("grid", [(2**31,), (1, 65_536), (1, 1, 65_536), (0,), (4, 0)])
def test_kernels_need_a_grid_within_limits(phantom, grid):
    """The device's own rule; the launcher has one, too, and starts nothing for an empty grid."""
    with pytest.raises(PhantomError, match="_stub_kernel: a grid of"):
        Kernel(started([]), phantom)[grid]


def test_kernels_need_aligned_tensors(phantom):
    grids = []
    _launch.launch(started(grids), (1,), torch.zeros(9, dtype=torch.uint8, device="cuda"))
    memory = torch.zeros(17, dtype=torch.uint8)
    shifted = PhantomTensor(
        torch.frombuffer(memory.numpy(), dtype=torch.float32, count=2, offset=1)
    )
    with pytest.raises(PhantomError, match="misaligned"):
        _launch.launch(started(grids), (1,), shifted)
    assert grids == [(1,)]


def test_kernel_launches_are_counted(phantom):
    with phantom.count() as counts:
        _launch.launch(started([]), (1,), torch.empty(3, device="cuda"))
        _launch.launch(started([]), (0,), torch.empty(3, device="cuda"))
    assert (counts.launches, counts.syncs) == (1, 0)
    assert "_stub_kernel" in counts.explain()


B = torch.eye(3, dtype=torch.float64)
# Launches and syncs of each call.
COUNTED = {
    "view": (lambda x: x.mT[:2, None].expand(2, 5, 3).unbind(), (0, 0)),
    "allocation": (lambda x: torch.empty_like(x), (0, 0)),
    "sum of two": (lambda x: x + x, (1, 0)),
    "number": (lambda x: 2 * x, (1, 0)),
    "conversion": (lambda x: x.float(), (1, 0)),
    "0-dim tensor of the CPU": (lambda x: x * torch.tensor(2.0), (1, 0)),
    "item": (lambda x: x[0, 0].item(), (0, 1)),
    "float": (lambda x: float(x[0, 0]), (0, 1)),
    "bool": (lambda x: bool((x > 0).all()), (2, 1)),
    "tolist": (lambda x: x.tolist(), (0, 1)),
    "print": (lambda x: str(x), (0, 1)),
    "to the host": (lambda x: x.cpu(), (0, 1)),
    "to the host, not waiting": (lambda x: x.to("cpu", non_blocking=True), (1, 0)),
    "from the host": (lambda x: B.to(x.device), (0, 1)),
    "numbers from the host": (lambda x: torch.tensor([1.0], device=x.device), (0, 1)),
    "little from the host, not waiting": (lambda x: B.to(x.device, non_blocking=True), (1, 0)),
    "much from the host": (
        lambda x: torch.zeros(8193).double().to("cuda", non_blocking=True),
        (0, 1),
    ),
    "much from pinned memory": (
        lambda x: torch.zeros(8193).double().pin_memory().to("cuda", non_blocking=True),
        (1, 0),
    ),
    "copy": (lambda x: x.copy_(B), (0, 1)),
    "copy of the device's": (lambda x: x.copy_(torch.empty_like(x)), (1, 0)),
    "one element": (lambda x: x[0, 0].copy_(torch.tensor(1.0)), (0, 1)),
    "assignment of a number": (lambda x: x.__setitem__(0, 1.0), (1, 0)),
    "assignment to an element": (lambda x: x.__setitem__((0, 0), 1.0), (0, 1)),
    "nonzero": (lambda x: x.nonzero(), (1, 1)),
    "mask": (lambda x: x[x > 0], (2, 1)),
    "fill by a mask": (lambda x: x.__setitem__(x > 0, 0.0), (2, 0)),
    "assignment by a mask": (lambda x: x.__setitem__(x > 2, x.sum()), (3, 1)),
    "list index": (lambda x: x[[0, 1]], (1, 1)),
    "CPU index": (lambda x: x[torch.tensor([0, 1])], (1, 1)),
    "numbers by an index": (lambda x: x.__setitem__([0, 1], 1.0), (1, 2)),
    "unique": (lambda x: x.unique(), (1, 1)),
    "bincount": (lambda x: (x > 0).long().flatten().bincount(), (3, 1)),
    "repeat_interleave": (lambda x: x[0].repeat_interleave((x[0] > -9).long(), 0), (4, 1)),
    "equal": (lambda x: torch.equal(x, x.clone()), (2, 1)),
    "cholesky": (lambda x: torch.linalg.cholesky(x), (2, 1)),
    "cholesky_ex": (lambda x: torch.linalg.cholesky_ex(x), (1, 0)),
    "solve": (lambda x: torch.linalg.solve(x, x), (2, 1)),
    "solve_triangular": (lambda x: torch.linalg.solve_triangular(x, x, upper=False), (1, 0)),
    "eigh": (lambda x: torch.linalg.eigh(x), (1, 1)),
    "svdvals": (lambda x: torch.linalg.svdvals(x), (1, 1)),
    "synchronize": (lambda x: torch.cuda.synchronize(), (0, 1)),
    "stream": (lambda x: torch.cuda.Stream().synchronize(), (0, 1)),
    "event": (lambda x: torch.cuda.Event().synchronize(), (0, 1)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_launches_and_syncs(phantom, name):
    call, want = COUNTED[name]
    x = SYMMETRIC.cuda()
    with phantom.count() as counts:
        call(x)
    assert (counts.launches, counts.syncs) == want, counts.explain()


def test_counts_name_the_line_of_the_package(phantom):
    with phantom.count() as counts:
        _launch.find_scale(A.cuda())
    text = counts.explain()
    assert "repsim_kernels/kernels/_cuda.py:" in text
    assert "1 aminmax" in text


def capture(call):
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        call()
    finally:
        graph.capture_end()
    return graph


def test_graphs_run_when_replayed(phantom):
    x, out = SYMMETRIC.cuda(), torch.zeros(3, 3, dtype=torch.float64, device="cuda")
    with phantom.count() as counts:
        graph = capture(lambda: (torch.mm(x, x, out=out), out.add_(1)))
        assert out.tolist() == torch.zeros(3, 3).tolist()
        graph.replay()
    assert counts.launches == 1
    assert counts.events["captured"].total() == 2
    torch.testing.assert_close(out.cpu(), SYMMETRIC @ SYMMETRIC + 1, rtol=0, atol=0)


FORBIDDEN_IN_GRAPHS = {
    "allocation": lambda x: x + 1,
    "empty memory": lambda x: torch.empty_like(x),
    "conversion": lambda x: x.float(),
    "sync": lambda x: x[0, 0].item(),
    "copy from the host": lambda x: x.copy_(SYMMETRIC),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", FORBIDDEN_IN_GRAPHS)
def test_graphs_hold_neither_allocations_nor_syncs(phantom, name):
    x = SYMMETRIC.cuda()
    with pytest.raises(PhantomError):
        capture(lambda: FORBIDDEN_IN_GRAPHS[name](x))


def test_syncs_are_errors_if_torch_is_told_so(phantom):
    x = SYMMETRIC.cuda()
    torch.cuda.set_sync_debug_mode("error")
    x + x
    with pytest.raises(PhantomError, match="item: the host waits"):
        x[0, 0].item()
    torch.cuda.set_sync_debug_mode("default")
    x[0, 0].item()
