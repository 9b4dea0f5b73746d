"""What may replace ablated neurons, as a user passes it and as a hook computes it."""

from __future__ import annotations

import numpy as np
import torch
from _hook import run_plain
from torch import Tensor, nn

from repsim_kernels.forward.fills import draw_other_images


def run_filled(model, layer, images, mask, make_values):
    """The model's output with the neurons of a mask (p,) overwritten in the layer's output."""

    def hook(_module, _inputs, out):
        clone = out.clone()
        rows = mask.view(out.shape[1:])
        clone[:, rows] = make_values(out).expand(out.shape)[:, rows]
        return clone

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        return run_plain(model, images)
    finally:
        handle.remove()


def _fill_mean(state, other, seed):
    return "mean", lambda out: out.mean(0, dtype=torch.float64).to(out.dtype)


def _fill_resample(state, other, seed):
    return "resample", lambda out: out[draw_other_images(len(out), seed)]


def _fill_number(state, other, seed):
    return 1.5, lambda out: torch.tensor(1.5, dtype=out.dtype, device=out.device)


def _random_like(state, shape, seed):
    act = state.activation
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(act.device, act.dtype)


def _fill_array(get_shape):
    def fill(state, other, seed):
        values = _random_like(state, get_shape(state.activation.shape), seed)
        return values, lambda out: values

    return fill


def _fill_numpy(state, other, seed):
    values = _random_like(state, state.activation.shape[1:], seed)
    host = values.cpu() if values.dtype == torch.bfloat16 else values.cpu().numpy()
    if isinstance(host, Tensor):
        return values, lambda out: values
    host.flags.writeable = False
    return np.asarray(host), lambda out: values


def _fill_state(state, other, seed):
    return other, lambda out: other.activation


FILLS = {
    "zero": lambda *_: ("zero", lambda out: torch.zeros_like(out)),
    "mean": _fill_mean,
    "resample": _fill_resample,
    "number": _fill_number,
    "per neuron": _fill_array(lambda shape: shape[1:]),
    "per channel": _fill_array(lambda shape: (shape[1], *[1] * (len(shape) - 2))),
    "per image": _fill_array(lambda shape: (shape[0], *[1] * (len(shape) - 1))),
    "numpy": _fill_numpy,
    "state": _fill_state,
}
"""By name: a function of a state, another one and a seed that returns the argument `fill` and a
function of the layer's output that returns the same values."""

LAYERS = ("conv1", "norm", "relu", "conv2", "pool", "hidden")


class ConvNet(nn.Module):
    """Convolutions, a batch norm, in-place ReLUs, a skip connection and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.conv2 = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)
        self.pool, self.hidden = nn.AdaptiveAvgPool2d(2), nn.Linear(16, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(images)))
        x = (x + self.conv2(x)).relu_()
        return self.out(torch.tanh(self.hidden(self.pool(x).flatten(1))))


def build_conv_net(seed: int) -> ConvNet:
    """A network with random parameters, in eval mode."""
    torch.manual_seed(seed)
    model = ConvNet()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model.eval()
