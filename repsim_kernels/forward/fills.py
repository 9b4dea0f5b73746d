"""The values that replace ablated neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels import _arrays, _options
from repsim_kernels.errors import DeviceError, DtypeError, OptionError, ShapeError
from repsim_kernels.forward.passes import State

_NAMES = ("zero", "mean", "resample")


def make_fill(fill: Any, state: State, seed: int) -> Tensor | None:
    """Return the value of each neuron and image when it is ablated, (n, …); None for zeros.

    `fill` is a name, another state of the same layer, a number or an array.
    """
    act = state._data
    if isinstance(fill, State):
        return _get_activation(fill, state)
    if fill is None or isinstance(fill, str):
        if fill not in _NAMES:
            names = ", ".join(map(repr, _NAMES))
            raise OptionError(
                f"fill: {_options.short_repr(fill)}; expected {names}, a State, a number or an "
                "array"
            )
        if fill == "zero":
            return None
        # The mean of a copy in another memory order could differ in its last bit.
        act = state.activation
        values = _average(act) if fill == "mean" else act[draw_other_images(len(act), seed)]
    elif isinstance(fill, (bool, int, float)):
        values = _convert_number(fill, act)
    else:
        values = _convert_array(fill, act)
    return values.expand(act.shape)


def draw_other_images(n: int, seed: int) -> list[int]:
    """Return a random permutation of n images that leaves none in its place."""
    if n < 2:
        raise OptionError("fill: 'resample' for 1 image; expected a state of at least 2 images")
    rng, images = np.random.default_rng(seed), np.arange(n)
    while True:  # e = 2.7 draws on average
        order = rng.permutation(n)
        if (order != images).all():
            return order.tolist()


def _average(act: Tensor) -> Tensor:
    """Return each neuron's mean over the images, (…), rounded to the activation's dtype once."""
    if not (act.is_floating_point() or act.is_complex()):
        raise DtypeError(
            f"fill: 'mean' of an activation of {_arrays.dtype_name(act)}; expected floating point"
        )
    wide = torch.complex128 if act.is_complex() else torch.float64
    return act.mean(0, dtype=wide).to(act.dtype)


def _get_activation(source: State, state: State) -> Tensor:
    """Return the activation of a state that replaces the neurons of another state."""
    if source._owner is not state._owner:
        raise OptionError(
            "fill: a state made by another AblatedForward; expected one from this one, or pass "
            "its .activation"
        )
    if source.layer != state.layer:
        raise OptionError(
            f"fill: a state of layer {source.layer!r}; expected one of {state.layer!r}, or pass "
            "its .activation"
        )
    shape = tuple(source._data.shape)
    if shape != state._data.shape:
        raise ShapeError(
            f"fill: a state of shape {shape}; expected {tuple(state._data.shape)}, the shape of "
            "the activation that it replaces"
        )
    source._check_unwritten("fill")
    _check_kind(source._data, state._data)
    return source.activation


def _convert_number(number: float, act: Tensor) -> Tensor:
    """Return a number as a tensor of the activation's dtype."""
    if isinstance(number, float) and not (act.is_floating_point() or act.is_complex()):
        raise DtypeError(
            f"fill: {number}; expected an integer, as the activation is {_arrays.dtype_name(act)}"
        )
    return torch.tensor(number, dtype=act.dtype, device=act.device)


def _convert_array(array: Any, act: Tensor) -> Tensor:
    """Return an array as a tensor that broadcasts to the activation (n, …)."""
    values, source = _arrays.convert(array, "fill")
    values = values.to(act.device) if source.library == "numpy" else values
    _check_kind(values, act)
    try:
        fits = torch.broadcast_shapes(values.shape, act.shape) == act.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ShapeError(
            f"fill: shape {tuple(values.shape)}; expected one that broadcasts to the activation's, "
            f"{tuple(act.shape)}"
        )
    return values


def _check_kind(values: Tensor, act: Tensor) -> None:
    """Check that a fill has the dtype and the device of the activation."""
    if values.dtype != act.dtype:
        dtype, expected = _arrays.dtype_name(values), _arrays.dtype_name(act)
        raise DtypeError(f"fill: dtype {dtype}; expected {expected}, as the activation has")
    if values.device != act.device:
        raise DeviceError(f"fill: on {values.device}; expected the activation's {act.device}")
