"""`CutForward`: runs a network up to its layers, once for all ablations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from repsim_kernels import _dispatch, _options
from repsim_kernels.errors import LayerError, OptionError
from repsim_kernels.forward import checks, contexts, cost, passes, sites, verify
from repsim_kernels.forward.cost import Cost
from repsim_kernels.forward.cuts import Cuts
from repsim_kernels.forward.dataflow import Split
from repsim_kernels.forward.inputs import Call, Images, Inputs
from repsim_kernels.forward.passes import State
from repsim_kernels.forward.trace import Trace, keep_attributes


class CutForward:
    """Runs a network up to its layers. `AblatedForward` documents the arguments."""

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
        return f"{type(self).__name__}({type(self.model).__name__}, layers=[{names}{more}]{device})"

    def prefix(self, images: Images) -> State:
        """Run the network up to the layer, with everything that does not depend on the layer.

        Parameters
        ----------
        images : tensor, (n, …), or dict or tuple of tensors
            On the model's device. They are not changed. The first tensor is (n, …); others with
            another first dimension are the same for all n.

        Returns
        -------
        state : State
            What `logits` and `intact` need. ``state.activation``, (n, …), is the layer's tensor (a
            module's output, its input, or what its heads return) with its own strides.

        Raises
        ------
        DtypeError, ShapeError, DeviceError
            The images are not dense tensors on the model's device, the first with n >= 1.
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
            ((layer, cut),) = self._cuts.find(self.layers, inputs).items()
            return self._adopt({layer: passes.run_head(*cut, inputs)}, inputs)[layer]

    def prefixes(self, images: Images, layers: Sequence[str] | None = None) -> dict[str, State]:
        """Run the network once, and return a state for each of several layers.

        Parameters
        ----------
        images : tensor, (n, …), or dict or tuple of tensors
            On the model's device. They are not changed. The first tensor is (n, …); others with
            another first dimension are the same for all n.
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
            cuts = self._cuts.find(names, inputs)
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

    def costs(
        self, images: Images, layers: Sequence[str] | None = None, *, timed: bool = True
    ) -> dict[str, Cost]:
        """What the network costs before and after each layer, measured in a few passes.

        Parameters
        ----------
        images : tensor, (n, …), or dict or tuple of tensors
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
            cuts = self._cuts.find(names, inputs)
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

    def _adopt(self, states: dict[str, State], inputs: Inputs) -> dict[str, State]:
        """Become the owner of states, and add the model's own output to those that need it."""
        intact = None
        if any(state._needs_intact for state in states.values()):
            with keep_attributes(self.model):
                intact = verify.run_intact(self._cuts.network, inputs)
        for state in states.values():
            state._set_owner(self, intact)
        return states
