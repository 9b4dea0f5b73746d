"""State dicts: read from a checkpoint file, and copied into a network."""

import argparse
from collections.abc import Mapping
from pathlib import Path, PosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from repsim_kernels.experiments.errors import ModelError

CONTAINERS = ("state_dict", "model", "model_state_dict")  # entries that hold a state dict
# Of DistributedDataParallel, torch.compile, and Lightning modules or wrappers alike.
PREFIXES = ("module.", "_orig_mod.", "model.")
_SCALAR = np.float64(0).__reduce__()[0]
# What training scripts store with the weights. These types only hold values; loading one runs
# no code of the file's.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),  # of Python 3.13
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),  # of NumPy 1
]


class Checkpoint(NamedTuple):
    """A state dict, and how it was found in its file."""

    state: Mapping[str, torch.Tensor]
    note: str


def read_checkpoint(path: str | Path, model: nn.Module) -> Checkpoint:
    """A state dict from a file, under the model's names; nothing is unpickled.

    Parameters
    ----------
    path : path
        ``.safetensors``, or what ``torch.load(weights_only=True)`` accepts. A state dict, or a
        training checkpoint that holds one as "state_dict", "model" or "model_state_dict".
    model : nn.Module
        Of the checkpoint's architecture, with any number of outputs.

    Returns
    -------
    Checkpoint
        ``state``: without prefixes that all its names have ("module.", "_orig_mod.", "model.",
        or several of them) where that makes more of them the model's. ``note``: the file, then
        the entry and the prefix, for example "a.pt, read from 'model', prefix 'module.' removed".

    Raises
    ------
    ModelError
        If there is no such file, it can't be read, it holds no state dict or several, or a tensor
        is sparse, quantised or without values.
    """
    held = _load(Path(path))
    if not isinstance(held, Mapping) or not held:
        raise ModelError(f"weights: {path} holds no state dict; expected names and tensors")
    state, note = held, str(path)
    inside = [entry for entry in CONTAINERS if _is_state(held.get(entry))]
    if len(inside) > 1:
        raise ModelError(
            f"weights: {path} holds several state dicts, {' and '.join(map(repr, inside))}; "
            "expected one"
        )
    if inside:
        state, note = held[inside[0]], f"{note}, read from {inside[0]!r}"
    for key, value in state.items():
        if not isinstance(key, str):
            raise ModelError(f"weights: {path} is no state dict: {key!r} is no name")
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"weights: {path} is no state dict: {key!r} is {type(value).__name__}; expected "
                f"a tensor, or a state dict as {', '.join(map(repr, CONTAINERS))}"
            )
        if kind := _unusual_kind(value):
            raise ModelError(f"weights: {key!r} of {path} is {kind}; expected a dense tensor")
    own = model.state_dict().keys()
    prefix = max(_shared_prefixes(state), key=lambda p: sum(p + name in state for name in own))
    if prefix:
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        note = f"{note}, prefix {prefix!r} removed"
    return Checkpoint(state, note)


def _load(path: Path) -> Any:
    """What a file holds, of tensors and plain values."""
    if not path.is_file():
        raise ModelError(f"weights: there is no file {path}; expected a state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"weights: {path} can't be read: {error}") from error
    except Exception as error:  # whatever torch.load meets in a file that isn't its own
        raise ModelError(
            f"weights: {path} can't be read; expected tensors in .safetensors or torch.save's "
            "format (a pickle of anything else is refused)"
        ) from error


def _unusual_kind(tensor: torch.Tensor) -> str:
    """Say what a tensor is where it isn't dense with values of its own; "" where it is."""
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    if tensor.is_nested:
        return "nested"
    return "" if tensor.layout == torch.strided else f"sparse ({tensor.layout})"


def _is_state(held: Any) -> bool:
    return (
        isinstance(held, Mapping)
        and len(held) > 0
        and all(isinstance(value, torch.Tensor) for value in held.values())
    )


def _shared_prefixes(state: Mapping[str, Any]) -> list[str]:
    """Strings of `PREFIXES` that all names begin with, the empty one first."""
    shared = [""]
    while longer := [
        shared[-1] + part
        for part in PREFIXES
        if all(name.startswith(shared[-1] + part) for name in state)
    ]:
        shared += longer
    return shared


def count_outputs(model: nn.Module, state: Mapping[str, torch.Tensor]) -> int:
    """Number of outputs in a checkpoint: the length of the parameter that a model defines last.

    The model is of the checkpoint's architecture, with any number of outputs: its own number counts
    where the checkpoint lacks that parameter.
    """
    last, default = [*model.named_parameters()][-1]
    return len(state[last]) if last in state and state[last].ndim else len(default)


def copy_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], name: str, path: str | Path
) -> None:
    """Copy a state dict into a model, in the model's dtypes; errors call them `name` and `path`.

    Raises
    ------
    ModelError
        If a tensor is missing, unexpected, of another shape, or has values that the model's dtype
        can't hold, such as complex ones; counters of batches may be missing.
    """
    want = model.state_dict()
    wrong = f"weights: {path} is of another architecture than {name!r}"
    for key, value in want.items():
        if key.endswith("num_batches_tracked"):
            continue  # old checkpoints lack it and inference has no use for it
        if key not in state:
            raise ModelError(f"{wrong}: {key!r} is missing; expected {tuple(value.shape)}")
        if state[key].shape != value.shape:
            raise ModelError(
                f"{wrong}: {key!r} is {tuple(state[key].shape)}; expected {tuple(value.shape)}"
            )
        if not _can_hold(value.dtype, state[key]):
            raise ModelError(f"{wrong}: {key!r} is {state[key].dtype}; expected {value.dtype}")
    if extra := [key for key in state if key not in want]:
        raise ModelError(f"{wrong}: {extra[0]!r} is unexpected; expected {len(want)} tensors")
    model.load_state_dict(state, strict=False)


def _can_hold(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether a dtype has the values of a tensor, but for their precision and range."""
    if torch.can_cast(tensor.dtype, dtype):
        return True
    return not tensor.is_complex() and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
