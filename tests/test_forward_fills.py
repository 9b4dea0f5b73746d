"""Cells that become something other than zero, against hooks that write the same into a clone."""

import math

import numpy as np
import pytest
import torch
from _hook import HUGE, Net, run_plain
from _layer_fills import FILLS, LAYERS, build_conv_net, run_filled
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repsim_kernels._cell_sets import SparseCells
from repsim_kernels.errors import DtypeError, LayerError, OptionError, ShapeError
from repsim_kernels.forward import AblatedForward, fusion
from repsim_kernels.forward.fills import draw_other_images


def as_sparse(members):
    return np.r_[0, members.sum(1).cumsum()], members.nonzero()[1]


def draw_cells(kind, shape, rng):
    """Cells as a user passes them, and as a membership (C, p)."""
    p = math.prod(shape)
    if kind == "labels":
        labels = rng.integers(-1, 3, p)
        return labels, labels == np.arange(labels.max() + 1)[:, None]
    if kind == "channels":
        channels = rng.integers(-1, 3, (shape[0], *[1] * (len(shape) - 1)))
        labels = np.broadcast_to(channels, shape).reshape(p)
        return channels, labels == np.arange(labels.max() + 1)[:, None]
    if kind == "mask":
        mask = rng.random(shape) < 0.3
        return mask, mask.reshape(1, p)
    members = rng.random((3, p)) < 0.3
    return (as_sparse(members) if kind == "sparse" else members), members


