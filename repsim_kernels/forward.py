"""The rest of a network after a layer, for many masks of that layer's activation."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repsim_kernels import _arrays, _check, _fusion, _options
from repsim_kernels._dataflow import Split, Trace, Values, tensors, version
from repsim_kernels._fusion import Cells
from repsim_kernels.errors import DeviceError, DtypeError, LayerError, OptionError, ShapeError


class AblatedForward:
    """The rest of a network after a layer, for a batch of cell masks.

    Parameters
    ----------
    model : nn.Module
        Takes images (n, …) and gives a tensor (n, …); in eval mode, and traceable by ``torch.fx``.
        It is neither changed nor copied.
    layer : str
        A name from ``model.named_modules()``, of a module or a container that runs once in a pass
        and gives a tensor (n, …).

    Raises
    ------
    LayerError
        The layer is missing, never called or called more than once; the model is in training mode
        or can't be traced.

    Notes
    -----
    Where a prefix meets a new shape, layout or dtype of images, the cut is first tried on two of
    them against whole passes, which finds randomness and hidden state. No method tracks gradients.

    On CUDA, unless ``REPSIM_BACKEND=torch``, Triton kernels make the masked copies together with a
    ReLU or ReLU6 behind the layer; for several cells at once also with an eval-mode batch norm, or
    a 1x1 convolution or linear layer, which then need no copies.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        if layer not in modules:
            near = ", ".join(difflib.get_close_matches(layer, modules)) or "model.named_modules()"
            raise LayerError(f"layer: the model has no module {layer!r}; expected one of {near}")
        _check_eval(model)
        self.model, self.layer, self._module = model, layer, modules[layer]
        self._trace = Trace(model, self._module, layer)
        self._splits: dict[object, Split] = {}

    def prefix(self, images: Tensor) -> State:
        """Run the network up to the layer, and all else that does not depend on the layer.

        Parameters
        ----------
        images : tensor, (n, …)
            On the model's device; not written to.

        Returns
        -------
        state : State
            ``state.activation``, (n, …), is the layer's output with its own strides.

        Raises
        ------
        DtypeError, ShapeError, DeviceError
            Images that are no tensor, have no stimuli, or are on another device than the model.
        LayerError
            The layer or the model gives no tensor (n, …); the model writes to its own parameters
            or buffers, differs from a whole pass when cut here, or is in training mode.
        """
        if not isinstance(images, Tensor):
            raise DtypeError(f"images: {type(images).__name__}; expected a torch tensor")
        if images.ndim == 0 or len(images) == 0:
            raise ShapeError(f"images: shape {tuple(images.shape)}; expected (n, …) with n >= 1")
        home = next((p.device for p in self.model.parameters()), images.device)
        if images.device != home:
            raise DeviceError(f"images: on {images.device}; expected the model's device, {home}")
        _check_eval(self.model)
        with _without_grad():
            few = _copy(images[:2])
            key = few.shape, few.stride(), few.dtype, few.device
            if key not in self._splits:
                split = self._trace.split(_copy(few))
                split.batchable &= self._prove(split, few)
                self._splits[key] = split
            return self._head(self._splits[key], images)

    def intact(self, state: State) -> Tensor:
        """The network's output with nothing ablated; computed once a state.

        Parameters
        ----------
        state : State
            From `prefix` of this object.

        Returns
        -------
        logits : tensor, (n, k)
            Bit for bit ``model(images)``.

        Raises
        ------
        OptionError
            The state is of another object.
        LayerError
            The state's tensors were written to, or the model is in training mode.
        """
        if state._owner is not self:
            raise OptionError("state: made by another AblatedForward; expected one of this one")
        _check_eval(self.model)
        with _without_grad():
            if state._intact is None:
                state._intact = self._tail(state)
            return state._intact.clone()

    def logits(
        self, state: State, cells: Any, n_cells: int | None = None, memory: int | None = None
    ) -> Tensor:
        """The network's output with the layer's units of a cell set to zero, for every cell.

        Parameters
        ----------
        state : State
            From `prefix` of this object.
        cells : integer array or sequence, (p,), or boolean array, (C, p)
            The cell of each unit, 0 … n_cells - 1 or -1 for none, or the units of each cell, which
            may overlap. The p units are one stimulus of the activation flattened in C order.
        n_cells : int, optional
            C; by default the largest label + 1.
        memory : int, optional
            Bytes for cells that run together, at least one; by default one cell at a time on a CPU
            (the faster there), and up to half of what is free on CUDA. An estimate, from the
            tensors that are alive at once, without the workspaces of kernels.

        Returns
        -------
        logits : tensor, (C, n, k)
            One cell at a time: bit for bit the output under a forward hook that returns a masked
            clone; cells together: the same to rounding. Cells without units, or whose units are
            zero for all the images, don't run and have exactly the intact logits.

        Raises
        ------
        CellError, DtypeError
            Cells of a wrong length, range or type.
        OptionError
            A memory that is no positive number, or a state of another object.
        LayerError
            The state's tensors were written to, or the model is in training mode.

        Notes
        -----
        Where stimuli influence each other, or the tail takes in what is no tensor (n, …), cells
        run one at a time.
        """
        if memory is not None:
            memory = int(_options.number(memory, "memory", low=1))
        intact = self.intact(state)
        act = state.activation
        checked, n_cells = _check.cells(cells, act[0].numel(), n_cells)
        table = _arrays.to_torch(checked, str(act.device))  # (p,) labels or (C, p) membership
        with _without_grad():
            alive = (act != 0).any(0).reshape(-1)  # (p,)
            if table.dtype == torch.bool:
                runs = (table & alive).any(1)
            else:
                runs = torch.bincount(table[alive & (table >= 0)], minlength=n_cells) > 0
            out = intact.expand(n_cells, *intact.shape).clone()
            for ids in _batches(runs.nonzero()[:, 0], state._split, act, memory):
                ablated = self._tail(state, Cells(checked, table, ids))
                out[ids] = ablated.view(-1, *intact.shape)
            return out

    def _prove(self, split: Split, images: Tensor) -> bool:
        """Hold the cut network against the whole one; say whether cells may run together."""
        state = self._head(split, images)
        act = state.activation
        labels = -(np.arange(act[0].numel()) % 2)  # cell 0 is every second unit, cell 1 is empty
        table, ids = torch.from_numpy(labels).to(act.device), torch.arange(2, device=act.device)
        one, two = Cells(labels, table, ids[:1]), Cells(labels, table, ids)
        mask = one.masks().view(1, *act.shape[1:])
        half, intact = self._tail(state, one), self._tail(state)
        handle = self._module.register_forward_hook(lambda _m, _i, out: _masked(out, mask))
        try:
            whole = self.model(_copy(images))
        finally:
            handle.remove()
        if not (_close(half, whole) and _close(intact, self.model(_copy(images)))):
            raise LayerError(
                f"model: cut at {self.layer!r} it differs from a whole pass; expected one without "
                "randomness or hidden state, which uses the layer's output only as a value"
            )
        try:
            both = self._tail(state, two)
        except Exception:  # whatever comes of a batch size that is fixed somewhere
            return False
        return _close(both, torch.cat([half, intact]), least=1e-2)  # TF32 differs by 1e-3

    def _head(self, split: Split, images: Tensor) -> State:
        trace = self._trace
        values: Values = {trace.input: _copy(images) if split.copy_images else images}
        for step in split.head:
            values[step.node] = trace.run(step.node, values)
            if step.node is trace.cut and split.copy_activation:
                values[step.node] = _copy(values[step.node])
            for x in step.dropped:
                del values[x]
        return State(values[trace.cut], {x: values[x] for x in split.inputs}, split, self)

    def _tail(self, state: State, cells: Cells | None = None) -> Tensor:
        """(C n, k): what follows the layer, masked for C cells or not at all."""
        trace, split = self._trace, state._split
        values = {trace.cut: state.activation, **state._values}
        changed = [x for x in split.changed if cells is None or x is not trace.cut]
        fresh = copy.deepcopy([values[x] for x in changed])  # at once: views of one tensor stay so
        values.update(zip(changed, fresh, strict=True))
        steps = split.tail
        if cells is not None:
            if len(cells.ids) > 1:
                values.update((x, _tiled(values[x], len(cells.ids))) for x in split.varying)
            if _fusion.serves(state.activation):
                steps = _fusion.run(trace, split, values, cells)
            else:
                masks = cells.masks().view(-1, *state.activation.shape[1:])
                values[trace.cut] = _masked(state.activation, masks)
        for step in steps:
            values[step.node] = trace.run(step.node, values)
            for x in step.dropped:
                del values[x]
        if any(version(t) != old for t, old in state._versions):
            raise LayerError("state: its tensors were written to after prefix() gave them")
        out: Tensor = values[trace.output]
        return out


