"""What is run of a network that is cut at a layer: before it, and after it."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor

from repsim_kernels.errors import LayerError, OutOfMemoryWarning
from repsim_kernels.forward import broadcast, cost, fusion
from repsim_kernels.forward.dataflow import Split, schedule, tensors, version
from repsim_kernels.forward.fusion import Cells
from repsim_kernels.forward.memory import Batch, fit
from repsim_kernels.forward.trace import Trace, Values


class State:
    """What the head of a network gave for some images; made by `AblatedForward.prefix`.

    Attributes
    ----------
    layer : str
        The layer that it is cut at.
    """

    def __init__(
        self,
        activation: Tensor,
        values: Values,
        trace: Trace,
        part: Split,
        same: Tensor | None = None,
    ) -> None:
        """same: what a hook gives that changes nothing, where it is known already."""
        self.layer = part.layer
        self._kept, self._strides = activation, activation.stride()
        self._values, self._trace, self._split = values, trace, part
        self._same = same
        self._plain: Tensor | None = None  # what the model gives without a hook, where that differs
        self._owner: object = None
        self._note()

    def __len__(self) -> int:
        """The number of stimuli."""
        return len(self._kept)

    @property
    def activation(self) -> Tensor:
        """The layer's output, (n, …), with its own strides; writing to it spoils the state."""
        return self._laid_out(self._kept)

    @property
    def needs_plain(self) -> bool:
        """Whether the model without a hook has other bits than under one that changes nothing."""
        return not self._split.plain

    def claim(self, owner: object, plain: Tensor | None) -> None:
        """Set what made this state, and the output of the model itself, kept where it is needed."""
        self._owner = owner
        self._plain = plain if self.needs_plain else None

    def move(self, rows: Tensor) -> None:
        """Copy the activation into memory of the caller's, and keep it there alone.

        Parameters
        ----------
        rows : tensor, (n, p)
            Of the activation's dtype and device; filled with the activation flattened in C order.
            That it is not written to from then on is the caller's care. Where the activation has
            gaps, or its stimuli are not one after the other, the state keeps its own as well.
        """
        kept = self._kept
        rows.copy_(kept.reshape(len(kept), -1))
        dense = torch.empty_like(kept, device="meta").stride() == kept.stride()
        if dense and kept.stride(0) == rows.shape[1]:
            # .data has a count of writes of its own: the rows of other states are still to come.
            self._kept = rows.data.view(kept.shape)
        self._note()

    def _rows(self, batch: Batch) -> Tensor:
        """The activation of some stimuli."""
        return self._laid_out(self._kept[batch.start : batch.stop])

    def _laid_out(self, t: Tensor) -> Tensor:
        if t.stride() == self._strides:
            return t
        return t.new_empty_strided(t.shape, self._strides).copy_(t)

    def _note(self) -> None:
        held = (self._kept, *tensors([*self._values.values()]))
        self._versions = [(t, version(t)) for t in held]


def run_head(trace: Trace, part: Split, images: Tensor) -> State:
    """Run what comes before the layer, and all else that does not depend on it."""
    values: Values = {trace.input: copied(images) if part.copy_images else images}
    for step in part.head:
        values[step.node] = trace.run(step.node, values)
        if step.node is part.cut and part.copy_activation:
            values[step.node] = copied(values[step.node])
        for x in step.dropped:
            del values[x]
    return State(values[part.cut], {x: values[x] for x in part.inputs}, trace, part)


def run_heads(trace: Trace, parts: dict[str, Split], images: Tensor) -> dict[str, State]:
    """One pass for several layers, to the end; their states, with the intact logits."""
    writes_images = any(part.copy_images for part in parts.values())
    values: Values = {trace.input: copied(images) if writes_images else images}
    kept: dict[str, Values] = {name: {} for name in parts}
    needed = {x for part in parts.values() for x in (part.cut, *part.inputs)}
    for step in schedule(trace.nodes[1:], needed | {trace.output}):
        # What a layer's tail will write to is kept as it is before this pass does so.
        fresh: Values = {}
        for name, part in parts.items():
            for x in part.writes.get(step.node, ()):
                if x not in fresh:
                    fresh[x] = copy.deepcopy(values[x])
                kept[name][x] = fresh[x]
        values[step.node] = trace.run(step.node, values)
        for name, part in parts.items():
            if step.node is part.cut and part.copy_activation:
                kept[name][step.node] = copied(values[step.node])
        for x in step.dropped:
            del values[x]
    states = {}
    for name, part in parts.items():
        mine = values | kept[name]
        inputs, same = {x: mine[x] for x in part.inputs}, values[trace.output].clone()
        states[name] = State(mine[part.cut], inputs, trace, part, same)
    return states


