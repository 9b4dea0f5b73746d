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

CONTAINERS = ("state_dict", "model", "model_state_dict")  # entries that may hold a state dict
# Added by DistributedDataParallel, torch.compile, and Lightning modules and similar wrappers.
PREFIXES = ("module.", "_orig_mod.", "model.")
_SCALAR = np.float64(0).__reduce__()[0]
# Types that training scripts store next to the weights. They only hold values: loading one runs no
# code from the file.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),  # Python 3.13
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),  # NumPy 1
]


class Checkpoint(NamedTuple):
    """A state dict, and a note that says where in the file it was."""

    state: Mapping[str, torch.Tensor]
    note: str


def read_checkpoint(path: str | Path, model: nn.Module) -> Checkpoint:
    """Read a state dict from a file and match its names to a model's; nothing is unpickled.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file, or one that ``torch.load(weights_only=True)`` accepts. It holds a
        state dict, or a training checkpoint with one as "state_dict", "model" or
        "model_state_dict".
    model : nn.Module
        A network of the checkpoint's architecture, with any number of outputs.

    Returns
    -------
    Checkpoint
        ``state``: the state dict. Prefixes that all its names share ("module.", "_orig_mod.",
        "model.", or several of these) are removed if more names match the model's without them.
        ``note``: the file, the entry and the prefix, for example "a.pt, read from 'model', prefix
        'module.' removed".

    Raises
    ------
    ModelError
        If the file is missing or can't be read, holds no state dict or several, or a tensor is
        sparse, quantised or without values.
    """
    content = _load(Path(path))
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"weights: {path} holds no state dict; expected names and tensors")
    state, note = content, str(path)
    entries = [entry for entry in CONTAINERS if _is_state(content.get(entry))]
    if len(entries) > 1:
        raise ModelError(
            f"weights: {path} holds several state dicts, {' and '.join(map(repr, entries))}; "
            "expected one"
        )
    if entries:
        state, note = content[entries[0]], f"{note}, read from {entries[0]!r}"
    for key, value in state.items():
        if not isinstance(key, str):
            raise ModelError(f"weights: {path} is not a state dict: key {key!r}; expected strings")
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"weights: {path} is not a state dict: {key!r} is {type(value).__name__}; expected "
                f"a tensor, or a state dict as {', '.join(map(repr, CONTAINERS))}"
            )
        if kind := _describe_unusual_kind(value):
            raise ModelError(f"weights: {key!r} of {path} is {kind}; expected a dense tensor")
    names = model.state_dict().keys()
    prefix = max(
        _list_shared_prefixes(state), key=lambda p: sum(p + name in state for name in names)
    )
    if prefix:
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        note = f"{note}, prefix {prefix!r} removed"
    return Checkpoint(state, note)


def _load(path: Path) -> Any:
    """Load the tensors and plain values in a file."""
    if not path.is_file():
        raise ModelError(f"weights: there is no file {path}; expected a state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"weights: {path} can't be read: {error}") from error
    except Exception as error:  # torch.load raises anything on foreign files
        raise ModelError(
            f"weights: {path} can't be read; expected tensors in .safetensors or torch.save's "
            "format (other pickles are refused)"
        ) from error


def _describe_unusual_kind(tensor: torch.Tensor) -> str:
    """Say what kind of tensor this is if it is not an ordinary dense one; otherwise ""."""
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    if tensor.is_nested:
        return "nested"
    return "" if tensor.layout == torch.strided else f"sparse ({tensor.layout})"


def _is_state(value: Any) -> bool:
    """Whether a value is a state dict: a non-empty mapping whose values are tensors."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(tensor, torch.Tensor) for tensor in value.values())
    )


def _list_shared_prefixes(state: Mapping[str, Any]) -> list[str]:
    """List concatenations of `PREFIXES` that all names begin with; the first is empty."""
    shared = [""]
    while longer := [
        shared[-1] + part
        for part in PREFIXES
        if all(name.startswith(shared[-1] + part) for name in state)
    ]:
        shared += longer
    return shared


def count_outputs(model: nn.Module, state: Mapping[str, torch.Tensor]) -> int:
    """Count the outputs in a checkpoint: the length of the parameter that the model defines last.

    The model has the checkpoint's architecture and any number of outputs. If the checkpoint lacks
    that parameter, the model's own number of outputs is returned.
    """
    last, default = [*model.named_parameters()][-1]
    return len(state[last]) if last in state and state[last].ndim else len(default)


def copy_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], name: str, path: str | Path
) -> None:
    """Copy a state dict into a model, in the model's dtypes.

    Error messages call the model `name` and the file `path`.

    Raises
    ------
    ModelError
        If a tensor is missing or unexpected, or has the wrong shape, or values that the model's
        dtype can't hold, for example complex ones. Batch norms' counters may be missing.
    """
    expected = model.state_dict()
    mismatch = f"weights: {path} does not match the architecture of {name!r}"
    state = _update_names(state, expected)
    for key, value in expected.items():
        if key.endswith("num_batches_tracked"):
            continue  # old checkpoints lack it, and inference ignores it
        if key not in state:
            raise ModelError(f"{mismatch}: {key!r} is missing; expected {tuple(value.shape)}")
        if state[key].shape != value.shape:
            raise ModelError(
                f"{mismatch}: {key!r} is {tuple(state[key].shape)}; expected {tuple(value.shape)}"
            )
        if not _can_hold(value.dtype, state[key]):
            raise ModelError(f"{mismatch}: {key!r} is {state[key].dtype}; expected {value.dtype}")
    if extra := [key for key in state if key not in expected]:
        raise ModelError(
            f"{mismatch}: {extra[0]!r} is unexpected; expected {len(expected)} tensors"
        )
    model.load_state_dict(state, strict=False)


def _update_names(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Rename the MLPs' layers as in torchvision's newer vision transformers.

    Its own weights, ViT-B/16's among them, still have the older names.
    """

    def update(key: str) -> str:
        newer = key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")
        return newer if newer in expected else key

    return {update(key): value for key, value in state.items()}


def _can_hold(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether a dtype can hold a tensor's values, up to precision and range."""
    if torch.can_cast(tensor.dtype, dtype):
        return True
    return not tensor.is_complex() and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