class State:
    """What the head of a network gave for some images; made by `AblatedForward.prefix`.

    Attributes
    ----------
    activation : tensor, (n, …)
        The layer's output, with its own strides; a state whose activation was written to raises.
    """

    def __init__(
        self, activation: Tensor, values: Values, split: Split, owner: AblatedForward
    ) -> None:
        self.activation = activation
        self._values, self._split, self._owner = values, split, owner
        self._versions = [(t, version(t)) for t in (activation, *tensors([*values.values()]))]
        self._intact: Tensor | None = None


@contextmanager
def _without_grad() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():  # inference tensors don't count writes
        yield


def _copy(t: Tensor) -> Tensor:
    """A copy with the same strides, which clone() only keeps where there are no gaps."""
    t = t.detach()
    clone = t.clone()
    return clone if clone.stride() == t.stride() else copy.deepcopy(t)


def _tiled(t: Tensor, cells: int) -> Tensor:
    """(cells n, …): the tensor once a cell, with its order of dimensions in memory."""
    strides = torch.empty_like(t, device="meta").stride()
    order = sorted(range(t.ndim), key=strides.__getitem__, reverse=True)
    sizes = cells * len(t), *t.shape[1:]
    out = t.new_empty([sizes[d] for d in order]).permute([order.index(d) for d in range(t.ndim)])
    out.view(cells, *t.shape).copy_(t)
    return out


