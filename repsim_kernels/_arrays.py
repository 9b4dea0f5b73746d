"""Which library, device and dtype an array is; conversion without copies; the same kind out as in.

Frameworks are recognised by the module that defines an array's type, so that nothing is imported
that the caller has not imported already.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from repsim_kernels.errors import DtypeError

Array = Any
"""A NumPy array, a torch tensor or a CuPy array."""


def kind(a: Any) -> str | None:
    """``"numpy"``, ``"torch"`` or ``"cupy"``; None for anything else."""
    for cls in type(a).__mro__:
        root = cls.__module__.partition(".")[0]
        if root in ("torch", "cupy") or (root == "numpy" and cls is np.ndarray):
            return root
    return None


def device(a: Array) -> str:
    """``"cpu"`` or ``"cuda:<index>"`` (torch's other devices by their own names)."""
    match kind(a):
        case "torch":
            return str(a.device)
        case "cupy":
            return f"cuda:{a.device.id}"
    return "cpu"


def asarray(a: Any, name: str) -> Array:
    """Give arrays back as they are (torch tensors detached), anything else as a NumPy array.

    NumPy's of foreign byte order come back in the machine's own, the only one that torch knows.
    """
    match kind(a):
        case "torch":
            if str(a.layout) != "torch.strided":
                raise DtypeError(f"{name}: got a tensor of layout {a.layout}; expected a dense one")
            return a.detach()
        case "cupy":
            return a
    if isinstance(a, np.ma.MaskedArray) and np.ma.is_masked(a):
        raise DtypeError(f"{name}: got a masked array with masked entries; expected a plain array")
    try:
        a = np.asarray(a)
    except (ValueError, TypeError) as error:
        raise DtypeError(f"{name}: not an array of numbers ({error})") from None
    return a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))


def to_numpy(a: Array) -> np.ndarray[Any, Any]:
    """The array's values as a NumPy array, without a copy where the memory allows it."""
    match kind(a):
        case "torch":
            a = a.cpu()
            return a.float().numpy() if str(a.dtype) == "torch.bfloat16" else a.numpy()
        case "cupy":
            return a.get()
    return np.asarray(a)


def to_torch(a: Array, where: str | None = None) -> Any:
    """The array as a torch tensor, without a copy where torch can take its strides."""
    import torch

    match kind(a):
        case "torch":
            t = a
        case "cupy":
            # The protocol makes torch's current stream wait for what CuPy's still has to do: CuPy
            # takes that of the current device, and copies to there.
            with a.device:
                flipped = any(stride < 0 for stride in a.strides)
                t = torch.utils.dlpack.from_dlpack(a.copy() if flipped else a)
        case _:
            if any(stride < 0 for stride in a.strides):
                a = a.copy()
            with warnings.catch_warnings():
                # Read-only arrays are welcome: no kernel writes into its inputs.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                t = torch.from_numpy(a)
    return t if where is None else t.to(where)


def like(result: Any, example: Array) -> Any:
    """A torch or NumPy result (or a dict of them) as the kind, and on the device, of `example`."""
    if isinstance(result, dict):
        return {key: like(value, example) for key, value in result.items()}
    if kind(result) is None and not isinstance(result, np.generic):
        return result
    match kind(example):
        case "torch":
            import torch

            return torch.as_tensor(result, device=example.device)
        case "cupy":
            import cupy  # type: ignore[import-not-found]

            with example.device:
                return cupy.from_dlpack(result) if kind(result) == "torch" else cupy.asarray(result)
    out = to_numpy(result)
    return out[()] if out.ndim == 0 else out
