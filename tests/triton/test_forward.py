"""Tails of a network with Triton kernels, against PyTorch operations and a forward hook."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _hook import HUGE, Lambda, get_tensors, make_labels, run_hooked, run_plain
from torch import nn

from repsim_kernels.forward import AblatedForward
from repsim_kernels.forward.trace import Trace
from repsim_kernels.kernels.triton import _launch

ABLATE, POINTWISE, LINEAR = (
    ["_ablate_kernel"],
    ["_masked_pointwise_kernel"],
    ["_parts_kernel", "_others_kernel"],
)


@pytest.fixture(autouse=True)
def _backend(monkeypatch):
    monkeypatch.setenv("REPSIM_BACKEND", "triton")


class LaunchLog:
    """Records the kernels that are launched, and the network's operations that run unfused."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.kernels, self.epilogue, self.steps, self.precision = [], "", [], None

    def record_launch(self, kernel, arguments, options):
        self.kernels.append(kernel.fn.__name__)
        self.precision = options.get("PRECISION", self.precision)
        if "ACTIVATE" in options:
            scale = dict(zip(kernel.arg_names, arguments, strict=False))["scale_ptr"]
            self.epilogue = " ".join(["norm"] * (scale is not None) + [options["ACTIVATE"]])

    @property
    def unfused(self):
        return self.steps[: self.steps.index("out") - 1]  # without the flatten before `out`


@pytest.fixture
def log(monkeypatch):
    log = LaunchLog()
    launch, run = _launch.launch, Trace.run

    def launch_and_record(kernel, grid, *arguments, **options):
        log.record_launch(kernel, arguments, options)
        launch(kernel, grid, *arguments, **options)

    def run_and_record(trace, node, values):
        log.steps.append(node.name.removeprefix("model_"))
        return run(trace, node, values)

    monkeypatch.setattr(_launch, "launch", launch_and_record)
    monkeypatch.setattr(Trace, "run", run_and_record)
    return log


def randomize_norms(model):
    """Give batch norms random parameters, and set eval mode."""
    torch.manual_seed(2)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t in (m.running_mean, m.weight, m.bias):
                nn.init.normal_(t, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return model.eval()


class Net(nn.Module):
    """A convolution, the layer to cut at, and the operations of a function after it."""

    def __init__(self, after_cut, **modules):
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.cut = nn.Conv2d(4, 6, 1)
        self.bn, self.relu, self.relu6 = (
            nn.BatchNorm2d(6, eps=0.3),
            nn.ReLU(inplace=True),
            nn.ReLU6(),
        )
        self.point, self.bn2 = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)
        self.wide = nn.Conv2d(6, 6, 3, padding=1)
        self.flatten, self.drop = nn.Flatten(), nn.Dropout()
        self.fc, self.bn1 = nn.Linear(6 * 16, 5), nn.BatchNorm1d(5)
        self.bn_flat = nn.BatchNorm1d(6 * 16)
        self.tokens, self.out = nn.Linear(4, 7), nn.LazyLinear(3)
        nn.init.normal_(self.fc.weight)
        for name, module in modules.items():
            setattr(self, name, module)
        self.after_cut = after_cut
        self(torch.zeros(2, 3, 4, 4))
        randomize_norms(self)

    def forward(self, x):
        return self.out(self.after_cut(self, self.cut(self.stem(x))).flatten(1))


def norm_relu(m, y):
    return m.wide(m.relu(m.bn(y)))


def norm_only(m, y):
    return m.bn(y).exp()


def relu_in_place(m, y):
    return m.wide(m.relu(y))


def relu6(m, y):
    return m.wide(m.relu6(m.drop(y)))


def pointwise(m, y):
    return m.relu6(m.bn2(m.point(y)))


def flat_linear(m, y):
    return m.relu(m.bn1(m.fc(m.drop(m.flatten(y)))))


def tokens(m, y):
    return F.relu(m.tokens(y))


def functions(m, y):
    b = m.bn
    y = F.batch_norm(y, b.running_mean, b.running_var, b.weight, b.bias)
    return torch.relu_(y) + 1


def pointwise_function(m, y):
    return F.conv2d(y, m.point.weight, m.point.bias).relu_() + 1


def linear_function(m, y):
    return F.relu6(F.linear(torch.flatten(y, 1), m.fc.weight * 2), inplace=True)


def residual(m, y):
    return m.relu(y + y.exp())


def wide(m, y):
    return m.relu(m.wide(y))


def flat_relu(m, y):
    return m.relu(y.flatten(1))


def tokens_norm(m, y):
    return F.batch_norm(m.tokens(y), m.bn.running_mean, m.bn.running_var)


def strided(m, y):
    return F.conv2d(y, m.point.weight, stride=2)


def padded(m, y):
    return F.conv2d(y, m.point.weight, padding=1)


