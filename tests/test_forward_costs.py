"""The costs of a cut, and operations that run once for many cells."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from _hook import HUGE, Lambda, Net, run_hooked, run_plain
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repsim_kernels.forward import AblatedForward, broadcast, fusion
from repsim_kernels.forward import cost as cost_module


class Residual(Net):
    """A network with a skip connection: `join` combines y, after the cut, with h, before it."""

    def __init__(self, join):
        super().__init__(lambda m, x: m.join_and_read_out(m.relu(m.a(x))))
        self.join = join

    def join_and_read_out(self, h):
        return self.out(torch.tanh(self.join(self.cut(h), h)))


def reuses_the_skip_after_a_copy(y, h):
    return torch.cat([h, y], 1)[:, 2:6] - h


def writes_the_skip(y, h):
    h *= y
    return h + y


# Functions of y and the skip connection h, and the number of times that h is repeated per cell.
JOINS = {
    "add": (operator.add, 0),
    "iadd": (operator.iadd, 0),
    "sub": (operator.sub, 0),
    "isub": (operator.isub, 0),
    "mul": (operator.mul, 0),
    "imul": (operator.imul, 0),
    "torch.add": (torch.add, 0),
    "torch.sub": (torch.sub, 0),
    "torch.mul": (torch.mul, 0),
    "alpha": (lambda y, h: torch.add(y, h, alpha=2), 1),
    "method": (lambda y, h: y.add_(h), 1),
    "cat": (lambda y, h: torch.cat([y, h], 1)[:, 2:6], 1),
    "reversed add": (lambda y, h: h + y, 1),
    "reversed sub": (lambda y, h: h - y, 1),
    "skip iadd": (lambda y, h: operator.iadd(h, y) * 2, 1),
    "skip imul": (writes_the_skip, 1),
    "twice": (lambda y, h: (y + h) * h, 0),
    "twice, copied": (reuses_the_skip_after_a_copy, 1),
    "one column": (lambda y, h: y + h[:, :1], 1),
    "more columns": (lambda y, h: y[:, :1] * h, 1),
    "exported add": (lambda y, h: y + h if len(h) else y, 0),
    "exported imul": (lambda y, h: operator.imul(y, h) if len(h) else y, 0),
    "exported reversed sub": (lambda y, h: h - y if len(h) else y, 1),
}


@pytest.mark.parametrize("name", JOINS)
def test_skip_connections_are_copied_only_where_needed(name, monkeypatch):
    join, copies = JOINS[name]
    model, images, shapes = Residual(join), torch.randn(5, 6), []
    forward = AblatedForward(model, "cut")
    state = forward.prefix(images)
    labels = torch.tensor([0, 1, 2, 1])
    repeat = broadcast.repeat_for_cells

    def record(t, n_cells):
        shapes.append(t.shape)
        return repeat(t, n_cells)

    monkeypatch.setattr(broadcast, "repeat_for_cells", record)
    got = forward.logits(state, labels, 3, batch=HUGE)
    assert len(shapes) == copies  # of the skip connection
    for c in range(3):
        torch.testing.assert_close(got[c], run_hooked(model, "cut", images, labels == c))
    torch.testing.assert_close(forward.logits(state, labels, 3, batch=HUGE), got, rtol=0, atol=0)
    torch.testing.assert_close(forward.logits(state, labels, 3, batch=2), got)
    assert torch.equal(forward.intact(state), run_plain(model, images))


MIDDLES = {
    "nothing": (lambda: [], (24,)),
    "dropout": (lambda: [nn.Dropout(inplace=True)], (24,)),
    "flatten": (lambda: [nn.Flatten()], (6, 2, 2)),
    "both": (lambda: [nn.Identity(), nn.Flatten(), nn.Dropout()], (6, 2, 2)),
    "function": (lambda: [Lambda(lambda h: F.dropout(h.flatten(1), training=False))], (6, 4)),
}


@pytest.fixture
def products(monkeypatch):
    """The number of cells of each product that serves several."""
    counts, run = [], fusion.PartitionedLinear.run

    def record(self, values):
        counts.append(len(self.cells.ids))
        return run(self, values)

    monkeypatch.setattr(fusion.PartitionedLinear, "run", record)
    return counts


def build_linear(middle="nothing", k=7, dtype=torch.float32, bias=True):
    torch.manual_seed(8)
    between, shape = MIDDLES[middle]
    layers = [nn.Unflatten(1, shape), *between(), nn.Linear(24, k, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("block_bytes", [1, 500, 2**23])
def test_linear_layer_is_one_product(products, monkeypatch, dtype, middle, block_bytes):
    monkeypatch.setattr(fusion, "_BLOCK_BYTES", block_bytes)
    model, images = (
        build_linear(middle, dtype=dtype, bias=block_bytes > 1),
        torch.randn(90, 24, dtype=dtype),
    )
    images[:, 20:] = 0
    forward = AblatedForward(model, "0")
    state = forward.prefix(images)
    # Cell 3 is empty, cell 5 is dead, and neuron 0 is in no cell.
    labels = torch.tensor([-1, *[0, 1, 2, 4, 6] * 3, 0, 0, 0, 0, 5, 5, 5, 5])
    want = forward.logits(state, labels, 7, batch=1)
    assert products == []
    for batch in (None, HUGE):
        got = forward.logits(state, labels, 7, batch=batch)
        slack = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(got, want, rtol=10 * slack, atol=slack)
        assert torch.equal(got[3], forward.intact(state))
        assert torch.equal(got[5], forward.intact(state))
    assert products == [5, 5]
    torch.testing.assert_close(want[6], run_hooked(model, "0", images, labels == 6), rtol=0, atol=0)


@given(
    st.lists(st.integers(-1, 5), min_size=24, max_size=24),
    st.integers(1, 9),
    st.integers(1, 2000),
    st.integers(0, 2**31),
)
def test_random_cells_of_a_linear_layer_match_a_hook(labels, k, block_bytes, seed):
    torch.manual_seed(seed)
    model, images = build_linear(k=k, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "_GATHER_ROWS", 0)
        patch.setattr(fusion, "_BLOCK_BYTES", block_bytes)
        forward = AblatedForward(model, "0")
        got = forward.logits(forward.prefix(images), labels, 6)
    for c in range(6):
        want = run_hooked(model, "0", images, torch.tensor(labels) == c)
        torch.testing.assert_close(got[c], want, rtol=1e-12, atol=1e-12)


def test_one_product_is_used_when_it_is_cheaper(products):
    forward = AblatedForward(build_linear(), "0")
    labels = torch.arange(24) // 6
    for n, expected in ((100, []), (101, [4])):  # gathering costs 300 products
        products.clear()
        forward.logits(forward.prefix(torch.randn(n, 24)), labels)
        assert products == expected
    state = forward.prefix(torch.randn(101, 24))
    products.clear()
    for cells, batch in (
        (labels[None] == torch.arange(4)[:, None], None),  # memberships may overlap
        (labels, 3),
        (labels, 1),
        ([0] * 24, None),
    ):
        forward.logits(state, cells, batch=batch)
    cell_bytes = 101 * (24 + 7) * 4
    forward.logits(state, labels, memory=3 * cell_bytes)
    assert products == []
    forward.logits(state, labels, memory=5 * cell_bytes)
    assert products == [4]


def test_one_product_is_not_used_where_it_does_not_apply(products):
    def check(model, images, layer="0", autocast=False):
        forward = AblatedForward(model, layer)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            state = forward.prefix(images)
            labels = torch.arange(state.activation[0].numel()) % 4
            got = forward.logits(state, labels, batch=HUGE)
            torch.testing.assert_close(got[1], run_hooked(model, layer, images, labels == 1))
        assert products == []

    images, fc = torch.randn(101, 24), nn.Linear(24, 7)
    check(nn.Sequential(nn.Unflatten(1, (2, 2, 6)), nn.Linear(6, 3), nn.Flatten()).eval(), images)
    check(nn.Sequential(nn.Identity(), nn.ReLU(), fc).eval(), images)
    check(nn.Sequential(nn.Identity(), nn.Flatten(0), nn.Unflatten(0, (-1, 24)), fc).eval(), images)
    check(nn.Sequential(nn.Identity(), fc).eval(), images, autocast=True)
    check(nn.Sequential(nn.Identity(), fc).bfloat16().eval(), images.bfloat16())
    check(Net(lambda m, x: m.out(y := m.cut(m.a(x))) + y[:, :3]), torch.randn(101, 6), "cut")
    hooks = nn.Sequential(nn.Identity(), nn.Linear(24, 7)).eval()
    hooks[1].register_forward_hook(lambda _m, _i, out: out * 2)
    check(hooks, images)


def test_one_product_keeps_infinite_activations_in_their_cells(products):
    model, images = build_linear(k=2), torch.randn(101, 24)
    images[:, 5] = math.inf
    forward = AblatedForward(model, "0")
    labels = torch.arange(24) // 6
    state = forward.prefix(images)
    want = forward.logits(state, labels, batch=1)
    torch.testing.assert_close(forward.logits(state, labels, batch=HUGE), want, equal_nan=True)
    assert want[0].isfinite().all()


def build_small():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 1, bias=False),
        nn.Flatten(),
        nn.Linear(80, 5),
    ).eval()


@pytest.fixture
def no_cache(monkeypatch):
    """Let the cells per pass depend on the weights alone."""
    monkeypatch.setattr(cost_module, "_CACHED_BYTES", 0)


@pytest.mark.usefixtures("no_cache")
def test_costs_of_a_small_network():
    layers, images = ["0", "1", "2", "3", "4"], torch.randn(6, 2, 4, 5)
    forward = AblatedForward(build_small(), layers)
    costs = forward.costs(images, timed=False)
    first, second, last = 2 * (3 * 20) * (2 * 9), 2 * (4 * 20) * 3, 2 * 80 * 5
    whole = first + second + last
    heads = [first, first, first + second, first + second, whole]
    assert [costs[x].head_flops for x in layers] == heads
    assert [costs[x].tail_flops for x in layers] == [whole - head for head in heads]
    assert [costs[x].held_bytes for x in layers] == [4 * k for k in (60, 60, 80, 80, 5)]
    # An operation's inputs and outputs are alive while it runs; a flatten returns a view.
    assert [costs[x].peak_bytes for x in layers] == [4 * k for k in (140, 140, 85, 85, 5)]
    # The whole pass runs as under a hook, so the cut layer's output is a copy, even the flatten's.
    assert [costs[x].pass_bytes for x in layers] == [4 * k for k in (140, 140, 140, 160, 140)]
    conv, fc = 4 * 3 * 4, 4 * (80 * 5 + 5)
    assert costs["1"].together == math.ceil(100 * (conv + fc) / (6 * (second + last)))
    assert costs["2"].together == math.ceil(100 * fc / (6 * last))
    assert costs["4"].together == 1
    assert all(math.isnan(cost.head_seconds + cost.tail_seconds) for cost in costs.values())
    assert list(forward.costs(images, ["3", "0"], timed=False)) == ["3", "0"]


def test_costs_of_a_skip_connection():
    def run(m, x):
        h = m.a(x)
        y = m.relu(m.cut(h))
        return m.out(y + h)

    model, images = Net(run), torch.randn(8, 6)
    cost = AblatedForward(model, "cut").costs(images, timed=False)["cut"]
    assert cost.head_flops == 2 * (6 * 4 + 4 * 4)
    assert cost.tail_flops == 2 * 4 * 3
    assert cost.held_bytes == 4 * (4 + 4)  # the activation and the skip
    assert cost.peak_bytes == 4 * (4 + 4 + 4)  # and their sum; the ReLU is in place
    assert cost.pass_bytes == 4 * (4 + 4 + 4)


def test_passes_of_small_images_have_as_many_cells_as_fit_the_cache(monkeypatch):
    images, layers = torch.randn(6, 2, 4, 5), ["0", "3"]
    forward = AblatedForward(build_small(), layers)
    monkeypatch.setattr(cost_module, "_INTENSITY", 0)
    monkeypatch.setattr(cost_module, "_CACHED_BYTES", 10 * 6 * 4 * 140 + 3)
    costs = forward.costs(images, timed=False)
    assert [costs[x].peak_bytes for x in layers] == [4 * 140, 4 * 85]
    assert [costs[x].together for x in layers] == [10, 16]
    large = forward.costs(torch.randn(66, 2, 4, 5), timed=False)
    assert large["0"].together == 1


@pytest.mark.usefixtures("no_cache")
def test_default_cells_per_pass_depend_on_the_weights():
    """One cell if an image's work outweighs reading the weights; otherwise several."""
    wide = nn.Sequential(nn.Identity(), nn.Conv2d(2, 2, 3, padding=1)).eval()
    deep = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(2 * 32 * 32, 8)).eval()
    images = torch.randn(4, 2, 32, 32)
    wide_cost, deep_cost = (AblatedForward(m, "0").costs(images)["0"] for m in (wide, deep))
    assert wide_cost.together == 1
    assert deep_cost.together == math.ceil(100 * 4 * (2048 * 8 + 8) / (4 * 2 * 2048 * 8))
    for model, cost in ((wide, wide_cost), (deep, deep_cost)):
        rows = []
        forward = AblatedForward(model, "0")
        state = forward.prefix(images)
        model[-1].register_forward_hook(lambda _m, _i, out, rows=rows: rows.append(len(out)))
        forward.intact(state)
        forward.logits(state, torch.arange(2048) // 16)  # 128 cells
        assert rows[1] == 4 * cost.together
        assert sum(rows) == 4 + 128 * 4


def test_seconds_add_up_to_a_pass():
    model, images = build_small(), torch.randn(64, 2, 4, 5)
    forward = AblatedForward(model, ["0", "4"])
    original = images.clone()
    costs = forward.costs(images)
    whole = {name: cost.head_seconds + cost.tail_seconds for name, cost in costs.items()}
    assert whole["0"] == pytest.approx(whole["4"])
    assert 0 < costs["0"].head_seconds < costs["4"].head_seconds
    assert costs["0"].tail_seconds > costs["4"].tail_seconds >= 0
    assert torch.equal(images, original)
