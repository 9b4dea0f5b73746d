"""Several layers in one pass, and activations that move into the caller's memory."""

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


def record_outputs(model, layers, images):
    """Each layer's output in a whole pass, before later operations write to it."""
    outputs = {}

    def keep(name, out):
        outputs[name] = passes.copy_with_strides(out)

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, n=name: keep(n, out))
        for name in layers
    ]
    run_plain(model, images)
    for handle in handles:
        handle.remove()
    return outputs


def check_states(model, states, images, order=None):
    """Compare each state with whole passes under a hook, in the given order, then in reverse."""
    outputs, intact = record_outputs(model, states, images), run_plain(model, images)
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
    """Check everything that `prefixes` promises."""
    forward, original = AblatedForward(model, layers), images.clone()
    states = forward.prefixes(images)
    assert list(states) == list(layers)
    before = {name: [t.clone() for t in get_tensors(state)] for name, state in states.items()}
    other = images * 3
    others = forward.prefixes(other, layers[::-1])  # must not change the first states
    check_states(model, states, images, order)
    check_states(model, others, other, order)
    assert torch.equal(images, original)
    for name, state in states.items():
        assert all(map(torch.equal, get_tensors(state), before[name])), name
    return states


def build_layer(kind):
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
    """Modules, one with submodules, between operations on values that share memory."""

    def __init__(self, parts, kinds):
        super().__init__([], [], nn.Identity())
        self.parts = parts
        self.first, self.last = build_layer(kinds[0]), build_layer(kinds[2])
        self.block = nn.Sequential(build_layer(kinds[1]), nn.BatchNorm1d(4), nn.ReLU(inplace=True))
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
def test_random_programs_can_be_cut_at_many_layers(parts, kinds, order):
    torch.manual_seed(4)
    model, images = Sites(parts, kinds), torch.randn(2, 4)
    intact = run_plain(model, images)
    # At the other sites a hook that returns a clone changes the network. Those are refused, as
    # test_random_programs_match_a_hook_or_are_refused in test_forward_in_place.py shows.
    sites = [x for x in SITES if torch.equal(run_hooked(model, x, images), intact)]
    if sites:
        check_prefixes(model, sites, images, [x for x in order if x in sites])


def tail_writes_a_skip(m, x):
    h = m.a(x)
    h += m.cut(h)
    return m.out(m.relu(h))


def tail_writes_the_images(m, x):
    h = m.cut(m.a(x))
    x[:, :4].mul_(h)
    return m.out(h) + m.out(m.relu(x[:, 2:]))


def tail_writes_a_constant(m, x):
    place = m.place.exp()
    y = m.cut(m.a(x)) * place
    place += y[:1]
    return m.out(m.relu(y)) + place[:, :3]


@pytest.mark.parametrize(
    "run",
    [
        head_writes_after_the_cut,
        tail_writes_a_skip,
        tail_writes_the_images,
        tail_writes_a_constant,
    ],
)
def test_states_equal_those_of_prefix(run):
    model, images = Net(run), torch.randn(3, 6)
    layers = [name for name, times in count_calls(model, images).items() if times == 1]
    states = check_prefixes(model, layers, images)
    for name, state in states.items():
        forward = AblatedForward(model, name)
        single = forward.prefix(images)
        assert len(get_tensors(single)) == len(get_tensors(state))
        assert all(map(torch.equal, get_tensors(single), get_tensors(state)))
        assert [t.stride() for t in get_tensors(single)] == [t.stride() for t in get_tensors(state)]
        labels = make_labels(state, 3)
        want = forward.logits(single, labels, 3, batch=1)
        assert torch.equal(state._owner.logits(state, labels, 3, batch=1), want)
        want = forward.logits(single, labels, 3, batch=HUGE)
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
def test_networks_can_be_cut_at_many_layers(name, every, memory_format):
    check_network(name, 0, every, memory_format)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2_small", "resnet50_small"])
