"""Conversion of arguments to torch tensors, and of results to the caller's kind of array.

Every array argument passes through `convert`, so that checks and kernels see only tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd.forward_ad import unpack_dual
from torch.utils.dlpack import from_dlpack

from repsim_kernels._options import short_repr, to_one_line
from repsim_kernels._routes import Distances
from repsim_kernels._typing import Array
from repsim_kernels.errors import DtypeError

REAL_NUMBERS = "real numbers (float16, bfloat16, float32, float64, integers)"
_DTYPES = {"bool", "float16", "bfloat16", "float32", "float64"}
_DTYPES |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def detect_library(a: Any) -> str | None:
    """Return ``"numpy"``, ``"torch"`` or ``"cupy"``; None for other objects."""
    if isinstance(a, Tensor):
        return "torch"
    if isinstance(a, np.ndarray):
        return "numpy"
    # CuPy is recognised by name, so that only callers who use it import it.
    is_cupy = any(cls.__module__.partition(".")[0] == "cupy" for cls in type(a).__mro__)
    return "cupy" if is_cupy else None


def dtype_name(a: Array) -> str:
    """Return the name of an array's dtype, such as ``"bfloat16"``, the same for all libraries."""
    return str(a.dtype).removeprefix("torch.")


def count_dimensions(a: Any) -> int:
    """Return the number of dimensions of an array or of nested lists; 0 for other objects."""
    if isinstance(a, (list, tuple)):
        return 1 + count_dimensions(a[0]) if a else 1
    dimensions = getattr(a, "ndim", 0)
    return dimensions if isinstance(dimensions, int) else 0


class Source(NamedTuple):
    """The library and device of an argument, to which the results are converted."""

    library: str  # "torch", "cupy", or "numpy" for NumPy arrays, lists, data frames and all others
    device: str  # "cpu", "cuda:<index>", or torch's name of any other device

    def restore(self, result: Any) -> Any:
        """Convert the arrays of a result, also inside dicts and tuples, to this source.

        For NumPy, arrays without dimensions become scalars. Other objects are returned unchanged.
        """
        if isinstance(result, dict):
            return {key: self.restore(value) for key, value in result.items()}
        if isinstance(result, Distances):  # how they were computed is reported in NumPy arrays
            return result._replace(values=self.restore(result.values))
        if isinstance(result, tuple):
            return rebuild_sequence(result, map(self.restore, result))
        if not isinstance(result, (Tensor, np.ndarray, np.generic)):
            return result
        if self.library == "torch":
            return torch.as_tensor(result, device=self.device)
        if self.library == "cupy":
            import cupy  # type: ignore[import-not-found]

            with cupy.cuda.Device(int(self.device.removeprefix("cuda:"))):
                if isinstance(result, Tensor):
                    return cupy.from_dlpack(result)
                return cupy.asarray(result)
        return to_numpy(result)[()]


def convert(
    a: Any, name: str, expected: str = REAL_NUMBERS, *, accept_grad: bool = False
) -> tuple[Tensor, Source]:
    """Convert an array of real numbers to a tensor on the same device.

    Memory is shared unless torch can't represent it: negative strides, foreign byte orders, the
    bfloat16 of ml_dtypes (widened to float32) and torch's lazy negation are copied.

    Parameters
    ----------
    a : array-like
    name : str
        Name of the argument in errors.
    expected : str
        What errors say is expected.
    accept_grad : bool
        Whether `a` may be a tensor that requires grad. The result is detached from it.

    Raises
    ------
    DtypeError
        If `a` is not an array of real numbers, or some of its values are missing or masked. The
        message suggests a conversion if there is one.
    """
    match detect_library(a):
        case "torch":
            a, source = _check_tensor(a, name, accept_grad), Source("torch", str(a.device))
        case "cupy":
            source = Source("cupy", f"cuda:{a.device.id}")
        case _:
            a, source = _as_numpy(a, name, expected), Source("numpy", "cpu")
    if dtype_name(a) not in _DTYPES:
        raise DtypeError(f"{name}: dtype {dtype_name(a)}; expected {expected}")
    return a if source.library == "torch" else _as_tensor(a), source


