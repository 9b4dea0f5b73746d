"""Batches of a loader and outputs of modules: the tensors in them, and what is done with them."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from repsim_kernels import _arrays, _options
from repsim_kernels._structures import get_parts, name_parts, rebuild
from repsim_kernels.errors import OptionError, ShapeError

Call = Callable[[nn.Module, Any], Any]
"""Calls a network on a batch."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def call_on_inputs(model: nn.Module, batch: Any) -> Any:
    """Call a network on a tensor, on the first item of a tuple, or on the entries of a dict.

    Floating-point numbers get the dtype of the network's first parameter: loaders return float32
    for networks in half precision, and NumPy float64.
    """
    if not list_tensors(batch):
        raise OptionError(
            f"call: None for a batch without tensors, {_options.short_repr(batch)}; expected a "
            "function that calls the network on it"
        )
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    dtype = next((a.dtype for a in _list_state(model) if a.dtype in _DTYPES), None)
    if dtype is not None:
        inputs = map_tensors(inputs, lambda a: a.to(dtype) if a.is_floating_point() else a)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def to_device(batch: Any, model: nn.Module) -> Any:
    """Move the tensors of a batch to the device of a network's first parameter."""
    device = next((a.device for a in _list_state(model)), None)
    return map_tensors(batch, lambda a: a.to(device) if device is not None else a)


def _list_state(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in a batch; NumPy arrays become tensors first."""
    if _is_array(batch):
        return function(_to_tensor(batch))
    parts = get_parts(batch)
    if parts is None:
        return batch
    return rebuild(batch, {key: map_tensors(part, function) for key, part in parts.items()})


def list_tensors(batch: Any) -> list[Tensor]:
    """Return the tensors in a batch, in order."""
    return [_to_tensor(leaf) for _, leaf in _list_leaves(batch) if _is_array(leaf)]


def list_output_tensors(output: Any) -> dict[str, Tensor]:
    """Return the tensors in a module's output by their paths, such as "hidden_states.3"."""
    return {path: leaf for path, leaf in _list_leaves(output) if isinstance(leaf, Tensor)}


def find_output_tensor(output: Any, path: str) -> Tensor | None:
    """Return the tensor at a path in a module's output, such as "hidden_states.3".

    Parts may also be counted, from the end with negative numbers: "hidden_states.-1".
    """
    if not path:
        return output if isinstance(output, Tensor) else None
    parts = get_parts(output) or {}
    for name, key in name_parts(parts).items():  # a name may have dots itself
        if path == name or path.startswith(f"{name}."):
            tensor = find_output_tensor(parts[key], path[len(name) + 1 :])
            if tensor is not None:
                return tensor
    return None


def get_version(a: Tensor) -> int:
    """Return how often a tensor was written to; PyTorch does not count it in inference mode."""
    return 0 if a.is_inference() else a._version


def count_stimuli(batch: Any) -> int:
    """Return the number of stimuli in a batch: the length of its first tensor, or of a list."""
    lengths = [len(a) for a in list_tensors(batch) if a.ndim]
    n = lengths[0] if lengths else _count_items(batch)
    if not n:
        raise ShapeError(
            f"loader: a batch {_options.short_repr(batch)}; expected tensors (n, …), with n >= 1, "
            "or a list"
        )
    return n


def _count_items(batch: Any) -> int:
    """Return the length of the first list in a batch that has no other lists in it."""
    parts = get_parts(batch) or {}
    inner = next(filter(None, map(_count_items, parts.values())), 0)
    return inner or (len(parts) if isinstance(batch, (tuple, list)) else 0)


def take_stimuli(batch: Any, count: int) -> Any:
    """Return the first stimuli of a batch; all of them if it has no tensors."""
    n = count_stimuli(batch)
    return map_tensors(batch, lambda a: a[:count] if a.ndim and len(a) == n else a)


def join_batches(batches: list[Any]) -> Any | None:
    """Concatenate batches along the stimuli; None if they can't be."""
    if len(batches) == 1:
        return batches[0]
    try:
        return _join(batches, [count_stimuli(batch) for batch in batches])
    except _NotJoinableError:
        return None


class _NotJoinableError(Exception):
    """Parts of batches differ in shape, or do not hold one value per stimulus."""


def _join(parts: list[Any], counts: list[int]) -> Any:
    first = parts[0]
    if _is_array(first):
        tensors = [_to_tensor(part) for part in parts]
        if all(a.ndim and len(a) == n for a, n in zip(tensors, counts, strict=True)):
            if any(a.shape[1:] != tensors[0].shape[1:] for a in tensors):
                raise _NotJoinableError
            return torch.cat(tensors)
        if not all(torch.equal(a, tensors[0]) for a in tensors):
            raise _NotJoinableError
        return tensors[0]
    if get_parts(first) is None:
        data = {_to_bytes(part) for part in parts}
        if len(data) > 1 or not all(data):
            raise _NotJoinableError
        return first
    items = [get_parts(part) or {} for part in parts]
    keys = items[0].keys()
    # A list of strings, or of other objects, may have one for each stimulus.
    is_per_stimulus = len(keys) == counts[0] and not list_tensors(first)
    if is_per_stimulus or any(one.keys() != keys for one in items):
        raise _NotJoinableError
    return rebuild(first, {key: _join([one[key] for one in items], counts) for key in keys})


class Mask(NamedTuple):
    """The attention mask of a batch (n, t): True for tokens, False for padding.

    A batch for an encoder and a decoder has several, of which ``tokens`` is the first. Which of
    them applies to a layer is not known.
    """

    tokens: Tensor
    names: tuple[str, ...]


def find_mask(batch: Any) -> Mask | None:
    """Return the attention mask in a batch."""
    masks = dict(_list_masks(batch))
    if not masks:
        return None
    tokens = torch.as_tensor(next(iter(masks.values())))
    if not bool(((tokens == 0) | (tokens == 1)).all()):
        raise ShapeError(
            f"loader: an attention_mask with values from {tokens.min():g} to {tokens.max():g}; "
            "expected 1 for tokens and 0 for padding"
        )
    return Mask(tokens.bool(), tuple(masks))


def _list_masks(batch: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the attention masks in a batch, such as "decoder_attention_mask", with their paths."""
    for key, part in (get_parts(batch) or {}).items():
        if not str(key).endswith("attention_mask"):
            yield from _list_masks(part, f"{path}{key}.")
        elif part is not None:
            yield f"{path}{key}", part


def compute_fingerprint(batch: Any) -> int:
    """Return a checksum of the values of a batch."""
    checksum = 0
    for _, leaf in _list_leaves(batch):
        checksum = zlib.crc32(_to_bytes(leaf), checksum)
    return checksum


def _to_bytes(leaf: Any) -> Any:
    """Return the value of a tensor or of another object as bytes; none if that can't be."""
    try:
        if not _is_array(leaf):
            return pickle.dumps(leaf)
        data = _to_tensor(leaf).detach().cpu().contiguous().flatten()
        return data.view(torch.uint8).numpy().data
    except Exception:  # whatever a user's class raises
        return b""


def _is_array(value: Any) -> bool:
    """Whether a value is a tensor, or a NumPy array of numbers."""
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    )


def _to_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else _arrays.convert(value, "loader")[0]


def _list_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield everything that has no parts, with its path."""
    parts = get_parts(value)
    if parts is None:
        yield path, value
        return
    for key, part in parts.items():
        yield from _list_leaves(part, f"{path}.{key}" if path else str(key))