@given(
    layer=st.sampled_from(LAYERS),
    fill=st.sampled_from(list(FILLS)),
    kind=st.sampled_from(["labels", "channels", "mask", "membership", "sparse"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    n=st.integers(2, 5),
    memory=st.sampled_from([None, 1, 2000]),
    seed=st.integers(0, 2**16),
)
def test_fills_match_a_hook(layer, fill, kind, dtype, memory_format, n, memory, seed):
    model = build_conv_net(seed).to(dtype=dtype, memory_format=memory_format)
    forward = AblatedForward(model, layer)
    images, others = (
        torch.randn(n, 3, 8, 8, dtype=dtype).to(memory_format=memory_format) for _ in range(2)
    )
    state, other = forward.prefix(images), forward.prefix(others)
    before = state.activation.clone(), other.activation.clone()
    passed, make_values = FILLS[fill](state, other, seed)
    rng = np.random.default_rng(seed)
    cells, members = draw_cells(kind, state.activation.shape[1:], rng)
    one_by_one = forward.logits(state, cells, fill=passed, seed=seed, batch=1)
    batched = forward.logits(state, cells, fill=passed, seed=seed, batch=HUGE, memory=memory)
    assert len(one_by_one) == len(members)
    for c, member in enumerate(members):
        want = run_filled(model, layer, images, torch.from_numpy(member), make_values)
        assert torch.equal(one_by_one[c], want)
    slack = 0.05 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(batched, one_by_one, rtol=slack, atol=slack)
    assert torch.equal(state.activation, before[0])
    assert torch.equal(other.activation, before[1])
    assert torch.equal(forward.intact(state), run_plain(model, images))


@pytest.mark.parametrize("fill", FILLS)
def test_activations_with_gaps_are_filled(fill):
    model = Net(lambda m, x: m.out(m.cut(torch.cat([m.a(x), m.b(x)], 1)[:, ::2])), nn.Identity())
    images, others = torch.randn(4, 6), torch.randn(4, 6)
    forward = AblatedForward(model, "cut")
    state, other = forward.prefix(images), forward.prefix(others)
    assert state.activation.stride() == (8, 2)
    passed, make_values = FILLS[fill](state, other, 5)
    cells = torch.tensor([0, 1, 1, -1])
    got = forward.logits(state, cells, fill=passed, seed=5, batch=1)
    for c in range(2):
        assert torch.equal(got[c], run_filled(model, "cut", images, cells == c, make_values))


def in_place(m, x):
    """The tail writes to what it makes of the layer's output, and to a value of the head."""
    h = m.a(x)
    y = m.relu(m.cut(h) * 2)
    h += y
    return m.out(y.mul_(2) - h)


def influence_each_other(m, x):
    y = m.cut(m.a(x))
    return m.out(y - y.mean(0))


def without_the_layer(m, x):
    m.cut(m.a(x))
    return m.out(m.a(x))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("run", [in_place, influence_each_other, without_the_layer])
@pytest.mark.parametrize("cut", [None, nn.Dropout().eval(), nn.ReLU(inplace=True)], ids=str)
def test_fills_match_a_hook_whatever_the_tail_does(run, cut, fill):
    model, images, others = Net(run, cut), torch.randn(5, 6), torch.randn(5, 6)
    forward = AblatedForward(model, "cut")
    state, other = forward.prefix(images), forward.prefix(others)
    passed, make_values = FILLS[fill](state, other, 1)
    cells = torch.tensor([0, 1, 1, -1])
    for batch in (1, HUGE, 1):
        got = forward.logits(state, cells, fill=passed, seed=1, batch=batch)
        for c in range(2):
            want = run_filled(model, "cut", images, cells == c, make_values)
            torch.testing.assert_close(got[c], want, rtol=0, atol=0 if batch == 1 else 1e-5)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Linear(6, 32)
        one = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.enc = nn.TransformerEncoder(one, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.eval()

    def forward(self, x):
        return self.head(self.enc(self.embed(x)))


@pytest.mark.parametrize("fill", ["mean", "resample", "per neuron", "state"])
@pytest.mark.parametrize(
    "layer", ["embed", "enc.layers.0", "enc.layers.1.linear1", "enc.layers.1.norm2", "enc"]
)
def test_encoder_layers_on_the_fast_path_match_a_hook(layer, fill):
    model, images = Encoder(), torch.randn(3, 5, 6)
    forward = AblatedForward(model, layer)
    state, other = forward.prefix(images), forward.prefix(torch.randn(3, 5, 6))
    passed, make_values = FILLS[fill](state, other, 3)
    d = state.activation.shape[-1]
    cells = torch.arange(d) * 4 // d  # like heads: slices of the features, at every token
    got = forward.logits(state, cells, fill=passed, seed=3, batch=1)
    assert len(got) == 4
    for c in range(4):
        mask = (cells == c).expand(5, d).reshape(-1)
        assert torch.equal(got[c], run_filled(model, layer, images, mask, make_values))


@pytest.fixture
def small_cut():
    """A cut with 20 neurons, its state, another one, and the rows of each tail pass."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 20), nn.Linear(20, 10), nn.Tanh()).double().eval()
    forward, rows = AblatedForward(model, "0"), []
    state, other = (forward.prefix(torch.randn(4, 6, dtype=torch.float64)) for _ in range(2))
    model[1].register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
    return forward, state, other, rows


def test_cells_that_the_fill_does_not_change_are_not_run(small_cut):
    forward, state, _, rows = small_cut
    patch = state.activation.clone()
    patch[2, 15] += 1  # one neuron of cell 3, for one image
    cells = [i // 5 for i in range(20)]
    for form in (cells, np.array(cells) == np.arange(5)[:, None]):
        rows.clear()
        logits = forward.logits(state, form, 5 if form is cells else None, fill=patch, batch=1)
        intact = forward.intact(state)
        changed = [not torch.equal(x, intact) for x in logits]
        assert changed == [False, False, False, True, False]
        assert rows in ([4, 4], [4])  # cell 3, and once the output without a mask
    rows.clear()
    assert torch.equal(forward.logits(state, cells, fill=state), intact.expand(4, -1, -1))
    assert rows == []
    sparse = as_sparse(np.array(cells) == np.arange(5)[:, None])
    assert torch.equal(forward.logits(state, sparse, fill=patch, batch=1), logits)
    assert rows == [4]


def test_zero_is_the_default_and_equals_an_array_of_zeros(small_cut):
    forward, state, _, _ = small_cut
    cells = [0, 1, -1, 2] * 5
    want = forward.logits(state, cells, batch=1)
    for zero in ("zero", 0, 0.0, np.zeros(20), torch.zeros(4, 20, dtype=torch.float64)):
        assert torch.equal(forward.logits(state, cells, fill=zero, batch=1), want)


def test_linear_layer_after_the_masks_is_one_product(monkeypatch):
    counts, run = [], fusion.PartitionedLinear.run

    def record(self, values):
        counts.append(len(self.cells.ids))
        return run(self, values)

    monkeypatch.setattr(fusion.PartitionedLinear, "run", record)
    monkeypatch.setattr(fusion, "_GATHER_ROWS", 0)
    torch.manual_seed(1)
    layers = nn.Unflatten(1, (5, 2, 2)), nn.Flatten(), nn.Linear(20, 10), nn.Tanh()
    forward = AblatedForward(nn.Sequential(*layers).double().eval(), "0")
    state, other = (forward.prefix(torch.randn(6, 20, dtype=torch.float64)) for _ in range(2))
    counts.clear()  # verifying the cut runs two cells in one pass
    cells = [i % 4 - 1 for i in range(20)]
    per_channel = torch.randn(5, 1, 1, dtype=torch.float64)
    for fill in ("mean", "resample", other, 2.5, per_channel):
        want = forward.logits(state, cells, fill=fill, batch=1)
        assert counts == []
        got = forward.logits(state, cells, fill=fill)
        assert counts == [3]
        counts.clear()
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    infinite = state.activation + 1
    infinite[0, 1] = math.inf  # in one cell: the product would make the others NaN
    want = forward.logits(state, cells, fill=infinite, batch=1)
    assert want.isfinite().all()  # tanh of infinity is 1
    torch.testing.assert_close(forward.logits(state, cells, fill=infinite), want)
    assert counts == []


def test_a_fill_of_infinity_or_nan_is_written_like_any_other(small_cut):
    forward, state, _, _ = small_cut
    got = forward.logits(state, [0] * 20, fill=math.nan)
    assert got.isnan().all()
    got = forward.logits(state, [0] * 20, fill=-math.inf)
    assert not got.isfinite().all()


def test_moved_states_can_be_filled_and_fill_others():
    model, images, others = build_conv_net(0), torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    model = model.to(memory_format=torch.channels_last)
    forward = AblatedForward(model, "conv1")
    cells = np.arange(4).reshape(4, 1, 1)  # the channels
    want = [
        forward.logits(forward.prefix(images), cells, fill=fill, batch=1)
        for fill in ("mean", "resample", forward.prefix(others))
    ]
    state, other = forward.prefix(images), forward.prefix(others)
    for moved in (state, other):
        moved.move(torch.empty(3, moved.activation[0].numel()))
    for fill, expected in zip(("mean", "resample", other), want, strict=True):
        assert torch.equal(forward.logits(state, cells, fill=fill, batch=1), expected)


def test_sparse_cells_become_masks_of_one_pass_at_a_time(monkeypatch):
    sizes, make = [], SparseCells.to_membership

    def record(self):
        sizes.append(len(self))
        return make(self)

    monkeypatch.setattr(SparseCells, "to_membership", record)
    forward = AblatedForward(build_conv_net(0), "conv1")
    state = forward.prefix(torch.randn(2, 3, 8, 8))
    p = state.activation[0].numel()
    members = np.random.default_rng(0).random((40, p)) < 0.1
    members[7] = False
    got = forward.logits(state, as_sparse(members), fill="mean", batch=6)
    assert max(sizes) == 6
    assert sum(sizes) == 39  # without the empty cell
    assert torch.equal(got, forward.logits(state, members, fill="mean", batch=6))


def test_integer_activations_can_be_filled():
    model = nn.Sequential(nn.Identity(), nn.Embedding(9, 3)).eval()
    forward = AblatedForward(model, "0")
    tokens, others = torch.randint(9, (4, 5)), torch.randint(9, (4, 5))
    state, other = forward.prefix(tokens), forward.prefix(others)
    for fill, value in ((other, others), (7, torch.tensor(7)), ("resample", None)):
        value = tokens[draw_other_images(4, 0)] if value is None else value
        want = tokens.clone()
        want[:, 2:4] = value.expand_as(tokens)[:, 2:4]
        got = forward.logits(state, [-1, -1, 0, 0, -1], fill=fill, batch=1)
        assert torch.equal(got[0], model[1](want).detach())
    with pytest.raises(DtypeError, match="fill: 'mean' of an activation of int64; expected float"):
        forward.logits(state, [0] * 5, fill="mean")
    with pytest.raises(DtypeError, match=r"fill: 0\.5; expected an integer, as the activation is"):
        forward.logits(state, [0] * 5, fill=0.5)


def test_wrong_fills_are_refused(small_cut):
    forward, state, _, _ = small_cut
    images = torch.randn(4, 6, dtype=torch.float64)
    several = AblatedForward(forward.model, ["0", "1"])
    states = several.prefixes(images)
    names = "'zero', 'mean', 'resample', a State, a number or an array"
    for fill, error, match in (
        ("zeros", OptionError, f"fill: 'zeros'; expected {names}"),
        (None, OptionError, f"fill: None; expected {names}"),
        (np.zeros(19), ShapeError, r"fill: shape \(19,\); expected one that broadcasts to the .*"),
        (np.zeros((3, 20)), ShapeError, r"fill: shape \(3, 20\); .* \(4, 20\)"),
        (np.zeros((1, 4, 20)), ShapeError, r"fill: shape \(1, 4, 20\); .* \(4, 20\)"),
        (torch.zeros(20), DtypeError, "fill: dtype float32; expected float64, as the activation"),
        ([0] * 20, DtypeError, "fill: dtype int64; expected float64"),
        (torch.zeros(20).double().to("meta"), DtypeError, "fill: a meta tensor"),
        (torch.zeros(20).requires_grad_(), DtypeError, "fill: a tensor that requires grad"),
        (object(), DtypeError, "fill: object; expected an array of real numbers"),
        (forward.prefix(images[:3]), ShapeError, r"fill: a state of shape \(3, 20\); .* \(4, 20\)"),
        (forward.prefix(images[:1]), ShapeError, r"fill: a state of shape \(1, 20\)"),
        (states["0"], OptionError, "fill: a state made by another AblatedForward; .*activation"),
    ):
        with pytest.raises(error, match=match) as raised:
            forward.logits(state, [0] * 20, fill=fill)
        assert "\n" not in str(raised.value)
    with pytest.raises(OptionError, match="fill: a state of layer '1'; expected one of '0', or"):
        several.logits(states["0"], [0] * 20, fill=states["1"])
    with pytest.raises(OptionError, match=r"fill: 'resample' for 1 image; expected .* 2 images"):
        forward.logits(forward.prefix(images[:1]), [0] * 20, fill="resample")
    for seed in (-1, 0.5, "0"):
        with pytest.raises(OptionError, match=r"seed: .*; expected a whole number"):
            forward.logits(state, [0] * 20, fill="resample", seed=seed)


def test_a_fill_that_was_written_to_is_refused(small_cut):
    forward, state, other, _ = small_cut
    other.activation[0] = 1
    with pytest.raises(LayerError, match=r"fill: its tensors were written to after prefix\(\)"):
        forward.logits(state, [0] * 20, fill=other)


def test_models_that_enable_gradients_can_be_filled():
    def run(m, x):
        with torch.enable_grad():
            return m.out(m.cut(m.a(x)).relu())

    model, images = Net(run), torch.randn(3, 6)
    forward = AblatedForward(model, "cut")
    state, cells = forward.prefix(images), torch.tensor([0, 1, 1, 0])
    for fill in ("mean", forward.prefix(torch.randn(3, 6))):
        logits = forward.logits(state, cells, fill=fill, batch=1)
        value = fill.activation if fill != "mean" else state.activation.double().mean(0).float()
        want = run_filled(model, "cut", images, cells == 1, lambda _, value=value: value)
        assert torch.equal(logits[1], want)
        assert not logits.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("layer", LAYERS)
def test_fills_on_a_gpu_match_a_hook(layer, fill):
    model, images = build_conv_net(0).cuda(), torch.randn(4, 3, 8, 8).cuda()
    forward = AblatedForward(model, layer)
    state, other = forward.prefix(images), forward.prefix(torch.randn(4, 3, 8, 8).cuda())
    passed, make_values = FILLS[fill](state, other, 2)
    cells = torch.arange(state.activation[0].numel()) % 3
    got = forward.logits(state, cells, fill=passed, seed=2, batch=1)
    for c in range(3):
        want = run_filled(model, layer, images, (cells == c).cuda(), make_values)
        assert torch.equal(got[c], want)
    batched = forward.logits(state, cells, fill=passed, seed=2)
    torch.testing.assert_close(batched, got, rtol=1e-3, atol=1e-3)