def _as_tensor(a: Array) -> Tensor:
    """Return a NumPy or CuPy array as a tensor that shares its memory, or a copy if it can't."""
    needs_copy = any(stride < 0 or stride % a.dtype.itemsize for stride in a.strides)
    if not isinstance(a, np.ndarray):
        # CuPy copies to the current device, and DLPack synchronises torch's stream with the stream
        # of that device: both must be the array's own device.
        with a.device:
            return from_dlpack(a.copy() if needs_copy else a)
    if needs_copy:
        a = a.copy()
    if a.flags.writeable:
        return torch.from_numpy(a)
    with warnings.catch_warnings():
        # Safe for read-only arrays: no kernel writes to its inputs.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(a)


def to_tensor(a: Any, device: Any) -> Tensor:
    """Return a NumPy array or a tensor as a tensor on a device, copied only if necessary."""
    return torch.as_tensor(a, device=device)


def rebuild_sequence(example: Any, items: Iterable[Any]) -> Any:
    """Return the items as a list, tuple or named tuple of the example's type."""
    return example._make(items) if hasattr(example, "_fields") else type(example)(items)


def to_numpy(value: Any) -> Any:
    """Convert tensors and CuPy arrays, also inside lists and tuples, to NumPy arrays.

    Memory is shared where possible; bfloat16 becomes float32. Other objects are returned unchanged.
    """
    if isinstance(value, Tensor):
        value = value.cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, (list, tuple)):
        return rebuild_sequence(value, map(to_numpy, value))
    return value.get() if detect_library(value) == "cupy" else value


def _check_tensor(a: Tensor, name: str, accept_grad: bool) -> Tensor:
    """Check that a tensor is dense and holds values, and that its derivatives are computed."""
    check_dense(a, name)
    if a.is_quantized:
        what, expected = "a quantized tensor", f"real numbers: pass {name}.dequantize()"
    elif a.is_meta or type(a).__name__ == "FakeTensor":
        what = f"a {'meta tensor' if a.is_meta else 'FakeTensor'}, which holds no values"
        expected = "a tensor with values"
    elif type(a).__name__ == "MaskedTensor":
        what, expected = "a MaskedTensor", "a plain tensor, without masked entries"
    elif unpack_dual(a).tangent is not None:
        what = "a tensor with a tangent, of forward-mode differentiation"
        expected = f"one without, since tangents are not computed: pass {name}.detach()"
    elif a.requires_grad and not accept_grad:
        # If it were detached silently, a loss computed from the result would train nothing.
        what = "a tensor that requires grad"
        expected = (
            f"one that doesn't: pass {name}.detach(), or whole tensors to cka, procrustes or rsa, "
            "the only functions that compute gradients"
        )
    else:
        check_untransformed(a, name)
        return a.detach().resolve_neg()
    raise DtypeError(f"{name}: {what}; expected {expected}")


def check_dense(a: Tensor, name: str) -> None:
    """Check that a tensor is dense: not nested, sparse or in oneDNN's layout."""
    if a.is_nested:
        what, expected = "a nested tensor", f"one dense tensor, such as {name}[0]"
    elif a.layout != torch.strided:
        what, expected = f"a tensor of layout {a.layout}", f"a dense one: pass {name}.to_dense()"
    else:
        return
    raise DtypeError(f"{name}: {what}; expected {expected}")


def check_untransformed(a: Tensor, name: str) -> None:
    """Check that a tensor is not inside a transform of torch.func, such as vmap."""
    if _functorch.is_functorch_wrapped_tensor(a):
        raise DtypeError(
            f"{name}: a tensor inside torch.func (vmap, grad, jvp), where values are not "
            "accessible; expected a plain tensor: use a loop instead of vmap"
        )


