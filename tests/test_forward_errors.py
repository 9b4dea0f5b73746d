"""What a cut network refuses, and how it says so."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _hook import Lambda, Net
from torch import nn

from repsim_kernels.errors import (
    CellError,
    DeviceError,
    DtypeError,
    LayerError,
    OptionError,
    ShapeError,
)
from repsim_kernels.forward import AblatedForward


def skip(m, x):
    return m.out(m.cut(m.a(x)) + m.b(x))


def no_layer(match, model, layer="cut"):
    with pytest.raises(LayerError, match=match) as caught:
        AblatedForward(model, layer).prefix(torch.randn(3, 6))
    assert "\n" not in str(caught.value)


def test_layers_that_cannot_be_cut():
    def twice(m, x):
        h = m.relu(m.a(x))
        return m.out(m.relu(m.cut(h) + h))

    def by_forward(m, x):
        return m.out(m.cut.forward(m.a(x)))

    def once(m, x):
        return m.out(m.cut(m.a(x)))

    no_layer(r"'relu' is called 2 times \(on a; on add\); expected one call", Net(twice), "relu")
    no_layer(
        "'b' is never called, as torch.fx traces the model; expected one call", Net(twice), "b"
    )
    no_layer("'cut' is never called", Net(by_forward))
    no_layer("no module 'cuts'; expected one of cut", Net(once), "cuts")
    no_layer(r"no module '123'; expected one of model.named_modules\(\)", Net(once), "123")
    pair = Lambda(lambda h: (h, h))
    pairs = Net(lambda m, x: m.out(m.cut(m.a(x))[0]), pair)
    no_layer(r"'cut' gives tuple; expected a tensor \(n, …\)", pairs)
    mean = Net(lambda m, x: m.out(m.cut(m.a(x)) + m.b(x)), Lambda(lambda h: h.mean(0)))
    no_layer(r"'cut' gives a tensor \(4,\) for 2 images; expected \(n, …\)", mean)


def test_models_that_cannot_be_cut():
    def branching(m, x):
        y = m.cut(m.a(x))
        return m.out(y if y.sum() > 0 else -y)

    def a_dict(m, x):
        return {"logits": m.out(m.cut(m.a(x)))}

    def random(m, x):
        return m.out(F.dropout(m.cut(m.a(x)), training=True))

    def counting(m, x):
        m.calls = getattr(m, "calls", 0) + 1
        return m.out(m.cut(m.a(x))) * m.calls

    def writes_a_buffer(m, x):
        m.place.add_(1)
        return m.out(m.cut(m.a(x)) + m.place)

    def writes_a_constant(m, x):
        y = m.cut(m.a(x))
        m.constant[:, 0] = y[0, 0]
        return m.out(y + m.constant)

    def reads_the_layers_memory(m, x):
        h = m.a(x)
        y = m.cut(h)
        y.add_(1)
        return m.out(h)

    both = r"torch.fx can't trace it: symbolically traced .*; torch.export can't either: "
    no_layer(both, Net(branching))
    no_layer(r"it gives dict; expected a tensor \(n, …\)", Net(a_dict))
    no_layer("two passes of the same images differ; expected one without random", Net(random))
    no_layer("two passes of the same images differ", Net(counting))
    no_layer("a pass writes to its 'place'; expected none", Net(writes_a_buffer))
    no_layer("a pass writes to its 'constant'; expected none", Net(writes_a_constant))
    no_layer(
        "a clone in place of the output of 'cut' changes what it gives; expected one which uses",
        Net(reads_the_layers_memory, nn.ReLU(inplace=True)),
    )


def test_training_mode():
    model = Net(skip)
    model.drop.train()
    no_layer("'drop' is in training mode; expected model.eval()", model)
    no_layer("it is in training mode", model.train())
    forward = AblatedForward(model.eval(), "cut")
    state = forward.prefix(torch.randn(3, 6))
    model.train()
    for call in (
        lambda: forward.prefix(torch.randn(3, 6)),
        lambda: forward.intact(state),
        lambda: forward.logits(state, [0, 0, 0, 0]),
    ):
        with pytest.raises(LayerError, match="training mode"):
            call()


def test_bad_arguments():
    forward = AblatedForward(Net(skip), "cut")
    with pytest.raises(DtypeError, match=r"images: ndarray; expected a torch tensor"):
        forward.prefix(np.zeros((3, 6)))
    for shape in ((0, 6), ()):
        with pytest.raises(ShapeError, match=r"images: shape .*; expected \(n, …\) with n >= 1"):
            forward.prefix(torch.zeros(shape))
    with pytest.raises(DeviceError, match="images: on meta; expected the model's device, cpu"):
        forward.prefix(torch.zeros(3, 6, device="meta"))
    state = forward.prefix(torch.randn(3, 6))
    for cells in (
        [0, 1, 2],  # too few
        [[0, 1, 2, 3]],
        [0, 1, -2, 3],
        [True, False, True, True],
        np.ones((2, 3), bool),
    ):
        with pytest.raises(CellError, match=r"cells: .*; expected"):
            forward.logits(state, cells)
    for cells in ([0.0, 1.0, 2.0, 3.0], [None] * 4, ["a"] * 4):
        with pytest.raises(DtypeError, match=r"cells: .*; expected integers"):
            forward.logits(state, cells)
    with pytest.raises(CellError, match=r"label 3 .* expected 0 … 2"):
        forward.logits(state, [0, 1, 2, 3], 3)
    with pytest.raises(CellError, match="n_cells: 3"):
        forward.logits(state, np.ones((2, 4), bool), 3)
    for batch in (0, 1.5, "all", True):
        with pytest.raises(OptionError, match=r"batch: .*; expected a whole number"):
            forward.logits(state, [0, 1, 2, 3], batch=batch)
    for memory in (0, -1, "8 gigabytes", "GiB", "0 MB", "-1GiB", float("nan"), [8]):
        with pytest.raises(OptionError, match=r"memory: .*; expected"):
            forward.logits(state, [0, 1, 2, 3], memory=memory)
    several = AblatedForward(forward.model, ["cut", "a"])
    with pytest.raises(OptionError, match=r"layer: 2 of them; expected one, or prefixes\(\)"):
        several.prefix(torch.randn(3, 6))
    for call in (several.prefixes, several.costs):
        with pytest.raises(OptionError, match="layers: 'b'; expected one of 'cut', 'a'"):
            call(torch.randn(3, 6), ["b"])
        with pytest.raises(DtypeError, match="images: ndarray"):
            call(np.zeros((3, 6)))
    with pytest.raises(LayerError, match="layer: none is given; expected a name"):
        AblatedForward(forward.model, [])
    with pytest.raises(OptionError, match="state: made by another"):
        AblatedForward(forward.model, "cut").intact(state)


def test_a_state_that_was_written_to_is_refused():
    forward = AblatedForward(Net(skip), "cut")
    state = forward.prefix(torch.randn(3, 6))
    state.activation.zero_()
    with pytest.raises(LayerError, match="state: its tensors were written to"):
        forward.intact(state)
