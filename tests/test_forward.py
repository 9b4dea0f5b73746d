"""A network cut at a layer against whole passes under a hook that returns a masked clone."""

import weakref

import numpy as np
import pytest
import torch
from _hook import HUGE, Net, check_cut, get_tensors, make_labels, run_hooked, run_plain
from torch import nn

from repsim_kernels.errors import LayerError, OutOfMemoryWarning
from repsim_kernels.experiments.inputs import networks as models
from repsim_kernels.forward import AblatedForward, passes
from repsim_kernels.forward.broadcast import repeat_for_cells


def adds_a_skip(m, x):
    h = m.a(x)
    y = m.cut(h)
    h.relu_()
    return m.out(y + h)


def build_network(name):
    """A network with live neurons: batch norms fitted to noise, with random scales and shifts."""
    torch.manual_seed(0)
    model = models.build(name)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # average over all passes
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
    with torch.no_grad():
        model.train()(torch.randn(32, 3, 32, 32))
    return model.eval()


def count_calls(model, images):
    calls = dict.fromkeys(dict(model.named_modules()), 0)

    def count(name):
        calls[name] += 1

    handles = [
        module.register_forward_hook(lambda _m, _i, _o, name=name: count(name))
        for name, module in model.named_modules()
    ]
    run_plain(model, images)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("alexnet_small", 24),
        pytest.param("mobilenet_v2_small", 213, marks=pytest.mark.slow),
        pytest.param("resnet50_small", 135, marks=pytest.mark.slow),
    ],
)
def test_cut_at_every_module_is_bit_identical_to_a_hook(name, cuts):
    model, images = build_network(name), torch.randn(2, 3, 32, 32)
    calls, intact = count_calls(model, images), run_plain(model, images)
    for layer, times in calls.items():
        if times > 1:
            with pytest.raises(LayerError, match=f"{layer!r} is called {times} times"):
                AblatedForward(model, layer)
            continue
        forward = AblatedForward(model, layer)
        state = forward.prefix(images)
        before = [t.clone() for t in get_tensors(state)]
        mask = make_labels(state, 2) == 0
        ablated = forward.logits(state, mask[None])
        assert torch.equal(ablated[0], run_hooked(model, layer, images, mask)), layer
        assert torch.equal(forward.intact(state), intact), layer
        assert not torch.equal(ablated[0], intact), layer
        assert all(map(torch.equal, get_tensors(state), before)), layer
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
def test_memory_formats_are_kept_and_cells_share_a_pass(name, layer, memory_format):
    model = build_network(name).to(memory_format=memory_format)
    images = torch.randn(3, 3, 32, 32).to(memory_format=memory_format)
    forward = check_cut(model, layer, images)
    sizes = []
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_hook(lambda _m, _i, out: sizes.append(len(out)))
    state = forward.prefix(images)
    assert state.activation.is_contiguous(memory_format=memory_format) or state.activation.ndim == 2
    sizes.clear()
    forward.logits(state, make_labels(state, 5), 5, batch=HUGE)
    assert sizes == ([] if layer == "" else [15])  # all cells in one pass


def test_images_of_any_layout_and_number_match_a_hook():
    model = build_network("resnet50_small")
    forward = AblatedForward(model, "layer1.0.conv3")
    for images in (
        torch.randn(2, 3, 32, 32),
        torch.randn(1, 3, 32, 32),
        torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last),
        torch.randn(3, 32, 32, 3).permute(0, 3, 1, 2)[:, :, ::2],
        torch.randn(1, 3, 32, 32).expand(3, -1, -1, -1),
    ):
        state = forward.prefix(images)
        labels = make_labels(state, 2)
        got = forward.logits(state, labels)
        with torch.no_grad():
            assert torch.equal(forward.intact(state), model(images))
        want = run_hooked(model, "layer1.0.conv3", images, labels == 1)
        torch.testing.assert_close(got[1], want)  # clone() closes gaps between images


def test_one_cell_per_pass_if_images_influence_each_other():
    def centred(m, x):
        y = m.cut(m.a(x))
        return m.out(y - y.mean(0))

    def captured_size(m, x):
        n = x.shape[0]
        return m.out(m.cut(m.a(x)).view(n, 4))

    def skip_without_images(m, x):
        h = m.a(x)
        return m.out(m.cut(h) + h.mean(0, keepdim=True))

    for run in (centred, captured_size, skip_without_images):
        forward = check_cut(Net(run), "cut", torch.randn(5, 6))
        state = forward.prefix(torch.randn(5, 6))
        cells = [0, 1, 2, 0]
        one_by_one = forward.logits(state, cells)
        assert torch.equal(forward.logits(state, cells, batch=HUGE), one_by_one)


