"""Errors of networks, layers and arguments that a forward pass refuses."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _hook import (
    Lambda,
    Net,
    assert_refused,
    check_cut,
    is_traced_by_fx,
    make_labels,
    run_hooked,
    run_plain,
)
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


def adds_a_skip(m, x):
    return m.out(m.cut(m.a(x)) + m.b(x))


def test_uncuttable_layers_are_refused():
    def twice(m, x):
        h = m.relu(m.a(x))
        return m.out(m.relu(m.cut(h) + h))

    def calls_forward_directly(m, x):
        return m.out(m.cut.forward(m.a(x)))

    def once(m, x):
        return m.out(m.cut(m.a(x)))

    assert_refused(
        r"'relu' is called 2 times \(on a; on add\); expected one call", Net(twice), "relu"
    )
    assert_refused(
        "'b' is never called in torch.fx's trace of the model; expected one call", Net(twice), "b"
    )
    assert_refused("'cut' is never called", Net(calls_forward_directly))
    assert_refused("no module 'cuts'; expected a name .* such as 'cut'$", Net(once), "cuts")
    assert_refused(r"no module '123'; .* model.named_modules\(\), such as 'a', ", Net(once), "123")
    pair = Lambda(lambda h: (h, h))
    pairs = Net(lambda m, x: m.out(m.cut(m.a(x))[0]), pair)
    assert_refused("'cut' returns a tuple of 2; expected a tensor, or output=0", pairs)
    mean = Net(lambda m, x: m.out(m.cut(m.a(x)) + m.b(x)), Lambda(lambda h: h.mean(0)))
    assert_refused(r"'cut' gives a tensor \(4,\) for 2 images; expected \(n, …\)", mean)


def test_uncuttable_models_are_refused():
    def branching(m, x):
        y = m.cut(m.a(x))
        return m.out(y if y.sum() > 0 else -y)

    def gives_a_dict(m, x):
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

    def reads_the_memory_of_the_layer(m, x):
        h = m.a(x)
        y = m.cut(h)
        y.add_(1)
        return m.out(h)

    neither_can = r"torch.fx can't trace it: symbolically traced .*; torch.export can't either: "
    assert_refused(neither_can, Net(branching))
    assert_refused(
        r"it returns dict; expected a tensor \(n, …\): pass call=.*\['logits'\]$", Net(gives_a_dict)
    )
    assert_refused(
        "two passes of the same images differ; expected a model without random", Net(random)
    )
    assert_refused("two passes of the same images differ", Net(counting))
    assert_refused("a pass writes to its 'place'; expected a pass that", Net(writes_a_buffer))
    assert_refused("a pass writes to its 'constant'; expected a pass that", Net(writes_a_constant))
    assert_refused(
        "replacing the output of 'cut' by a clone changes the model's output; expected",
        Net(reads_the_memory_of_the_layer, nn.ReLU(inplace=True)),
    )


def branches_on_the_shape(m, x):
    """A network that torch.export can trace, but torch.fx can't."""
    return adds_a_skip(m, x) if len(x) > 1 else m.b(x)


TRANSIENT_ERRORS = [MemoryError, torch.OutOfMemoryError, torch.AcceleratorError]


@pytest.mark.parametrize("error", TRANSIENT_ERRORS)
@pytest.mark.parametrize(("run", "runs"), [(adds_a_skip, 4), (branches_on_the_shape, 7)])
def test_transient_errors_pass_through_and_are_not_cached(error, run, runs):
    """An error in any run of forward, traces included, is raised; the next call works."""
    images = torch.randn(3, 6)

    def check_prefix(forward):
        state = forward.prefix(images)
        assert is_traced_by_fx(forward) == (run is adds_a_skip)
        labels = make_labels(state, 2)
        logits = forward.logits(state, labels, 2, batch=1)
        assert torch.equal(logits[0], run_hooked(forward.model, "cut", images, labels == 0))
        assert torch.equal(forward.intact(state), run_plain(forward.model, images))

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
            check_prefix(AblatedForward(model, "cut"))
            continue
        with pytest.raises(error, match="broken"):
            forward.prefix(images)
        check_prefix(forward)


