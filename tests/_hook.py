"""The oracle of ablated forward passes: whole passes of a network under a forward hook."""

import pytest
import torch
from torch import Tensor, nn

from repsim_kernels.errors import LayerError
from repsim_kernels.forward import AblatedForward

HUGE = 10**12


def run_hooked(model, layer, images, mask=None):
    """The model's output with the neurons of a mask (p,) zero in a clone of the layer's output."""

    def hook(_module, _inputs, out):
        return out.clone() if mask is None else out.clone().masked_fill_(mask.view(out[0].shape), 0)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        return run_plain(model, images)
    finally:
        handle.remove()


def get_strides(model, layer, images):
    """The strides of a layer's output."""
    strides = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _m, _i, out: strides.append(out.stride())
    )
    run_plain(model, images)
    handle.remove()
    return strides[0]


def run_plain(model, images):
    """The model's output, without gradients, for a copy of the images."""
    with torch.no_grad():
        return model(images.clone())


def make_labels(state, n_cells):
    """Random labels of a state's neurons, -1 included."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1, n_cells, (state.activation[0].numel(),), generator=generator).to(
        state.activation.device
    )


def get_tensors(state):
    """Every tensor that a state holds."""
    values = (v if isinstance(v, tuple) else (v,) for v in state._values.values())
    tensors = (t for v in values for t in v if isinstance(t, Tensor))
    return [state.activation, *(t.to_dense() if t.is_sparse else t for t in tensors)]


def check_cut(model: nn.Module, layer, images, n_cells=3):
    """Check everything that a cut promises, in an order that shows if a call affects later ones."""
    forward, original = AblatedForward(model, layer), images.clone()
    state = forward.prefix(images)
    assert state.activation.stride() == get_strides(model, layer, images)
    before = [t.clone() for t in get_tensors(state)]
    labels = make_labels(state, n_cells)
    ablated = forward.logits(state, labels, n_cells, batch=1)
    batched = forward.logits(state, labels, n_cells, batch=HUGE)
    for c in range(n_cells):
        assert torch.equal(ablated[c], run_hooked(model, layer, images, labels == c))
    assert torch.equal(forward.intact(state), run_plain(model, images))
    torch.testing.assert_close(batched, ablated, rtol=1e-4, atol=1e-5)
    assert torch.equal(forward.logits(state, labels, n_cells, batch=1), ablated)
    assert torch.equal(images, original)
    assert all(map(torch.equal, get_tensors(state), before))
    return forward


def assert_refused(match, model, layer="cut", images=None):
    """Check that a network is refused, with a message of one line."""
    with pytest.raises(LayerError, match=match) as error:
        AblatedForward(model, layer).prefix(torch.randn(3, 6) if images is None else images)
    assert "\n" not in str(error.value)


def is_traced_by_fx(forward):
    """Whether no network was exported."""
    return not forward._cuts._exports


class Net(nn.Module):
    """Layers that the function `run` connects; "cut" is the layer to cut at."""

    def __init__(self, run, cut=None):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)
        self.cut = nn.Linear(4, 4) if cut is None else cut
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("place", torch.randn(1, 4))
        self.constant = torch.ones(1, 4)
        self.run = run
        self.eval()

    def forward(self, x, unused=None):
        return self.run(self, x) if unused is None else None


class Lambda(nn.Module):
    """A module that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