def grouped(m, y):
    return F.conv2d(y, m.point.weight[:3, :2], groups=3)


def norm_point(m, y):
    return m.point(m.bn(y))


def norm_norm(m, y):
    return m.bn(m.bn(y))


def relu6_relu(m, y):
    return m.relu(m.relu6(y))


def relu_norm(m, y):
    return m.bn(m.relu(y))


def flat_norm(m, y):
    return m.bn_flat(y.flatten(1))


def used_twice(m, y):
    return m.relu6(y) * y


def norm_used_twice(m, y):
    z = m.bn(y)
    return m.relu6(z) * z


def by_name(m, y):
    return torch.relu(input=y)


# Several cells: kernels, epilogue and unfused operations; one cell: epilogue and unfused operations
# (the kernel is ABLATE).
CASES = {
    norm_relu: (ABLATE, "norm relu", ["wide"], "none", ["bn", "relu", "wide"]),
    norm_only: (ABLATE, "norm none", ["exp"], "none", ["bn", "exp"]),
    relu_in_place: (ABLATE, "relu", ["wide"], "relu", ["wide"]),
    relu6: (ABLATE, "relu6", ["wide"], "relu6", ["wide"]),
    functions: (ABLATE, "norm relu", ["add"], "none", ["batch_norm", "relu_", "add"]),
    pointwise: (POINTWISE, "norm relu6", [], "none", ["point", "bn2", "relu6"]),
    pointwise_function: (POINTWISE, "relu", ["add"], "none", ["conv2d", "relu_", "add"]),
    tokens: (POINTWISE, "relu", [], "none", ["tokens", "relu"]),
    tokens_norm: (POINTWISE, "none", ["batch_norm"], "none", ["tokens", "batch_norm"]),
    flat_linear: (LINEAR, "norm relu", [], "none", ["flatten", "drop", "fc", "bn1", "relu"]),
    linear_function: (LINEAR, "relu6", [], "none", ["flatten", "linear", "relu6"]),
    residual: (ABLATE, "none", ["exp", "add", "relu"], "none", ["exp", "add", "relu"]),
    wide: (ABLATE, "none", ["wide", "relu"], "none", ["wide", "relu"]),
    flat_relu: (ABLATE, "none", ["flatten", "relu"], "none", ["flatten", "relu"]),
    strided: (ABLATE, "none", ["conv2d"], "none", ["conv2d"]),
    padded: (ABLATE, "none", ["conv2d"], "none", ["conv2d"]),
    grouped: (ABLATE, "none", ["conv2d"], "none", ["conv2d"]),
    norm_point: (ABLATE, "norm none", ["point"], "none", ["bn", "point"]),
    norm_norm: (ABLATE, "norm none", ["bn_1"], "none", ["bn", "bn_1"]),
    relu6_relu: (ABLATE, "relu6", ["relu"], "relu6", ["relu"]),
    relu_norm: (ABLATE, "relu", ["bn"], "relu", ["bn"]),
    flat_norm: (ABLATE, "none", ["flatten", "bn_flat"], "none", ["flatten", "bn_flat"]),
    used_twice: (ABLATE, "none", ["relu6", "mul"], "none", ["relu6", "mul"]),
    norm_used_twice: (ABLATE, "norm none", ["relu6", "mul"], "none", ["bn", "relu6", "mul"]),
    by_name: (ABLATE, "none", ["relu"], "none", ["relu"]),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("after_cut", CASES, ids=lambda after_cut: after_cut.__name__)
def test_fused_operations_and_results(device, log, monkeypatch, after_cut, layout):
    kernels, epilogue, unfused, one, unfused_of_one = CASES[after_cut]
    model = Net(after_cut).to(device, memory_format=layout)
    images = torch.randn(3, 3, 4, 4, device=device).to(memory_format=layout)
    forward = AblatedForward(model, "cut")
    state = forward.prefix(images)
    assert torch.equal(forward.intact(state), run_plain(model, images))
    before = [t.clone() for t in get_tensors(state)]
    labels = make_labels(state, 4)

    log.clear()
    one_by_one = forward.logits(state, labels[None] == 2, batch=1)
    assert (log.kernels, log.epilogue, log.unfused) == (ABLATE, one, unfused_of_one)
    assert torch.equal(one_by_one[0], run_hooked(model, "cut", images, labels == 2))

    log.clear()
    together = forward.logits(state, labels, batch=HUGE)
    assert (log.kernels, log.epilogue, log.unfused) == (kernels, epilogue, unfused)
    log.clear()
    overlapping = forward.logits(
        state, labels == torch.arange(5, device=device)[:, None], batch=HUGE
    )
    assert log.kernels == (POINTWISE if kernels == LINEAR else kernels)
    assert (log.epilogue, log.unfused) == (epilogue, unfused)
    assert all(map(torch.equal, get_tensors(state), before))

    monkeypatch.setenv("REPSIM_BACKEND", "torch")
    log.clear()
    want = forward.logits(state, labels, batch=HUGE)
    assert log.kernels == []
    torch.testing.assert_close(together, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(overlapping[:4], want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(want[0], want[1], rtol=1e-2)


@pytest.mark.parametrize("switch", ["tf32", "ieee"])
@pytest.mark.parametrize("after_cut", [pointwise, flat_linear])
def test_tf32_follows_pytorchs_switches(device, log, after_cut, switch):
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    backend = conv if after_cut is pointwise else matmul
    model = Net(after_cut).to(device)
    forward = AblatedForward(model, "cut")
    state = forward.prefix(torch.randn(3, 3, 4, 4, device=device))
    before = backend.fp32_precision
    try:
        backend.fp32_precision = switch
        forward.logits(state, make_labels(state, 4), batch=HUGE)
    finally:
        backend.fp32_precision = before
    assert log.precision == {"tf32": "tf32", "ieee": "tf32x3"}[switch]


def test_modules_with_hooks_or_parametrizations_are_not_fused(device, log):
    calls = []
    point = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 5, 1))
    model = Net(lambda m, y: m.point(m.relu6(y)), point=point).to(device)
    forward = AblatedForward(model, "cut")
    state = forward.prefix(torch.randn(3, 3, 4, 4, device=device))
    forward.intact(state)
    labels = make_labels(state, 3)
    log.clear()
    want = forward.logits(state, labels, batch=HUGE)
    assert (log.epilogue, log.unfused) == ("relu6", ["point"])
    model.relu6.register_forward_hook(lambda _m, _i, out: calls.append(len(out)))
    log.clear()
    unfused = forward.logits(state, labels, batch=HUGE)
    assert (log.epilogue, log.unfused) == ("none", ["relu6", "point"])
    assert calls == [9]
    torch.testing.assert_close(unfused, want)
    model.relu6._forward_hooks.clear()
    model.relu6.forward = F.relu6
    log.clear()
    unfused = forward.logits(state, labels, batch=HUGE)
    assert (log.epilogue, log.unfused) == ("none", ["relu6", "point"])
    torch.testing.assert_close(unfused, want)
    forward = AblatedForward(Net(lambda m, y: m.point(y), point=point).to(device), "cut")
    state = forward.prefix(torch.randn(3, 3, 4, 4, device=device))
    log.clear()
    forward.logits(state, labels, batch=HUGE)
    assert log.kernels == ABLATE


def test_new_weights_are_used(device):
    model = Net(pointwise).to(device)
    images = torch.randn(3, 3, 4, 4, device=device)
    forward = AblatedForward(model, "cut")
    state = forward.prefix(images)
    labels = make_labels(state, 3)
    forward.logits(state, labels, batch=HUGE)
    with torch.no_grad():
        for parameter in (*model.point.parameters(), model.bn2.weight, model.bn2.running_mean):
            parameter.mul_(1.5)
    state = forward.prefix(images)
    got = forward.logits(state, labels, batch=HUGE)
    for c in range(3):
        want = run_hooked(model, "cut", images, labels == c)
        torch.testing.assert_close(got[c], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(device, log, dtype):
    model = Net(relu_in_place).to(device, dtype)
    images = torch.randn(3, 3, 4, 4, device=device, dtype=dtype)
    forward = AblatedForward(model, "cut")
    state = forward.prefix(images)
    labels = make_labels(state, 3)
    log.clear()
    one_by_one = forward.logits(state, labels, batch=1)
    assert log.kernels == ([] if dtype == torch.float64 else ABLATE * 3)
    for c in range(3):
        assert torch.equal(one_by_one[c], run_hooked(model, "cut", images, labels == c))


def test_no_fusion_under_autocast(device, log):
    cut = nn.Sequential(nn.Conv2d(4, 6, 1), Lambda(lambda y: y.float()))
    model = Net(pointwise, cut=cut).to(device)
    images = torch.randn(3, 3, 4, 4, device=device)
    forward = AblatedForward(model, "cut")
    with torch.autocast(device.type, torch.bfloat16):
        state = forward.prefix(images)
        forward.intact(state)
        log.clear()
        forward.logits(state, make_labels(state, 3), batch=HUGE)
    assert (log.kernels, log.unfused) == (ABLATE, ["point", "bn2", "relu6"])


def test_nothing_after_the_layer(device, log):
    model = Net(lambda m, y: y).to(device)
    images = torch.randn(3, 3, 4, 4, device=device)
    forward = AblatedForward(model, "")
    state = forward.prefix(images)
    log.clear()
    got = forward.logits(state, [0, 1, -1], batch=HUGE)
    assert log.kernels == ABLATE
    assert torch.equal(got[1], run_plain(model, images) * torch.tensor([1, 0, 1], device=device))
