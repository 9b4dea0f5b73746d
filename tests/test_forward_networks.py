"""Special features of PyTorch: cuts are bit-identical to a hook, or refused."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from _hook import (
    HUGE,
    Lambda,
    Net,
    assert_refused,
    check_cut,
    is_traced_by_fx,
    make_labels,
    run_hooked,
    run_plain,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from repsim_kernels.errors import DeviceError, LayerError
from repsim_kernels.forward import AblatedForward


def autocast_to_bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextlib.contextmanager
def use_default_dtype(dtype):
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


def wrap_the_layer(context):
    def run(m, x):
        with context():
            h = m.relu(m.cut(m.a(x)))
        return m.out(h.float())

    return run


def autocast(m, x):
    with autocast_to_bfloat16():
        h = m.cut(m.a(x))
    return m.out(m.relu(h.float()))


def nested_autocast(m, x):
    with autocast_to_bfloat16():
        h = m.a(x)
        with torch.autocast("cpu", enabled=False):
            h = m.cut(h.float())
        return m.out(m.relu(h)).float()


def autocast_behind_the_layer(m, x):
    h = m.cut(m.a(x))
    with autocast_to_bfloat16():
        h = h @ m.weight + h
    return m.out(h.float())


def gradients_within_autocast(m, x):
    with autocast_to_bfloat16(), torch.enable_grad():
        h = m.cut(m.a(x))
    return m.out(h.float())


def sets_attention_backend(m, x):
    h = m.cut(m.a(x)).view(-1, 2, 2, 1)
    with sdpa_kernel(SDPBackend.MATH):
        h = F.scaled_dot_product_attention(h, h * 2, h + 1)
    return m.out(h.reshape(-1, 4))


def sets_default_dtype(m, x):
    with use_default_dtype(torch.float64):
        # In float32, 1e6 is exact to 0.06 only.
        h = m.cut(m.a(x)) + (torch.arange(x.shape[1] / 10, 9)[:4] + 1e6 - 1e6)
    return m.out(h.float())


CONTEXTS = [
    autocast,
    nested_autocast,
    autocast_behind_the_layer,
    gradients_within_autocast,
    sets_attention_backend,
    sets_default_dtype,
    *map(wrap_the_layer, (torch.no_grad, torch.inference_mode, torch.enable_grad)),
]


@pytest.mark.parametrize("run", CONTEXTS)
@pytest.mark.parametrize("layer", ["a", "cut", "out"])
def test_contexts_in_forward_are_kept(run, layer):
    images = torch.randn(4, 6)
    forward = check_cut(Net(run), layer, images)
    assert is_traced_by_fx(forward)
    assert torch.equal(
        forward.intact(forward.prefix(images[:3])), run_plain(forward.model, images[:3])
    )


@pytest.mark.parametrize(
    "run",
    [autocast, nested_autocast, autocast_behind_the_layer, gradients_within_autocast],
)
@pytest.mark.parametrize("layer", ["a", "cut", "out"])
def test_contexts_of_exported_networks_are_kept(run, layer):
    def untraceable(m, x):
        assert isinstance(x, torch.Tensor)
        return run(m, x)

    assert not is_traced_by_fx(check_cut(Net(untraceable), layer, torch.randn(4, 6)))


def test_activation_has_the_dtype_of_its_context():
    state = AblatedForward(Net(autocast), "cut").prefix(torch.randn(3, 6))
    assert state.activation.dtype == torch.bfloat16


def test_autocast_of_the_caller_is_kept():
    model, images = Net(nested_autocast), torch.randn(4, 6)
    forward = AblatedForward(model, "cut")
    for outside in (contextlib.nullcontext(), autocast_to_bfloat16(), contextlib.nullcontext()):
        with outside:
            state = forward.prefix(images)
            labels = make_labels(state, 2)
            ablated = forward.logits(state, labels, batch=1)
            assert torch.equal(ablated[1], run_hooked(model, "cut", images, labels == 1))
            assert torch.equal(forward.intact(state), run_plain(model, images))


@pytest.mark.parametrize(
    "check_input",
    [
        lambda x: isinstance(x, torch.Tensor),
        torch.is_tensor,
        lambda x: x.dtype is torch.float32,
    ],
)
def test_checks_that_fx_evaluates_wrongly_are_exported(check_input):
    def run(m, x):
        h = m.cut(m.a(x))
        return m.out(h * 2 if check_input(x) else h)

    assert not is_traced_by_fx(check_cut(Net(run), "cut", torch.randn(4, 6)))


def test_layers_with_fewer_or_more_calls_under_fx_are_refused():
    def twice(m, x):
        h = m.a(x)
        return m.out(m.cut(m.cut(h)) if isinstance(x, torch.Tensor) else m.cut(h))

    def once(m, x):
        return m.out(m.cut(m.a(x)) if isinstance(x, torch.Tensor) else m.a(x))

    assert_refused(r"'cut' is called 2 times \(on linear.*\); expected one call", Net(twice))
    assert_refused("'cut' is never called in torch.fx.s trace of the model", Net(once))


def build_sequential():
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def build_decorated():
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build_sequential()

        @torch.compile(backend="eager")
        def forward(self, x):
            return self.net(x)

    return Decorated().eval(), "net.1"


def build_wrapped():
    return torch.compile(build_sequential(), backend="eager"), "_orig_mod.1"


def build_compiled_in_place():
    model = build_sequential()
    model.compile(backend="eager")
    return model, "1"


def build_compiled_part():
    model = build_sequential()
    model[0] = torch.compile(model[0], backend="eager")
    model[2].compile(backend="eager")
    return model, "1"


@pytest.mark.parametrize(
    "build", [build_decorated, build_wrapped, build_compiled_in_place, build_compiled_part]
)
@pytest.mark.parametrize("called", [False, True])
def test_compiled_networks_can_be_cut(build, called):
    torch.compiler.reset()
    (model, layer), eager, images = build(), build_sequential(), torch.randn(4, 6)
    if called:  # after its first call, compiled code ignores hooks
        run_plain(model, images)
    forward = AblatedForward(model, layer)
    state = forward.prefix(images)
    labels = make_labels(state, 3)
    ablated = forward.logits(state, labels, 3, batch=1)
    for c in range(3):
        assert torch.equal(ablated[c], run_hooked(eager, "1", images, labels == c))
    assert torch.equal(forward.intact(state), run_plain(eager, images))
    assert torch.equal(run_plain(model, images), run_plain(eager, images))


def test_a_name_from_before_compilation_is_refused():
    with pytest.raises(LayerError, match=r"no module '1'; expected .* '_orig_mod\.1'$"):
        AblatedForward(build_wrapped()[0], "1")


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_torchscript_is_refused(kind):
    def compiled(module, *images):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            return torch.jit.script(module) if kind == "script" else torch.jit.trace(module, images)

    images, model = torch.randn(3, 6), build_sequential()
    match = r"'{}' is TorchScript, because {} was scripted or traced, .*; pass the nn.Module"
    assert_refused(match.format("1", "the model"), compiled(model, images), "1")
    assert_refused(match.format("", "the model"), compiled(model, images), "")
    inner = nn.Sequential(compiled(model, images), nn.Linear(3, 3)).eval()
    assert_refused(match.format("0.1", "module '0'"), inner, "0.1")
    assert_refused(match.format("0", "module '0'"), inner, "0")
    check_cut(inner, "1", images)


def test_images_that_the_network_rejects_are_refused():
    message = r"it can't take these images, {}, with parameters of {}: mat1 and mat2 .*"
    images = torch.randn(4, 6)
    for model, batch, shape, dtype in [
        (build_sequential().double(), images, r"float32 of shape \(4, 6\)", "float64"),
        (build_sequential(), images.double(), r"float64 of shape \(4, 6\)", "float32"),
        (build_sequential(), images.int(), r"int32 of shape \(4, 6\)", "float32"),
        (build_sequential().half(), images[:1], r"float32 of shape \(1, 6\)", "float16"),
        (build_sequential(), images[:, 1:], r"float32 of shape \(4, 5\)", "float32"),
    ]:
        assert_refused(message.format(shape, dtype), model, "1", batch)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        forward = AblatedForward(build_sequential().to(dtype), "1")
        state = forward.prefix(images.to(dtype))
        want = run_hooked(forward.model, "1", images.to(dtype), torch.arange(8) % 2 == 0)
        assert torch.equal(forward.logits(state, [0, -1] * 4, batch=1)[0], want)


def test_a_network_may_fix_the_number_of_images():
    def fixed(m, x):
        return m.out(m.cut(m.a(x)).view(5, 4))

    check_cut(Net(fixed), "cut", torch.randn(5, 6))
    assert_refused(
        "can't take these images, float32 of shape", Net(fixed), images=torch.randn(4, 6)
    )


def test_parameters_without_values_are_refused():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU()).eval()
    assert_refused("'0.weight' has no shape yet; run the model once on a batch", lazy, "1")
    assert isinstance(lazy[0].weight, nn.parameter.UninitializedParameter)
    run_plain(lazy, torch.randn(3, 6))
    check_cut(lazy, "0", torch.randn(3, 6))
    assert_refused(
        "'0.weight' is on meta, which holds no values", build_sequential().to("meta"), "1"
    )
    with pytest.raises(DeviceError, match="images: on meta, which holds no values"):
        AblatedForward(nn.Sequential(nn.ReLU()).eval(), "0").prefix(torch.ones(2, device="meta"))


def test_data_parallel_is_refused_on_several_devices():
    model = nn.DataParallel(build_sequential()).eval()
    check_cut(model, "module.1", torch.randn(4, 6))
    model.device_ids = [0, 1]
    assert_refused(
        "it is split over 2 devices by DataParallel; pass its .module", model, "module.1"
    )
    inner = nn.Sequential(model).eval()
    assert_refused("'0' is split over 2 devices by DataParallel", inner, "0.module.1")


def test_dynamic_quantization_allows_one_cell_per_pass():
    """Activations are rounded by their range over the batch, so results depend on the batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        model = torch.ao.quantization.quantize_dynamic(build_sequential(), {nn.Linear}).eval()
    images = torch.randn(6, 6) * torch.logspace(-1, 1, 6)[:, None]
    for layer in "012":
        forward = check_cut(model, layer, images)
        state = forward.prefix(images)
        labels = make_labels(state, 3)
        one_by_one = forward.logits(state, labels, 3, batch=1)
        assert torch.equal(forward.logits(state, labels, 3, batch=HUGE), one_by_one)
        assert torch.equal(forward.logits(state, labels, 3, memory=1), one_by_one)


