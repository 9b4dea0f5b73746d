"""`AblatedForward`: the output of a network with cells of a layer's neurons ablated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from repsim_kernels import _check_cells, _dispatch, _options
from repsim_kernels.errors import LayerError, OptionError
from repsim_kernels.forward import checks, contexts, cost, fills, passes, sites, verify
from repsim_kernels.forward.cost import Cost
from repsim_kernels.forward.cuts import Cuts
from repsim_kernels.forward.dataflow import Split
from repsim_kernels.forward.inputs import Call, Inputs
from repsim_kernels.forward.masks import Ablations
from repsim_kernels.forward.memory import resolve_batch_budget
from repsim_kernels.forward.passes import State
from repsim_kernels.forward.trace import Trace, keep_attributes


class AblatedForward:
    """The output of a network with cells of a layer's neurons ablated.

    The network up to the layer runs once for all cells; only the rest runs for each cell.

    Parameters
    ----------
    model : nn.Module
        Takes images (n, …) and returns a tensor (n, …). It must be in eval mode and traceable by
        ``torch.fx`` or ``torch.export``. It is neither changed nor copied. A model compiled by
        ``torch.compile`` runs uncompiled; ``model(images)`` below means that uncompiled pass.
    layer : str or sequence of str
        A name from ``model.named_modules()``: a module or container that runs once per pass and
        returns a tensor (n, …). Several layers share one trace and the pass of `prefixes`.

    Attributes
    ----------
    layers : tuple of str
        The layers, without duplicates.

    Raises
    ------
    LayerError
        The layer is missing from the model, is not called exactly once, or is in TorchScript. Or
        the model is not a module, is in training mode, has parameters without shapes or values, or
        is a ``DataParallel`` over several devices.
    OptionError
        REPSIM_BACKEND does not name a backend.

    Notes
    -----
    The first time it sees images of a new shape, layout or dtype, `prefix` compares the cut network
    on two of them with whole passes under a forward hook, which also reveals randomness and hidden
    state. If the ``torch.fx`` trace differs from these passes, for example because ``forward``
    checks a type, a ``torch.export`` trace for each shape is compared on all the images instead.

    Operations run under the autocast state, attention backends and default dtype that ``forward``
    sets for them. TF32 follows PyTorch's switches. No method tracks gradients.

    PyTorch runs a transformer encoder layer as one fused operation unless a module inside it has a
    hook; the two ways differ by rounding. `logits` matches the hook bit for bit, so a layer inside
    an encoder layer moves that encoder layer, and no other, off its fast path. Cells without effect
    match the hook too; `intact` matches the model without a hook. An exported network keeps all
    encoder layers and attention off the fast path, and agrees with the hook up to rounding.

    On CUDA, unless ``REPSIM_BACKEND=torch``, a Triton kernel sets cells to zero and applies a ReLU
    or ReLU6 that follows the layer. With several cells per pass it also applies an eval-mode batch
    norm, or a 1x1 convolution or linear layer, which then needs no masked copies.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import repsim_kernels as rk
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    >>> forward = rk.forward.AblatedForward(model, "1")
    >>> forward
    AblatedForward(Sequential, layers=['1'], device='cpu')
    >>> state = forward.prefix(torch.ones(2, 4))
    >>> forward.logits(state, [0, 0, 1, 1, 2, 2]).shape  # cells, images, outputs
    torch.Size([3, 2, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | Sequence[str],
        *,
        output: int | str | None = None,
        call: Call | None = None,
    ) -> None:
        self.layers = checks.resolve_layers(model, layer)
        output, call = sites.check_output(output), checks.check_call(call)
        checks.check_eval(model)
        checks.check_tensors(model)
        _dispatch.get_requested_backend()  # during a pass, its error would look like the model's
        self.model = model
        with contexts.run_eagerly():
            self._cuts = Cuts(model, self.layers, output, call)

    def __repr__(self) -> str:
        first_layers = self.layers[:4]
        names = ", ".join(map(repr, first_layers))
        more = "" if first_layers == self.layers else f", … {len(self.layers)} in all"
        tensors = [*self.model.parameters(), *self.model.buffers()]
        device = f", device={str(tensors[0].device)!r}" if tensors else ""
        return f"AblatedForward({type(self.model).__name__}, layers=[{names}{more}]{device})"

    def prefix(self, images: Tensor) -> State:
        """Run the network up to the layer, with everything that does not depend on the layer.

        Parameters
        ----------
        images : tensor, (n, …)
            On the model's device. They are not changed.

        Returns
        -------
        state : State
            What `logits` and `intact` need. ``state.activation``, (n, …), is the layer's output
            with its own strides.

        Raises
        ------
        DtypeError, ShapeError, DeviceError
            The images are not a dense tensor with n >= 1 on the model's device.
        LayerError
            The model raises an error for these images, can't be traced, is random, writes to its
            own parameters or buffers, differs from a whole pass when cut here, or is in training
            mode. Or its output or the layer's is not a dense tensor (n, …), or has no neurons.
        OptionError
            This object has several layers; use `prefixes`.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> import repsim_kernels as rk
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
        >>> rk.forward.AblatedForward(model, "1").prefix(torch.ones(2, 4))
        State(layer='1', images=2, activation=(2, 6), dtype='float32', device='cpu')
        """
        if len(self.layers) > 1:
            raise OptionError(
                f"layer: this object has {len(self.layers)} layers; expected one, or use prefixes()"
            )
        inputs = checks.check_images(self.model, images)
        with contexts.run_eagerly():
            (layer,) = self.layers
            state = passes.run_head(*self._cuts.find(layer, inputs), inputs)
            return self._adopt({layer: state}, inputs)[layer]

    def prefixes(self, images: Tensor, layers: Sequence[str] | None = None) -> dict[str, State]:
        """Run the network once, and return a state for each of several layers.

        Parameters
        ----------
        images : tensor, (n, …)
            On the model's device. They are not changed.
        layers : sequence of str, optional
            Some of this object's layers, in any order; by default all.

        Returns
        -------
        states : dict of str to State
            For each layer, in the given order, the state that `prefix` would return. These states
            also hold the output without ablation, so `intact` needs no further pass.

        Raises
        ------
        DtypeError, ShapeError, DeviceError, LayerError
            As for `prefix`.
        OptionError
            A layer is not one of this object's.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> import repsim_kernels as rk
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
        >>> states = rk.forward.AblatedForward(model, ["0", "1"]).prefixes(torch.ones(2, 4))
        >>> {name: tuple(state.activation.shape) for name, state in states.items()}
        {'0': (2, 6), '1': (2, 6)}
        """
        names = self._select_layers(layers)
        inputs = checks.check_images(self.model, images)
        with contexts.run_eagerly():
            cuts = {name: self._cuts.find(name, inputs) for name in names}
            states: dict[str, State] = {}
            shared: dict[Trace, dict[str, Split]] = {}
            for name, (trace, split) in cuts.items():
                if split.no_shared_memory:
                    shared.setdefault(trace, {})[name] = split
                else:
                    states[name] = passes.run_head(trace, split, inputs)
            for trace, splits in shared.items():
                states |= passes.run_heads(trace, splits, inputs)
            return self._adopt({name: states[name] for name in names}, inputs)

    def intact(self, state: State, *, memory: int | str | None = None) -> Tensor:
        """The network's output without ablation; computed once for each state.

        Parameters
        ----------
        state : State
            From `prefix` or `prefixes` of this object.
        memory : int or str, optional
            As in `logits`.

        Returns
        -------
        logits : tensor, (n, k)
            Bit-identical to ``model(images)``. A forward hook that changes nothing can still change
            the output by rounding; for an empty cell, `logits` returns what such a hook yields.

        Raises
        ------
        OptionError
            The state belongs to another object, or `memory` is not a size.
        LayerError
            The state's tensors were written to, or the model is in training mode.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> import repsim_kernels as rk
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
        >>> forward = rk.forward.AblatedForward(model, "1")
        >>> images = torch.ones(2, 4)
        >>> torch.equal(forward.intact(forward.prefix(images)), model(images))
        True
        """
        self._check_state(state)
        budget = resolve_batch_budget(memory, state._data.device)
        with contexts.run_eagerly():
            return passes.run_intact(state, budget).clone()

    def logits(
        self,
        state: State,
        cells: Any,
        n_cells: int | None = None,
        *,
        fill: Any = "zero",
        seed: int = 0,
        batch: int | None = None,
        memory: int | str | None = None,
    ) -> Tensor:
        """The network's output with the neurons of one cell replaced, for every cell.

        Parameters
        ----------
        state : State
            From `prefix` or `prefixes` of this object.
        cells : integer or boolean array, or sparse membership
            Labels give each neuron's cell, 0 … n_cells - 1, or -1 for no cell; a boolean mask gives
            the neurons of one cell. Both are (p,), in the C order of one image's activation (…), or
            broadcast to its shape. The cells of a membership may overlap: booleans (C, p), a SciPy
            CSR array (C, p), or a tuple (indptr, indices).
        n_cells : int, optional
            C; by default the largest label + 1.
        fill : {"zero", "mean", "resample"}, number, array or State
            What a cell's neurons become: zero; each neuron's mean over the images of `state` (for a
            mean over others, pass an array); its value for another of these images; numbers of the
            activation's dtype that broadcast to (n, …); or the activation of another state of the
            same layer, for n other images (patching).
        seed : int
            For "resample": the images are permuted by the first permutation drawn by
            ``numpy.random.default_rng(seed)`` that moves every image.
        batch : int, optional
            The most cells to run in one pass. By default as many as fit in `memory` on CUDA, and
            one on a CPU, or more if one cell has too few images to amortise reading the weights, or
            if the pass stays below 16 MiB.
        memory : int or str, optional
            Bytes for one pass, or text such as "8GiB". It limits the cells, and if necessary the
            images, of one pass. By default half of the free memory, on CUDA at most 8 GiB. Memory
            use is estimated from the tensors alive at one moment, without the workspaces of
            kernels. If a GPU still runs out of memory, passes are half as large from then on.

        Returns
        -------
        logits : tensor, (C, n, k)
            With ``batch=1`` and enough memory, bit-identical to the output under a forward hook
            that writes the fill into a clone; otherwise equal up to rounding. Cells that the fill
            changes for no image get the output under a hook that returns a clone.

        Raises
        ------
        CellError, DtypeError, ShapeError, DeviceError
            The cells or the fill have the wrong length, range, shape, dtype or device.
        OptionError
            `fill` is no such name, `batch` is not a count, `memory` is not a size, or a state
            belongs to another object or layer.
        LayerError
            The states' tensors were written to, or the model is in training mode.

        Warns
        -----
        OutOfMemoryWarning
            A GPU ran out of memory, and passes became smaller.

        Notes
        -----
        If images influence each other, or the rest of the network reads a value that is not a
        tensor (n, …), each pass has one cell and all images.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> import repsim_kernels as rk
        >>> model = nn.Sequential(nn.Identity(), nn.Linear(3, 1, bias=False)).eval()
        >>> _ = model[1].weight.data.fill_(1)
        >>> forward = rk.forward.AblatedForward(model, "0")
        >>> state = forward.prefix(torch.tensor([[1.0, 2.0, 4.0]]))
        >>> forward.intact(state)
        tensor([[7.]])
        >>> forward.logits(state, [0, 1, 1]).flatten()  # without neuron 0; without neurons 1 and 2
        tensor([6., 1.])
        >>> other = forward.prefix(torch.tensor([[10.0, 20.0, 40.0]]))
        >>> forward.logits(state, [0, 1, 1], fill=other).flatten()
        tensor([16., 61.])
        """
        batch = None if batch is None else _options.check_count(batch, "batch")
        seed = _options.check_count(seed, "seed", minimum=0)
        self._check_state(state)
        act = state._data
        budget = resolve_batch_budget(memory, act.device)
        shape = tuple(act.shape[1:])
        checked, n_cells = _check_cells.check_cells(cells, act[0].numel(), n_cells, shape=shape)
        with contexts.run_eagerly():
            ablations = Ablations(checked, n_cells, act.device, fills.make_fill(fill, state, seed))
            return passes.run_ablations(state, ablations, batch, budget)

    def costs(
        self, images: Tensor, layers: Sequence[str] | None = None, *, timed: bool = True
    ) -> dict[str, Cost]:
        """What the network costs before and after each layer, measured in a few passes.

        Parameters
        ----------
        images : tensor, (n, …)
            As many as will be passed to `prefix`.
        layers : sequence of str, optional
            Some of this object's layers; by default all.
        timed : bool
            Whether to time passes of all the images. If not, the seconds are NaN.

        Returns
        -------
        costs : dict of str to Cost
            The cost for each layer, in the given order.

        Raises
        ------
        DtypeError, ShapeError, DeviceError, LayerError
            As for `prefix`.
        OptionError
            A layer is not one of this object's, or `timed` is not a boolean.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> import repsim_kernels as rk
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
        >>> costs = rk.forward.AblatedForward(model, "1").costs(torch.ones(2, 4), timed=False)
        >>> costs["1"].head_flops, costs["1"].tail_flops
        (48.0, 36.0)
        """
        names, timed = self._select_layers(layers), _options.check_flag(timed, "timed")
        inputs = checks.check_images(self.model, images)
        with contexts.run_eagerly():
            cuts = {name: self._cuts.find(name, inputs) for name in names}
            traces = {trace for trace, _ in cuts.values()} if timed else set()
            times = {trace: cost.time_operations(trace, inputs.copy()) for trace in traces}
            return {
                name: cost.summarize(split, times.get(trace), len(inputs))
                for name, (trace, split) in cuts.items()
            }

    def count_heads(self, layer: str) -> int:
        """The number of heads of a layer such as "block.attn:heads".

        Parameters
        ----------
        layer : str
            One of this object's layers.

        Returns
        -------
        n_heads : int

        Raises
        ------
        LayerError
            The layer is not one of this object's, or not the heads of an attention module.

        Examples
        --------
        >>> from torch import nn
        >>> import repsim_kernels as rk
        >>> model = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True).eval()
        >>> rk.forward.AblatedForward(model, "self_attn:heads").count_heads("self_attn:heads")
        4
        """
        site = self._cuts.sites.get(layer)
        if site is None or site.n_heads is None:
            raise LayerError(
                f"layer: {_options.short_repr(layer)}; expected one of this object's layers that "
                "is an attention module's heads, 'module:heads'"
            )
        return site.n_heads

    def _select_layers(self, layers: Sequence[str] | None) -> tuple[str, ...]:
        return (
            self.layers if layers is None else _options.check_choices(layers, "layers", self.layers)
        )

    def _check_state(self, state: State) -> None:
        if not isinstance(state, State):
            raise OptionError(f"state: {_options.short_repr(state)}; expected one from prefix()")
        if state._owner is not self:
            raise OptionError("state: made by another AblatedForward; expected one from this one")
        checks.check_eval(self.model)

    def _adopt(self, states: dict[str, State], inputs: Inputs) -> dict[str, State]:
        """Become the owner of states, and add the model's own output to those that need it."""
        intact = None
        if any(state._needs_intact for state in states.values()):
            with keep_attributes(self.model):
                intact = verify.run_intact(self._cuts.network, inputs)
        for state in states.values():
            state._set_owner(self, intact)
        return states
