"""Arrays enter as torch tensors, and results leave as the kind of array that was passed.

`convert` is the one way in: checks and kernels see activations as tensors only.
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

from repsim_kernels._options import one_line, shown
from repsim_kernels.errors import DtypeError

Array = Any
"""A NumPy array, a torch tensor or a CuPy array."""

REAL = "real numbers (float16, bfloat16, float32, float64, integers)"
_NUMBERS = {"bool", "float16", "bfloat16", "float32", "float64"}
_NUMBERS |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def kind(a: Any) -> str | None:
    """Return ``"numpy"``, ``"torch"`` or ``"cupy"``; None for anything else."""
    if isinstance(a, Tensor):
        return "torch"
    if isinstance(a, np.ndarray):
        return "numpy"
    # CuPy is recognised by name, so that it is imported only by callers who use it.
    cupy = any(cls.__module__.partition(".")[0] == "cupy" for cls in type(a).__mro__)
    return "cupy" if cupy else None


def dtype_name(a: Array) -> str:
    """The name of an array's dtype: ``"bfloat16"`` for torch's as for NumPy's."""
    return str(a.dtype).removeprefix("torch.")


class Source(NamedTuple):
    """Where an argument came from, which is where the results go."""

    kind: str  # "numpy" (also for lists, data frames and all other arrays), "torch" or "cupy"
    device: str  # "cpu" or "cuda:<index>", torch's other devices by their own names

    def restore(self, result: Any) -> Any:
        """Convert tensors and NumPy arrays, also in a dict or a named tuple, to how they came.

        For NumPy, results without dimensions become scalars. Whatever is no array is left alone.
        """
        if isinstance(result, dict):
            return {key: self.restore(value) for key, value in result.items()}
        if isinstance(result, tuple):
            return rebuild(result, map(self.restore, result))
        if not isinstance(result, (Tensor, np.ndarray, np.generic)):
            return result
        if self.kind == "torch":
            return torch.as_tensor(result, device=self.device)
        if self.kind == "cupy":
            import cupy  # type: ignore[import-not-found]

            with cupy.cuda.Device(int(self.device.removeprefix("cuda:"))):
                tensor = isinstance(result, Tensor)
                return cupy.from_dlpack(result) if tensor else cupy.asarray(result)
        return to_numpy(result)[()]


def convert(a: Any, name: str, expected: str = REAL) -> tuple[Tensor, Source]:
    """Convert an argument that holds real numbers to a tensor on its device.

    Every such argument comes through here. Nothing is copied but what torch can't take as it is:
    negative strides, foreign byte orders, bfloat16 of ml_dtypes (widened to float32), and torch's
    lazy negation. `expected` is what the message of an error asks for.

    Raises
    ------
    DtypeError
        For anything but an array of real numbers with all of its values. The message names the
        argument, what it is, and where there is one a way to convert it.
    """
    match kind(a):
        case "torch":
            a, source = _plain_tensor(a, name), Source("torch", str(a.device))
        case "cupy":
            source = Source("cupy", f"cuda:{a.device.id}")
        case _:
            a, source = _as_numpy(a, name, expected), Source("numpy", "cpu")
    if dtype_name(a) not in _NUMBERS:
        raise DtypeError(f"{name}: dtype {dtype_name(a)}; expected {expected}")
    return a if source.kind == "torch" else _share(a), source


def _share(a: Array) -> Tensor:
    """Return a NumPy or CuPy array as a tensor on its memory, or on a copy if torch refuses it."""
    strange = any(stride < 0 or stride % a.dtype.itemsize for stride in a.strides)
    if not isinstance(a, np.ndarray):
        # The protocol makes torch's current stream wait for what CuPy's still has to do: CuPy
        # takes that of the current device, and copies to there.
        with a.device:
            return from_dlpack(a.copy() if strange else a)
    if strange:
        a = a.copy()
    if a.flags.writeable:
        return torch.from_numpy(a)
    with warnings.catch_warnings():
        # Read-only arrays are welcome: no kernel writes into its inputs.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(a)


def to_tensor(a: Any, device: Any) -> Tensor:
    """Return a NumPy array or a tensor as a tensor on a device, without a copy if it is there."""
    return torch.as_tensor(a, device=device)


def rebuild(example: Any, items: Iterable[Any]) -> Any:
    """Make a list, a tuple or a named tuple like another of other items."""
    return example._make(items) if hasattr(example, "_fields") else type(example)(items)


def to_numpy(value: Any) -> Any:
    """Return tensors and CuPy arrays, also those in lists and tuples, as NumPy arrays.

    Without a copy where the memory allows it; bfloat16 becomes float32, and what is no array is
    returned as it is.
    """
    if isinstance(value, Tensor):
        value = value.cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, (list, tuple)):
        return rebuild(value, map(to_numpy, value))
    return value.get() if kind(value) == "cupy" else value


def _plain_tensor(a: Tensor, name: str) -> Tensor:
    """Check that a tensor is dense, has values and takes part in no derivative."""
    check_dense(a, name)
    if a.is_quantized:
        what, expected = "a quantized tensor", f"real numbers: pass {name}.dequantize()"
    elif a.is_meta or type(a).__name__ == "FakeTensor":
        what = f"a {'meta tensor' if a.is_meta else 'FakeTensor'}, which holds no values"
        expected = "a tensor with values"
    elif type(a).__name__ == "MaskedTensor":
        what, expected = "a MaskedTensor", "a plain tensor, without masked entries"
    elif a.requires_grad or unpack_dual(a).tangent is not None:  # in reverse or forward mode
        # Detached silently, a loss made of the result would not train.
        what = "a tensor that requires grad"
        expected = f"one that doesn't, since gradients are not computed: pass {name}.detach()"
    else:
        check_untransformed(a, name)
        return a.detach().resolve_neg()
    raise DtypeError(f"{name}: {what}; expected {expected}")


def check_dense(a: Tensor, name: str) -> None:
    """Check that a tensor is neither nested nor sparse, nor in another library's layout."""
    if a.is_nested:
        what, expected = "a nested tensor", f"one dense tensor, such as {name}[0]"
    elif a.layout != torch.strided:
        what, expected = f"a tensor of layout {a.layout}", f"a dense one: pass {name}.to_dense()"
    else:
        return
    raise DtypeError(f"{name}: {what}; expected {expected}")


def check_untransformed(a: Tensor, name: str) -> None:
    """Check that no transform of torch.func, such as vmap, goes through a tensor."""
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
            tensor, source = convert(item, where, expected)
            if source.device != "cpu":
                raise DtypeError(
                    f"{name}: not an array of numbers ({where} is on {source.device}); expected "
                    "one array: stack the items first"
                )
            item = to_numpy(tensor)
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
