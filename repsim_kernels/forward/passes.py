"""Passes of a network cut at a layer: its head, its tail, and batches of cells."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import torch
from torch import Tensor

from repsim_kernels._arrays import dtype_name
from repsim_kernels.errors import LayerError, OutOfMemoryWarning
from repsim_kernels.forward import broadcast, cost, fusion
from repsim_kernels.forward.dataflow import Split, collect_tensors, get_version, schedule
from repsim_kernels.forward.inputs import Inputs, copy_with_strides
from repsim_kernels.forward.masks import Ablations, CellMasks, mask_for_cells
from repsim_kernels.forward.memory import Batch, split_to_fit
from repsim_kernels.forward.trace import Trace, Values


class State:
    """A layer's activation for some images, and what the rest of the network needs with it.

    `AblatedForward.prefix` and `AblatedForward.prefixes` make states; `AblatedForward.logits` and
    `AblatedForward.intact` take them. ``len(state)`` is the number of images.

    Attributes
    ----------
    layer : str
        Name of the layer.
    activation : tensor, (n, …)
        The layer's tensor for n images: a module's output, its input, or what its heads return.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import repsim_kernels as rk
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> state = rk.forward.AblatedForward(model, "1").prefix(torch.ones(2, 4))
    >>> state
    State(layer='1', images=2, activation=(2, 8), dtype='float32', device='cpu')
    >>> len(state), state.activation.shape
    (2, torch.Size([2, 8]))
    """

    def __init__(
        self,
        activation: Tensor,
        values: Values,
        trace: Trace,
        split: Split,
        unmasked: Tensor | None = None,
    ) -> None:
        """`unmasked` is the output under a hook that changes nothing, if it is known already."""
        self.layer = split.layer
        self._data, self._strides = activation, activation.stride()
        self._values, self._trace, self._split = values, trace, split
        self._unmasked = unmasked
        self._intact: Tensor | None = None  # the output without a hook, if it differs
        self._owner: object = None
        self._record_versions()

    def __len__(self) -> int:
        """The number of images."""
        return len(self._data)

    def __repr__(self) -> str:
        data = self._data
        return (
            f"State(layer={self.layer!r}, images={len(data)}, activation={tuple(data.shape)}, "
            f"dtype={dtype_name(data)!r}, device={str(data.device)!r})"
        )

    @property
    def activation(self) -> Tensor:
        """The layer's tensor, (n, …), with its own strides. Writing to it invalidates the state."""
        return self._restore_strides(self._data)

    def move(self, rows: Tensor) -> None:
        """Copy the activation into the caller's memory, and keep it there instead of here.

        Parameters
        ----------
        rows : tensor, (n, p)
            On the activation's device, with its dtype. Filled with the activation flattened in C
            order. The caller must not write to it while the state is in use. If the activation has
            gaps, or does not store its images one after the other, the state keeps its own copy
            too.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> import repsim_kernels as rk
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
        >>> state = rk.forward.AblatedForward(model, "0").prefix(torch.arange(8.0).view(2, 2, 2))
        >>> rows = torch.empty(2, 4)
        >>> state.move(rows)
        >>> rows
        tensor([[0., 1., 2., 3.],
                [4., 5., 6., 7.]])
        """
        data = self._data
        rows.copy_(data.reshape(len(data), -1))
        is_dense = torch.empty_like(data, device="meta").stride() == data.stride()
        if is_dense and data.stride(0) == rows.shape[1]:
            # .data counts its own writes, so other states may still be moved into the same buffer.
            self._data = rows.data.view(data.shape)
        self._record_versions()

    @property
    def _needs_intact(self) -> bool:
        """Whether a hook that changes nothing may still change the output by rounding."""
        return not self._split.hook_keeps_bits

    def _set_owner(self, owner: object, intact: Tensor | None) -> None:
        """Set the object that made this state, and the model's own output where it is needed."""
        self._owner = owner
        self._intact = intact if self._needs_intact else None

    def _select_images(self, batch: Batch) -> Tensor:
        """Return the activation of a batch's images."""
        return self._restore_strides(self._data[batch.start : batch.stop])

    def _restore_strides(self, t: Tensor) -> Tensor:
        if t.stride() == self._strides:
            return t
        return t.new_empty_strided(t.shape, self._strides).copy_(t)

    def _record_versions(self) -> None:
        tensors = (self._data, *collect_tensors([*self._values.values()]))
        self._versions = [(t, get_version(t)) for t in tensors]

    def _check_unwritten(self, name: str = "state") -> None:
        """Check that the tensors that this holds are as the pass of the head left them."""
        if any(get_version(t) != old for t, old in self._versions):
            raise LayerError(
                f"{name}: its tensors were written to after prefix(); expected no writes"
            )


