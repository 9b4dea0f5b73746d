"""A network cut at a layer against whole passes under a hook that returns a masked clone."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repsim_kernels.errors import CellError, DtypeError, LayerError, OptionError, ShapeError
from repsim_kernels.forward import AblatedForward, State

HUGE = 10**12


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small tensors; threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hooked(model: nn.Module, layer: str, images: Tensor, mask: Tensor | None) -> Tensor:
    """The oracle: units where the mask (p,) is true are zero in a clone of the layer's output."""

    def hook(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        return out.clone() if mask is None else out.clone().masked_fill_(mask.view(out[0].shape), 0)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model(images.clone())
    finally:
        handle.remove()


def plain(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images.clone())


def labels_for(state: State, n_cells: int, seed: int = 0) -> Tensor:
    units = state.activation[0].numel()
    return torch.randint(-1, n_cells, (units,), generator=torch.Generator().manual_seed(seed))


def contents(state: State) -> list[Tensor]:
    values = (v if isinstance(v, tuple) else (v,) for v in state._values.values())
    return [state.activation, *(t for v in values for t in v if isinstance(t, Tensor))]


def check(model: nn.Module, layer: str, images: Tensor, n_cells: int = 3) -> AblatedForward:
    """Everything that a cut promises, in an order in which one call could spoil the next."""
    forward, given = AblatedForward(model, layer), images.clone()
    state = forward.prefix(images)
    before = [t.clone() for t in contents(state)]
    labels = labels_for(state, n_cells)
    ablated = forward.logits(state, labels, n_cells)
    together = forward.logits(state, labels, n_cells, memory=HUGE)
    for c in range(n_cells):
        assert torch.equal(ablated[c], hooked(model, layer, images, labels == c))
    assert torch.equal(forward.intact(state), plain(model, images))
    torch.testing.assert_close(together, ablated, rtol=1e-4, atol=1e-5)
    assert torch.equal(forward.logits(state, labels, n_cells), ablated)
    assert torch.equal(images, given)
    assert all(torch.equal(a, b) for a, b in zip(contents(state), before, strict=True))
    return forward


# The three networks, at every layer


def network(name: str) -> nn.Module:
    """A network whose units are alive: normalised for noise, then put out of balance."""
    models = pytest.importorskip("experiments.models")
    torch.manual_seed(0)
    model: nn.Module = models.build(name)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over passes, whatever the first
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
    with torch.no_grad():
        model.train()(torch.randn(32, 3, 32, 32))
    return model.eval()


def calls_of(model: nn.Module, images: Tensor) -> dict[str, int]:
    calls = dict.fromkeys(dict(model.named_modules()), 0)

    def count(name: str) -> None:
        calls[name] += 1

    handles = [
        module.register_forward_hook(lambda _m, _i, _o, name=name: count(name))
        for name, module in model.named_modules()
    ]
    plain(model, images)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize(
    ("name", "cuts"), [("alexnet_small", 24), ("mobilenet_v2_small", 213), ("resnet50_small", 135)]
)
def test_every_module_of_the_networks_is_bit_equal_to_a_hook(name: str, cuts: int) -> None:
    model, images = network(name), torch.randn(2, 3, 32, 32)
    calls, intact = calls_of(model, images), plain(model, images)
    for layer, times in calls.items():
        if times > 1:
            with pytest.raises(LayerError, match=f"{layer!r} is called {times} times"):
                AblatedForward(model, layer)
            continue
        forward = AblatedForward(model, layer)
        state = forward.prefix(images)
        before = [t.clone() for t in contents(state)]
        mask = labels_for(state, 2) == 0
        ablated = forward.logits(state, mask[None])
        assert torch.equal(ablated[0], hooked(model, layer, images, mask)), layer
        assert torch.equal(forward.intact(state), intact), layer
        assert not torch.equal(ablated[0], intact), layer
        assert all(map(torch.equal, contents(state), before)), layer
    assert list(calls.values()).count(1) == cuts


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("alexnet_small", "features.1"),
        ("alexnet_small", "features"),
        ("alexnet_small", "classifier.2"),
        ("mobilenet_v2_small", "features.2.conv.1.1"),
        ("mobilenet_v2_small", "features.3"),
        ("resnet50_small", "layer2.0.conv2"),
        ("resnet50_small", "layer3.1"),
        ("resnet50_small", ""),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_batches_of_cells(
    name: str, layer: str, memory_format: torch.memory_format
) -> None:
    model = network(name).to(memory_format=memory_format)
    images = torch.randn(3, 3, 32, 32).to(memory_format=memory_format)
    forward = check(model, layer, images)
    sizes: list[int] = []
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_hook(lambda _m, _i, out: sizes.append(len(out)))
    state = forward.prefix(images)
    assert state.activation.is_contiguous(memory_format=memory_format) or state.activation.ndim == 2
    sizes.clear()
    forward.logits(state, labels_for(state, 5), 5, memory=HUGE)
    assert sizes == ([] if layer == "" else [3, 15])  # intact, then all cells at once


def test_one_object_takes_images_of_any_layout_and_number() -> None:
    model = network("resnet50_small")
    forward = AblatedForward(model, "layer1.0.conv3")
    for images in (
        torch.randn(2, 3, 32, 32),
        torch.randn(1, 3, 32, 32),
        torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last),
        torch.randn(3, 32, 32, 3).permute(0, 3, 1, 2)[:, :, ::2],
        torch.randn(1, 3, 32, 32).expand(3, -1, -1, -1),
    ):
        state = forward.prefix(images)
        labels = labels_for(state, 2)
        got = forward.logits(state, labels)
        with torch.no_grad():
            assert torch.equal(forward.intact(state), model(images))
        want = hooked(model, "layer1.0.conv3", images, labels == 1)
        torch.testing.assert_close(got[1], want)  # clone() closes gaps between images


