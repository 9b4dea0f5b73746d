"""The cells of a study's layers: a grid for each target class, or the same ones for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

import repsim_kernels as rk
from repsim_kernels import _options
from repsim_kernels._cell_sets import SparseCells
from repsim_kernels._check_cells import check_cells
from repsim_kernels.experiments.errors import StudyError, one_line
from repsim_kernels.experiments.study.network import LayerSize
from repsim_kernels.forward import AblatedForward

GRIDS = ("selectivity", "random")  # these differ from target to target
KINDS = (*GRIDS, "channels", "heads")

CellFunction: TypeAlias = Callable[[tuple[int, ...], Tensor, Tensor], Any]
"""Makes a layer's cells from the shape of one activation, all activations and the labels."""

CellsOption: TypeAlias = str | CellFunction | Mapping[str, Any]

ReadLayer: TypeAlias = Callable[[str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LayerCells:
    """The cells of a layer, and their number.

    They are each neuron's label (p,), a boolean membership (C, p), or sparse.
    """

    assignment: Tensor | SparseCells
    count: int

    @property
    def overlap(self) -> bool:
        """Whether the cells are a membership, whose cells may share neurons."""
        return isinstance(self.assignment, SparseCells) or self.assignment.dtype == torch.bool

    @cached_property
    def sizes(self) -> Tensor:
        """Number of neurons of each cell, (C,)."""
        own = self.assignment
        if isinstance(own, SparseCells):
            return torch.from_numpy(np.diff(own.indptr))
        if self.overlap:
            return own.sum(1)
        return own[own >= 0].bincount(minlength=self.count)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that define the cells."""
        own = self.assignment
        if isinstance(own, SparseCells):
            return torch.from_numpy(own.indptr), torch.from_numpy(own.indices)
        return (own,)

    def to(self, device: torch.device) -> LayerCells:
        """Move labels or a membership to a device; sparse cells stay on the host."""
        own = self.assignment
        return LayerCells(own if isinstance(own, SparseCells) else own.to(device), self.count)

    def split(self, size: int) -> Iterator[LayerCells]:
        """Split the cells into runs of up to `size`; a neuron in none of a run has the label -1."""
        own = self.assignment
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            if isinstance(own, SparseCells):
                yield LayerCells(own.select(slice(start, stop)), stop - start)
            elif self.overlap:
                yield LayerCells(own[start:stop], stop - start)
            else:
                inside = (own >= start) & (own < stop)
                yield LayerCells(torch.where(inside, own - start, -1), stop - start)

    def to_sparse(self) -> SparseCells:
        """Return the list of each cell's neurons."""
        own = self.assignment
        if isinstance(own, SparseCells):
            return own
        if self.overlap:
            neurons = own.nonzero()[:, 1]
        else:
            labels, order = own.sort(stable=True)
            neurons = order[labels >= 0]
        ends = self.sizes.cumsum(0).cpu().numpy()
        return SparseCells(np.concatenate([[0], ends]), neurons.cpu().numpy(), own.shape[-1])

    def sum_values(self, values: Tensor) -> Tensor:
        """Sum the values (p,) of each cell's neurons, (C,)."""
        own = self.assignment
        if isinstance(own, SparseCells):
            members = torch.from_numpy(own.indices).to(values.device)
            parts = iter(values[members].split(self.sizes.tolist()))
        else:
            masks = own if self.overlap else (own == label for label in range(self.count))
            parts = (values[mask] for mask in masks)
        return torch.stack([part.sum() for part in parts])


def check_kind(value: Any, layers: Sequence[str]) -> CellsOption:
    """Check the argument ``cells`` of a study of these layers."""
    if isinstance(value, Mapping):
        if missing := [layer for layer in layers if layer not in value]:
            raise StudyError(
                f"cells: none for layer {missing[0]!r}; expected cells for each of {list(layers)}"
            )
        if unknown := [layer for layer in value if layer not in layers]:
            raise StudyError(
                f"cells: {_options.short_repr(unknown[0])} is not among the layers {list(layers)}"
            )
        return dict(value)
    if isinstance(value, str):
        return _options.check_choice(value, "cells", KINDS)
    if callable(value):
        function: CellFunction = value
        return function
    raise StudyError(
        f"cells: {_options.short_repr(value)}; expected one of {', '.join(map(repr, KINDS))}, a "
        "function of (shape, activations, labels), or a dict of cells by layer"
    )


def describe_kind(kind: CellsOption) -> str:
    """Describe the argument ``cells`` of a study for its summary."""
    if isinstance(kind, str):
        return repr(kind)
    return "a dict" if isinstance(kind, Mapping) else "a function"


def fix_cells(
    kind: CellsOption, forward: AblatedForward, sizes: Mapping[str, LayerSize], read: ReadLayer
) -> dict[str, LayerCells]:
    """Make the cells of each layer that serve all targets; none if the cells are grids.

    Parameters
    ----------
    kind : str, function or dict
        As `check_kind` returns it.
    forward : AblatedForward
        Of the network.
    sizes : mapping of str to LayerSize
        Of each layer.
    read : function
        Returns a layer's activations (n, p) and the labels (n,), for a function of the user's.

    Raises
    ------
    StudyError
        The cells don't fit a layer, or the layer has no heads.
    """
    if kind in GRIDS:
        return {}
    fixed = {}
    for layer, size in sizes.items():
        try:
            if kind == "channels":
                value = rk.cells.channels(size.shape)
            elif kind == "heads":
                value = rk.cells.heads(size.shape, _count_heads(forward, layer))
            elif isinstance(kind, Mapping):
                value = kind[layer]
            else:
                assert callable(kind)
                value = kind(size.shape, *read(layer))
            checked, count = check_cells(value, size.neurons, shape=size.shape)
        except rk.RepsimError as error:
            raise StudyError(f"layer {layer}: {one_line(error)}") from error
        if count == 0:
            raise StudyError(f"layer {layer}: cells: none; expected at least one")
        own = checked if isinstance(checked, SparseCells) else torch.from_numpy(checked)
        fixed[layer] = LayerCells(own, count)
    return fixed


def _count_heads(forward: AblatedForward, layer: str) -> int:
    """Return the number of heads of a layer; StudyError if it is no layer of heads."""
    try:
        return forward.count_heads(layer)
    except rk.LayerError:
        raise StudyError(
            f"cells: 'heads' for layer {layer!r}; expected layers that are the heads of an "
            "attention module, 'module:heads'"
        ) from None


def check_grid(grid: tuple[int, int], sizes: Mapping[str, LayerSize]) -> None:
    """Check that each layer has a neuron for each cell of a grid."""
    for layer, size in sizes.items():
        if size.neurons < grid[0] * grid[1]:
            raise StudyError(
                f"grid: {grid[0]} x {grid[1]} cells for the {size.neurons} neurons of layer "
                f"{layer!r}; expected at least one neuron per cell"
            )
