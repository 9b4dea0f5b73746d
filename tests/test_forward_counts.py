"""Exported networks for any number of stimuli, and the conditions on which that depends."""

from functools import partial

import pytest
import torch
from _hook import HUGE, Net, check_cut, make_labels, run_hooked, run_plain
from torch import nn

from repsim_kernels.errors import LayerError
from repsim_kernels.forward import AblatedForward
from repsim_kernels.forward.inputs import Inputs
from repsim_kernels.forward.trace import Trace, Untraceable


def needs_six_features(m, x):
    """Rejects the stand-ins of torch.fx, which have no shape."""
    if x.shape[1:] != (6,):
        raise ValueError("expected 6 features")


def reshapes_by_the_count(m, x):
    needs_six_features(m, x)
    y = m.cut(m.a(x)).view(x.shape[0], 2, 2)
    return m.out(y.flatten(1) + x.new_ones(x.shape[0], 4)) + m.b(x)[:, :3]


def divides_by_the_count(m, x):
    needs_six_features(m, x)
    return m.out(m.cut(m.a(x)) / x.shape[0])


def centres(m, x):
    needs_six_features(m, x)
    y = m.cut(m.a(x))
    return m.out(y - y.mean(0))


def takes_as_many_neurons(m, x):
    """Twice as many neurons as images are all of them, for two images or more, but not for one."""
    needs_six_features(m, x)
    y = m.cut(m.a(x))
    return m.out(y) + y[:, : 2 * x.shape[0]].sum(1, keepdim=True)


def branches_on_the_count(m, x):
    needs_six_features(m, x)
    return m.out(m.cut(m.a(x))) * (2 if x.shape[0] > 3 else 3)


def needs_even_counts(m, x):
    needs_six_features(m, x)
    return m.out(m.cut(m.a(x))) * (2 if x.shape[0] % 2 else 3)


def treats_one_differently(m, x):
    needs_six_features(m, x)
    return m.out(m.cut(m.a(x))) * (2 if x.shape[0] == 1 else 3)


def pairs_halves(m, x):
    needs_six_features(m, x)
    left, *right = m.cut(m.a(x)).chunk(2)
    return m.out(torch.cat([*right, left])[: x.shape[0]])


def reads_the_count_as_an_int(m, x):
    needs_six_features(m, x)
    return m.out(m.cut(m.a(x)).view(len(x), 4))


def recognises_the_exporter(m, x):
    """With a dynamic size, it takes another path without asking about the size."""
    needs_six_features(m, x)
    return m.out(m.cut(m.a(x))) * (2 if isinstance(x.shape[0], int) else 3)


def refuses_the_exporter(m, x):
    needs_six_features(m, x)
    if not isinstance(x.shape[0], int):
        raise TypeError("expected a number")
    return m.out(m.cut(m.a(x)))


# Network, and how many exports serve 2, 5, 4, 3 and 6 stimuli, in this order.
NETWORKS = {
    reshapes_by_the_count: 1,
    divides_by_the_count: 1,
    centres: 1,
    treats_one_differently: 1,
    branches_on_the_count: 2,
    needs_even_counts: 2,
    reads_the_count_as_an_int: 5,
}


def list_exports(forward):
    exports = [x for group in forward._cuts._exports.values() for x in group]
    return [x for x in exports if not isinstance(x, Untraceable)]


@pytest.mark.parametrize("run", NETWORKS, ids=lambda run: run.__name__)
def test_an_export_serves_every_number_that_meets_its_conditions(run):
    model = Net(run)
    with pytest.raises(Untraceable, match=r"torch.fx can't trace it"):
        Trace(model, ["cut"])
    forward = AblatedForward(model, "cut")
    for n in (2, 5, 4, 3, 6):
        images = torch.randn(n, 6)
        state = forward.prefix(images)
        labels = make_labels(state, 2)
        ablated = forward.logits(state, labels, 2, batch=1)
        for c in range(2):
            assert torch.equal(ablated[c], run_hooked(model, "cut", images, labels == c))
        assert torch.equal(forward.intact(state), run_plain(model, images))
    assert len(list_exports(forward)) == NETWORKS[run]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "run",
    [*NETWORKS, pairs_halves, takes_as_many_neurons, recognises_the_exporter, refuses_the_exporter],
    ids=lambda run: run.__name__,
)
def test_cuts_match_a_hook_for_any_number(run, n):
    check_cut(Net(run), "cut", torch.randn(n, 6))


@pytest.mark.parametrize("run", [recognises_the_exporter, refuses_the_exporter])
def test_networks_that_reject_a_dynamic_size_are_exported_for_each(run):
    model = Net(run)
    forward = AblatedForward(model, "cut")
    for n in (4, 5, 4):
        images = torch.randn(n, 6)
        state = forward.prefix(images)
        ablated = forward.logits(state, [0, 1, 0, 1], batch=1)
        mask = torch.tensor([True, False, True, False])
        assert torch.equal(ablated[0], run_hooked(model, "cut", images, mask))
        assert not state._trace.serves(Inputs((images[:3],)))


