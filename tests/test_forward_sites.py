"""Layers that are parts of outputs or inputs of modules, and networks with several inputs."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from _hook import Lambda, Net, is_traced_by_fx, run_hooked, run_plain
from torch import nn

from repsim_kernels.errors import DeviceError, DtypeError, LayerError, OptionError, ShapeError
from repsim_kernels.forward import AblatedForward

Pair = namedtuple("Pair", "first second")


@dataclass
class Record:
    name: str
    values: object


# what a layer returns for h, the path of its tensor, and how to read that
OUTPUTS = [
    (lambda h: (h, h + 1), 0, lambda out: out[0]),
    (lambda h: (h + 1, h), -1, lambda out: out[1]),
    (lambda h: [h + 1, h, None], "1", lambda out: out[1]),
    (lambda h: {"a": h + 1, "b.c": h}, "b.c", lambda out: out["b.c"]),
    (lambda h: OrderedDict(a=h, b=h + 1), "a", lambda out: out["a"]),
    (lambda h: Pair(h + 1, h), "second", lambda out: out.second),
    (lambda h: Record("x", (h, 2)), "values.0", lambda out: out.values[0]),
    (lambda h: (3, {"hidden": [h * 2, h]}), "1.hidden.-1", lambda out: out[1]["hidden"][1]),
    (lambda h: h, "3.anything", lambda out: out),  # a tensor is the layer, whatever the path
]


@pytest.mark.parametrize(("make", "path", "read"), OUTPUTS)
@pytest.mark.parametrize("export", [False, True])
def test_parts_of_outputs_match_code_that_masks_them(make, path, read, export):
    def run(m, x, change=lambda h: h):
        out = m.cut(m.a(x))
        if export and len(x) < 1:  # torch.fx can't trace a branch on the number of images
            return x
        # Only the part is changed, and the module's other values are used too.
        rest = sum(t.sum(-1, keepdim=True) for t in list_tensors(out) if t is not read(out))
        return m.out(change(read(out)) + m.b(x)) + rest

    model, images = Net(run, Lambda(make)), torch.randn(4, 6)
    forward = AblatedForward(model, "cut", output=path)
    state = forward.prefix(images)
    assert is_traced_by_fx(forward) == (not export)
    mask = torch.tensor([True, False, False, True])
    masked = Net(lambda m, x: run(m, x, lambda h: h.masked_fill(mask, 0)), Lambda(make))
    masked.load_state_dict(model.state_dict())
    (logits,) = forward.logits(state, mask[None], batch=1)
    assert torch.equal(logits, run_plain(masked, images))
    assert torch.equal(forward.intact(state), run_plain(model, images))


def list_tensors(value):
    if isinstance(value, (torch.Tensor, torch.fx.Proxy)):
        return [value]
    if isinstance(value, Record):
        value = value.values
    parts = value.values() if isinstance(value, dict) else value
    return [t for part in parts for t in list_tensors(part)] if not scalar(value) else []


def scalar(value):
    return value is None or isinstance(value, (int, str))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_sequence_of_a_recurrent_network(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.out = kind(5, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.cell(x)[0])

    model, x = Recurrent().eval(), torch.randn(3, 4, 5)
    forward = AblatedForward(model, "cell", output=0)
    state = forward.prefix(x)
    assert is_traced_by_fx(forward)
    assert state.activation.shape == (3, 4, 8)
    cells = torch.rand(2, 32) < 0.5
    with torch.no_grad():
        h = model.cell(x)[0]
        for cell, logits in zip(cells, forward.logits(state, cells, batch=1), strict=True):
            assert torch.equal(logits, model.out(h.masked_fill(cell.view(4, 8), 0)))


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("export", [False, True])
def test_inputs_of_modules_are_not_what_others_read(by_name, export):
    def run(m, x):
        h = m.a(x)
        y = m.cut(input=h) if by_name else m.cut(h)
        h.relu_()  # after the layer has read it
        return m.out(y + h) if not export or len(x) else x

    model, images = Net(run), torch.randn(4, 6)
    forward = AblatedForward(model, "cut:input")
    state = forward.prefix(images)
    assert is_traced_by_fx(forward) == (not export)
    with torch.no_grad():
        assert torch.equal(state.activation, model.a(images))
        for j in range(4):
            h = model.a(images)
            expected = model.out(model.cut(h.index_fill(1, torch.tensor(j), 0)) + h.relu())
            (logits,) = forward.logits(state, (torch.arange(4) == j)[None], batch=1)
            assert torch.equal(logits, expected)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_of_several_kinds_share_a_pass():
    model = Net(lambda m, x: m.out(m.cut(m.relu(m.a(x)))[1] + m.b(x)), Lambda(lambda h: (h, 2 * h)))
    layers, images = ["a", "cut:input", "cut", "out:input", ":input", "out"], torch.randn(3, 6)
    forward = AblatedForward(model, layers, output=1)
    states = forward.prefixes(images)
    assert list(states) == layers
    assert len({state._trace for state in states.values()}) == 1
    assert torch.equal(states[":input"].activation, images)
    with torch.no_grad():
        h = model.relu(model.a(images))
        assert torch.equal(states["cut:input"].activation, h)
        assert torch.equal(states["cut"].activation, 2 * h)
        assert torch.equal(states["out:input"].activation, 2 * h + model.b(images))
    for layer, state in states.items():
        everything = torch.ones(1, state.activation[0].numel(), dtype=torch.bool)
        (logits,) = forward.logits(state, everything, batch=1)
        if ":" not in layer and layer != "cut":
            assert torch.equal(logits, run_hooked(model, layer, images, everything[0]))
        assert torch.equal(forward.intact(state), run_plain(model, images))
    costs = forward.costs(images)
    assert costs["out:input"].tail_flops == 2 * 4 * 3


def test_a_name_with_a_colon_is_that_of_a_module():
    model = nn.Sequential(
        OrderedDict([("a", nn.Linear(6, 4)), ("a:input", nn.Linear(4, 3))])
    ).eval()
    assert AblatedForward(model, "a:input").prefix(torch.randn(2, 6)).activation.shape == (2, 3)
    assert AblatedForward(model, "a:input:input").prefix(torch.randn(2, 6)).activation.shape == (
        2,
        4,
    )


class Two(nn.Module):
    """A network of two inputs and a table that is the same for all stimuli."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.relu = nn.ReLU()

    def forward(self, x, y, table=None):
        h = self.relu(self.a(x)) * self.b(y)
        return {"logits": self.out(h if table is None else h + table), "hidden": h}


