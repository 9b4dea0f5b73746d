"""What a cut network is held against: whole passes under a forward hook."""

import pytest
import torch
from torch import Tensor, nn

from repsim_kernels.errors import LayerError
from repsim_kernels.forward import AblatedForward

HUGE = 10**12


def hooked(model, layer, images, mask=None):
    """Output where the units of a mask (p,) are zero in a clone of the layer's output."""

    def hook(_module, _inputs, out):
        return out.clone() if mask is None else out.clone().masked_fill_(mask.view(out[0].shape), 0)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        return plain(model, images)
    finally:
        handle.remove()


def strides_of(model, layer, images):
    strides = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _m, _i, out: strides.append(out.stride())
    )
    plain(model, images)
    handle.remove()
    return strides[0]


def plain(model, images):
    with torch.no_grad():
        return model(images.clone())


def labels_for(state, n_cells):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1, n_cells, (state.activation[0].numel(),), generator=generator).to(
        state.activation.device
    )


def contents(state):
    """Every tensor that a state holds."""
    values = (v if isinstance(v, tuple) else (v,) for v in state._values.values())
    found = (t for v in values for t in v if isinstance(t, Tensor))
    return [state.activation, *(t.to_dense() if t.is_sparse else t for t in found)]


def check(model: nn.Module, layer, images, n_cells=3):
    """Everything that a cut promises, in an order in which a call could spoil the next ones."""
    forward, given = AblatedForward(model, layer), images.clone()
    state = forward.prefix(images)
    assert state.activation.stride() == strides_of(model, layer, images)
    before = [t.clone() for t in contents(state)]
    labels = labels_for(state, n_cells)
    ablated = forward.logits(state, labels, n_cells, batch=1)
    together = forward.logits(state, labels, n_cells, batch=HUGE)
    for c in range(n_cells):
        assert torch.equal(ablated[c], hooked(model, layer, images, labels == c))
    assert torch.equal(forward.intact(state), plain(model, images))
    torch.testing.assert_close(together, ablated, rtol=1e-4, atol=1e-5)
    assert torch.equal(forward.logits(state, labels, n_cells, batch=1), ablated)
    assert torch.equal(images, given)
    assert all(map(torch.equal, contents(state), before))
    return forward


def refused(match, model, layer="cut", images=None):
    """The one-line reason for which a network isn't cut."""
    with pytest.raises(LayerError, match=match) as caught:
        AblatedForward(model, layer).prefix(torch.randn(3, 6) if images is None else images)
    assert "\n" not in str(caught.value)


def by_fx(forward):
    """Whether no network had to be exported."""
    return not forward._cuts._exports


class Net(nn.Module):
    """Layers for a function that puts them together; "cut" is the one to cut at."""

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
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