def _as_numpy(a: Any, name: str, expected: str) -> np.ndarray[Any, Any]:
    """Convert anything but a tensor or CuPy array to a NumPy array; its dtype is never object."""
    if a is None or isinstance(a, (str, bytes)):
        raise DtypeError(f"{name}: {short_repr(a)}; expected an array of {expected}")
    if isinstance(a, Mapping):
        raise DtypeError(
            f"{name}: {type(a).__name__}; expected one array: pass one of its values, or "
            f"list({name}.values()) to pairwise"
        )
    # SciPy's sparse arrays. Checked on the type, since a DataFrame may have a column "nnz".
    if hasattr(type(a), "nnz"):
        dense = "toarray" if hasattr(a, "toarray") else "todense"
        raise DtypeError(
            f"{name}: a sparse {type(a).__name__}; expected a dense array: pass {name}.{dense}()"
        )
    if isinstance(a, np.ma.MaskedArray) and np.ma.is_masked(a):
        raise DtypeError(f"{name}: a masked array with masked entries; expected a plain array")
    dtype = None
    if hasattr(type(a), "isna"):  # pandas, and classes derived from it
        dtype = _pandas_dtype(a, name, expected)
    is_list = isinstance(a, (list, tuple))
    only_dlpack = not hasattr(a, "__array__") and hasattr(a, "__dlpack__")
    try:
        if is_list:
            a = _convert_items(a, name, expected)
        values = np.from_dlpack(a) if only_dlpack else np.asarray(a, dtype)
    except (DtypeError, MemoryError):
        raise
    except Exception as error:  # a user's class may raise anything
        if is_list and isinstance(error, ValueError):
            raise DtypeError(
                f"{name}: not an array of numbers: its items have different shapes; expected one "
                "array"
            ) from None
        if is_list and isinstance(error, RecursionError):
            raise DtypeError(f"{name}: a list that contains itself; expected one array") from None
        line = to_one_line(str(error) or type(error).__name__, 200)
        raise DtypeError(f"{name}: not an array of numbers ({line}); expected {expected}") from None
    if values.dtype.kind == "O":
        raise _object_error(values, name, expected)
    # The bfloat16 of ml_dtypes, which JAX uses; torch can't read it from NumPy.
    if values.dtype.name == "bfloat16":
        values = values.astype(np.float32)
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def _convert_items(a: Iterable[Any], name: str, expected: str) -> list[Any]:
    """Return the items of a nested list, with arrays and tensors converted to NumPy arrays."""
    items: list[Any] = []
    for i, item in enumerate(a):
        item_name = f"{name}[{i}]"
        if isinstance(item, (list, tuple)):
            item = _convert_items(item, item_name, expected)
        elif not isinstance(item, np.generic) and (
            hasattr(item, "__array__") or hasattr(item, "__dlpack__")
        ):
            tensor, source = convert(item, item_name, expected)
            if source.device != "cpu":
                raise DtypeError(
                    f"{name}: not an array of numbers ({item_name} is on {source.device}); "
                    "expected one array: stack the items first"
                )
            item = to_numpy(tensor)
        items.append(item)
    return items


def _pandas_dtype(a: Any, name: str, expected: str) -> Any:
    """Return the NumPy dtype for a pandas object, or None if NumPy's default is right."""
    columns = list(a.dtypes.items()) if a.ndim == 2 else [(None, a.dtype)]
    numpy_dtypes = [getattr(d, "numpy_dtype", getattr(d, "subtype", d)) for _, d in columns]
    if a.ndim == 2:
        for (column, dtype), numpy_dtype in zip(columns, numpy_dtypes, strict=True):
            if not isinstance(numpy_dtype, np.dtype) or numpy_dtype.kind not in "biuf":
                raise DtypeError(
                    f"{name}: column {column!r} has dtype {dtype}; expected {expected}"
                )
    nullable = any(hasattr(dtype, "numpy_dtype") for _, dtype in columns)
    missing = int(np.asarray(a.isna()).sum()) if nullable else 0
    if missing:
        raise DtypeError(
            f"{name}: missing values (NA), {missing} of {a.size}; expected none: fill or drop them"
        )
    # NumPy would return objects for nullable columns, and for booleans next to numbers.
    return np.result_type(*numpy_dtypes) if nullable or (a.ndim == 2 and columns) else None


def _object_error(a: np.ndarray[Any, Any], name: str, expected: str) -> DtypeError:
    """Return the error for an array of objects, naming the first item that is not a number."""
    if a.ndim == 0:
        return DtypeError(f"{name}: {type(a.item()).__name__}; expected an array of {expected}")
    numbers = (bool, int, float, np.number)
    other = next(((i, v) for i, v in np.ndenumerate(a) if not isinstance(v, numbers)), None)
    if other is not None:
        what = type(other[1]).__name__
        if what == "NAType":
            what = "a missing value (pd.NA)"
        return DtypeError(
            f"{name}: dtype object, with {what} at index {other[0]}; expected {expected}"
        )
    too_large = next((v for v in a.flat if isinstance(v, int) and not -(2**63) <= v < 2**64), None)
    if too_large is not None:
        return DtypeError(
            f"{name}: {short_repr(too_large)} does not fit 64 bits; expected {expected}"
        )
    return DtypeError(f"{name}: dtype object; expected {expected}: pass {name}.astype(float)")