def run_head(trace: Trace, split: Split, inputs: Inputs) -> State:
    """Run the operations that do not depend on the layer, and the layer."""
    values = trace.bind(inputs.copy() if split.copy_images else inputs)
    for step in split.head:
        values[step.node] = trace.run(step.node, values)
        if step.node is split.cut and split.copy_activation:
            values[step.node] = copy_with_strides(values[step.node])
        for x in step.to_drop:
            del values[x]
    return State(values[split.cut], {x: values[x] for x in split.inputs}, trace, split)


def run_heads(trace: Trace, splits: dict[str, Split], inputs: Inputs) -> dict[str, State]:
    """Run one whole pass; return a state per layer, each of which holds the unmasked output."""
    copy_images = any(split.copy_images for split in splits.values())
    values = trace.bind(inputs.copy() if copy_images else inputs)
    copies_by_layer: dict[str, Values] = {name: {} for name in splits}
    needed = {x for split in splits.values() for x in (split.cut, *split.inputs)}
    for step in schedule(trace.operations, needed | {trace.output}):
        # Copy the values that a layer's tail writes to before this pass makes the same write.
        copies: Values = {}
        for name, split in splits.items():
            for x in split.first_writes.get(step.node, ()):
                if x not in copies:
                    copies[x] = copy.deepcopy(values[x])
                copies_by_layer[name][x] = copies[x]
        values[step.node] = trace.run(step.node, values)
        for name, split in splits.items():
            if step.node is split.cut and split.copy_activation:
                copies_by_layer[name][step.node] = copy_with_strides(values[step.node])
        for x in step.to_drop:
            del values[x]
    states = {}
    for name, split in splits.items():
        layer_values = values | copies_by_layer[name]
        held, unmasked = {x: layer_values[x] for x in split.inputs}, values[trace.output].clone()
        states[name] = State(layer_values[split.cut], held, trace, split, unmasked)
    return states


