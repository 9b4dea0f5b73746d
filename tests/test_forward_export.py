"""Networks that torch.export can trace but torch.fx can't, because of Python control flow."""

import pytest
import torch
from _hook import HUGE, Lambda, Net, check_cut, make_labels, run_hooked, run_plain
from torch import nn

from repsim_kernels.errors import LayerError, OptionError
from repsim_kernels.forward import AblatedForward
from repsim_kernels.forward.inputs import Inputs
from repsim_kernels.forward.trace import Trace, Untraceable


def branches_on_the_length(m, x):
    y = m.cut(m.a(x))
    return m.out(y) if len(x) > 2 else m.out(-y) * 2


def loops_over_a_size(m, x):
    y = m.cut(m.a(x))
    for i in range(x.shape[1]):
        y = torch.tanh(y + i)
    return m.out(y)


def checks_the_type(m, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError("expected images")
    return m.out(m.relu(m.cut(m.a(x))))


def checks_the_shape(m, x):
    if x.shape[1:] != (6,):
        raise ValueError("expected 6 features")
    return m.out(m.cut(m.a(x)))


def iterates_over_images(m, x):
    h = m.a(x)
    rows = [row * (i + 1) for i, row in enumerate(m.cut(h) + h)]
    return m.out(torch.stack(rows))


def writes_a_skip(m, x):
    assert len(x) > 1
    h = m.relu(m.a(x))
    h += m.cut(h)
    h[:, 1:3].mul_(2)
    return m.out(h)


def writes_a_skip_later(m, x):
    assert len(x) > 1
    h = m.a(x)
    y = m.cut(h) * h
    h.relu_()
    return m.out(y) + m.out(h)


def reads_weights_and_constants(m, x):
    h = m.cut(m.a(x)) * m.place.exp() if len(x) else x
    return m.out(h + m.constant) @ m.weight[:3, :3] + m.place[:, :3]


def writes_the_images(m, x):
    assert len(x) > 1
    y = m.cut(m.a(x))
    x[:, :4].mul_(y)
    return m.b(x)


RUNS = [f for f in list(globals().values()) if getattr(f, "__module__", None) == __name__]


def assert_untraceable(model, layer="cut"):
    with pytest.raises(Untraceable, match=r"torch.fx can't trace it"):
        Trace(model, layer if isinstance(layer, list) else [layer])
    return model


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_python_that_fx_cannot_trace_can_be_cut(run):
    model = assert_untraceable(Net(run))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check_cut(model, "cut", torch.randn(4, 6))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {type(m) for m in model.children()} == {nn.Linear, nn.ReLU, nn.Dropout}
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("layer", "cut"),
    [
        ("cut", nn.ReLU()),
        ("cut", nn.ReLU(inplace=True)),
        ("cut", nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))),
        ("cut.0", nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))),
        ("cut.1", nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))),
        ("cut", nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), nn.Flatten())),
        ("cut", Lambda(lambda h: h.t().contiguous().t())),
        ("a", nn.Tanh()),
        ("out", nn.Tanh()),
    ],
)
def test_layers_of_any_kind_can_be_cut(layer, cut):
    def run(m, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError("expected images")
        return m.out(m.cut(m.a(x)).repeat(1, 2)[:, :4])

    check_cut(assert_untraceable(Net(run, cut.eval()), layer), layer, torch.randn(3, 6))


def test_the_whole_network_can_be_cut():
    model, images = assert_untraceable(Net(branches_on_the_length), ["", "cut"]), torch.randn(3, 6)
    forward = AblatedForward(model, ["", "cut"])
    state = forward.prefixes(images)[""]
    logits = forward.logits(state, [0, -1, 1])
    assert torch.equal(logits[0, :, 1:], run_plain(model, images)[:, 1:])
    assert torch.equal(logits[0, :, 0], torch.zeros(3))
    assert torch.equal(logits[1], run_hooked(model, "", images, torch.tensor([False, False, True])))


def test_each_shape_and_layout_is_exported_once():
    def run(m, x):
        y = m.pool(m.cut(x))
        return m.out(y.flatten(1)) * (2 if len(x) > 2 and x.shape[2] > 5 else 3)

    model = Net(run, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)))
    model.pool = nn.AdaptiveAvgPool2d(1).eval()
    forward = AblatedForward(assert_untraceable(model, "cut.0"), "cut.0")
    states = []
    for images in (
        torch.randn(4, 3, 6, 6),
        torch.randn(1, 3, 6, 6),
        torch.randn(4, 3, 5, 7),
        torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last),
        torch.randn(1, 3, 6, 6).expand(4, -1, -1, -1),
        torch.randn(4, 3, 6, 6),
    ):
        states.append((images, forward.prefix(images)))
    for images, state in states:
        labels = make_labels(state, 2)
        ablated = forward.logits(state, labels, batch=1)
        assert torch.equal(forward.intact(state), run_plain(model, images))
        torch.testing.assert_close(ablated[1], run_hooked(model, "cut.0", images, labels == 1))
    assert len(forward._cuts._exports) == 5


