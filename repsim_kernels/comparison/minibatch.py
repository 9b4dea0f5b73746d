"""CKA of layers whose stimuli come in batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repsim_kernels import _check, _options
from repsim_kernels._typing import ArrayLike
from repsim_kernels.comparison import ranks
from repsim_kernels.comparison.grams import MIN_STIMULI, GramTable, compute_cosines
from repsim_kernels.comparison.similarity_map import SimilarityMap, check_names
from repsim_kernels.errors import OptionError, ShapeError

# HSIC₁ whose squares, and sums of these, fit float64.
_RANGE = 1e-140, 1e140


@dataclass(frozen=True)
class _Sums:
    """Sums over batches, which the sums over other batches can be added to.

    ``moments`` (4, 3, R, C) holds n h, and below it n² h hᵀ, for the numbers of stimuli n and
    the vectors h of the three HSIC₁: of a row with a column, of the row and of the column.
    ``rounding`` (2, R, C) bounds the rounding errors of the last two of n h.
    """

    moments: np.ndarray[Any, Any]
    rounding: np.ndarray[Any, Any]
    n: int
    n_batches: int
    n_left_out: int

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.moments + other.moments,
            self.rounding + other.rounding,
            self.n + other.n,
            self.n_batches + other.n_batches,
            self.n_left_out + other.n_left_out,
        )


class MinibatchCKA:
    """Debiased CKA of all pairs of layers, from one pass over batches of stimuli.

    HSIC₁ is computed within each batch and averaged over batches, before the ratio is taken::

        mean HSIC₁(x, y) / √(mean HSIC₁(x, x) · mean HSIC₁(y, y))

    Batches are weighted by their numbers of stimuli.

    Parameters
    ----------
    rows, columns : sequence of str, optional
        Names of the layers in ``xs`` and ``ys``; by default "0", "1", …. For one network, columns
        are the rows.
    precision : {"float32", "float64"}
        How features of at most 32 bits are multiplied, as in `cka`. HSIC₁ and all sums are float64.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, OptionError

    Notes
    -----
    Memory does not depend on the number of batches: fourteen numbers for each pair of layers, and
    during `update` one n x n Gram matrix for each layer, where n is the size of that batch.

    Batches should be random samples, as from a loader that shuffles: stimuli that are sorted, for
    example by class, give a different similarity. HSIC₁ is unbiased, so that batches of different
    sizes differ only by chance; ``cka(debiased=True)`` of all stimuli together varies less.

    The standard error is that of a ratio by the delta method. With the residual of each batch,
    e = xy / √(mean xx · mean yy) - r (xx / mean xx + yy / mean yy) / 2, where r is the similarity
    and xx, xy and yy are the batch's HSIC₁, its square is B / (B - 1) Σ (n e / Σ n)² for B batches
    that are independent. It describes how r varies between samples of stimuli. For few batches, or
    features with heavy tails, it can be a quarter too small; below 1e-8 it is rounding.

    Source: Nguyen, Raghu & Kornblith 2021 for the estimator, Song et al. 2012 for HSIC₁, Wolter
    2007 for the variance.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> s = rk.MinibatchCKA(rows=["conv1", "conv2"], columns=["block1"])
    >>> for _ in range(20):
    ...     x = rng.standard_normal((50, 10))
    ...     s.update([x, x**2], [x + rng.standard_normal((50, 10))])
    >>> m = s.compute()
    >>> m
    SimilarityMap: debiased CKA of 2 x 1 layers, -0.00891 … 0.5, n = 1000
    >>> m.standard_error.round(3)
    array([[0.009],
           [0.009]])
    """

    def __init__(
        self,
        rows: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        *,
        precision: str = "float32",
    ) -> None:
        self._rows = None if rows is None else check_names(rows, "rows")
        self._columns = None if columns is None else check_names(columns, "columns")
        self._precision = _options.check_product_precision(precision)
        self.reset()

    def __repr__(self) -> str:
        if self._sums is None:
            return "MinibatchCKA: no batches"
        shape = " x ".join(map(str, self._sums.moments.shape[2:]))
        batches = f"{self._sums.n_batches} batches"
        return f"MinibatchCKA: {shape} layers, {batches}, n = {self._sums.n}"

    def reset(self) -> None:
        """Forget all batches."""
        self._sums: _Sums | None = None
        self._of_one_network = False

    def update(self, xs: Iterable[ArrayLike], ys: Iterable[ArrayLike] | None = None) -> None:
        """Add a batch.

        Parameters
        ----------
        xs : sequence of R arrays, (n, p_i), float16 | bfloat16 | float32 | float64
            Activations of each layer for the same n stimuli, on any device. With fewer than 4
            stimuli the batch is left out, and counted.
        ys : sequence of C arrays, (n, q_j), optional
            Those of the other network; by default `xs`.

        Raises
        ------
        ShapeError, DtypeError, DeviceError, OptionError
            The batch was not added.

        Notes
        -----
        A layer may be constant in a batch, which contributes zeros. Values that are not finite, or
        beyond 1e±35, leave it without a similarity, while other layers are not affected.
        """
        options: dict[str, Any] = {"min_stimuli": 1, "allow_undefined": True}
        left, source = _check.check_representations(xs, "xs", **options)
        right = None
        if ys is not None:
            right, _ = _check.check_representations(ys, "ys", like=(left[0], source), **options)
        tables = []
        for side in (left,) if right is None else (left, right):
            table = GramTable(map(str, range(len(side))), True, self._precision)
            for name, x in zip(table.names, side, strict=True):
                table.add(name, x)
            tables.append(table)
        self.add_tables(*tables)

    def add_tables(self, left: GramTable, right: GramTable | None = None) -> None:
        """Add a batch from the U-centred Grams of its layers."""
        n, shape = left.n, (len(left.names), len((right or left).names))
        self._check_layers(shape, right is None)
        if n < MIN_STIMULI:
            batch = _Sums(np.zeros((4, 3, *shape)), np.zeros((2, *shape)), 0, 0, n)
        else:
            products = left.multiply(right or left)
            low, high = _RANGE
            # n HSIC₁ of each pair, row and column, NaN where its squares don't fit float64.
            xx, yy, floor_x, floor_y = (
                values / (n - 3)
                for values in (products.xx, products.yy, products.floor_x, products.floor_y)
            )
            xx, yy = (np.where((a == 0) | ((low < a) & (a < high)), a, np.nan) for a in (xx, yy))
            own = xx[:, None] * yy
            xy = np.where(own > 0, products.xy / (n - 3), own)  # 0 or NaN if one of them is
            h = np.stack(np.broadcast_arrays(xy, xx[:, None], yy))
            moments = np.concatenate([h[None], h[:, None] * h])
            rounding = np.stack(np.broadcast_arrays(floor_x[:, None], floor_y))
            batch = _Sums(moments, rounding, n, 1, 0)
        self._sums = batch if self._sums is None else self._sums + batch
        self._of_one_network = right is None

    def merge_state(self, others: MinibatchCKA | Iterable[MinibatchCKA]) -> None:
        """Add the batches that others have seen, and leave the others unchanged.

        Parameters
        ----------
        others : MinibatchCKA, or iterable of these
            For the same layers.

        Raises
        ------
        OptionError
            An item is not a `MinibatchCKA`, or has other layers. Nothing was added.
        """
        items = (others,) if isinstance(others, MinibatchCKA) else _options.to_tuple(others)
        if items is None or not all(isinstance(item, MinibatchCKA) for item in items):
            raise OptionError(
                f"others: {_options.short_repr(others)}; expected MinibatchCKA, one or several"
            )
        merged = self._merge([item._state() for item in items])
        self._sums, self._of_one_network = merged

    def compute(self) -> SimilarityMap:
        """Return the similarities of all batches so far.

        With `torch.distributed` initialised, all ranks must call it, each after its own part of
        the batches: it then gathers the sums of all ranks, and every rank returns the same map.
        What this rank has seen stays as it is.

        Returns
        -------
        SimilarityMap
            Metric "cka_debiased" with a standard error, which is NaN for a single batch. A layer
            without a similarity has NaN in its row and column.

        Raises
        ------
        ShapeError
            There was no batch of at least 4 stimuli.
        OptionError
            The ranks have different layers.

        Warns
        -----
        UserWarning
            Stimuli of small batches were left out, or layers have no similarity, which it names.
        """
        sums, of_one_network = self._gather()
        if sums is None or not sums.n_batches:
            raise ShapeError(
                f"batches: none of at least {MIN_STIMULI} stimuli so far; expected one, since "
                "HSIC₁ is not defined for fewer"
            )
        rows, columns = self._get_names(sums.moments.shape[2:], of_one_network)
        if sums.n_left_out:
            warnings.warn(
                f"{sums.n_left_out} stimuli are left out, in batches of fewer than {MIN_STIMULI}, "
                "for which HSIC₁ is not defined",
                stacklevel=_options.find_stacklevel(),
            )
        is_defined = sums.moments[0, 1:] > sums.rounding
        with np.errstate(divide="ignore", invalid="ignore"):
            values, error = (np.where(is_defined.all(0), a, np.nan) for a in _estimate(sums))
        if of_one_network:
            values, error = (values + values.T) / 2, (error + error.T) / 2  # exactly symmetric
            itself = np.eye(len(rows), dtype=bool) & ~np.isnan(values)
            values[itself] = 1.0
            error[itself & ~np.isnan(error)] = 0.0
        options = {"estimator": "minibatch", "precision": self._precision}
        m = SimilarityMap(
            values, rows, columns, "cka_debiased", options, sums.n, error, sums.n_left_out
        )
        m.warn_of_undefined()
        return m

    def _check_layers(self, shape: tuple[int, int], of_one_network: bool) -> None:
        """Check that a batch has the layers of the names, and of the batches before."""
        self._get_names(shape, of_one_network)
        if self._sums is not None:
            before = self._sums.moments.shape[2:]
            if (before, self._of_one_network) != (shape, of_one_network):
                other = "xs alone" if self._of_one_network else "xs and ys"
                raise ShapeError(
                    f"xs: {shape[0]} and {shape[1]} layers; expected {before[0]} and {before[1]} "
                    f"from {other}, as in the batches before"
                )

    def _get_names(
        self, shape: tuple[int, ...], of_one_network: bool
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the layers, after checking that there are as many as layers."""
        rows = self._rows or tuple(map(str, range(shape[0])))
        default = rows if of_one_network else tuple(map(str, range(shape[1])))
        columns = self._columns or default
        if of_one_network and columns != rows:
            raise OptionError("columns: not the names of the rows; expected ys, or the same names")
        return check_names(rows, "rows", shape[0]), check_names(columns, "columns", shape[1])

    def _state(self) -> tuple[Any, ...]:
        """Return what identifies the layers, and the sums."""
        return self._rows, self._columns, self._precision, self._of_one_network, self._sums

    def _merge(self, states: list[tuple[Any, ...]]) -> tuple[_Sums | None, bool]:
        """Return the sums of this and other states, and whether they are of one network."""
        sums, of_one_network = self._sums, self._of_one_network
        for i, (*settings, other_is_of_one, other) in enumerate(states):
            if settings != [self._rows, self._columns, self._precision]:
                raise OptionError(
                    f"others[{i}]: other names of layers, or another precision; expected the same"
                )
            if other is None:
                continue
            if sums is None:
                sums, of_one_network = other, other_is_of_one
                continue
            shapes = sums.moments.shape, other.moments.shape
            if shapes[0] != shapes[1] or of_one_network != other_is_of_one:
                raise OptionError(
                    f"others[{i}]: {shapes[1][2]} x {shapes[1][3]} layers; expected "
                    f"{shapes[0][2]} x {shapes[0][3]}, both of one network or both of two"
                )
            sums = sums + other
        return sums, of_one_network

    def _gather(self) -> tuple[_Sums | None, bool]:
        """Return the sums of all ranks, in the order of the ranks."""
        states = ranks.gather(self._state())
        if len(states) == 1:
            return self._sums, self._of_one_network
        total = MinibatchCKA(self._rows, self._columns, precision=self._precision)
        return total._merge(states)


def _estimate(sums: _Sums) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the similarities and their standard errors, (R, C)."""
    xy, xx, yy = sums.moments[0] / sums.n
    values = compute_cosines(xy, xx, yy)
    # The residual of a batch is the product of its HSIC₁ and this gradient.
    gradient = np.stack([1 / np.sqrt(xx) / np.sqrt(yy), -values / xx / 2, -values / yy / 2])
    squares = np.einsum("irc,ijrc,jrc->rc", gradient, sums.moments[1:], gradient)
    b = sums.n_batches
    variance = squares / sums.n**2 * (b / (b - 1) if b > 1 else np.nan)
    return values, np.sqrt(np.maximum(variance, 0.0))
