"""What a cut costs, what fits into memory, and what runs once for many cells."""

import math
import operator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _hook import HUGE, Lambda, Net, hooked, plain
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repsim_kernels.errors import OptionError
from repsim_kernels.forward import AblatedForward, broadcast, fusion, memory
from repsim_kernels.forward.memory import Batch, fit

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (1, 1),
        (2**40, 2**40),
        ("17B", 17),
        ("500MB", 500_000_000),
        (" 1.5 kB ", 1500),
        ("1.5KiB", 1536),
        ("0.5MiB", 2**19),
        ("8GiB", 2**33),
        ("3 GB", 3_000_000_000),
        ("2TiB", 2**41),
        ("0.1TB", 10**11),
    ],
)
def test_sizes(value, want):
    assert memory.size(value) == want
    assert memory.resolve_budget(value, CPU) == want
    assert memory.resolve_budget(value, torch.device("cuda")) == want


NO_SIZES = "", "GiB", "8 gib", "8KB", "1e9", "-1", "+1", ".5GB", "0", "0.4B", "1 2", "8\nX"


@pytest.mark.parametrize("value", NO_SIZES)
def test_texts_that_are_no_sizes(value):
    with pytest.raises(OptionError, match=r"room: '.*'; expected bytes, or a size such as") as e:
        memory.size(value, "room")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", [0, 0.5, -1, math.nan, math.inf, True, [8], b"8", 10**400])
def test_numbers_that_are_no_sizes(value):
    with pytest.raises(OptionError, match=r"memory: .*; expected a finite number of at least 1"):
        memory.size(value)


def test_a_text_of_more_digits_than_a_float_holds():
    with pytest.raises(OptionError, match=r"memory: .*; expected"):
        memory.size("9" * 400)


