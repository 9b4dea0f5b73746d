"""Networks that write in place to values that a state must preserve."""

import pytest
import torch
import torch.nn.functional as F
from _hook import Lambda, Net, check_cut, run_hooked, run_plain
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repsim_kernels.errors import LayerError
from repsim_kernels.forward import AblatedForward


def head_writes_after_the_cut(m, x):
    h = m.a(x)
    y = m.cut(h)
    h.relu_()
    return m.out(y + h)


def head_writes_what_the_tail_has_read(m, x):
    h = m.a(x)
    y = m.cut(h) * h
    h.add_(1)
    return m.out(y) + m.out(h)


def tail_writes_a_skip(m, x):
    h = m.a(x)
    h.add_(m.cut(h))
    return m.out(F.relu(h))


def tail_writes_by_iadd(m, x):
    h = old = m.a(x)
    h += m.cut(h)
    return m.out(old) - m.out(h).exp()


def tail_writes_items(m, x):
    h = m.a(x)
    y = m.cut(h)
    y[:, 0] = 1
    h[:, 1:3] = y[:, 1:3]
    return m.out(y) + m.out(h)


def tail_writes_the_images(m, x):
    y = m.cut(m.a(x))
    x[:, :4].mul_(y)
    return m.b(x)


def head_writes_the_images(m, x):
    return m.out(m.cut(m.a(x.mul_(2)))) + m.b(x)[:, :3]


def tail_writes_a_view(m, x):
    h = m.a(x)
    view = h.view(-1, 4)[:, 1:3]
    view.add_(m.cut(h)[:, 1:3])
    return m.out(h)


def tail_writes_one_of_several(m, x):
    h = m.a(x)
    left, right = h.chunk(2, 1)
    y = m.cut(h)
    right *= y[:, 2:]
    return m.out(h) + m.out(torch.cat([right, left], 1))


def aliases(m, x):
    h = m.drop(m.a(x))
    y = m.cut(h)
    m.relu(m.drop(y))
    F.relu(m.drop(h), inplace=True)
    return m.out(y) + m.out(h)


def branches(m, x):
    a, b = m.a(x), m.b(x)
    y = m.cut(a)
    before = torch.cat([y, b], 1)
    F.relu_(b)
    return torch.cat([m.out(y), before, b], 1)


def head_clamps_a_view(m, x):
    h = m.a(x)
    view = h.view(-1, 4)
    y = m.cut(h) * h
    view.clamp_(-9, 9)
    return m.out(y) + m.out(h)


def tail_writes_alternately(m, x):
    h, b = m.a(x), m.b(x)
    y = m.cut(h)
    b.add_(y)
    b.mul_(h)
    h.sub_(b)
    return m.out(b) + m.out(h)


def weights_in_many_operations(m, x):
    h = F.linear(m.a(x), m.weight)
    y = F.gelu(F.linear(m.cut(h), m.weight) @ m.weight)
    return m.out(y + m.place * 2) @ m.out.weight + m.place.shape[1]


def writes_a_value_without_images(m, x):
    place = m.place.repeat(1, 1)
    y = m.cut(m.a(x)) + place
    place.add_(1)
    return m.out(y * place)


def nothing_after(m, x):
    return m.cut(m.a(x))


def output_is_unused(m, x):
    h = m.a(x)
    m.cut(h)
    return m.out(h)


@pytest.mark.parametrize(
    "run",
    [f for f in list(globals().values()) if getattr(f, "__module__", None) == __name__],
    ids=lambda run: run.__name__,
)
def test_networks_that_write_in_place_can_be_cut(run):
    model = Net(run)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check_cut(model, "cut", torch.randn(4, 6) * torch.tensor([1, 1, 1, 99])[:, None])
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
        Lambda(lambda h: h[:, ::3]),
    ],
    ids=["relu_", "identity", "dropout", "container", "transposed", "gaps", "expanded", "view"],
)
def test_layers_with_strided_or_shared_output_can_be_cut(cut):
    def run(m, x):
        h = m.a(x)
        return m.out(m.cut(h).repeat(1, 2)[:, :4]) * m.out(h)

    check_cut(Net(run, cut.eval()), "cut", torch.randn(3, 6))