def test_networks_can_be_cut_at_every_layer(name):
    check_network(name, 0, 1, torch.contiguous_format)


def test_prefixes_is_one_pass():
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


def test_uncuttable_layers_are_refused():
    def run(m, x):
        return m.out(m.relu(m.cut(m.relu(m.a(x)))))

    model, images = Net(run), torch.randn(3, 6)
    with pytest.raises(LayerError, match=r"'relu' is called 2 times \(on a; on cut\)"):
        AblatedForward(model, ["cut", "relu"])
    with pytest.raises(LayerError, match="'b' is never called"):
        AblatedForward(model, ["a", "b"])
    with pytest.raises(LayerError, match=r"no module 'outs'; expected .* 'out'$"):
        AblatedForward(model, ["a", "outs"])
    forward = AblatedForward(model, ["a", "cut"])
    with pytest.raises(OptionError, match="layers: 'out'; expected one of 'a', 'cut'"):
        forward.prefixes(images, ["cut", "out"])
    with pytest.raises(OptionError, match="layers: 'cut'; expected a sequence of names"):
        forward.prefixes(images, "cut")
    with pytest.raises(OptionError, match="state: made by another"):
        AblatedForward(model, ["a", "cut"]).intact(forward.prefixes(images)["cut"])


def test_views_of_one_value_are_copied_together():
    def shared(m, x):  # the tail writes to both views of h, so they must be copied together
        h = m.a(x)
        left, right = h.chunk(2, 1)
        y = m.cut(h)
        right *= y[:, 2:]
        left += 1
        return m.out(h) + m.out(torch.cat([right, left], 1))

    model, images = Net(shared), torch.randn(3, 6)
    states = check_prefixes(model, ["a", "cut"], images)
    assert [state._split.no_shared_memory for state in states.values()] == [True, False]


def build_convolutions(channels=5, side=6):
    """A network whose layer "0" gives (n, channels, side, side)."""
    first = nn.Sequential(nn.Conv2d(3, channels, 3), nn.AdaptiveAvgPool2d(side))
    rest = nn.ReLU(inplace=True), nn.Conv2d(channels, 37, 3, padding=1), nn.Flatten()
    return nn.Sequential(first, *rest, nn.Linear(37 * side**2, 3)).eval()


def build_with_output(function):
    return Net(lambda m, x: m.out(torch.tanh(m.cut(m.a(x)))), Lambda(function).eval())


LAYOUTS = {
    "contiguous": (build_convolutions, "0", torch.contiguous_format),
    "channels_last": (build_convolutions, "0", torch.channels_last),
    "one_channel": (lambda: build_convolutions(1), "0", torch.channels_last),
    "one_pixel": (lambda: build_convolutions(33, 1), "0", torch.channels_last),
    "rows": (lambda: build_with_output(torch.tanh), "cut", None),
    "transposed": (lambda: build_with_output(lambda h: h.t().contiguous().t()), "cut", None),
    "gaps": (lambda: build_with_output(lambda h: torch.cat([h, h], 1)[:, ::2]), "cut", None),
    "expanded": (lambda: build_with_output(lambda h: h[:, :1].expand(-1, 4)), "cut", None),
}


def build_case(name):
    build, layer, memory_format = LAYOUTS[name]
    torch.manual_seed(7)
    if memory_format is None:
        return build(), layer, torch.randn(4, 6)
    images = torch.randn(4, 3, 8, 8).to(memory_format=memory_format)
    return build(), layer, images


def make_buffer(*states):
    """A buffer of NaN with a row for each image, and one more."""
    n, p = sum(map(len, states)), states[0].activation[0].numel()
    return torch.full((n + 1, p), torch.nan)