def test_several_cells_per_pass_may_share_values():
    def run(m, x):
        scale = m.place.exp()  # (1, 4), the same for all images
        h = m.a(x)
        y = m.cut(h)  # without the mask, h itself
        z = y * h * scale
        return m.out(m.relu(y) + z)

    model, rows = Net(run, nn.Dropout().eval()), []
    forward = check_cut(model, "cut", torch.randn(3, 6))
    model.out.register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
    forward.logits(forward.prefix(torch.randn(3, 6)), [0, 1, 2, 3], batch=HUGE)
    assert rows == [12]


def test_values_are_freed_after_their_last_use():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(7))).eval()
    forward, outputs, freed = AblatedForward(model, "3"), {}, {}
    forward.prefix(torch.randn(3, 6))

    def record(i, out):
        outputs[i] = weakref.ref(out)
        freed[i] = i < 2 or outputs[i - 2]() is None

    for i, module in enumerate(model):
        module.register_forward_hook(lambda _m, _i, out, i=i: record(i, out))
    forward.logits(forward.prefix(torch.randn(3, 6)), [0] * 6)
    assert freed == {0: True, 1: True, 2: True, 3: True, 4: True, 5: False, 6: True}


def test_model_is_unchanged_and_new_weights_are_used():
    def stores(m, x):
        m.stored = y = m.cut(m.a(x))
        return m.out(y * m.place.exp()) + m.weight[0, :3] * 2

    model, images = Net(stores), torch.randn(3, 6)
    forward = AblatedForward(model, "cut")
    assert not hasattr(model, "stored")
    forward.prefix(images)
    with torch.no_grad():
        model.place.fill_(0.5)
        model.weight.fill_(2)
    assert torch.equal(forward.intact(forward.prefix(images)), run_plain(model, images))


def test_a_module_with_two_names_can_be_cut():
    model = Net(adds_a_skip)
    model.other = model.cut
    check_cut(model, "other", torch.randn(3, 6))


def test_a_network_that_branches_on_a_buffer_can_be_cut():
    def signed(m, x):
        y = m.cut(m.a(x))
        return m.out(y if m.place.sum() > 100 else -y)

    check_cut(Net(signed), "cut", torch.randn(3, 6))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 1, 2)])
def test_repeated_tensor_keeps_its_memory_order(order):
    t = torch.randn(2, 3, 4, 5).permute(order).contiguous()
    t = t.permute([order.index(d) for d in range(4)])  # `order` is slowest to fastest in memory
    copies = repeat_for_cells(t, 3)
    assert torch.equal(copies, torch.cat([t, t, t]))
    assert sorted(range(4), key=copies.stride, reverse=True) == list(order)