def add_parametrizations(model):
    parametrizations.weight_norm(model[0])
    parametrizations.orthogonal(model[2])


def add_hooks(model):
    model.register_forward_hook(lambda _m, _i, out: out * 3)
    model[0].register_forward_hook(lambda _m, _i, out: out + 1)
    model[1].register_forward_pre_hook(lambda _m, inputs: (inputs[0] * 2,))
    model[2].register_forward_hook(lambda _m, _i, out: torch.from_numpy(out.numpy() + 1))


def add_gradient_hooks(model):
    model.register_full_backward_hook(lambda *_: None)
    model[0].register_full_backward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [add_parametrizations, add_hooks, add_gradient_hooks])
@pytest.mark.parametrize("layer", ["", "0", "1", "2"])
def test_parametrizations_and_hooks_of_the_user_run(change, layer):
    model = build_sequential()
    change(model)
    model.eval()
    check_cut(model, layer, torch.randn(4, 6))


def test_data_dependent_networks_are_refused():
    def reads_a_value(m, x):
        return m.out(m.cut(m.a(x)) * float(x.mean()))

    def uses_numpy(m, x):
        return m.out(m.cut(m.a(x)) + float(x.numpy().mean()))

    neither_can = "torch.fx can't trace it: .*; torch.export can't either: "
    assert_refused(neither_can, Net(reads_a_value))
    assert_refused(neither_can, Net(uses_numpy))

    def neither(m, x):
        h = m.cut(m.a(x))
        return m.out(h * 2 if isinstance(x, torch.Tensor) and float(x.sum()) < 9e9 else h)

    assert_refused("torch.fx trace differs from a whole pass; torch.export can.t", Net(neither))
    pair = Net(lambda m, x: m.out(m.cut(m.a(x))[0]), Lambda(lambda h: [h, h]))
    assert_refused("'cut' returns a list of 2; expected a tensor, or output=0", pair)


class Fused(nn.Module):
    """A transformer layer, which runs as one fused operation, under autocast."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.a, self.out = nn.Linear(16, 16), nn.Linear(16, 4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = self.layer(self.a(x))
        return self.out(h.float().mean(1))


@pytest.mark.parametrize("layer", ["a", "out"])
def test_a_network_with_a_fused_layer_can_be_cut(layer):
    check_cut(Fused().eval(), layer, torch.randn(4, 6, 16))


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: torch.vmap(torch.sin)(x),
        lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1],
        lambda x: torch.func.grad(lambda t: t.sin().sum())(x),
    ],
    ids=["vmap", "jvp", "grad"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # used by PyTorch's jvp
def test_torch_func_is_refused_and_leaves_no_level_open(transform):
    model = Net(lambda net, x: net.out(transform(net.cut(net.a(x))))).eval()
    assert_refused(r"torch\.func|vmap", model)
    assert torch.ones(2).requires_grad_().requires_grad  # it would raise with a level open