def test_several_cells_share_a_pass():
    model, rows = Net(branches_on_the_length), []
    forward = AblatedForward(model, "cut")
    state = forward.prefix(torch.randn(4, 6))  # fewer images would take the other branch
    run = forward._cuts.find(["cut"], Inputs((torch.randn(4, 6),)))["cut"].trace.run
    want = forward.logits(state, [0, 1, 2, 3], batch=1)
    state._trace.run = lambda node, values: rows.append(len(out := run(node, values))) or out
    image_bytes = 2 * 4 * 4
    for batch, memory, expected in [(HUGE, None, 16), (3, None, 12), (HUGE, image_bytes, 1)]:
        rows.clear()
        got = forward.logits(state, [0, 1, 2, 3], batch=batch, memory=memory)
        torch.testing.assert_close(got, want)
        assert max(rows) == expected


def test_a_fixed_size_allows_one_cell_per_pass():
    def run(m, x):
        return m.out(m.cut(m.a(x)).view(len(x), 2, 2).mean(1).repeat(1, 2))

    forward = check_cut(assert_untraceable(Net(run)), "cut", torch.randn(3, 6))
    assert not forward._cuts.find(["cut"], Inputs((torch.randn(3, 6),)))["cut"].split.batchable


def test_new_weights_are_used():
    model, images = assert_untraceable(Net(reads_weights_and_constants)), torch.randn(3, 6)
    forward, labels = AblatedForward(model, "cut"), torch.tensor([0, 1, 0, 1])
    old = forward.intact(forward.prefix(images))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-0.5)
        model.place.fill_(0.5)
        model.constant.fill_(3)
    state = forward.prefix(images)
    assert not torch.allclose(old, run_plain(model, images))
    assert torch.equal(forward.intact(state), run_plain(model, images))
    want = run_hooked(model, "cut", images, labels == 1)
    assert torch.equal(forward.logits(state, labels, batch=1)[1], want)
    weights = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    model.load_state_dict(weights)
    assert torch.equal(forward.intact(forward.prefix(images)), run_plain(model, images))
    model.double()
    images = images.double()
    assert torch.equal(forward.intact(forward.prefix(images)), run_plain(model, images))


def test_several_layers_share_an_export():
    def run(m, x):
        h = m.relu(m.a(x))
        return m.out(m.cut(h) + h) if len(x) > 2 else m.out(h)

    cut = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    layers = ["", "out", "a", "cut", "cut.0", "relu"]
    model, images = assert_untraceable(Net(run, cut), layers), torch.randn(3, 6)
    forward, original = AblatedForward(model, layers), images.clone()
    states = forward.prefixes(images)
    assert list(states) == layers
    assert len(forward._cuts._exports) == 1
    for name in (*layers, *reversed(layers)):
        state = states[name]
        labels = make_labels(state, 2)
        ablated = forward.logits(state, labels, batch=1)
        assert torch.equal(ablated[1], run_hooked(model, name, images, labels == 1)), name
        assert torch.equal(forward.intact(state), run_plain(model, images)), name
        (single,) = AblatedForward(model, [name]).prefixes(images).values()
        assert torch.equal(state.activation, single.activation), name
    assert torch.equal(images, original)
    with pytest.raises(LayerError, match="'cut' is never called"):
        forward.prefixes(images[:2])  # these take the other branch
    assert list(forward.prefixes(images * 2, ["cut"])) == ["cut"]
    with pytest.raises(OptionError, match="layers: 'b'; expected one of"):
        forward.prefixes(images, ["b"])