def run_tail(state: State, cells: Cells | None = None, batch: Batch | None = None) -> Tensor:
    """(C m, k): what follows the layer of m stimuli, masked for C cells or not at all."""
    trace, part = state._trace, state._split
    values = dict(state._values)
    if batch is None or batch.stop - batch.start == len(state):
        values[part.cut] = state.activation
    else:
        values[part.cut] = state._rows(batch)
        values.update((x, values[x][batch.start : batch.stop]) for x in part.varying)
    changed = [x for x in part.changed if cells is None or x is not part.cut]
    fresh = copy.deepcopy([values[x] for x in changed])  # at once: views of one tensor stay so
    values.update(zip(changed, fresh, strict=True))
    steps, several = part.tail, 1 if cells is None else len(cells.ids)
    if cells is not None:
        if fusion.uses_triton(values[part.cut]):
            steps = fusion.run(trace, part, values, cells)
        elif behind := fusion.linear(trace, part, values, cells, several):
            steps = behind.run(values)
        else:
            masks = cells.masks().view(-1, *values[part.cut].shape[1:])
            values[part.cut] = mask_for_cells(values[part.cut], masks)
    once = set(part.varying) if several > 1 else set()  # what has a row a stimulus, not a cell
    for step in steps:
        values[step.node] = broadcast.run(trace, step.node, values, once, several)
        for x in step.dropped:
            del values[x]
    if any(version(t) != old for t, old in state._versions):
        raise LayerError("state: its tensors were written to after prefix() gave them")
    out: Tensor = values[trace.output]
    return out


def run_intact(state: State, room: int) -> Tensor:
    """(n, k): what the model gives without a hook."""
    return run_unmasked(state, room) if state._plain is None else state._plain


def run_unmasked(state: State, room: int) -> Tensor:
    """(n, k): what a hook gives that changes nothing; computed once a state."""
    if state._same is None:
        (state._same,) = in_batches(state, None, [0], 1, room)
    return state._same


def choose_together(state: State, cells: Cells, count: int) -> int:
    """How many of `count` cells run together, where the caller doesn't say."""
    act, part, trace = state._kept, state._split, state._trace
    values = {part.cut: act, **state._values}
    if act.device.type != "cpu" or fusion.linear(trace, part, values, cells, count):
        return count
    return cost.together(part, len(state))


def in_batches(
    state: State, cells: Cells | None, ids: list[int], together: int, room: int
) -> Tensor:
    """(C, n, k) of the cells `ids`, in batches that fit the budget; half as large out of memory."""
    part = state._split
    rows = max(1, min(room // max(1, part.peak), part.most or room))
    if not part.batchable:
        rows, together = len(state), 1
    todo = fit(Batch(ids, 0, len(state)), rows, together)
    places, out = {c: i for i, c in enumerate(ids)}, None
    while todo:
        batch = todo.pop(0)
        try:
            found = run_tail(state, None if cells is None else cells.some(batch.cells), batch)
        except torch.OutOfMemoryError:
            tried = len(batch.cells) * (batch.stop - batch.start)
            if tried == 1 or not part.batchable:
                raise
            if part.most is None:
                warnings.warn(
                    f"layer {part.layer}: out of memory with {tried} cells x images together; "
                    "going on with fewer",
                    OutOfMemoryWarning,
                    stacklevel=4,
                )
            part.most = tried // 2
            todo = [less for b in (batch, *todo) for less in fit(b, part.most, together)]
            continue
        found = found.unflatten(0, (len(batch.cells), -1))
        if out is None:
            out = found.new_empty(len(ids), len(state), *found.shape[2:])
        out[[places[c] for c in batch.cells], batch.start : batch.stop] = found
    assert out is not None
    return out


def copied(t: Tensor) -> Tensor:
    """A copy with the same strides, which clone() only keeps where there are no gaps."""
    t = t.detach()
    clone = t.clone()
    return clone if clone.stride() == t.stride() else copy.deepcopy(t)


def mask_for_cells(t: Tensor, masks: Tensor) -> Tensor:
    """(C n, …): the tensor once for each mask (C, …) of one stimulus, zero where it is true."""
    out = t.clone() if len(masks) == 1 else broadcast.tiled(t, len(masks))
    out.view(len(masks), *t.shape).masked_fill_(masks[:, None], 0)
    return out