@pytest.fixture
def small_cut():
    """A cut with 20 neurons, 8 of them dead, its state, and the rows of each tail pass."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10), nn.Tanh()).eval()
    with torch.no_grad():
        model[0].bias[:8] = -100
        model[0].bias[8:] = 10
    forward, rows = AblatedForward(model, "1"), []
    state = forward.prefix(torch.randn(3, 6))
    model[2].register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
    return forward, state, rows


def test_cells_without_effect_are_not_run(small_cut):
    forward, state, rows = small_cut
    cells = np.r_[[0] * 8, [1] * 6, [3] * 5, -1]  # cell 0 is dead, cells 2 and 4 are empty
    logits = forward.logits(state, cells, 5, batch=1)
    assert logits.shape == (5, 3, 10)
    assert rows == [3, 3, 3]  # intact, cells 1 and 3
    intact = forward.intact(state)
    assert [torch.equal(x, intact) for x in logits] == [True, False, True, False, True]
    members = torch.from_numpy(cells) == torch.arange(5)[:, None]
    assert torch.equal(forward.logits(state, members, batch=1), logits)
    assert rows == [3] * 5
    intact.zero_()
    assert torch.equal(forward.intact(state), logits[0])


def test_cells_may_overlap(small_cut):
    forward, state, _ = small_cut
    members = np.zeros((3, 20), bool)
    members[0], members[1, 8:], members[2, 10:12] = True, True, True
    logits = forward.logits(state, members)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], forward.model[2:](torch.zeros(3, 20)).detach())
    single = forward.logits(state, [0 if 10 <= i < 12 else -1 for i in range(20)])
    assert torch.equal(logits[2:], single)
    assert forward.logits(state, members[:0]).shape == (0, 3, 10)
    assert forward.logits(state, [-1] * 20).shape == (0, 3, 10)


def test_labels_may_be_any_kind_of_array(small_cut):
    forward, state, _ = small_cut
    labels = np.arange(20, dtype=np.uint8) // 10
    want = forward.logits(state, labels)
    labels.flags.writeable = False
    for cells in (
        labels.tolist(),
        torch.from_numpy(labels.copy()).short(),
        labels,
        labels[::-1][::-1],
    ):
        assert torch.equal(forward.logits(state, cells), want)
    assert torch.equal(forward.logits(state, labels[::-1]), want.flip(0))


def test_batches_fit_the_memory(small_cut):
    forward, state, rows = small_cut
    cells = [i // 2 for i in range(20)]  # cells 4 to 9 run
    forward.intact(state)
    # The masked activation and the linear layer's output exist at the same time.
    cell_bytes = 3 * (20 + 10) * 4
    want = forward.logits(state, cells, batch=1)
    for batch, memory, expected in [
        (1, None, [3] * 6),
        (4, None, [12, 6]),
        (None, None, [18]),  # so few rows leave the weights underused
        (HUGE, 4 * cell_bytes - 1, [9, 9]),
        (HUGE, 4 * cell_bytes, [12, 6]),
        (None, f"{4 * cell_bytes / 1024}KiB", [12, 6]),
        (4, 2 * cell_bytes, [6, 6, 6]),
        (None, cell_bytes - 1, [1, 2] * 6),  # less than one cell with all images
        (1, cell_bytes / 3, [1] * 18),
        (None, 1, [1] * 18),
    ]:
        rows.clear()
        torch.testing.assert_close(forward.logits(state, cells, batch=batch, memory=memory), want)
        assert rows == expected


def test_intact_pass_fits_the_memory(small_cut):
    forward, state, rows = small_cut
    image_bytes = (20 + 10) * 4
    torch.testing.assert_close(
        forward.intact(state, memory=2 * image_bytes), forward.model[2:](state.activation).detach()
    )
    assert rows == [1, 2, 3]


def test_batches_are_halved_when_memory_runs_out(small_cut, monkeypatch):
    forward, state, rows = small_cut
    cells = [i // 2 for i in range(20)]
    want = forward.logits(state, cells, batch=1)
    run_tail = passes.run_tail

    def limited(state, cells=None, batch=None):
        if cells is not None and len(cells.ids) * (batch.stop - batch.start) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_tail(state, cells, batch)

    monkeypatch.setattr(passes, "run_tail", limited)
    rows.clear()
    with pytest.warns(OutOfMemoryWarning, match="with 18 cells x images in one pass"):
        got = forward.logits(state, cells, batch=HUGE)
    torch.testing.assert_close(got, want)
    assert rows == [3] * 6  # 18 and 9 rows fail; 4 rows fit one cell
    assert torch.equal(forward.logits(state, cells, batch=HUGE), got)  # without a second warning
    assert rows == [3] * 12


def test_an_image_that_does_not_fit_raises(small_cut, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    forward, state, _ = small_cut
    forward.intact(state)
    monkeypatch.setattr(passes, "run_tail", fail)
    with (
        pytest.warns(OutOfMemoryWarning, match="with 3 cells x images"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        forward.logits(state, [0] * 20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_have_the_dtype_of_the_network(dtype):
    model = Net(adds_a_skip).to(dtype)
    forward = AblatedForward(model, "cut")
    images = torch.randn(3, 6, dtype=dtype)
    state = forward.prefix(images)
    for memory in (None, HUGE):
        logits = forward.logits(state, [0, 0, 1, -1], memory=memory)
        assert logits.dtype == dtype
        want = run_hooked(model, "cut", images, torch.tensor([False, False, True, False]))
        torch.testing.assert_close(logits[1], want)


def test_inference_mode_and_gradients_of_the_caller_do_not_matter():
    def writes_the_images(m, x):
        y = m.cut(m.a(x))
        x[:, :4].mul_(y)
        return m.b(x)

    model, cells = Net(writes_the_images), [0, 1, 1, -1]
    forward = AblatedForward(model, "cut")
    want = forward.logits(forward.prefix(torch.ones(2, 6)), cells)
    with torch.inference_mode():
        again = AblatedForward(model, "cut")
        assert torch.equal(again.logits(again.prefix(torch.ones(2, 6)), cells), want)
    images = (torch.ones(2, 12, requires_grad=True) * 1)[:, ::2]
    logits = forward.logits(forward.prefix(images), cells)
    assert torch.equal(logits, want)
    assert not logits.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layer", ["features.1", "features.6", "classifier.2"])
def test_cuts_on_a_gpu_match_a_hook(layer):
    model, images = build_network("alexnet_small").cuda(), torch.randn(4, 3, 32, 32).cuda()
    forward = check_cut(model, layer, images)
    state = forward.prefix(images)
    labels = make_labels(state, 5)
    one_by_one = forward.logits(state, labels.cuda(), 5, batch=1)
    torch.testing.assert_close(forward.logits(state, labels, 5), one_by_one, rtol=1e-3, atol=1e-3)