@pytest.mark.parametrize("name", LAYOUTS)
def test_moved_state_is_unchanged(name):
    model, layer, images = build_case(name)
    forward = AblatedForward(model, [layer])
    for state in (forward.prefix(images), *forward.prefixes(images).values()):
        before, rows = passes.copy_with_strides(state.activation), make_buffer(state)
        labels = make_labels(state, 3)
        state.move(rows[:-1])
        assert torch.equal(rows[:-1], before.flatten(1))
        assert rows[-1].isnan().all()
        for _ in range(2):
            assert torch.equal(state.activation, before)
            assert state.activation.stride() == before.stride()
            ablated = forward.logits(state, labels, 3, batch=1)
            for c in range(3):
                assert torch.equal(ablated[c], run_hooked(model, layer, images, labels == c))
            assert torch.equal(forward.intact(state), run_plain(model, images))
            for memory in (1, HUGE):  # one image per pass, and all
                got = forward.logits(state, labels, 3, memory=memory)
                torch.testing.assert_close(got, ablated)
        assert torch.equal(rows[:-1], before.flatten(1))


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_state_can_move_twice(name):
    model, layer, images = build_case(name)
    forward = AblatedForward(model, layer)
    state = forward.prefix(images)
    before, labels = passes.copy_with_strides(state.activation), make_labels(state, 2)
    for _ in range(2):
        state.move(make_buffer(state)[:-1])
    assert torch.equal(state.activation, before)
    assert state.activation.stride() == before.stride()
    want = run_hooked(model, layer, images, labels == 1)
    assert torch.equal(forward.logits(state, labels, batch=1)[1], want)


@pytest.mark.parametrize("name", LAYOUTS)
def test_moved_state_frees_its_memory(name):
    model, layer, images = build_case(name)
    state = AblatedForward(model, layer).prefix(images)
    old = weakref.ref(state.activation)
    assert old() is not None
    rows = make_buffer(state)[:-1]
    state.move(rows)
    gc.collect()
    if name in ("transposed", "gaps", "expanded"):  # the rows can't have these strides
        assert old() is state.activation
    else:
        assert old() is None
        assert state._data.data_ptr() == rows.data_ptr()


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "transposed"])
def test_states_of_several_batches_share_a_buffer(name):
    model, layer, images = build_case(name)
    forward = AblatedForward(model, [layer])
    batches = images, images * 2, images[:2] * 3
    states = [forward.prefixes(batch)[layer] for batch in batches]
    before = [state.activation.clone() for state in states]
    rows, row = make_buffer(*states), 0
    for i, state in enumerate(states):
        state.move(rows[row : row + len(state)])
        row += len(state)
        for moved, batch in zip(states[: i + 1], batches, strict=False):
            mask = make_labels(moved, 2) == 0
            ablated = forward.logits(moved, mask[None], batch=1)
            assert torch.equal(ablated[0], run_hooked(model, layer, batch, mask))
    assert torch.equal(rows[:-1], torch.cat(before).flatten(1))


def test_move_keeps_states_of_other_layers():
    def run(m, x):
        h = m.a(x)
        return m.out(m.relu(m.cut(h)) * h)

    model, images = Net(run), torch.randn(3, 6)
    # The output of "a" is also a skip connection of "cut".
    states = AblatedForward(model, ["a", "cut"]).prefixes(images)
    rows = torch.empty(3, 4)
    states["a"].move(rows)
    check_states(model, states, images)
    rows.zero_()  # invalidates only the state of "a"
    check_states(model, {"cut": states["cut"]}, images)


def test_a_state_of_one_unit_can_move():
    def run(m, x):
        return F.softplus(m.cut(m.a(x)))[:, None]

    model, images = Net(run, Lambda(lambda h: h.sum(1)).eval()), torch.randn(3, 6)
    forward = AblatedForward(model, "cut")
    state = forward.prefix(images)
    before, rows = copy.deepcopy(state.activation), torch.empty(3, 1)
    state.move(rows)
    assert torch.equal(rows[:, 0], before)
    want = run_hooked(model, "cut", images, torch.tensor([True]))
    assert torch.equal(forward.logits(state, [0])[0], want)