def list_attributes(model):
    """The ids of everything assigned to the modules of a model."""
    return [
        {key: id(value) for key, value in table.items()}
        for m in model.modules()
        for table in (vars(m), m._parameters, m._buffers, m._modules)
    ]


def test_assigned_buffers_are_restored_after_a_refusal():
    def counts(m, x):
        m.place = m.place + 1
        return adds_a_skip(m, x) + m.place[:, :3]

    def adds(m, x):
        m.place += 1
        return adds_a_skip(m, x) + m.place[:, :3]

    def branches(m, x):
        m.place = m.place * 2
        y = adds_a_skip(m, x)
        return y if y.sum() > 0 else -y

    neither_can = r"torch.fx can't trace it: symbolically traced .*; torch.export can't either: "
    for run, reason in (
        (counts, "two passes of the same images differ; expected a model without random"),
        (adds, "a pass writes to its 'place'; expected a pass that"),
        (branches, neither_can),
    ):
        model = Net(run)
        before = list_attributes(model)
        forward = AblatedForward(model, "cut")
        assert list_attributes(model) == before
        with pytest.raises(LayerError, match=reason):
            forward.prefix(torch.randn(3, 6))
        assert list_attributes(model) == before


def test_assigned_attributes_are_restored():
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
        before = list_attributes(model)
        forward = AblatedForward(model, "cut")
        assert list_attributes(model) == before
        forward.prefix(torch.randn(3, 6))
        assert list_attributes(model) == before
        check_cut(model, "cut", torch.randn(3, 6))
        assert all(isinstance(t, Tensor) for t in model.buffers())


def test_training_mode_is_refused():
    model = Net(adds_a_skip)
    model.drop.train()
    assert_refused("'drop' is in training mode; expected model.eval()", model)
    assert_refused("it is in training mode", model.train())
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


def test_invalid_arguments_are_refused():
    forward = AblatedForward(Net(adds_a_skip), "cut")
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
        [True, False, True],
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
    with pytest.raises(OptionError, match="this object has 2 layers; expected one"):
        several.prefix(torch.randn(3, 6))
    for call in (several.prefixes, several.costs):
        with pytest.raises(OptionError, match="layers: 'b'; expected one of 'cut', 'a'"):
            call(torch.randn(3, 6), ["b"])
        with pytest.raises(DtypeError, match="images: ndarray"):
            call(np.zeros((3, 6)))
    with pytest.raises(LayerError, match=r"layer: .*; expected a name or a sequence of names"):
        AblatedForward(forward.model, [])
    with pytest.raises(OptionError, match="state: made by another"):
        AblatedForward(forward.model, "cut").intact(state)


INVALID = [
    np.arange(10**4),
    torch.rand(5, 5),
    np.eye(2),
    {3: np.eye(9)},
    [[0]],
    1.5,
    True,
    "x\n" * 10**4,
]


def test_errors_of_invalid_arguments_are_one_line():
    model, images = Net(adds_a_skip), torch.randn(3, 6)
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
        "memory": lambda value: forward.intact(state, memory="" if value is INVALID[5] else value),
    }.items():
        for value in INVALID:
            with pytest.raises(RepsimError) as error:
                call(value)
            line = str(error.value)
            assert line.startswith(f"{name}: "), line
            assert len(line.splitlines()) == 1
            assert len(line) < 300
    with pytest.raises(OptionError, match="layers: 'cut'; expected a sequence of names"):
        forward.prefixes(images, "cut")


def test_a_state_that_was_written_to_is_refused():
    forward = AblatedForward(Net(adds_a_skip), "cut")
    state = forward.prefix(torch.randn(3, 6))
    state.activation.zero_()
    with pytest.raises(LayerError, match="state: its tensors were written to"):
        forward.intact(state)
