"""The types in public signatures."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy.typing as npt
from torch import Tensor as Tensor


class SupportsDLPack(Protocol):
    """An array of any library that implements the DLPack protocol, such as CuPy or JAX."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...


ArrayLike: TypeAlias = npt.ArrayLike | Tensor | SupportsDLPack
"""Input: a NumPy array, torch tensor or CuPy array; also a (nested) list, a pandas data frame, or
any array with ``__array__`` or ``__dlpack__``, all of which are handled as NumPy arrays."""


class SupportsToCSR(Protocol):
    """A sparse matrix or array, as SciPy has them."""

    def tocsr(self) -> Any: ...


CellsLike: TypeAlias = ArrayLike | SupportsToCSR
"""Input: cells of neurons, as an array, a SciPy sparse membership, or (indptr, indices)."""

Array: TypeAlias = Any
"""Result: a torch tensor or CuPy array on the device of the first argument if that was one;
otherwise a NumPy array, or a NumPy scalar for a single number.

`Any`, so that results can be used as arrays of one's own library without a cast."""
