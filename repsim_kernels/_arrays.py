"""Which library, device and dtype an array is; conversion without copies; the same kind out as in.

Frameworks are recognised by the module that defines an array's type, so that nothing is imported
that the caller has not imported already.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from repsim_kernels._options import one_line, shown
from repsim_kernels.errors import DtypeError

Array = Any
"""A NumPy array, a torch tensor or a CuPy array."""

REAL = "real numbers (float16, bfloat16, float32, float64, integers)"
_NUMBERS = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|bfloat16")


def kind(a: Any) -> str | None:
    """``"numpy"``, ``"torch"`` or ``"cupy"``; None for anything else."""
    for cls in type(a).__mro__:
        root, name = cls.__module__.partition(".")[0], cls.__name__
        # Modules of torch are no arrays, nor is a torch.Size.
        if root == "cupy" or (root, name) in (("torch", "Tensor"), ("numpy", "ndarray")):
            return root
    return None


def dtype_name(a: Array) -> str:
    """The name of an array's dtype: ``"bfloat16"`` for torch's as for NumPy's."""
    return str(a.dtype).removeprefix("torch.")


def device(a: Array) -> str:
    """``"cpu"`` or ``"cuda:<index>"`` (torch's other devices by their own names)."""
    match kind(a):
        case "torch":
            return str(a.device)
        case "cupy":
            return f"cuda:{a.device.id}"
    return "cpu"


def asarray(a: Any, name: str, expected: str = REAL) -> Array:
    """Return tensors, CuPy and NumPy arrays of real numbers; make NumPy arrays of the rest.

    Every argument that holds numbers comes through here. Nothing is copied but what torch could not
    take: foreign byte orders, ml_dtypes' bfloat16 (widened to float32), and torch's lazy negation.
    `expected` is what the message of an error asks for.

    Raises
    ------
    DtypeError
        For anything but an array of real numbers with all of its values. The message names the
        argument, what it is, and where there is one a way to convert it.
    """
    match kind(a):
        case "torch":
            a = _plain_tensor(a, name)
        case "cupy":
            pass
        case _:
            a = _as_numpy(a, name, expected)
    if not _NUMBERS.fullmatch(dtype_name(a)):
        raise DtypeError(f"{name}: dtype {dtype_name(a)}; expected {expected}")
    return a


def _plain_tensor(a: Any, name: str) -> Any:
    """Check that a tensor is dense, has values and takes part in no derivative."""
    check_dense(a, name)
    if a.is_quantized:
        what, expected = "a quantized tensor", f"real numbers: pass {name}.dequantize()"
    elif a.is_meta or type(a).__name__ == "FakeTensor":
        what = f"a {'meta tensor' if a.is_meta else 'FakeTensor'}, which holds no values"
        expected = "a tensor with values"
    elif type(a).__name__ == "MaskedTensor":
        what, expected = "a MaskedTensor", "a plain tensor, without masked entries"
    elif a.requires_grad or _has_tangent(a):
        # Detached silently, a loss made of the result would not train.
        what = "a tensor that requires grad"
        expected = f"one that doesn't, since gradients are not computed: pass {name}.detach()"
    else:
        check_untransformed(a, name)
        return a.detach().resolve_conj().resolve_neg()
    raise DtypeError(f"{name}: {what}; expected {expected}")


def check_dense(a: Any, name: str) -> None:
    """Check that a tensor is neither nested nor sparse, nor in another library's layout."""
    if a.is_nested:
        what, expected = "a nested tensor", f"one dense tensor, such as {name}[0]"
    elif str(a.layout) != "torch.strided":
        what, expected = f"a tensor of layout {a.layout}", f"a dense one: pass {name}.to_dense()"
    else:
        return
    raise DtypeError(f"{name}: {what}; expected {expected}")


def _has_tangent(a: Any) -> bool:
    """Whether forward-mode differentiation goes through a tensor."""
    from torch.autograd.forward_ad import unpack_dual

    return unpack_dual(a).tangent is not None


def check_untransformed(a: Any, name: str) -> None:
    """Check that no transform of torch.func, such as vmap, goes through a tensor."""
    from torch._C import _functorch

    if _functorch.is_functorch_wrapped_tensor(a):
        raise DtypeError(
            f"{name}: a tensor inside torch.func (vmap, grad, jvp), which shows no values; "
            "expected a plain tensor: write a loop in place of vmap"
        )


