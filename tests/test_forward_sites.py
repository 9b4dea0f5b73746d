"""Several layers in one pass, and states whose activation moves to memory of the caller's."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from _hook import HUGE, Lambda, Net, get_tensors, make_labels, run_hooked, run_plain
from hypothesis import given
from hypothesis import strategies as st
from test_forward import build_network, count_calls
from test_forward_in_place import Program, head_writes_after_the_cut, step
from torch import nn

from repsim_kernels.errors import LayerError, OptionError
from repsim_kernels.forward import AblatedForward, passes


def outputs_of(model, layers, images):
    """What each layer gives in a whole pass, as it is before later operations write to it."""
    found = {}

    def keep(name, out):
        found[name] = passes.copy_with_strides(out)  # with its strides

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, n=name: keep(n, out))
        for name in layers
    ]
    run_plain(model, images)
    for handle in handles:
        handle.remove()
    return found


def check_states(model, states, images, order=None):
    """Each state against whole passes under a hook, in an order, and again."""
    outputs, intact = outputs_of(model, states, images), run_plain(model, images)
    for name in [*(order or states), *reversed(states)]:
        state = states[name]
        assert state.layer == name
        assert torch.equal(state.activation, outputs[name]), name
        assert state.activation.stride() == outputs[name].stride(), name
        mask = make_labels(state, 2) == 0
        ablated = state._owner.logits(state, mask[None], batch=1)
        assert torch.equal(ablated[0], run_hooked(model, name, images, mask)), name
        assert torch.equal(state._owner.intact(state), intact), name


def check_prefixes(model, layers, images, order=None):
    """Everything that `prefixes` promises; the states of `prefix` for each layer alone are met."""
    forward, given = AblatedForward(model, layers), images.clone()
    states = forward.prefixes(images)
    assert list(states) == list(layers)
    before = {name: [t.clone() for t in get_tensors(state)] for name, state in states.items()}
    other = images * 3
    others = forward.prefixes(other, layers[::-1])  # a later pass leaves the first one's states
    check_states(model, states, images, order)
    check_states(model, others, other, order)
    assert torch.equal(images, given)
    for name, state in states.items():
        assert all(map(torch.equal, get_tensors(state), before[name])), name
    return states


def act(kind):
    match kind:
        case "linear":
            return nn.Linear(4, 4)
        case "relu_":
            return nn.ReLU(inplace=True)
        case "identity":
            return nn.Identity()
        case "view":
            return Lambda(lambda h: h.view(-1, 4))


class Sites(Program):
    """Operations on values that share memory, between modules and what is inside one of them."""

    def __init__(self, parts, kinds):
        super().__init__([], [], nn.Identity())
        self.parts = parts
        self.first, self.last = act(kinds[0]), act(kinds[2])
        self.block = nn.Sequential(act(kinds[1]), nn.BatchNorm1d(4), nn.ReLU(inplace=True))
        nn.init.uniform_(self.block[1].bias)
        self.eval()

    def forward(self, x):
        pool = [x, torch.tanh(x)]
        for module, part in zip((self.first, self.block, self.last), self.parts, strict=True):
            for operation in part:
                self.do(pool, *operation)
            pool.append(module(pool[-1]))
        return torch.cat(pool, 1)


SITES = ("first", "block", "block.0", "block.1", "block.2", "last")
part = st.lists(step, max_size=4)
kinds = st.sampled_from(["linear", "relu_", "identity", "view"])


@given(st.tuples(part, part, part), st.tuples(kinds, kinds, kinds), st.permutations(SITES))
def test_random_programs_cut_at_many_sites(parts, kinds, order):
    torch.manual_seed(4)
    model, images = Sites(parts, kinds), torch.randn(2, 4)
    intact = run_plain(model, images)
    # At the other sites a hook that returns a clone changes the network; test_random_programs
    # covers those.
    sites = [x for x in SITES if torch.equal(run_hooked(model, x, images), intact)]
    if sites:
        check_prefixes(model, sites, images, [x for x in order if x in sites])


def a_skip_that_a_tail_writes(m, x):
    h = m.a(x)
    h += m.cut(h)
    return m.out(m.relu(h))


def images_that_are_written(m, x):
    h = m.cut(m.a(x))
    x[:, :4].mul_(h)
    return m.out(h) + m.out(m.relu(x[:, 2:]))


def a_value_without_images(m, x):
    place = m.place.exp()
    y = m.cut(m.a(x)) * place
    place += y[:1]
    return m.out(m.relu(y)) + place[:, :3]


@pytest.mark.parametrize(
    "run",
    [
        head_writes_after_the_cut,
        a_skip_that_a_tail_writes,
        images_that_are_written,
        a_value_without_images,
    ],
)
def test_states_are_those_of_each_layer_alone(run):
    model, images = Net(run), torch.randn(3, 6)
    layers = [name for name, times in count_calls(model, images).items() if times == 1]
    states = check_prefixes(model, layers, images)
    for name, state in states.items():
        forward = AblatedForward(model, name)
        alone = forward.prefix(images)
        assert len(get_tensors(alone)) == len(get_tensors(state))
        assert all(map(torch.equal, get_tensors(alone), get_tensors(state)))
        assert [t.stride() for t in get_tensors(alone)] == [t.stride() for t in get_tensors(state)]
        labels = make_labels(state, 3)
        want = forward.logits(alone, labels, 3, batch=1)
        assert torch.equal(state._owner.logits(state, labels, 3, batch=1), want)
        want = forward.logits(alone, labels, 3, batch=HUGE)
        assert torch.equal(state._owner.logits(state, labels, 3, batch=HUGE), want)


def check_network(name, start, every, memory_format):
    model = build_network(name).to(memory_format=memory_format)
    images = torch.randn(2, 3, 32, 32).to(memory_format=memory_format)
    sites = [layer for layer, times in count_calls(model, images).items() if times == 1]
    states = AblatedForward(model, sites[start::every]).prefixes(images)
    assert len(states) == len(range(start, len(sites), every))
    check_states(model, states, images)


@pytest.mark.parametrize(
    ("name", "every", "memory_format"),
    [
        ("alexnet_small", 1, torch.contiguous_format),
        ("alexnet_small", 2, torch.channels_last),
        ("mobilenet_v2_small", 17, torch.contiguous_format),
        ("resnet50_small", 11, torch.contiguous_format),
        ("resnet50_small", 23, torch.channels_last),
    ],
)
def test_the_networks_at_many_sites_at_once(name, every, memory_format):
    check_network(name, 0, every, memory_format)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2_small", "resnet50_small"])
def test_the_networks_at_every_site_at_once(name):
    check_network(name, 0, 1, torch.contiguous_format)


def test_a_pass_for_many_layers_is_one():
    def run(m, x):
        h = m.relu(m.a(x))
        return m.out(m.cut(h) + h)

    model, calls = Net(run), []
    forward = AblatedForward(model, ["out", "a", "cut", "a"])
    assert forward.layers == ("out", "a", "cut")
    images = torch.randn(3, 6)
    forward.prefixes(images)
    for name in ("a", "cut", "out"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    states = forward.prefixes(images)
    assert list(states) == ["out", "a", "cut"]
    assert calls == ["a", "cut", "out"]
    assert list(forward.prefixes(images, ["cut", "out", "cut"])) == ["cut", "out"]
    assert forward.prefixes(images, []) == {}
    calls.clear()
    want = run_plain(model, images)
    calls.clear()
    assert all(torch.equal(forward.intact(state), want) for state in states.values())
    assert calls == []


def test_layers_that_cannot_be_cut_together():
    def run(m, x):
        return m.out(m.relu(m.cut(m.relu(m.a(x)))))

    model, images = Net(run), torch.randn(3, 6)
    with pytest.raises(LayerError, match=r"'relu' is called 2 times \(on a; on cut\)"):
        AblatedForward(model, ["cut", "relu"])
    with pytest.raises(LayerError, match="'b' is never called"):
        AblatedForward(model, ["a", "b"])
    with pytest.raises(LayerError, match="no module 'outs'; expected one of out"):
        AblatedForward(model, ["a", "outs"])
    forward = AblatedForward(model, ["a", "cut"])
    with pytest.raises(OptionError, match="layers: 'out'; expected one of 'a', 'cut'"):
        forward.prefixes(images, ["cut", "out"])
    with pytest.raises(OptionError, match="layers: 'cut'; expected a sequence of names"):
        forward.prefixes(images, "cut")
    with pytest.raises(OptionError, match="state: made by another"):
        AblatedForward(model, ["a", "cut"]).intact(forward.prefixes(images)["cut"])


def test_layers_beside_one_whose_cells_keep_apart():
    def shared(m, x):  # both views of h are written to: their copies have to be made together
        h = m.a(x)
        left, right = h.chunk(2, 1)
        y = m.cut(h)
        right *= y[:, 2:]
        left += 1
        return m.out(h) + m.out(torch.cat([right, left], 1))

    model, images = Net(shared), torch.randn(3, 6)
    states = check_prefixes(model, ["a", "cut"], images)
    assert [state._split.no_shared_memory for state in states.values()] == [True, False]


def convolutions(channels=5, side=6):
    """A cut at (n, channels, side, side)."""
    first = nn.Sequential(nn.Conv2d(3, channels, 3), nn.AdaptiveAvgPool2d(side))
    rest = nn.ReLU(inplace=True), nn.Conv2d(channels, 37, 3, padding=1), nn.Flatten()
    return nn.Sequential(first, *rest, nn.Linear(37 * side**2, 3)).eval()


def laid_out(function):
    return Net(lambda m, x: m.out(torch.tanh(m.cut(m.a(x)))), Lambda(function).eval())


LAYOUTS = {
    "contiguous": (convolutions, "0", torch.contiguous_format),
    "channels_last": (convolutions, "0", torch.channels_last),
    "one_channel": (lambda: convolutions(1), "0", torch.channels_last),
    "one_pixel": (lambda: convolutions(33, 1), "0", torch.channels_last),
    "rows": (lambda: laid_out(torch.tanh), "cut", None),
    "transposed": (lambda: laid_out(lambda h: h.t().contiguous().t()), "cut", None),
    "gaps": (lambda: laid_out(lambda h: torch.cat([h, h], 1)[:, ::2]), "cut", None),
    "expanded": (lambda: laid_out(lambda h: h[:, :1].expand(-1, 4)), "cut", None),
}


def layout(name):
    build, layer, memory_format = LAYOUTS[name]
    torch.manual_seed(7)
    if memory_format is None:
        return build(), layer, torch.randn(4, 6)
    images = torch.randn(4, 3, 8, 8).to(memory_format=memory_format)
    return build(), layer, images


def buffer_for(*states):
    """Rows for the activations, and one more that stays NaN."""
    n, p = sum(map(len, states)), states[0].activation[0].numel()
    return torch.full((n + 1, p), torch.nan)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_moved_state_is_as_before(name):
    model, layer, images = layout(name)
    forward = AblatedForward(model, [layer])
    for state in (forward.prefix(images), *forward.prefixes(images).values()):
        kept, rows = passes.copy_with_strides(state.activation), buffer_for(state)
        labels = make_labels(state, 3)
        state.move(rows[:-1])
        assert torch.equal(rows[:-1], kept.flatten(1))
        assert rows[-1].isnan().all()
        for _ in range(2):
            assert torch.equal(state.activation, kept)
            assert state.activation.stride() == kept.stride()
            ablated = forward.logits(state, labels, 3, batch=1)
            for c in range(3):
                assert torch.equal(ablated[c], run_hooked(model, layer, images, labels == c))
            assert torch.equal(forward.intact(state), run_plain(model, images))
            for few in (1, HUGE):  # one stimulus at a time, and all
                got = forward.logits(state, labels, 3, memory=few)
                torch.testing.assert_close(got, ablated)
        assert torch.equal(rows[:-1], kept.flatten(1))


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_a_state_that_moves_twice_keeps_its_layout(name):
    model, layer, images = layout(name)
    forward = AblatedForward(model, layer)
    state = forward.prefix(images)
    kept, labels = passes.copy_with_strides(state.activation), make_labels(state, 2)
    for _ in range(2):
        state.move(buffer_for(state)[:-1])
    assert torch.equal(state.activation, kept)
    assert state.activation.stride() == kept.stride()
    want = run_hooked(model, layer, images, labels == 1)
    assert torch.equal(forward.logits(state, labels, batch=1)[1], want)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_moved_state_lets_go_of_its_own_memory(name):
    model, layer, images = layout(name)
    state = AblatedForward(model, layer).prefix(images)
    old = weakref.ref(state.activation)
    assert old() is not None
    rows = buffer_for(state)[:-1]
    state.move(rows)
    gc.collect()
    if name in ("transposed", "gaps", "expanded"):  # a view of the rows would have other strides
        assert old() is state.activation
    else:
        assert old() is None
        assert state._data.data_ptr() == rows.data_ptr()


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "transposed"])
def test_states_of_several_batches_share_a_buffer(name):
    model, layer, images = layout(name)
    forward = AblatedForward(model, [layer])
    batches = images, images * 2, images[:2] * 3
    states = [forward.prefixes(batch)[layer] for batch in batches]
    kept = [state.activation.clone() for state in states]
    rows, row = buffer_for(*states), 0
    for i, state in enumerate(states):
        state.move(rows[row : row + len(state)])
        row += len(state)
        for moved, batch in zip(states[: i + 1], batches, strict=False):
            mask = make_labels(moved, 2) == 0
            ablated = forward.logits(moved, mask[None], batch=1)
            assert torch.equal(ablated[0], run_hooked(model, layer, batch, mask))
    assert torch.equal(rows[:-1], torch.cat(kept).flatten(1))


def test_a_move_leaves_the_states_of_other_layers():
    def run(m, x):
        h = m.a(x)
        return m.out(m.relu(m.cut(h)) * h)

    model, images = Net(run), torch.randn(3, 6)
    states = AblatedForward(model, ["a", "cut"]).prefixes(images)  # h is also the second's skip
    rows = torch.empty(3, 4)
    states["a"].move(rows)
    check_states(model, states, images)
    rows.zero_()  # the caller's, and no longer what the layer gave
    check_states(model, {"cut": states["cut"]}, images)


def test_an_activation_of_one_number_moves():
    def run(m, x):
        return F.softplus(m.cut(m.a(x)))[:, None]

    model, images = Net(run, Lambda(lambda h: h.sum(1)).eval()), torch.randn(3, 6)
    forward = AblatedForward(model, "cut")
    state = forward.prefix(images)
    kept, rows = copy.deepcopy(state.activation), torch.empty(3, 1)
    state.move(rows)
    assert torch.equal(rows[:, 0], kept)
    want = run_hooked(model, "cut", images, torch.tensor([True]))
    assert torch.equal(forward.logits(state, [0])[0], want)