def assert_export_refused(match, model, layer="cut"):
    forward = AblatedForward(assert_untraceable(model, layer), layer)
    with pytest.raises(LayerError, match=match) as error:
        forward.prefix(torch.randn(3, 6))
    assert "\n" not in str(error.value)


def test_uncuttable_layers_are_refused():
    def twice(m, x):
        return m.out(m.cut(m.cut(m.a(x)))) if len(x) else x

    def in_the_other_branch(m, x):
        return m.out(m.a(x) if len(x) < 9 else m.cut(m.a(x)))

    def gives_a_pair(m, x):
        left, right = m.cut(m.a(x))
        return m.out(left + right) if len(x) else x

    def shares_memory(m, x):
        h = m.a(x) if len(x) else x
        return m.out(m.cut(h) + h)

    assert_export_refused(
        r"'cut' is called 2 times \(on linear.*; on linear.*\); expected one", Net(twice)
    )
    assert_export_refused(
        "'cut' is never called; expected one call in a pass", Net(in_the_other_branch)
    )
    pair = Lambda(lambda h: (h * 2, h + 1))
    assert_export_refused(
        "'cut' returns a tuple of 2; expected a tensor, or output=0", Net(gives_a_pair, pair)
    )
    # torch.export gives a value and what later overwrites it the same name.
    assert_export_refused(
        "cut at 'cut', it differs from a whole", Net(shares_memory, nn.ReLU(inplace=True))
    )


def test_a_layer_with_two_outputs_is_refused_if_one_is_used():
    def uses_one_of_a_pair(m, x):
        return m.out(m.cut(m.a(x))[0]) if len(x) else x

    pair = Lambda(lambda h: (h * 2, h + 1))
    assert_export_refused("'cut' returns a tuple of 2; expected a", Net(uses_one_of_a_pair, pair))


def test_uncuttable_models_are_refused():
    def branching(m, x):
        y = m.cut(m.a(x))
        return m.out(y if y.sum() > 0 else -y)

    def gives_a_dict(m, x):
        return {"logits": m.out(m.cut(m.a(x)))} if len(x) else x

    def random(m, x):
        y = m.cut(m.a(x)) if len(x) else x
        return m.out(nn.functional.dropout(y, training=True))

    def writes_a_buffer(m, x):
        m.place.add_(len(x))
        return m.out(m.cut(m.a(x)) + m.place)

    def writes_a_constant(m, x):
        y = m.cut(m.a(x)) if len(x) else x
        m.constant[:, 0] = y[0, 0]
        return m.out(y + m.constant)

    def averages_images(m, x):
        return m.out(m.cut(m.a(x))).mean(0)[:2] if len(x) else x

    neither_can = (
        r"^model: torch.fx can't trace it: symbolically traced variables.*; torch.export can't"
    )
    assert_export_refused(f"{neither_can} either: ", Net(branching))
    assert_export_refused(r"it returns dict; expected a tensor \(n, …\)", Net(gives_a_dict))
    assert_export_refused(
        "two passes of the same images differ; expected a model without random", Net(random)
    )
    assert_export_refused(
        "a pass writes to its 'place'; expected a pass that", Net(writes_a_buffer)
    )
    assert_export_refused(
        "a pass writes to its 'constant'; expected a pass that", Net(writes_a_constant)
    )
    assert_export_refused(r"it gives a tensor \(2,\) for 3 images", Net(averages_images))


def test_training_mode_is_refused():
    model = assert_untraceable(Net(branches_on_the_length))
    model.drop.train()
    with pytest.raises(LayerError, match="'drop' is in training mode"):
        AblatedForward(model, "cut")
    model.eval()
    forward = AblatedForward(model, "cut")
    state = forward.prefix(torch.randn(3, 6))
    model.train()
    for call in (
        lambda: forward.prefix(torch.randn(3, 6)),
        lambda: forward.prefixes(torch.randn(2, 6)),
        lambda: forward.intact(state),
        lambda: forward.logits(state, [0, 0, 0, 0]),
        lambda: forward.costs(torch.randn(3, 6)),
    ):
        with pytest.raises(LayerError, match="it is in training mode"):
            call()