def run_tail(state: State, cells: CellMasks | None = None, batch: Batch | None = None) -> Tensor:
    """Run the rest of the network for m images, masked for C cells or not at all: (C m, k)."""
    trace, split = state._trace, state._split
    values = dict(state._values)
    if batch is None or batch.stop - batch.start == len(state):
        values[split.cut] = state.activation
    else:
        values[split.cut] = state._select_images(batch)
        if cells is not None and cells.fill is not None:
            cells = dataclasses.replace(cells, fill=cells.fill[batch.start : batch.stop])
        values.update((x, values[x][batch.start : batch.stop]) for x in split.per_image_inputs)
    mutated = [x for x in split.mutated_inputs if cells is None or x is not split.cut]
    copies = copy.deepcopy([values[x] for x in mutated])  # in one call, so shared views stay shared
    values.update(zip(mutated, copies, strict=True))
    steps, n_cells = split.tail, 1 if cells is None else len(cells.ids)
    rows = n_cells * len(values[split.cut])
    values.update((x, values[x] * rows // len(state)) for x in split.sizes)
    if cells is not None:
        if cells.fill is None and fusion.uses_triton(values[split.cut]):
            steps = fusion.run_fused(trace, split, values, cells)
        elif linear := fusion.find_linear(trace, split, values, cells, n_cells):
            steps = linear.run(values)
        else:
            masks = cells.make_masks().view(-1, *values[split.cut].shape[1:])
            values[split.cut] = mask_for_cells(values[split.cut], masks, cells.fill)
    shared = set(split.per_image_inputs) if n_cells > 1 else set()
    for step in steps:
        values[step.node] = broadcast.run_for_cells(trace, step.node, values, shared, n_cells)
        for x in step.to_drop:
            del values[x]
    state._check_unwritten()
    out: Tensor = values[trace.output]
    return out


def run_intact(state: State, budget: int) -> Tensor:
    """Return the model's output without a hook, (n, k)."""
    return run_unmasked(state, budget) if state._intact is None else state._intact


def run_unmasked(state: State, budget: int) -> Tensor:
    """Return the output under a hook that changes nothing, (n, k); computed once per state."""
    if state._unmasked is None:
        (state._unmasked,) = run_in_batches(state, None, [0], 1, budget)
    return state._unmasked


def run_ablations(
    state: State, ablations: Ablations, cells_per_pass: int | None, budget: int
) -> Tensor:
    """Return the output for every cell, (C, n, k); cells without effect are not run."""
    ids, n_cells = ablations.find_effective(state._data), ablations.n_cells
    if ids:
        cells_per_pass = cells_per_pass or _choose_cells_per_pass(state, ablations, ids)
        ablated = run_in_batches(state, ablations, ids, cells_per_pass, budget)
        if len(ids) == n_cells:
            return ablated
    unmasked = run_unmasked(state, budget)
    out = unmasked.expand(n_cells, *unmasked.shape).clone()
    if ids:
        out[ids] = ablated
    return out


def _choose_cells_per_pass(state: State, ablations: Ablations, ids: list[int]) -> int:
    act, split, trace = state._data, state._split, state._trace
    if act.device.type != "cpu":
        return len(ids)
    if ablations.are_partition:
        values, masks = {split.cut: act, **state._values}, ablations.select(ids)
        if fusion.find_linear(trace, split, values, masks, len(ids)):
            return len(ids)
    return cost.choose_cells_per_pass(split, len(state))


def run_in_batches(
    state: State, ablations: Ablations | None, ids: list[int], cells_per_pass: int, budget: int
) -> Tensor:
    """Run the tail for the cells `ids`, in batches that fit the budget: (C, n, k).

    When a batch runs out of memory, this and later batches are half as large.
    """
    split = state._split
    rows = max(1, min(budget // max(1, split.tail_peak_bytes), split.oom_limit or budget))
    if not split.batchable:
        rows, cells_per_pass = len(state), 1
    pending = split_to_fit(Batch(ids, 0, len(state)), rows, cells_per_pass)
    positions, out = {c: i for i, c in enumerate(ids)}, None
    while pending:
        batch = pending.pop(0)
        try:
            cells = None if ablations is None else ablations.select(batch.cells)
            logits = run_tail(state, cells, batch)
        except torch.OutOfMemoryError:
            n_rows = len(batch.cells) * (batch.stop - batch.start)
            if n_rows == 1 or not split.batchable:
                raise
            if split.oom_limit is None:
                warnings.warn(
                    f"layer {split.layer}: out of memory with {n_rows} cells x images in one pass; "
                    "continuing with fewer",
                    OutOfMemoryWarning,
                    stacklevel=4,
                )
            split.oom_limit = n_rows // 2
            pending = [
                part
                for b in (batch, *pending)
                for part in split_to_fit(b, split.oom_limit, cells_per_pass)
            ]
            continue
        logits = logits.unflatten(0, (len(batch.cells), -1))
        if out is None:
            out = logits.new_empty(len(ids), len(state), *logits.shape[2:])
        first = positions[batch.cells[0]]  # a batch has consecutive items of `ids`
        out[first : first + len(logits), batch.start : batch.stop] = logits
    assert out is not None
    return out
