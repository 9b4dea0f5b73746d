"""What a network is called with: one tensor of images, or several tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from repsim_kernels import _arrays, _options
from repsim_kernels.errors import DeviceError, DtypeError, ShapeError

Call = Callable[[nn.Module, Any], Any]
"""Calls a network on a tensor, or on a dict or tuple of tensors."""

Images = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
"""One tensor (n, …), or a dict or tuple of tensors of which the first is (n, …)."""

Form = tuple[str, ...] | int | None
"""How tensors are passed: the keys of a dict, the length of a tuple, or None for one tensor."""


def call_network(model: nn.Module, inputs: Any) -> Any:
    """Call a network on a tensor, on the entries of a dict, or on the items of a tuple."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@dataclass(frozen=True)
class Inputs:
    """The tensors that a network is called with, for n stimuli.

    Attributes
    ----------
    tensors : tuple of tensors
        The first is (n, …). Others with another first dimension are the same for all stimuli.
    form : tuple of str, int or None
        See `Form`.
    """

    tensors: tuple[Tensor, ...]
    form: Form = None

    def __len__(self) -> int:
        """The number of stimuli."""
        return len(self.tensors[0])

    def is_batch(self, i: int) -> bool:
        """Whether a tensor has one entry for each stimulus."""
        return self.tensors[i].shape[:1] == self.tensors[0].shape[:1]

    def take(self, count: int) -> Inputs:
        """Return the first stimuli."""
        tensors = (t[:count] if self.is_batch(i) else t for i, t in enumerate(self.tensors))
        return Inputs(tuple(tensors), self.form)

    def copy(self) -> Inputs:
        return Inputs(tuple(map(copy_with_strides, self.tensors)), self.form)

    def make_key(self, any_count: bool = False) -> tuple[object, ...]:
        """Return what decides which operations a network runs, apart from values.

        If `any_count`, the number of stimuli is left out.
        """
        shapes = (
            (-1, *t.shape[1:]) if any_count and self.is_batch(i) else tuple(t.shape)
            for i, t in enumerate(self.tensors)
        )
        kinds = ((t.stride(), t.dtype, t.device) for t in self.tensors)
        return self.form, *zip(shapes, kinds, strict=True)

    def describe(self) -> str:
        """Return dtypes and shapes, for messages."""
        return "; ".join(
            f"{name.removeprefix('images')} {kind}".strip()
            for name, kind in zip(
                _name_tensors(self.form),
                (f"{_arrays.dtype_name(t)} of shape {tuple(t.shape)}" for t in self.tensors),
                strict=True,
            )
        )

    def pack(self) -> Any:
        """Return the argument of `Call`."""
        return pack(self.tensors, self.form)


def pack(values: Sequence[Any], form: Form) -> Any:
    """Return values in place of the tensors of an input."""
    if form is None:
        return values[0]
    return tuple(values) if isinstance(form, int) else dict(zip(form, values, strict=True))


@dataclass(frozen=True)
class Network:
    """A network, and how it is called."""

    model: nn.Module
    call: Call

    def run(self, inputs: Inputs) -> Any:
        """Call the network on copies of its inputs."""
        return self.call(self.model, inputs.copy().pack())


def to_inputs(model: nn.Module, images: Images) -> Inputs:
    """Check that inputs are dense tensors for n >= 1 stimuli, on the device of the model."""
    form: Form = None
    values: Sequence[Any] = (images,)
    if isinstance(images, Mapping) and images and all(isinstance(key, str) for key in images):
        form, values = tuple(images), tuple(images.values())
    elif isinstance(images, (tuple, list)) and images:
        form, values = len(images), images
    device = next((p.device for p in model.parameters()), None)
    for name, t in zip(_name_tensors(form), values, strict=True):
        if not isinstance(t, Tensor):
            raise DtypeError(
                f"{name}: {_options.short_repr(t) if t is None else type(t).__name__}; expected a "
                f"torch tensor{', or a dict or tuple of them' if form is None else ''}"
            )
        _arrays.check_dense(t, name)
        _arrays.check_untransformed(t, name)
        if t is values[0] and (t.ndim == 0 or len(t) == 0):
            raise ShapeError(f"{name}: shape {tuple(t.shape)}; expected (n, …) with n >= 1")
        device = device or t.device
        if t.device != device:
            raise DeviceError(f"{name}: on {t.device}; expected the model's device, {device}")
        if t.is_meta:
            raise DeviceError(f"{name}: on meta, which holds no values; expected another device")
    return Inputs(tuple(values), form)


def _name_tensors(form: Form) -> list[str]:
    """Return the names of tensors, for messages."""
    if form is None:
        return ["images"]
    keys: Sequence[Any] = range(form) if isinstance(form, int) else form
    return [f"images[{key!r}]" for key in keys]


def copy_with_strides(t: Tensor) -> Tensor:
    """Copy a tensor with its strides; clone() keeps them only for a tensor without gaps."""
    t = t.detach()
    clone = t.clone()
    return clone if clone.stride() == t.stride() else copy.deepcopy(t)