@pytest.mark.parametrize(
    ("run", "batchable"),
    [
        (reshapes_by_the_count, True),
        (divides_by_the_count, False),
        (centres, False),
        (takes_as_many_neurons, False),
    ],
)
def test_cells_share_a_pass_unless_the_number_of_images_is_a_value(run, batchable):
    state = AblatedForward(Net(run), "cut").prefix(torch.randn(5, 6))
    assert state._split.batchable is batchable


@pytest.mark.parametrize(
    ("batch", "rows_in_memory", "rows"),
    [(HUGE, HUGE, {20}), (2, HUGE, {10}), (3, 12, {10}), (HUGE, 2, {1, 2}), (HUGE, 1, {1})],
)
def test_sizes_follow_the_rows_of_a_pass(batch, rows_in_memory, rows):
    """A view by the number of images gets that of the rows: several cells', or a few images'."""
    model, images = Net(reshapes_by_the_count), torch.randn(5, 6)
    forward = AblatedForward(model, "cut")
    state, seen = forward.prefix(images), set()
    assert len(state._split.sizes) == 1
    run = state._trace.run
    state._trace.run = lambda node, values: note_rows(seen, run(node, values))
    memory = state._split.tail_peak_bytes * rows_in_memory
    got = forward.logits(state, [0, 1, 2, 3], batch=batch, memory=memory)
    for c in range(4):
        want = run_hooked(model, "cut", images, torch.arange(4) == c)
        torch.testing.assert_close(got[c], want)
    assert seen == rows


def note_rows(rows, value):
    rows.add(len(value))
    return value


def test_two_stimuli_are_compared_for_each_layer():
    """The first time, two of them run under two hooks for each layer; later, none do."""
    counts = []

    def run(m, x):
        if isinstance(x.shape[0], int):  # no pass of the exporter
            counts.append(x.shape[0])
        return reshapes_by_the_count(m, x)

    layers = ["a", "cut", "out"]
    forward = AblatedForward(Net(run), layers)
    counts.clear()
    forward.prefixes(torch.randn(7, 6))
    assert counts == [2] * (1 + 2 * len(layers))
    counts.clear()
    for n in (7, 5):
        forward.prefixes(torch.randn(n, 6))
    assert counts == []


def test_operations_are_counted_once_for_all_layers(monkeypatch):
    from repsim_kernels.forward import dataflow

    counted, count = [], dataflow._run_counted
    monkeypatch.setattr(
        dataflow, "_run_counted", lambda t, x, v: counted.append(x) or count(t, x, v)
    )
    layers = ["a", "cut", "out"]
    forward = AblatedForward(Net(reshapes_by_the_count), layers)
    costs = forward.costs(torch.randn(7, 6), timed=False)
    assert len(counted) == len(set(counted)) > 0
    assert {cost.head_flops + cost.tail_flops for cost in costs.values()} == {48 + 32 + 24 + 48}
    assert [costs[name].tail_flops for name in layers] == [32 + 24, 24, 0]


def test_inputs_that_are_the_same_for_all_stimuli_keep_their_shape():
    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.out = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x, places):
            if places.shape[0] not in (1, 3):
                raise ValueError("expected one place for all, or three")
            return self.out(torch.relu(self.a(x)) + places.sum(0))

    model = Embedder().eval()
    forward = AblatedForward(model, "a")
    for n, count in ((5, 3), (4, 3), (4, 1), (7, 1)):
        x, places = torch.randn(n, 6), torch.randn(count, 4)
        state = forward.prefix((x, places))
        handle = model.a.register_forward_hook(partial(zero_first_neuron))
        with torch.no_grad():
            expected = model(x, places)
        handle.remove()
        assert torch.equal(forward.logits(state, [0, 1, 1, 1], batch=1)[0], expected)
    assert len(list_exports(forward)) == 2


def zero_first_neuron(_module, _inputs, out):
    out = out.clone()
    out[:, 0] = 0
    return out


def test_a_layer_that_only_some_counts_call_is_refused_for_the_others():
    def run(m, x):
        needs_six_features(m, x)
        h = m.a(x)
        return m.out(m.cut(h) if x.shape[0] > 2 else h)

    forward = AblatedForward(Net(run), "cut")
    forward.prefix(torch.randn(4, 6))
    for _ in range(2):
        with pytest.raises(LayerError, match="'cut' is never called; expected one call"):
            forward.prefix(torch.randn(2, 6))
    forward.prefix(torch.randn(3, 6))