@pytest.mark.parametrize("form", ["tuple", "dict", "list"])
def test_networks_of_several_inputs(form):
    model = Two().eval()
    x, y, table = torch.randn(6, 5), torch.randn(6, 3), torch.randn(1, 4)
    inputs = {
        "dict": {"y": y, "x": x, "table": table},
        "tuple": (x, y, table),
        "list": [x, y, table],
    }
    if form == "dict":
        call = lambda model, inputs: model(**inputs)["logits"]  # noqa: E731
    else:
        call = lambda model, inputs: model(*inputs)["logits"]  # noqa: E731
    forward = AblatedForward(model, ["relu", "b"], call=call)
    states = forward.prefixes(inputs[form])
    assert not forward._cuts._exports  # one trace by torch.fx, for any number of stimuli
    for layer, state in states.items():
        assert len(state) == 6
        assert state._split.batchable
        labels = torch.tensor([0, 1, 1, -1])
        logits = forward.logits(state, labels, batch=1)
        with torch.no_grad():
            for c in range(2):
                h = {"relu": model.relu(model.a(x)), "b": model.b(y)}
                h[layer] = h[layer].masked_fill(labels == c, 0)
                assert torch.equal(logits[c], model.out(h["relu"] * h["b"] + table))
        together = forward.logits(state, labels)
        torch.testing.assert_close(together, logits)
        in_parts = forward.logits(state, labels, memory=2 * state._split.tail_peak_bytes)
        torch.testing.assert_close(in_parts, logits)
    fewer = {"y": y[:4], "x": x[:4], "table": table}
    if form == "dict":
        assert torch.equal(
            forward.intact(forward.prefixes(fewer)["b"]), forward.intact(states["b"])[:4]
        )
    assert forward.costs(inputs[form])["relu"].head_flops == 2 * (5 + 3) * 4


def test_default_calls():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 4)

        def forward(self, x, y):
            return self.a(x) - y

    model, x, y = Sum().eval(), torch.randn(3, 5), torch.randn(3, 4)
    for inputs in ((x, y), [x, y], {"x": x, "y": y}, {"y": y, "x": x}):
        forward = AblatedForward(model, "a")
        state = forward.prefix(inputs)
        with torch.no_grad():
            assert torch.equal(forward.intact(state), model(x, y))
        assert torch.equal(forward.logits(state, [0, 0, 0, 0])[0], -y)