def _as_numpy(a: Any, name: str, expected: str) -> np.ndarray[Any, Any]:
    """Make a NumPy array of what is neither a tensor nor CuPy's, of any dtype but object."""
    if a is None or isinstance(a, (str, bytes)):
        raise DtypeError(f"{name}: {shown(a)}; expected an array of {expected}")
    if isinstance(a, Mapping):
        raise DtypeError(
            f"{name}: {type(a).__name__}; expected one array: pass one of its values, or "
            f"list({name}.values()) to pairwise"
        )
    if hasattr(type(a), "nnz"):  # of the type: a DataFrame may have a column of any name
        dense = "toarray" if hasattr(a, "toarray") else "todense"
        raise DtypeError(
            f"{name}: a sparse {type(a).__name__}; expected a dense array: pass {name}.{dense}()"
        )
    if isinstance(a, np.ma.MaskedArray) and np.ma.is_masked(a):
        raise DtypeError(f"{name}: a masked array with masked entries; expected a plain array")
    dtype = None
    if hasattr(type(a), "isna"):  # pandas, and what is derived from it
        dtype = _pandas_dtype(a, name, expected)
    listed = isinstance(a, (list, tuple))
    by_dlpack = not hasattr(a, "__array__") and hasattr(a, "__dlpack__")
    try:
        if listed:
            a = _without_arrays(a, name, expected)
        values = np.from_dlpack(a) if by_dlpack else np.asarray(a, dtype)
    except (DtypeError, MemoryError):
        raise
    except Exception as error:  # a class of the caller's may raise anything
        if listed and isinstance(error, ValueError):
            raise DtypeError(
                f"{name}: not an array of numbers: its items have different shapes; expected one "
                "array"
            ) from None
        if listed and isinstance(error, RecursionError):
            raise DtypeError(f"{name}: a list that contains itself; expected one array") from None
        line = one_line(str(error) or type(error).__name__, 200)
        raise DtypeError(f"{name}: not an array of numbers ({line}); expected {expected}") from None
    if values.dtype.kind == "O":
        raise _object_error(values, name, expected)
    if values.dtype.name == "bfloat16":  # of ml_dtypes, as JAX has it; torch takes none from NumPy
        values = values.astype(np.float32)
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def _without_arrays(a: Iterable[Any], name: str, expected: str) -> list[Any]:
    """The items of a list, with NumPy's in place of the arrays and tensors among them."""
    items: list[Any] = []
    for i, item in enumerate(a):
        where = f"{name}[{i}]"
        if isinstance(item, (list, tuple)):
            item = _without_arrays(item, where, expected)
        elif not isinstance(item, np.generic) and (
            hasattr(item, "__array__") or hasattr(item, "__dlpack__")
        ):
            item = asarray(item, where, expected)
            if device(item) != "cpu":
                raise DtypeError(
                    f"{name}: not an array of numbers ({where} is on {device(item)}); expected one "
                    "array: stack the items first"
                )
            item = to_numpy(item)
        items.append(item)
    return items


def _pandas_dtype(a: Any, name: str, expected: str) -> Any:
    """The NumPy dtype that holds a pandas object, or None where NumPy finds it on its own."""
    columns = list(a.dtypes.items()) if a.ndim == 2 else [(None, a.dtype)]
    found = [getattr(d, "numpy_dtype", getattr(d, "subtype", d)) for _, d in columns]
    if a.ndim == 2:
        for (column, dtype), plain in zip(columns, found, strict=True):
            if not isinstance(plain, np.dtype) or plain.kind not in "biuf":
                raise DtypeError(
                    f"{name}: column {column!r} has dtype {dtype}; expected {expected}"
                )
    nullable = any(hasattr(dtype, "numpy_dtype") for _, dtype in columns)
    missing = int(np.asarray(a.isna()).sum()) if nullable else 0
    if missing:
        raise DtypeError(
            f"{name}: missing values (NA), {missing} of {a.size}; expected none: fill or drop them"
        )
    # NumPy makes objects of columns of booleans and of numbers, and of nullable ones.
    return np.result_type(*found) if nullable or (a.ndim == 2 and found) else None


def _object_error(a: np.ndarray[Any, Any], name: str, expected: str) -> DtypeError:
    """Say what an array of objects holds that is no number."""
    if a.ndim == 0:
        return DtypeError(f"{name}: {type(a.item()).__name__}; expected an array of {expected}")
    numbers = (bool, int, float, np.number)
    odd = next(((i, v) for i, v in np.ndenumerate(a) if not isinstance(v, numbers)), None)
    wide = next((v for v in a.flat if isinstance(v, int) and not -(2**63) <= v < 2**64), None)
    if odd is None and wide is not None:
        return DtypeError(f"{name}: {shown(wide)} does not fit 64 bits; expected {expected}")
    if odd is None:
        return DtypeError(f"{name}: dtype object; expected {expected}: pass {name}.astype(float)")
    what = type(odd[1]).__name__
    if what == "NAType":
        what = "a missing value (pd.NA)"
    return DtypeError(f"{name}: dtype object, with {what} at index {odd[0]}; expected {expected}")


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