# Small networks that write in place


class Net(nn.Module):
    """Layers `a` and `b` before or beside the cut, `out` after it, put together by a function."""

    def __init__(self, run: Callable[["Net", Tensor], object], cut: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)
        self.cut = nn.Linear(4, 4) if cut is None else cut
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("place", torch.randn(1, 4))
        self.run = run
        self.eval()

    def forward(self, x: Tensor, unused: Tensor | None = None) -> object:
        return self.run(self, x) if unused is None else None


def net(cut: nn.Module | None = None) -> Callable[[Callable[[Net, Tensor], object]], nn.Module]:
    return lambda run: Net(run, cut)


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def head_writes_after_the_cut(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    y = m.cut(h)
    h.relu_()
    return m.out(y + h)


def head_writes_what_the_tail_has_read(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    y = m.cut(h) * h
    h.add_(1)
    return m.out(y) + m.out(h)


def tail_writes_a_skip(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    h.add_(m.cut(h))
    return m.out(F.relu(h))


def tail_writes_by_iadd(m: Net, x: Tensor) -> Tensor:
    h = old = m.a(x)
    h += m.cut(h)
    return m.out(old) - m.out(h).exp()


def tail_writes_items(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    y = m.cut(h)
    y[:, 0] = 1
    h[:, 1:3] = y[:, 1:3]
    return m.out(y) + m.out(h)


def tail_writes_the_images(m: Net, x: Tensor) -> Tensor:
    y = m.cut(m.a(x))
    x[:, :4].mul_(y)
    return m.b(x)


def head_writes_the_images(m: Net, x: Tensor) -> Tensor:
    return m.out(m.cut(m.a(x.mul_(2)))) + m.b(x)[:, :3]


def tail_writes_a_view(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    view = h.view(-1, 4)[:, 1:3]
    view.add_(m.cut(h)[:, 1:3])
    return m.out(h)


def tail_writes_parts(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    left, right = h.chunk(2, 1)
    y = m.cut(h)
    right *= y[:, 2:]
    return m.out(h) + m.out(torch.cat([right, left], 1))


def aliases(m: Net, x: Tensor) -> Tensor:
    h = m.drop(m.a(x))
    y = m.cut(h)
    m.relu(m.drop(y))
    F.relu(m.drop(h), inplace=True)
    return m.out(y) + m.out(h)


def branches(m: Net, x: Tensor) -> Tensor:
    a, b = m.a(x), m.b(x)
    y = m.cut(a)
    kept = torch.cat([y, b], 1)
    F.relu_(b)
    return torch.cat([m.out(y), kept, b], 1)


def written_twice(m: Net, x: Tensor) -> Tensor:
    h, b = m.a(x), m.b(x)
    y = m.cut(h)
    b.add_(y)
    b.mul_(h)
    h.sub_(b)
    return m.out(b) + m.out(h)


def weights_in_many_places(m: Net, x: Tensor) -> Tensor:
    h = F.linear(m.a(x), m.weight)
    return m.out(F.gelu(F.linear(m.cut(h), m.weight) @ m.weight) + m.place * 2) @ m.out.weight


def nothing_after(m: Net, x: Tensor) -> Tensor:
    return m.cut(m.a(x))


def nothing_comes_of_it(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    m.cut(h)
    return m.out(h)


def writes_a_constant_of_the_head(m: Net, x: Tensor) -> Tensor:
    place = m.place.repeat(1, 1)
    y = m.cut(m.a(x))
    y = y + place
    place.add_(1)
    return m.out(y * place)


def cut_behind_a_skip(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.out(m.cut(h)) * m.out(h)


PROGRAMS = [
    head_writes_after_the_cut, head_writes_what_the_tail_has_read, tail_writes_a_skip,
    tail_writes_by_iadd, tail_writes_items, tail_writes_the_images, head_writes_the_images,
    tail_writes_a_view, tail_writes_parts, aliases, branches, written_twice,
    weights_in_many_places, nothing_after, nothing_comes_of_it, writes_a_constant_of_the_head,
]  # fmt: skip


@pytest.mark.parametrize("run", PROGRAMS, ids=lambda run: run.__name__)
def test_writes_in_place(run: Callable[[Net, Tensor], object]) -> None:
    model = Net(run)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check(model, "cut", torch.randn(3, 6))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.relu.inplace
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "cut",
    [
        nn.ReLU(inplace=True),
        nn.Identity(),
        nn.Dropout(0.5),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
        Lambda(lambda h: h.t().contiguous().t()),
        Lambda(lambda h: torch.cat([h, h], 1)[:, ::2]),
        Lambda(lambda h: h[:, :1].expand(-1, 4)),
        Lambda(lambda h: h.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4)),
    ],
    ids=["relu_", "identity", "dropout", "container", "transposed", "gaps", "expanded", "mixed"],
)
def test_layers_that_alias_their_input(cut: nn.Module) -> None:
    check(Net(cut_behind_a_skip, cut.eval()), "cut", torch.randn(3, 6))


@pytest.mark.parametrize("cut", [nn.Identity(), nn.ReLU(inplace=True)], ids=["identity", "relu_"])
def test_a_cut_at_the_images(cut: nn.Module) -> None:
    images = torch.randn(3, 6)
    model = nn.Sequential(cut, nn.ReLU(inplace=True), nn.Linear(6, 2)).eval()
    forward = check(model, "0", images)
    state = forward.prefix(images)
    want = forward.logits(state, [0, 0, 0, 1, 1, 1])
    images.zero_()  # the caller's own
    assert torch.equal(forward.logits(state, [0, 0, 0, 1, 1, 1]), want)


OPERATIONS = ["a", "double", "sum", "view", "drop", "relu_", "add_", "iadd", "setitem", "part_"]
step = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9), st.integers(0, 9))


class Program(nn.Module):
    """A random sequence of operations over a growing list of values, some sharing memory."""

    def __init__(self, before: list, after: list, cut: nn.Module) -> None:  # type: ignore[type-arg]
        super().__init__()
        torch.manual_seed(2)
        self.before, self.after = before, after
        self.a, self.cut, self.drop = nn.Linear(4, 4), cut, nn.Dropout()
        self.eval()

    def do(self, pool: list[Tensor], name: str, i: int, j: int) -> None:
        x, y = pool[i % len(pool)], pool[j % len(pool)]
        match name:
            case "a":
                pool.append(torch.tanh(self.a(x)))
            case "double":
                pool.append(x * 2)
            case "sum":
                pool.append(torch.tanh(x + y))
            case "view":
                pool.append(x.view(-1, 4))
            case "drop":
                pool.append(self.drop(x))
            case "relu_":
                pool.append(F.relu(x, inplace=True))
            case "add_":
                x.add_(y, alpha=0.5)
            case "iadd":
                x += torch.tanh(y)
                pool.append(x)
            case "setitem":
                x[:, :2] = torch.tanh(y[:, 1:3])
            case "part_":
                x[:, 1:].mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        pool = [x, torch.tanh(x)]
        for name, i, j in self.before:
            self.do(pool, name, i, j)
        pool.append(self.cut(pool[-1]))
        for name, i, j in self.after:
            self.do(pool, name, i, j)
        return torch.cat(pool, 1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(step, max_size=4),
    st.lists(step, max_size=8),
    st.sampled_from([nn.Linear(4, 4), nn.Identity(), nn.ReLU(inplace=True)]),
)
def test_random_programs(before: list, after: list, cut: nn.Module) -> None:  # type: ignore[type-arg]
    model, images = Program(before, after, cut), torch.randn(2, 4)
    if torch.equal(plain(model, images), hooked(model, "cut", images, None)):
        check(model, "cut", images, n_cells=2)
    else:  # a hook that returns a clone is another network: others read the layer's memory
        with pytest.raises(LayerError, match="differs from a whole pass"):
            AblatedForward(model, "cut").prefix(images)


# Cells


def test_stimuli_that_influence_each_other_keep_cells_apart() -> None:
    @net()
    def centred(m: Net, x: Tensor) -> Tensor:
        y = m.cut(m.a(x))
        return m.out(y - y.mean(0))

    @net()
    def captured_size(m: Net, x: Tensor) -> Tensor:
        n = x.shape[0]
        return m.out(m.cut(m.a(x)).view(n, 4))

    @net()
    def skip_without_stimuli(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.out(m.cut(h) + h.mean(0, keepdim=True))

    for model in (centred, captured_size, skip_without_stimuli):
        forward = check(model, "cut", torch.randn(5, 6))
        state = forward.prefix(torch.randn(5, 6))
        cells = [0, 1, 2, 0]
        apart = forward.logits(state, cells)
        assert torch.equal(forward.logits(state, cells, memory=HUGE), apart)


@pytest.fixture
def counted() -> tuple[AblatedForward, State, list[int]]:
    """A cut of 20 units, 8 of them dead, and the numbers of rows that its tail runs on."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10), nn.Tanh()).eval()
    with torch.no_grad():
        model[0].bias[:8] = -100
        model[0].bias[8:] = 10
    forward, rows = AblatedForward(model, "1"), list[int]()
    state = forward.prefix(torch.randn(3, 6))
    model[2].register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
    return forward, state, rows


def test_cells_without_live_units_do_not_run(
    counted: tuple[AblatedForward, State, list[int]],
) -> None:
    forward, state, rows = counted
    cells = np.r_[[0] * 8, [1] * 6, [3] * 5, -1]  # cell 0 is dead, cells 2 and 4 are empty
    logits = forward.logits(state, cells, 5)
    assert logits.shape == (5, 3, 10)
    assert rows == [3, 3, 3]  # intact, cells 1 and 3
    intact = forward.intact(state)
    assert [torch.equal(x, intact) for x in logits] == [True, False, True, False, True]
    members = torch.from_numpy(cells) == torch.arange(5)[:, None]
    assert torch.equal(forward.logits(state, members), logits)
    intact.zero_()
    assert torch.equal(forward.intact(state), logits[0])


def test_cells_may_overlap(counted: tuple[AblatedForward, State, list[int]]) -> None:
    forward, state, _ = counted
    members = np.zeros((3, 20), bool)
    members[0], members[1, 8:], members[2, 10:12] = True, True, True
    logits = forward.logits(state, members)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], forward.model[2:](torch.zeros(3, 20)).detach())
    one = forward.logits(state, [0 if 10 <= i < 12 else -1 for i in range(20)])
    assert torch.equal(logits[2:], one)
    assert forward.logits(state, members[:0]).shape == (0, 3, 10)
    assert forward.logits(state, [-1] * 20).shape == (0, 3, 10)


def test_labels_of_any_kind(counted: tuple[AblatedForward, State, list[int]]) -> None:
    forward, state, _ = counted
    labels = np.arange(20) // 10
    want = forward.logits(state, labels)
    frozen = labels.astype(np.uint8)
    frozen.flags.writeable = False
    for cells in (labels.tolist(), torch.from_numpy(labels).short(), frozen, labels[::-1]):
        got = forward.logits(state, cells)
        assert torch.equal(
            got, want.flip(0) if cells is not labels.tolist() and got is None else got
        )
        expected = want if np.asarray(cells)[0] == 0 else want.flip(0)
        assert torch.equal(got, expected)


def test_cells_run_together_as_memory_allows(
    counted: tuple[AblatedForward, State, list[int]],
) -> None:
    forward, state, rows = counted
    cells = [i // 2 for i in range(20)]  # cells 4 to 9 run
    forward.intact(state)
    # the masked activation and the linear layer's output are alive together
    each = 3 * (20 + 10) * 4
    for memory, expected in [
        (1, [3] * 6),
        (4 * each - 1, [9, 9]),
        (4 * each, [12, 6]),
        (HUGE, [18]),
        (None, [3] * 6),
    ]:
        rows.clear()
        forward.logits(state, cells, memory=memory)
        assert rows == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = Net(branches).to(dtype)
    forward = AblatedForward(model, "cut")
    images = torch.randn(3, 6, dtype=dtype)
    state = forward.prefix(images)
    for memory in (None, HUGE):
        logits = forward.logits(state, [0, 0, 1, -1], memory=memory)
        assert logits.dtype == dtype
        want = hooked(model, "cut", images, torch.tensor([False, False, True, False]))
        torch.testing.assert_close(logits[1], want)


def test_inference_mode_and_gradients_of_the_caller() -> None:
    model = Net(tail_writes_the_images)
    want = check(model, "cut", torch.ones(2, 6))
    cells = [0, 1, 1, -1]
    expected = want.logits(want.prefix(torch.ones(2, 6)), cells)
    with torch.inference_mode():
        state = want.prefix(torch.ones(2, 6))
        assert torch.equal(want.logits(state, cells), expected)
    state = want.prefix(torch.ones(2, 6, requires_grad=True) * 1)
    logits = want.logits(state, cells)
    assert torch.equal(logits, expected)
    assert not logits.requires_grad


# Errors


def no_layer(match: str, model: nn.Module, layer: str = "cut") -> None:
    with pytest.raises(LayerError, match=match) as caught:
        AblatedForward(model, layer).prefix(torch.randn(3, 6))
    assert "\n" not in str(caught.value)


def test_layers_that_cannot_be_cut() -> None:
    @net()
    def twice(m: Net, x: Tensor) -> Tensor:
        h = m.relu(m.a(x))
        return m.out(m.relu(m.cut(h) + h))

    @net()
    def by_forward(m: Net, x: Tensor) -> Tensor:
        return m.out(m.cut.forward(m.a(x)))

    @net()
    def once(m: Net, x: Tensor) -> Tensor:
        return m.out(m.cut(m.a(x)))

    no_layer(r"'relu' is called 2 times \(on a; on add\); expected one call", twice, "relu")
    no_layer("'b' is never called; expected one call", twice, "b")
    no_layer("'cut' is never called", by_forward)
    no_layer("no module 'cuts'; expected one of cut", once, "cuts")
    no_layer(r"no module '123'; expected one of model.named_modules\(\)", once, "123")
    attention = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    attend = net(Lambda(lambda h: attention(h[:, None], h[:, None], h[:, None])))
    no_layer(
        r"'cut' gives tuple; expected a tensor \(n, …\)",
        attend(lambda m, x: m.cut(m.a(x))[0][:, 0]),
    )
    mean = net(Lambda(lambda h: h.mean(0)))
    no_layer(
        r"'cut' gives a tensor \(4,\) for 2 images; expected \(n, …\)",
        mean(lambda m, x: m.out(m.cut(m.a(x)) + m.b(x))),
    )


def test_models_that_cannot_be_cut() -> None:
    @net()
    def branching(m: Net, x: Tensor) -> Tensor:
        y = m.cut(m.a(x))
        return m.out(y if y.sum() > 0 else -y)

    @net()
    def a_dict(m: Net, x: Tensor) -> dict[str, Tensor]:
        return {"logits": m.out(m.cut(m.a(x)))}

    @net()
    def random(m: Net, x: Tensor) -> Tensor:
        return m.out(F.dropout(m.cut(m.a(x)), training=True))

    @net()
    def counting(m: Net, x: Tensor) -> Tensor:
        m.calls = getattr(m, "calls", 0) + 1
        return m.out(m.cut(m.a(x))) * m.calls

    @net()
    def writes_a_buffer(m: Net, x: Tensor) -> Tensor:
        m.place.add_(1)
        return m.out(m.cut(m.a(x)) + m.place)

    @net()
    def writes_a_constant(m: Net, x: Tensor) -> Tensor:
        total = torch.zeros(1, 4)
        y = m.cut(m.a(x))
        total = F.relu(total + 0 * y) + y
        m.constant[:, 0] = y[0, 0]
        return m.out(total + m.constant)

    writes_a_constant.constant = torch.ones(1, 4)

    @net(nn.ReLU(inplace=True))
    def reads_the_layers_memory(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        y = m.cut(h)
        y.add_(1)
        return m.out(h)

    no_layer("torch.fx can't trace it: symbolically traced variables", branching)
    no_layer(r"it gives dict; expected a tensor \(n, …\)", a_dict)
    no_layer("cut at 'cut' it differs from a whole pass", random)
    no_layer("cut at 'cut' it differs from a whole pass", counting)
    no_layer("a pass writes to its 'place'; expected none", writes_a_buffer)
    no_layer("a pass writes to its 'constant'; expected none", writes_a_constant)
    no_layer("cut at 'cut' it differs from a whole pass", reads_the_layers_memory)


def test_training_mode() -> None:
    model = Net(branches)
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


def test_bad_arguments() -> None:
    forward = AblatedForward(Net(branches), "cut")
    with pytest.raises(DtypeError, match=r"images: ndarray; expected a torch tensor"):
        forward.prefix(np.zeros((3, 6)))
    for shape in ((0, 6), ()):
        with pytest.raises(ShapeError, match=r"images: shape .*; expected \(n, …\) with n >= 1"):
            forward.prefix(torch.zeros(shape))
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
    for memory in (0, -1, "8GiB", float("nan")):
        with pytest.raises(OptionError, match=r"memory: .*; expected"):
            forward.logits(state, [0, 1, 2, 3], memory=memory)
    with pytest.raises(OptionError, match="state: made by another"):
        AblatedForward(forward.model, "cut").intact(state)


def test_a_state_that_was_written_to_is_refused() -> None:
    forward = AblatedForward(Net(head_writes_after_the_cut), "cut")
    state = forward.prefix(torch.randn(3, 6))
    state.activation.zero_()
    with pytest.raises(LayerError, match="state: its tensors were written to"):
        forward.intact(state)