def test_the_inputs_are_not_changed():
    def run(m, x):
        y = m.cut(m.a(x["x"]))
        x["x"].zero_()
        x["place"].add_(1)
        return m.out(y + x["place"])

    model = Net(lambda m, x: x)
    x, place = torch.randn(3, 6), torch.randn(1, 4)
    inputs = {"x": x, "place": place}
    before = {key: t.clone() for key, t in inputs.items()}
    forward = AblatedForward(model, "cut", call=run)
    state = forward.prefix(inputs)
    for _ in range(2):
        logits = forward.logits(state, [0, 1, 2, 3])
        with torch.no_grad():
            h = model.cut(model.a(x)).index_fill(1, torch.tensor(2), 0)
            torch.testing.assert_close(logits[2], model.out(h + place + 1))
    assert all(torch.equal(t, before[key]) for key, t in inputs.items())


def test_invalid_inputs_are_refused():
    forward = AblatedForward(Two().eval(), "relu", call=lambda model, x: model(**x)["logits"])
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    for inputs, error, match in (
        ({"x": x, "y": None}, DtypeError, r"images\['y'\]: None; expected a torch tensor$"),
        ((x, 3), DtypeError, r"images\[1\]: int; expected a torch tensor$"),
        ({}, DtypeError, "images: dict; expected a torch tensor, or a dict or tuple of them"),
        ({3: x}, DtypeError, "images: dict; expected a torch tensor, or a dict or tuple of them"),
        ({"x": x[:0], "y": y}, ShapeError, r"images\['x'\]: shape \(0, 5\); expected \(n, …\)"),
        ({"x": x, "y": y.to("meta")}, DeviceError, r"images\['y'\]: on meta; expected the model's"),
        ({"x": x, "y": y, "z": x}, LayerError, r"\['x'\] float32 of shape \(6, 5\); \['y'\] float"),
    ):
        with pytest.raises(error, match=match):
            forward.prefix(inputs)


def test_invalid_options_are_refused():
    model = Net(lambda m, x: m.out(m.cut(m.a(x))))
    for output in (True, 1.5, (0,)):
        with pytest.raises(OptionError, match=r"output: .*; expected an index, a path such as"):
            AblatedForward(model, "cut", output=output)
    with pytest.raises(OptionError, match="call: 'logits'; expected a function of the model and"):
        AblatedForward(model, "cut", call="logits")


def test_uncuttable_inputs_are_refused():
    def check(match, run, layer, cut=None):
        with pytest.raises(LayerError, match=match):
            AblatedForward(Net(run, cut), layer).prefix(torch.randn(3, 6))

    def twice(m, x):
        return m.out(m.cut(m.cut(m.a(x))))

    def never(m, x):
        return m.out(m.a(x))

    def with_a_pair(m, x):
        return m.out(m.cut((m.a(x), 1)))

    check(r"'cut:input' is called 2 times \(on a; on cut\); expected one call", twice, "cut:input")
    check("'cut:input' is never called", never, "cut:input")
    first = Lambda(lambda pair: pair[0])
    check("'cut:input' gets a tuple of 2; expected a tensor", with_a_pair, "cut:input", first)
    mean = Lambda(lambda h: h.mean(0))
    match = r"'out:input' gives a tensor \(4,\) for 3 images; expected \(n, …\)"
    check(match, lambda m, x: m.out(m.cut(m.a(x))).expand(len(x), 3), "out:input", mean)


def test_a_tuple_of_the_model_says_what_to_pass():
    model = nn.Sequential(nn.Linear(6, 4), Lambda(lambda h: (h, h)))
    match = (
        r"^model: it returns tuple; expected a tensor \(n, …\): pass call=lambda model, inputs: "
    )
    with pytest.raises(LayerError, match=rf"{match}model\(inputs\)\[0\]$"):
        AblatedForward(model.eval(), "0").prefix(torch.randn(3, 6))
    with pytest.raises(LayerError, match=rf"{match}model\(\*inputs\)\[0\]$"):
        AblatedForward(model.eval(), "0").prefix((torch.randn(3, 6),))