@given(
    st.lists(st.integers(0, 99), max_size=12, unique=True),
    st.integers(0, 9),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 15),
)
def test_every_cell_and_stimulus_is_in_one_part(cells, start, n, rows, most):
    parts = fit(Batch(cells, start, start + n), rows, most)
    found = [(c, i) for part in parts for c in part.cells for i in range(part.start, part.stop)]
    assert sorted(found) == sorted((c, start + i) for c in cells for i in range(n))
    for part in parts:
        size = part.stop - part.start
        assert 1 <= len(part.cells) <= most
        assert 1 <= len(part.cells) * size <= rows
        assert size == n if rows >= n else len(part.cells) == 1
    # No more parts than it takes, of stimuli that are as many in each.
    count = min(most, rows // n)
    assert len(parts) == (-(-len(cells) // count) if count else len(cells) * -(-n // rows))
    assert len({part.stop - part.start for part in parts}) <= 2


def test_what_is_free_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / Path(path).relative_to("/"))
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(memory.os, "sysconf", pages.__getitem__)
    assert memory.free(CPU) == 4_096_000
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   3000 kB\n")
    assert memory.free(CPU) == 3_072_000
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("700000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    assert memory.free(CPU) == 3_072_000
    (group / "memory.max").write_text("1500000\n")
    assert memory.free(CPU) == 1_000_000  # pages of files that nobody uses can be had
    assert memory.resolve_budget(None, CPU) == 500_000
    (group / "memory.max").write_text("400000\n")
    assert memory.free(CPU) == 1
    (group / "memory.stat").write_text("anon 1\n")
    assert memory.free(CPU) == 3_072_000


def test_what_is_free_on_a_gpu(monkeypatch):
    device = torch.device("cuda", 1)
    given = {"mem_get_info": (2**33, 2**36), "memory_reserved": 2**34, "memory_allocated": 2**32}
    for name, value in given.items():
        monkeypatch.setattr(torch.cuda, name, {device: value}.__getitem__)
    assert memory.free(device) == 2**33 + 2**34 - 2**32
    assert memory.resolve_budget(None, device) == (2**33 + 2**34 - 2**32) // 2
    assert memory.for_a_batch(2**40, device) == 2**33  # more makes no GPU busier
    assert memory.for_a_batch(2**20, device) == 2**20
    assert memory.for_a_batch(2**40, CPU) == 2**40
    monkeypatch.setattr(memory, "free", lambda device: 5000)
    assert memory.resolve_budget(None, device) == 2500
    monkeypatch.setattr(memory, "free", lambda device: 2**40)
    assert memory.resolve_budget(None, CPU) == 2**39
    assert memory.resolve_budget("1TiB", device) == 2**40


class Residual(Net):
    """Two branches, h before the cut and y behind it; what its tail copies for each cell."""

    def __init__(self, join):
        super().__init__(lambda m, x: m.joined(m.relu(m.a(x))))
        self.join = join

    def joined(self, h):
        return self.out(torch.tanh(self.join(self.cut(h), h)))


def used_twice_after_a_copy(y, h):
    return torch.cat([h, y], 1)[:, 2:6] - h


def skip_is_written(y, h):
    h *= y
    return h + y


# What joins a skip connection h; how often it is copied for each cell.
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
    "skip imul": (skip_is_written, 1),
    "twice": (lambda y, h: (y + h) * h, 0),
    "twice, copied": (used_twice_after_a_copy, 1),
    "one column": (lambda y, h: y + h[:, :1], 1),
    "more columns": (lambda y, h: y[:, :1] * h, 1),
    "exported add": (lambda y, h: y + h if len(h) else y, 0),
    "exported imul": (lambda y, h: operator.imul(y, h) if len(h) else y, 0),
    "exported reversed sub": (lambda y, h: h - y if len(h) else y, 1),
}


@pytest.mark.parametrize("name", JOINS)
def test_skip_connections_of_many_cells(name, monkeypatch):
    join, copies = JOINS[name]
    model, images, tiled = Residual(join), torch.randn(5, 6), []
    forward = AblatedForward(model, "cut")
    state = forward.prefix(images)
    labels = torch.tensor([0, 1, 2, 1])
    whole = broadcast.tiled
    monkeypatch.setattr(broadcast, "tiled", lambda t, k: tiled.append(t.shape) or whole(t, k))
    got = forward.logits(state, labels, 3, batch=HUGE)
    assert len(tiled) == 1 + copies  # the activation, and the skip connection
    for c in range(3):
        torch.testing.assert_close(got[c], hooked(model, "cut", images, labels == c))
    torch.testing.assert_close(forward.logits(state, labels, 3, batch=HUGE), got, rtol=0, atol=0)
    torch.testing.assert_close(forward.logits(state, labels, 3, batch=2), got)
    assert torch.equal(forward.intact(state), plain(model, images))


MIDDLES = {
    "nothing": (lambda: [], (24,)),
    "dropout": (lambda: [nn.Dropout(inplace=True)], (24,)),
    "flatten": (lambda: [nn.Flatten()], (6, 2, 2)),
    "both": (lambda: [nn.Identity(), nn.Flatten(), nn.Dropout()], (6, 2, 2)),
    "function": (lambda: [Lambda(lambda h: F.dropout(h.flatten(1), training=False))], (6, 4)),
}


@pytest.fixture
def taken(monkeypatch):
    """The numbers of cells that took one product."""
    found, run = [], fusion.Linear.run
    monkeypatch.setattr(
        fusion.Linear, "run", lambda self, v: found.append(len(self.cells.ids)) or run(self, v)
    )
    return found


def linear(middle="nothing", k=7, dtype=torch.float32, bias=True):
    torch.manual_seed(8)
    between, shape = MIDDLES[middle]
    layers = [nn.Unflatten(1, shape), *between(), nn.Linear(24, k, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("gathered", [1, 500, 2**23])
def test_a_linear_layer_is_one_product(taken, monkeypatch, dtype, middle, gathered):
    monkeypatch.setattr(fusion, "_GATHERED", gathered)
    model, images = linear(middle, dtype=dtype, bias=gathered > 1), torch.randn(90, 24, dtype=dtype)
    images[:, 20:] = 0
    forward = AblatedForward(model, "0")
    state = forward.prefix(images)
    # Cell 3 is empty and cell 5 is dead; unit 0 is in none.
    labels = torch.tensor([-1, *[0, 1, 2, 4, 6] * 3, 0, 0, 0, 0, 5, 5, 5, 5])
    want = forward.logits(state, labels, 7, batch=1)
    assert taken == []
    for batch in (None, HUGE):
        got = forward.logits(state, labels, 7, batch=batch)
        slack = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(got, want, rtol=10 * slack, atol=slack)
        assert torch.equal(got[3], forward.intact(state))
        assert torch.equal(got[5], forward.intact(state))
    assert taken == [5, 5]
    torch.testing.assert_close(want[6], hooked(model, "0", images, labels == 6), rtol=0, atol=0)


@given(
    st.lists(st.integers(-1, 5), min_size=24, max_size=24),
    st.integers(1, 9),
    st.integers(1, 2000),
    st.integers(0, 2**31),
)
def test_drawn_cells_of_a_linear_layer(labels, k, gathered, seed):
    torch.manual_seed(seed)
    model, images = linear(k=k, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "_GATHER", 0)
        patch.setattr(fusion, "_GATHERED", gathered)
        forward = AblatedForward(model, "0")
        got = forward.logits(forward.prefix(images), labels, 6)
    for c in range(6):
        want = hooked(model, "0", images, torch.tensor(labels) == c)
        torch.testing.assert_close(got[c], want, rtol=1e-12, atol=1e-12)


def test_where_one_product_is_the_cheaper(taken):
    forward = AblatedForward(linear(), "0")
    labels = torch.arange(24) // 6
    for n, expected in ((100, []), (101, [4])):  # to gather takes as long as 300 products
        taken.clear()
        forward.logits(forward.prefix(torch.randn(n, 24)), labels)
        assert taken == expected
    state = forward.prefix(torch.randn(101, 24))
    taken.clear()
    for cells, batch in (
        (labels[None] == torch.arange(4)[:, None], None),  # memberships may overlap
        (labels, 3),
        (labels, 1),
        ([0] * 24, None),
    ):
        forward.logits(state, cells, batch=batch)
    each = 101 * (24 + 7) * 4
    forward.logits(state, labels, memory=3 * each)
    assert taken == []
    forward.logits(state, labels, memory=5 * each)
    assert taken == [4]


def test_where_one_product_is_not_what_follows(taken):
    def check(model, images, layer="0", autocast=False):
        forward = AblatedForward(model, layer)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            state = forward.prefix(images)
            labels = torch.arange(state.activation[0].numel()) % 4
            got = forward.logits(state, labels, batch=HUGE)
            torch.testing.assert_close(got[1], hooked(model, layer, images, labels == 1))
        assert taken == []

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


def test_one_product_of_numbers_that_overflow(taken):
    model, images = linear(k=2), torch.randn(101, 24)
    images[:, 5] = math.inf
    forward = AblatedForward(model, "0")
    labels = torch.arange(24) // 6
    state = forward.prefix(images)
    want = forward.logits(state, labels, batch=1)
    torch.testing.assert_close(forward.logits(state, labels, batch=HUGE), want, equal_nan=True)
    assert want[0].isfinite().all()


def small():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 1, bias=False),
        nn.Flatten(),
        nn.Linear(80, 5),
    ).eval()


def test_costs_of_a_small_network():
    layers, images = ["0", "1", "2", "3", "4"], torch.randn(6, 2, 4, 5)
    forward = AblatedForward(small(), layers)
    costs = forward.costs(images, timed=False)
    first, second, last = 2 * (3 * 20) * (2 * 9), 2 * (4 * 20) * 3, 2 * 80 * 5
    whole = first + second + last
    heads = [first, first, first + second, first + second, whole]
    assert [costs[x].head_flops for x in layers] == heads
    assert [costs[x].tail_flops for x in layers] == [whole - head for head in heads]
    assert [costs[x].held_bytes for x in layers] == [4 * k for k in (60, 60, 80, 80, 5)]
    # While an operation runs, what it takes and what it gives; a flatten gives a view.
    assert [costs[x].peak_bytes for x in layers] == [4 * k for k in (140, 140, 85, 85, 5)]
    # Of which a cut has its own copy.
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
    assert cost.peak_bytes == 4 * (4 + 4 + 4)  # and their sum, while the ReLU is in place
    assert cost.pass_bytes == 4 * (4 + 4 + 4)


def test_cells_that_run_together_by_default():
    """Where each stimulus leaves the weights unused, and where its own work hides them."""
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


def test_seconds():
    model, images = small(), torch.randn(64, 2, 4, 5)
    forward = AblatedForward(model, ["0", "4"])
    given = images.clone()
    costs = forward.costs(images)
    whole = {name: cost.head_seconds + cost.tail_seconds for name, cost in costs.items()}
    assert whole["0"] == pytest.approx(whole["4"])
    assert 0 < costs["0"].head_seconds < costs["4"].head_seconds
    assert costs["0"].tail_seconds > costs["4"].tail_seconds >= 0
    assert torch.equal(images, given)