@pytest.mark.parametrize("cut", [nn.Identity(), nn.ReLU(inplace=True)], ids=["identity", "relu_"])
def test_a_cut_at_the_images_does_not_share_their_memory(cut):
    images, cells = torch.randn(3, 6), [0, 0, 0, 1, 1, 1]
    model = nn.Sequential(cut, nn.ReLU(inplace=True), nn.Linear(6, 2)).eval()
    forward = check_cut(model, "0", images)
    state = forward.prefix(images)
    want = forward.logits(state, cells)
    images.zero_()  # the state must not depend on the caller's images
    assert torch.equal(forward.logits(state, cells), want)


def test_memory_shared_in_only_one_memory_format_is_copied():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.cut = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            h = self.a(x)
            flat = h.permute(0, 2, 3, 1).reshape(-1, 12)  # a view in channels_last only
            y = self.cut(h) * h
            flat.add_(1)
            return (y + h).flatten(1)

    torch.manual_seed(5)
    model, images = Flat().eval(), torch.randn(3, 2, 2, 2)
    forward = AblatedForward(model, "cut")
    for layout in (torch.contiguous_format, torch.channels_last):
        x = images.to(memory_format=layout)
        model.to(memory_format=layout)
        ablated = forward.logits(forward.prefix(x), [0, 1] * 6)
        assert torch.equal(ablated[1], run_hooked(model, "cut", x, torch.tensor([False, True] * 6)))


def test_output_that_shares_no_memory_is_not_copied():
    images = torch.randn(3, 1000)
    model = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(7))).eval()
    for name, module in model.named_children():
        outputs = []
        forward = AblatedForward(model, name)
        module.register_forward_hook(
            lambda _m, _i, y, outputs=outputs: outputs.append(y.data_ptr())
        )
        assert forward.prefix(images).activation.data_ptr() == outputs[-1]


def test_operations_independent_of_the_layer_run_once():
    def run(m, x):
        h = m.relu(m.a(x))
        y = m.cut(h) * h
        return m.out(y + m.b(x))

    model, calls = Net(run), []
    forward = AblatedForward(model, "cut")
    state = forward.prefix(torch.randn(3, 6))
    for name in ("a", "b", "cut", "out"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    forward.logits(state, [0, 1, 2, 3], batch=1)
    assert calls == ["out"] * 4


OPERATIONS = ["a", "double", "sum", "view", "drop", "relu_", "add_", "iadd", "setitem", "part_"]


class Program(nn.Module):
    """A sequence of operations over a growing list of values, some of which share memory."""

    def __init__(self, before, after, cut):
        super().__init__()
        torch.manual_seed(2)
        self.before, self.after = before, after
        self.a, self.cut, self.drop = nn.Linear(4, 4), cut, nn.Dropout()
        self.eval()

    def do(self, pool, name, i, j):
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

    def forward(self, x):
        pool = [x, torch.tanh(x)]
        for operation in self.before:
            self.do(pool, *operation)
        pool.append(self.cut(pool[-1]))
        for operation in self.after:
            self.do(pool, *operation)
        return torch.cat(pool, 1)


step = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9), st.integers(0, 9))
cuts = st.sampled_from([nn.Linear(4, 4), nn.Identity(), nn.ReLU(inplace=True)])


@given(st.lists(step, max_size=4), st.lists(step, max_size=8), cuts)
def test_random_programs_match_a_hook_or_are_refused(before, after, cut):
    torch.manual_seed(4)
    model, images = Program(before, after, cut), torch.randn(2, 4)
    if torch.equal(run_plain(model, images), run_hooked(model, "cut", images)):
        check_cut(model, "cut", images, n_cells=2)
    else:  # other operations read the layer's memory, so a hook that clones it changes the network
        with pytest.raises(LayerError, match="replacing the output of 'cut' by a clone changes"):
            AblatedForward(model, "cut").prefix(images)
