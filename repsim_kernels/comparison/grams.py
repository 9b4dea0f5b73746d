"""A table of the Gram matrices of layers, and what is computed from two such tables."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repsim_kernels import _dispatch
from repsim_kernels._arrays import Source
from repsim_kernels.errors import OptionError, ShapeError

MIN_STIMULI = 4  # U-centring and HSIC₁ divide by n - 3

_EPS = torch.finfo(torch.float32).eps

Array = np.ndarray[Any, Any]


class Products(NamedTuple):
    """Inner products of the Grams of two tables, with R and C layers.

    Attributes
    ----------
    xy : array, (R, C)
        Of each row with each column.
    xx, yy : array, (R,) and (C,)
        Of each with itself: 0 if that is only rounding, NaN if a Gram is not finite.
    trace_x, trace_y : array, (R,) and (C,)
    floor_x, floor_y : array, (R,) and (C,)
        Bounds of the rounding errors of xx and yy.
    """

    xy: Array
    xx: Array
    yy: Array
    trace_x: Array
    trace_y: Array
    floor_x: Array
    floor_y: Array


class GramTable:
    """The centred Gram matrices of a network's layers, which are additive over neurons.

    Parameters
    ----------
    names : iterable of str
        The layers, in order.
    debiased : bool
        Whether the Grams are U-centred.
    precision : {"float32", "float64"}
        How features of at most 32 bits are multiplied.
    dtype : torch.dtype
        In which Grams are held; sums over them are float64. In float32 each layer has a scale of
        its own, so that its products, traces and floors are known but for a factor.
    folder : path, optional
        Where Grams on a CPU are held in a file, if they do not fit in memory.
    memory : int
        Bytes of features on a GPU that wait until the Grams of all of them are computed in one
        launch.

    Attributes
    ----------
    n : int
        Number of stimuli; 0 before the first layer.
    """

    def __init__(
        self,
        names: Iterable[str],
        debiased: bool,
        precision: str,
        dtype: torch.dtype = torch.float64,
        folder: Path | None = None,
        memory: int = 2**30,
    ) -> None:
        self.names, self.n = tuple(names), 0
        self._rows = {name: row for row, name in enumerate(self.names)}
        self._debiased, self._precision = debiased, precision
        self._dtype, self._folder, self._memory = dtype, folder, memory
        self._waiting: dict[str, Tensor] = {}
        self._grams: Tensor | None = None
        self._traces = self._root_floors = self._scales = torch.empty(0)

    def add(self, name: str, x: Tensor) -> None:
        """Add the Gram of some neurons x (n, k) of a layer to that of its other neurons."""
        if self.n not in (0, len(x)):
            raise ShapeError(
                f"layers: {name!r} has {len(x)} stimuli, but {self.names[0]!r} has {self.n}; "
                "expected the same number"
            )
        self.n = len(x)
        if self._debiased and self.n < MIN_STIMULI:
            return
        if not x.is_cuda:
            self._add([name], [x])
            return
        if name in self._waiting or sum(a.nbytes for a in self._waiting.values()) > self._memory:
            self.flush()
        self._waiting[name] = x.clone()  # operations of the network that work in place come next

    def flush(self) -> None:
        """Add the Grams of features that wait."""
        if self._waiting:
            self._add(list(self._waiting), list(self._waiting.values()))
            self._waiting = {}

    def multiply(self, other: GramTable) -> Products:
        """Return the inner products of the Grams with those of another table, or of the same."""
        h, x = self._finish()
        k, y = (h, x) if other is self else other._finish()
        source = Source("torch", str(h.device))
        products = _dispatch.call(
            "gram_products",
            None,
            source,
            h,
            k.to(h.device),
            n=self.n,
            debiased=self._debiased,
        )
        xy, xx, yy = (a.cpu().numpy() for a in products)
        floor_x, floor_y = x[1] ** 2, y[1] ** 2
        if self._dtype == torch.float32:  # rounding of sums over blocks of neurons
            floor_x, floor_y = (
                floor + (_EPS * traces) ** 2 for floor, traces in ((floor_x, x[0]), (floor_y, y[0]))
            )
        for norms, traces, floors in ((xx, x[0], floor_x), (yy, y[0], floor_y)):
            norms[norms <= floors] = 0.0
            norms[~np.isfinite(traces)] = np.nan
        return Products(xy, xx, yy, x[0], y[0], floor_x, floor_y)

    def unpack(self, rows: Array) -> list[Tensor]:
        """Return the Grams (n, n) of the layers at a mask, float64; for tables on a CPU."""
        grams, _ = self._finish()
        source = Source("torch", str(grams.device))
        return [
            _dispatch.call("unpack_gram", None, source, grams[i], n=self.n)
            for i in np.flatnonzero(rows)
        ]

    def _finish(self) -> tuple[Tensor, Array]:
        """Return the Grams (L, m), and their traces and the roots of their floors (2, L)."""
        self.flush()
        assert self._grams is not None
        return self._grams, torch.stack([self._traces, self._root_floors]).cpu().numpy()

    def _add(self, names: list[str], xs: list[Tensor]) -> None:
        source = Source("torch", str(xs[0].device))
        grams, traces, floors = _dispatch.call(
            "layer_grams", None, source, xs, debiased=self._debiased, precision=self._precision
        )
        if self._grams is None:
            self._grams = self._allocate(grams)
            self._traces = traces.new_zeros(len(self.names))
            self._root_floors = torch.zeros_like(self._traces)
            self._scales = torch.ones_like(self._traces)
        rows = torch.tensor([self._rows[name] for name in names], device=grams.device)
        if self._dtype == torch.float32:  # a layer's first trace is its scale
            is_first = (self._traces[rows] == 0) & (traces > 0) & traces.isfinite()
            scales = torch.where(is_first, traces, self._scales[rows])
            self._scales[rows] = scales
            grams, traces, floors = grams / scales[:, None], traces / scales, floors / scales**2
        self._grams.index_add_(0, rows, grams.to(self._dtype))
        self._traces.index_add_(0, rows, traces)
        self._root_floors.index_add_(0, rows, floors.sqrt())  # a floor grows as the trace²

    def _allocate(self, grams: Tensor) -> Tensor:
        """Return zeros for the Grams of all layers: in memory, or in a file in the folder."""
        shape = len(self.names), grams.shape[1]
        if self._folder is None:
            return torch.zeros(shape, dtype=self._dtype, device=grams.device)
        path, length = self._folder / f"{id(self)}.grams", math.prod(shape)
        size = length * self._dtype.itemsize
        with path.open("wb") as file:
            try:
                # Writing to a mapped file on a disk that is full would kill the process.
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise OptionError(
                    f"memory: less than the Gram matrices of {shape[0]} layers and {self.n:,} "
                    f"stimuli, {size / 2**30:.3g} GiB, which do not fit in {self._folder.parent} "
                    f"({error.strerror}) either; expected more, fewer layers or stimuli, or "
                    "estimator='minibatch'"
                ) from None
        return torch.from_file(str(path), True, length, dtype=self._dtype).view(shape)


def compute_cosines(xy: Array, xx: Array, yy: Array) -> Array:
    """Return xy / √(xx yy), in [-1, 1]: NaN unless xx and yy are above 0. It does not overflow."""
    with np.errstate(all="ignore"):
        cosines = np.clip(np.sign(xy) * np.sqrt((xy / xx) * (xy / yy)), -1.0, 1.0)
    return np.where((xx > 0) & (yy > 0), cosines, np.nan)
