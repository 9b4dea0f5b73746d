"""What a cut network refuses, and how it says so."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _hook import Lambda, Net, by_fx, check, hooked, labels_for, plain
from torch import Tensor, nn

from repsim_kernels.errors import (
    CellError,
    DeviceError,
    DtypeError,
    LayerError,
    OptionError,
    RepsimError,
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


def by_shape(m, x):
    """What torch.fx can't trace, and torch.export can."""
    return skip(m, x) if len(x) > 1 else m.b(x)


MACHINE = [MemoryError, torch.OutOfMemoryError, torch.AcceleratorError]


@pytest.mark.parametrize("error", MACHINE)
@pytest.mark.parametrize(("run", "runs"), [(skip, 4), (by_shape, 7)])
def test_errors_of_the_machine_are_not_the_models(error, run, runs):
    """Whichever run of forward meets one, traces included: it is raised, and forgotten."""
    images = torch.randn(3, 6)

    def prefix_of(forward):
        state = forward.prefix(images)
        assert by_fx(forward) == (run is skip)
        labels = labels_for(state, 2)
        logits = forward.logits(state, labels, 2, batch=1)
        assert torch.equal(logits[0], hooked(forward.model, "cut", images, labels == 0))
        assert torch.equal(forward.intact(state), plain(forward.model, images))

    for nth in range(runs):
        calls = itertools.count()

        def failing(m, x, nth=nth, calls=calls):
            if next(calls) == nth:
                raise error("broken")
            return run(m, x)

        model = Net(failing)
        try:
            forward = AblatedForward(model, "cut")
        except error:
            prefix_of(AblatedForward(model, "cut"))
            continue
        with pytest.raises(error, match="broken"):
            forward.prefix(images)
        prefix_of(forward)


def tables(model):
    """What is assigned to the modules of a model, by identity."""
    return [
        {key: id(value) for key, value in table.items()}
        for m in model.modules()
        for table in (vars(m), m._parameters, m._buffers, m._modules)
    ]


def test_a_network_that_assigns_to_its_buffers_keeps_them():
    def counts(m, x):
        m.place = m.place + 1
        return skip(m, x) + m.place[:, :3]

    def adds(m, x):
        m.place += 1
        return skip(m, x) + m.place[:, :3]

    def branches(m, x):
        m.place = m.place * 2
        y = skip(m, x)
        return y if y.sum() > 0 else -y

    both = r"torch.fx can't trace it: symbolically traced .*; torch.export can't either: "
    for run, reason in (
        (counts, "two passes of the same images differ; expected one without random"),
        (adds, "a pass writes to its 'place'; expected none"),
        (branches, both),
    ):
        model = Net(run)
        before = tables(model)
        forward = AblatedForward(model, "cut")
        assert tables(model) == before
        with pytest.raises(LayerError, match=reason):
            forward.prefix(torch.randn(3, 6))
        assert tables(model) == before


def test_what_a_network_stores_in_its_tables_is_put_back():
    def keeps(m, x):
        m.place = m.cut(m.a(x))
        return m.out(m.place)

    def registers(m, x):
        m.register_buffer("seen", m.b(x))
        return m.out(m.cut(m.a(x)) + m.seen)

    def adds_a_module(m, x):
        m.late = nn.ReLU().eval()
        return m.out(m.late(m.cut(m.a(x))))

    for run in (keeps, registers, adds_a_module, lambda m, x: keeps(m, x) if len(x) > 1 else x):
        model = Net(run)
        before = tables(model)
        forward = AblatedForward(model, "cut")
        assert tables(model) == before
        forward.prefix(torch.randn(3, 6))
        assert tables(model) == before
        check(model, "cut", torch.randn(3, 6))
        assert all(isinstance(t, Tensor) for t in model.buffers())


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
    with pytest.raises(LayerError, match=r"layer: .*; expected a name, or several"):
        AblatedForward(forward.model, [])
    with pytest.raises(OptionError, match="state: made by another"):
        AblatedForward(forward.model, "cut").intact(state)


ODD = [
    np.arange(10**4),
    torch.rand(5, 5),
    np.eye(2),
    {3: np.eye(9)},
    [[0]],
    1.5,
    True,
    "x\n" * 10**4,
]


def test_odd_arguments_are_refused_in_one_line():
    model, images = Net(skip), torch.randn(3, 6)
    forward = AblatedForward(model, ["a", "cut"])
    state = forward.prefixes(images)["cut"]
    cells = [0, 0, 1, 1]
    for name, call in {
        "model": lambda value: AblatedForward(value, "cut"),
        "layer": lambda value: AblatedForward(model, value),
        "layers": lambda value: forward.prefixes(images, value),
        "timed": lambda value: forward.costs(images, timed=1.0 if value is True else value),
        "state": lambda value: forward.logits(value, cells),
        "cells": lambda value: forward.logits(state, value),
        "n_cells": lambda value: forward.logits(state, cells, value),
        "batch": lambda value: forward.logits(state, cells, batch=value),
        "memory": lambda value: forward.intact(state, memory="" if value is ODD[5] else value),
    }.items():
        for value in ODD:
            with pytest.raises(RepsimError) as caught:
                call(value)
            line = str(caught.value)
            assert line.startswith(f"{name}: "), line
            assert len(line.splitlines()) == 1
            assert len(line) < 300
    with pytest.raises(OptionError, match="layers: 'cut'; expected a sequence of names"):
        forward.prefixes(images, "cut")


def test_a_state_that_was_written_to_is_refused():
    forward = AblatedForward(Net(skip), "cut")
    state = forward.prefix(torch.randn(3, 6))
    state.activation.zero_()
    with pytest.raises(LayerError, match="state: its tensors were written to"):
        forward.intact(state)
