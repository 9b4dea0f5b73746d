"""A network cut at its layers, and the passes of what follows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels.errors import OptionError
from repsim_kernels.forward import checks, contexts, cost, passes, verify
from repsim_kernels.forward.cost import Cost
from repsim_kernels.forward.cuts import Cuts
from repsim_kernels.forward.dataflow import Split
from repsim_kernels.forward.fusion import Cells
from repsim_kernels.forward.memory import for_a_batch, resolve_budget
from repsim_kernels.forward.passes import State, copied
from repsim_kernels.forward.trace import Trace, keep_attributes


class AblatedForward:
    """The rest of a network after a layer, for a batch of cell masks.

    Parameters
    ----------
    model : nn.Module
        Takes images (n, …) and gives a tensor (n, …); in eval mode, and traceable by ``torch.fx``
        or ``torch.export``. It is neither changed nor copied. A model compiled by ``torch.compile``
        runs uncompiled, and ``model(images)`` below means that.
    layer : str or sequence of str
        A name from ``model.named_modules()``, of a module or a container that runs once in a pass
        and gives a tensor (n, …); or several, which then share one trace and `prefixes`.

    Raises
    ------
    LayerError
        The layer is no name, is missing, never called, called more than once or in TorchScript; or
        the model is no module, is in training mode, has lazy parameters that no batch has given a
        shape yet, is on the meta device, or is a ``DataParallel`` over several devices.
    OptionError
        REPSIM_BACKEND names no backend.

    Notes
    -----
    Where a prefix meets a new shape, layout or dtype of images, the cut is first compared on two of
    them with whole passes under a forward hook, which finds randomness and hidden state. A trace by
    ``torch.fx`` that differs from them, because ``forward`` asks for a type for example, is
    replaced by one of ``torch.export``, which is compared on all the images, once for each shape.
    Autocast, the backends of attention and the default dtype are what ``forward`` sets them to. No
    method tracks gradients. TF32 is as PyTorch's switches say.

    PyTorch's transformer encoder layers run as one fused operation unless a module inside has a
    hook, and the two ways differ by rounding. `logits` has the bits of the hook, so a layer inside
    an encoder layer takes that one off its fast path, and no other. Cells without effect have these
    bits too; `intact` has those of the model without a hook. An exported network takes all of its
    encoder layers and attention off the fast path, and agrees with the hook up to rounding.

    On CUDA, unless ``REPSIM_BACKEND=torch``, Triton kernels make the masked copies together with a
    ReLU or ReLU6 behind the layer; for several cells at once also with an eval-mode batch norm, or
    a 1x1 convolution or linear layer, which then need no copies.
    """

    def __init__(self, model: nn.Module, layer: str | Sequence[str]) -> None:
        self.layers = checks.layer_names(model, layer)
        checks.check_eval(model)
        checks.check_tensors(model)
        _dispatch.named_backend()  # a wrong REPSIM_BACKEND would look like the model's in a pass
        self.model = model
        with contexts.run_eagerly():
            self._cuts = Cuts(model, self.layers)

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
            Images that are no dense tensor, have no stimuli, or are on another device than the
            model.
        LayerError
            The model itself can't take the images; it can't be traced; the layer or the model gives
            no dense tensor (n, …), or the layer one without units; the model is random or writes to
            its own parameters or buffers, differs from a whole pass when cut here, or is in
            training mode.
        OptionError
            There are several layers: `prefixes` is for them.
        """
        if len(self.layers) > 1:
            raise OptionError(f"layer: {len(self.layers)} of them; expected one, or prefixes()")
        checks.check_images(self.model, images)
        with contexts.run_eagerly():
            (layer,) = self.layers
            state = passes.run_head(*self._cuts.find(layer, images), images)
            return self._claim({layer: state}, images)[layer]

    def prefixes(self, images: Tensor, layers: Sequence[str] | None = None) -> dict[str, State]:
        """Run the network once, and keep what the passes after each of several layers need.

        Parameters
        ----------
        images : tensor, (n, …)
            On the model's device; not written to.
        layers : sequence of str, optional
            Some of this object's layers; all by default.

        Returns
        -------
        states : dict of str to State
            By layer, in their order: those that `prefix` gives for each by itself. They hold the
            intact logits as well.

        Raises
        ------
        DtypeError, ShapeError, DeviceError, LayerError
            As `prefix`.
        OptionError
            A layer that is not this object's.
        """
        wanted = self._wanted(layers)
        checks.check_images(self.model, images)
        with contexts.run_eagerly():
            cuts = {name: self._cuts.find(name, images) for name in wanted}
            states: dict[str, State] = {}
            shared: dict[Trace, dict[str, Split]] = {}
            for name, (trace, part) in cuts.items():
                if part.apart:
                    shared.setdefault(trace, {})[name] = part
                else:
                    states[name] = passes.run_head(trace, part, images)
            for trace, parts in shared.items():
                states |= passes.run_heads(trace, parts, images)
            return self._claim({name: states[name] for name in wanted}, images)

    def intact(self, state: State, *, memory: int | str | None = None) -> Tensor:
        """The network's output with nothing ablated and no hook; computed once a state.

        Parameters
        ----------
        state : State
            From `prefix` of this object.
        memory : int or str, optional
            As in `logits`.

        Returns
        -------
        logits : tensor, (n, k)
            Bit for bit ``model(images)``. What a hook gives that changes nothing, which can differ
            by rounding, is the result of `logits` for a cell without units.

        Raises
        ------
        OptionError
            The state is of another object, or a memory that is no size.
        LayerError
            The state's tensors were written to, or the model is in training mode.
        """
        self._own(state)
        room = for_a_batch(resolve_budget(memory, state._kept.device), state._kept.device)
        with contexts.run_eagerly():
            return passes.run_intact(state, room).clone()

    def logits(
        self,
        state: State,
        cells: Any,
        n_cells: int | None = None,
        *,
        batch: int | None = None,
        memory: int | str | None = None,
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
        batch : int, optional
            Cells that run together, at most. By default, on a CPU, one where its stimuli alone keep
            the products busy, and more where they would wait for the weights; on CUDA as many as
            `memory` takes.
        memory : int or str, optional
            Bytes for what runs together, or text such as "8GiB": fewer cells, or not all stimuli of
            a cell, run at a time. By default half of what is free; on CUDA 8 GiB at most. An
            estimate, from the tensors that are alive at once, without the workspaces of kernels.
            Where a GPU runs out of memory all the same, half as much runs together from then on.

        Returns
        -------
        logits : tensor, (C, n, k)
            With ``batch=1`` and memory for it, bit for bit the output under a forward hook that
            returns a masked clone; else the same to rounding. Cells without units, or whose units
            are zero for all the images, don't run: all have the same bits, of a hook that returns
            a clone.

        Raises
        ------
        CellError, DtypeError
            Cells of a wrong length, range or type.
        OptionError
            A batch that is no count, a memory that is no size, or a state of another object.
        LayerError
            The state's tensors were written to, or the model is in training mode.

        Warns
        -----
        OutOfMemoryWarning
            A GPU ran out of memory, and less runs together.

        Notes
        -----
        Where stimuli influence each other, or the tail takes in what is no tensor (n, …), cells
        run one at a time, with all stimuli.

        A linear layer directly behind the masks takes one product for all cells of a partition,
        W(x ⊙ m_c) = W x - W(x ⊙ (1 - m_c)), where that is the cheaper.
        """
        batch = None if batch is None else _options.count(batch, "batch")
        self._own(state)
        act = state._kept
        room = for_a_batch(resolve_budget(memory, act.device), act.device)
        checked, n_cells = _check.cells(cells, act[0].numel(), n_cells)
        table = torch.as_tensor(checked, device=act.device)  # (p,) labels or (C, p) membership
        with contexts.run_eagerly():
            unmasked = passes.run_unmasked(state, room)
            alive = (act != 0).any(0).reshape(-1)  # (p,)
            if table.dtype == torch.bool:
                runs = (table & alive).any(1)
            else:
                runs = torch.bincount(table[alive & (table >= 0)], minlength=n_cells) > 0
            out = unmasked.expand(n_cells, *unmasked.shape).clone()
            ids = runs.nonzero()[:, 0].tolist()
            if ids:
                masks = Cells(checked, table, torch.arange(n_cells, device=act.device))
                together = batch or passes.choose_together(state, masks, len(ids))
                out[ids] = passes.in_batches(state, masks, ids, together, room)
            return out

    def costs(
        self, images: Tensor, layers: Sequence[str] | None = None, *, timed: bool = True
    ) -> dict[str, Cost]:
        """What the network takes before and after each layer, from a few passes.

        Parameters
        ----------
        images : tensor, (n, …)
            As many as will run together.
        layers : sequence of str, optional
            Some of this object's layers; all by default.
        timed : bool
            Whether to time passes of all the images; without it seconds are NaN.

        Returns
        -------
        costs : dict of str to Cost

        Raises
        ------
        DtypeError, ShapeError, DeviceError, LayerError
            As `prefix`.
        OptionError
            A layer that is not this object's.
        """
        wanted, timed = self._wanted(layers), _options.flag(timed, "timed")
        checks.check_images(self.model, images)
        with contexts.run_eagerly():
            cuts = {name: self._cuts.find(name, images) for name in wanted}
            traces = {trace for trace, _ in cuts.values()} if timed else set()
            times = {trace: cost.seconds(trace, copied(images)) for trace in traces}
            return {
                name: cost.cost(part, times.get(trace), len(images))
                for name, (trace, part) in cuts.items()
            }

    def _wanted(self, layers: Sequence[str] | None) -> tuple[str, ...]:
        return self.layers if layers is None else _options.options(layers, "layers", self.layers)

    def _own(self, state: State) -> None:
        if not isinstance(state, State):
            raise OptionError(f"state: {_options.shown(state)}; expected one that prefix() gave")
        if state._owner is not self:
            raise OptionError("state: made by another AblatedForward; expected one of this one")
        checks.check_eval(self.model)

    def _claim(self, states: dict[str, State], images: Tensor) -> dict[str, State]:
        """Take ownership of states of these images, with the model's own logits where needed."""
        plain = None
        if any(state.needs_plain for state in states.values()):
            with keep_attributes(self.model):
                plain = verify.run_plain(self.model, images)
        for state in states.values():
            state.claim(self, plain)
        return states
