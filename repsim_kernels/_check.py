"""Checks of the arrays that public functions take.

They return tensors on the arguments' device (NumPy arrays for integers), or raise an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels import _arrays, _options
from repsim_kernels._arrays import Source
from repsim_kernels._typing import Array
from repsim_kernels.errors import (
    ConstantError,
    DeviceError,
    DtypeError,
    LabelError,
    NonFiniteError,
    RepsimError,
    ShapeError,
)

Check = Callable[..., tuple[Tensor, Source]]
"""`check_representation`, or a function like it for other arrays with a row for each stimulus."""

MAX_MAGNITUDE = 1e70  # squares of Gram matrices fit float64


def to_float(a: Tensor) -> Tensor:
    """Return floating-point tensors unchanged, integers and booleans as float64."""
    return a if a.is_floating_point() else a.double()


def at_least_float32(a: Tensor) -> Tensor:
    """Return float32 and float64 tensors unchanged, all others as float64."""
    return a if a.dtype in (torch.float32, torch.float64) else a.double()


def check_finite(a: Tensor, name: str, limit: float = MAX_MAGNITUDE) -> None:
    """Check that all values are finite, the largest magnitude being 0 or 1 / limit … limit."""
    dense = _dense(a)
    # Every finite number of a dtype below float64 is within the limit, and a number that is not
    # finite makes the sum not finite.
    if a.dtype != torch.float64 and math.isfinite(float(dense.sum())):
        return
    low, high = map(float, dense.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = ~a.isfinite()
        first = np.unravel_index(int(bad.flatten().byte().argmax()), a.shape)
        raise NonFiniteError(
            f"{name}: {int(bad.sum())} of {a.numel()} values are NaN or infinite (the first at "
            f"index {tuple(map(int, first))}); expected finite numbers"
        )
    largest = max(-low, high)
    if largest > limit or 0 < largest < 1 / limit:
        raise NonFiniteError(
            f"{name}: the largest magnitude is {largest:.3g}; expected between {1 / limit:g} and "
            f"{limit:g}, so that squares of Gram matrices fit float64 (rescale it)"
        )


def has_constant(x: Tensor) -> bool:
    """Whether any matrix of x (…, n, p) has equal rows; usually reads only a corner of it."""
    n, p = x.shape[-2:]
    varies: Any = False
    start, rows, width = 0, min(n, 16), 16
    while start < p:
        block = x[..., :rows, start : start + width]
        varies = varies | (block != block[..., :1, :]).any((-2, -1))
        if bool(varies.all()):
            return False
        if rows < n:
            rows = n
        else:
            start, width = start + width, width * 4
    return True


def check_representation(
    x: Any,
    name: str = "x",
    *,
    min_stimuli: int = 2,
    needed_for: str = "",
    allow_constant: bool = False,
    allow_batch: bool = True,
    batched: Any = False,
    defer: bool = False,
    allow_undefined: bool = False,
    accept_grad: bool = False,
) -> tuple[Tensor, Source]:
    """Check one representation (n, p): real, finite, not constant, with at least one neuron.

    `needed_for` says what needs `min_stimuli`, for the error.

    Unless `batched` is set, more than two dimensions are an error: nearly always they are
    activations (n, c, h, w) or (n, t, d) that were not flattened. If `allow_batch`, the error also
    suggests `batched`.

    `defer` skips the scans for constant representations and, in dtypes below float64, for values
    that are not finite. The operation's result must be NaN in either case, and must be passed to
    `raise_if_nan`. `allow_undefined` skips both in all dtypes: the result is NaN then.

    `accept_grad` accepts a tensor that requires grad, and returns it detached.
    """
    batched = _options.check_flag(batched, "batched")
    x, source = _arrays.convert(x, name, accept_grad=accept_grad)
    if x.ndim < 2 or (x.ndim > 2 and not batched):
        expected = "(…, n, p)" if batched else "(n, p)"
        hint = ""
        if x.ndim > 2:
            hint = f"; pass {name}.flatten(1) (in NumPy {name}.reshape(len({name}), -1))"
            hint += ", or batched=True for a batch of (n, p)" if allow_batch else ""
        raise ShapeError(
            f"{name}: shape {tuple(x.shape)}; expected {expected}: stimuli x neurons{hint}"
        )
    n, p = x.shape[-2:]
    if n < min_stimuli:
        raise ShapeError(
            f"{name}: {n} stimuli in shape {tuple(x.shape)}; expected at least {min_stimuli}"
            f"{needed_for}"
        )
    if p < 1:
        raise ShapeError(f"{name}: no neurons in shape {tuple(x.shape)}; expected at least 1")
    if 0 in x.shape:
        raise ShapeError(f"{name}: an empty batch, shape {tuple(x.shape)}; expected at least 1")
    x = to_float(x)
    varying = not allow_constant and not allow_undefined and not defer
    if varying and _passes_quick_check(x):
        return x, source
    # Finite float64 numbers may still exceed the limit, which no NaN in the result would show.
    if not allow_undefined and (not defer or x.dtype == torch.float64):
        check_finite(x, name)
    if varying:
        _check_varying(x, name)
    return x, source


def _passes_quick_check(x: Tensor) -> bool:
    """Return whether the sum of x is finite and its first 16 x 16 values differ between stimuli.

    Copies to the host once. `check_finite` and `has_constant` begin in the same way, below float64.
    """
    if x.dtype == torch.float64:
        return False
    corner = x[..., :16, :16]
    varies = (corner != corner[..., :1, :]).any((-2, -1))
    varies = varies.all() if x.ndim > 2 else varies
    total, seen = torch.stack([_dense(x).sum(), varies]).tolist()
    return math.isfinite(total) and seen > 0


def _dense(a: Tensor) -> Tensor:
    """Return a view for reductions of all elements, which are fastest over dense memory."""
    return a.mT if a.ndim > 1 and not a.is_contiguous() else a


def _check_varying(x: Tensor, name: str) -> None:
    """Check that the stimuli of a representation are not all the same."""
    if has_constant(x):
        check_finite(x, name)
        raise ConstantError(
            f"{name}: the representation is the same for every stimulus; expected at least two "
            "different rows, since a zero Gram matrix has no similarity"
        )


def check_same_source(a: Source, b: Source, name_a: str, name_b: str) -> None:
    """Check that two arguments came from one library and one device."""
    if a != b:
        raise DeviceError(
            f"{name_b}: a {b.library} array on {b.device}, but {name_a} is a {a.library} array on "
            f"{a.device}; expected both from one library on one device"
        )


def require_neighbours(metric: str, k: int) -> dict[str, Any]:
    """Return the options of `check_representation` for a metric of k nearest neighbours."""
    reason = f" for the k={k} nearest neighbours of {metric!r}"
    return {"min_stimuli": k + 1, "needed_for": reason}


def check_pair(
    x: Any, y: Any, *, check: Check = check_representation, **options: Any
) -> tuple[Tensor, Tensor, Source]:
    """Check two representations of the same stimuli, each with `check` and its options."""
    x, source = check(x, "x", **options)
    y, y_source = check(y, "y", **options)
    check_same_source(source, y_source, "x", "y")
    _check_same_stimuli(x, y, "x", "y")
    try:
        if x.ndim > 2 or y.ndim > 2:
            np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except ValueError:
        raise ShapeError(
            f"y: batch dimensions {tuple(y.shape[:-2])}, but x has {tuple(x.shape[:-2])}; expected "
            "shapes that broadcast"
        ) from None
    return x, y, source


def _check_same_stimuli(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    """Check that two representations have equally many stimuli."""
    if a.shape[-2] != b.shape[-2]:
        raise ShapeError(
            f"{name_b}: {b.shape[-2]} stimuli, but {name_a} has {a.shape[-2]}; expected the same "
            "stimuli in the same order"
        )


def check_representations(
    xs: Any,
    name: str,
    *,
    like: tuple[Tensor, Source] | None = None,
    like_name: str = "xs[0]",
    allow_one: bool = False,
    check: Check = check_representation,
    **options: Any,
) -> tuple[list[Tensor], Source]:
    """Check a sequence of representations of the same stimuli, each with `check` and its options.

    When `ys` are checked, `like` is ``xs[0]``, whose stimuli and source they must share. With
    `allow_one`, xs may also be one representation.
    """
    kind = type(xs).__name__
    if allow_one:
        expected = "expected an array (n, p), or a list of arrays (n, p_i)"
    else:
        expected = "expected a list of arrays (n, p_i), or several as one array (r, n, p)"
    if isinstance(xs, Mapping):
        raise ShapeError(f"{name}: {kind}; {expected}: pass list({name}.values())")
    if isinstance(xs, str):
        raise ShapeError(f"{name}: {_options.short_repr(xs)}; {expected}")
    if allow_one and _arrays.count_dimensions(xs) == 2:
        items, names = [xs], [name]
    elif getattr(xs, "ndim", 3) == 2:
        raise ShapeError(f"{name}: an array of shape {tuple(xs.shape)}; {expected}")
    else:
        try:
            items = list(xs)
        # RuntimeError for tensors without rows; a user's class may raise anything.
        except Exception:
            raise ShapeError(f"{name}: {kind}; {expected}") from None
        names = [f"{name}[{i}]" for i in range(len(items))]
    if not items:
        raise ShapeError(f"{name}: an empty list; expected at least one array (n, p)")
    options |= {"allow_batch": False}
    checked = [check(x, label, **options) for x, label in zip(items, names, strict=True)]
    (first, source), first_name = (checked[0], names[0]) if like is None else (like, like_name)
    for (x, x_source), label in zip(checked, names, strict=True):
        check_same_source(source, x_source, first_name, label)
        _check_same_stimuli(first, x, first_name, label)
    return [x for x, _ in checked], source


def check_numbers(a: Any, name: str) -> Tensor:
    """Check an array of finite real numbers of any shape."""
    values = to_float(_arrays.convert(a, name)[0])
    if values.numel():
        check_finite(values, name)
    return values


def check_integers(a: Any, name: str, error: type[RepsimError]) -> np.ndarray[Any, Any]:
    """Return integers or booleans as a NumPy array; floats are refused, even whole ones."""
    tensor, _ = _arrays.convert(a, name, "integers (of 8 to 64 bits)")
    values: np.ndarray[Any, Any] = _arrays.to_numpy(tensor)
    if values.dtype.kind not in "iub" and values.size:
        raise DtypeError(f"{name}: dtype {_arrays.dtype_name(tensor)}; expected integers")
    if values.dtype.kind == "u" and values.size and values.max() > np.iinfo(np.int64).max:
        raise error(
            f"{name}: {values.max()} does not fit a signed 64-bit integer; expected smaller "
            "integers"
        )
    return values


def _check_one_per_stimulus(labels: Any, n: int, name: str) -> np.ndarray[Any, Any]:
    """Check integers (n,) and return them as int64."""
    values = check_integers(labels, name, LabelError)
    if values.shape != (n,):
        raise LabelError(f"{name}: shape {values.shape}; expected ({n},), one per stimulus of x")
    return values.astype(np.int64)


_NO_TARGET: Any = object()  # None is a wrong target, not an absent one


def check_labels(labels: Any, n: int, target: Any = _NO_TARGET) -> np.ndarray[Any, Any]:
    """Check class labels (n,) of at least two classes, and that `target`, if passed, is one."""
    values = _check_one_per_stimulus(labels, n, "labels")
    present = np.unique(values)
    if target is not _NO_TARGET:
        if isinstance(target, (bool, np.bool_)) or not isinstance(target, (int, np.integer)):
            raise LabelError(f"target: {_options.short_repr(target)}; expected an integer label")
        if target not in present:
            choices = ", ".join(str(v) for v in present[:10])
            more = ", …" if len(present) > 10 else ""
            raise LabelError(
                f"target: no stimulus has label {_options.short_repr(target)}; expected one of "
                f"{choices}{more}"
            )
    if len(present) < 2:
        raise LabelError(f"labels: only class {present[0]}; expected at least two classes")
    return values


def check_classes(
    labels: Any, n: int, n_classes: int | None, name: str = "labels"
) -> tuple[np.ndarray[Any, Any], int]:
    """Check class labels 0 … k - 1 (n,), with a stimulus of every class; return them and k."""
    values = _check_one_per_stimulus(labels, n, name)
    k = int(values.max()) + 1
    if n_classes is not None:
        k = _options.check_count(n_classes, "n_classes", error=LabelError)
    if values.min() < 0 or values.max() >= k:
        problem = f"{name}: values {values.min()} … {values.max()}"
        if n_classes is None:
            raise LabelError(f"{problem}; expected integers from 0 on")
        raise LabelError(f"{problem} with n_classes={k}; expected integers in 0 … {k - 1}")
    present = np.unique(values)  # np.bincount up to the largest label might not fit in memory
    if len(present) < k:
        empty = int(np.append(present != np.arange(len(present)), True).argmax())
        raise LabelError(f"{name}: class {empty} has no stimulus; expected every class 0 … {k - 1}")
    return values, k


def raise_if_nan(result: Array, message: str, **arguments: Tensor) -> Array:
    """Return a result, or raise an error that explains its NaN.

    It names an argument that was checked with `defer`, or is a ConstantError with the message.
    """
    if math.isnan(float(result.sum())):  # finite results are far too small for it to overflow
        for check in (check_finite, _check_varying):
            for name, argument in arguments.items():
                check(argument, name)
        raise ConstantError(message)
    return result


def finish_checks(distances: Array, a: Tensor, name: str) -> None:
    """Check an argument that was checked with `defer`, unless its distances prove it right.

    If any value is not finite, or all stimuli are the same, all distances (…, C) are NaN or 0.
    """
    proves = (distances > 0).any(-1)
    # `all` of a scalar would start another kernel.
    if not bool(proves.all() if proves.ndim else proves):
        check_finite(a, name)
        _check_varying(a, name)