def _masked(t: Tensor, masks: Tensor) -> Tensor:
    """(C n, …): the tensor once for each mask (C, …) of one stimulus, zero where it is true."""
    out = t.clone() if len(masks) == 1 else _tiled(t, len(masks))
    out.view(len(masks), *t.shape).masked_fill_(masks[:, None], 0)
    return out


def _close(got: Tensor, want: Tensor, least: float = 0.0) -> bool:
    """Equal up to rounding, at the scale of the largest value."""
    if got.shape != want.shape or not want.is_floating_point() or not want.numel():
        return torch.equal(got, want)
    slack = max(least, torch.finfo(want.dtype).eps ** 0.5)
    scale = float(want.abs().nan_to_num(0, 0).max())
    return torch.allclose(got, want, rtol=0, atol=slack * scale, equal_nan=True)


def _batches(ids: Tensor, split: Split, activation: Tensor, memory: int | None) -> list[Tensor]:
    """The cells to run, in groups that fit into memory."""
    device, cells = activation.device, 1
    if memory is None and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        memory = min(free // 2, 2**33)  # a device is busy long before it holds 2^31 numbers
    if memory is not None and split.batchable:
        cells = max(1, memory // max(1, split.bytes_per_stimulus * len(activation)))
    return [ids[i : i + cells] for i in range(0, len(ids), cells)]


def _check_eval(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training:
            what = f"{name!r} is" if name else "it is"
            raise LayerError(f"model: {what} in training mode; expected model.eval()")
