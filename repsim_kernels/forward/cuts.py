"""Cut a network at its layers: trace it, and verify each cut on first use."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, fx, nn

from repsim_kernels._arrays import dtype_name
from repsim_kernels.errors import LayerError
from repsim_kernels.forward import contexts, verify
from repsim_kernels.forward.dataflow import (
    NESTED_HINT,
    Split,
    check_unwritten,
    split_at_layer,
    watch_writes,
)
from repsim_kernels.forward.inputs import Call, Form, Inputs, Network, call_network
from repsim_kernels.forward.sites import Output, resolve_sites
from repsim_kernels.forward.trace import (
    FUSED,
    TRANSIENT,
    Trace,
    Untraceable,
    first_line,
    is_within,
    keep_attributes,
)

# Raised again unchanged: these already have a message for the user, or are not about the cut.
_RERAISED = LayerError, *TRANSIENT


class Cut(NamedTuple):
    """A traced network, and its split at one layer."""

    trace: Trace
    split: Split


@dataclasses.dataclass
class _Shared:
    """What the cuts at several layers share, for the same inputs."""

    intact: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # by number of stimuli
    flops: dict[fx.Node, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Attempt:
    """The result of cutting the network with one of the two tracers."""

    cut: Cut | None = None  # a cut that agrees with a hook, at least up to rounding
    final: bool = False  # no other cut can agree better
    error: Exception | None = None  # raised by the cut, although the network itself runs


class Cuts:
    """A model's cuts at its layers, for images of any kind.

    A trace by torch.fx works for any number of images. If it fails, or its result is not
    bit-identical to a hook's, torch.export traces the model for images of this shape, in any
    number that takes the same path through the model. If that fails too, or for one image, it
    traces the model for exactly this number.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str],
        output: Output = None,
        call: Call | None = None,
    ) -> None:
        self._model, self._output = model, output
        self.sites = resolve_sites(model, layers, output)
        self.network = Network(model, call or call_network)
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._fx_traces: dict[object, Trace | Untraceable] = {}
        self._exports: dict[object, list[Trace | Untraceable]] = {}
        self._served_by: dict[object, Trace | None] = {}
        self._dynamic_cuts: dict[tuple[Trace, str], Cut | None] = {}
        self._fx_attempts: dict[object, _Attempt] = {}
        self._export_cuts: dict[object, Cut] = {}
        for layer in layers if call is None else ():  # otherwise the form of inputs isn't known
            trace = self._get_fx_trace(layer)
            if isinstance(trace, Trace):
                trace.find_cut(layer)

    def find(self, layers: Collection[str], inputs: Inputs) -> dict[str, Cut]:
        """Return the network cut at each layer, for inputs like these; LayerError if that fails."""
        shared = _Shared()
        return {layer: self._find(layer, inputs, shared) for layer in layers}

    def _find(self, layer: str, inputs: Inputs, shared: _Shared) -> Cut:
        sample = inputs.take(2)
        key = layer, _make_key(sample)
        if key not in self._fx_attempts:
            with keep_attributes(self._model):
                self._fx_attempts[key] = self._cut_by_fx(layer, sample, shared)
        attempt = self._fx_attempts[key]
        if attempt.cut is not None and attempt.final:
            return attempt.cut
        with keep_attributes(self._model):
            dynamic = self._cut_dynamically(layer, inputs, shared)
        if dynamic is not None:
            return dynamic
        key = layer, _make_key(inputs)
        if key not in self._export_cuts:
            with keep_attributes(self._model):
                cut = self._cut_by_export(layer, inputs, attempt, shared)
            if cut is attempt.cut:
                attempt.final = True
                return cut
            self._export_cuts[key] = cut
        return self._export_cuts[key]

    def _run_intact(self, inputs: Inputs, shared: _Shared) -> Tensor:
        if len(inputs) not in shared.intact:
            shared.intact[len(inputs)] = verify.run_intact(self.network, inputs)
        return shared.intact[len(inputs)]

    def _cut_by_fx(self, layer: str, sample: Inputs, shared: _Shared) -> _Attempt:
        trace = self._get_fx_trace(layer, sample.form)
        if isinstance(trace, Untraceable):
            return _Attempt()
        try:
            intact = self._run_intact(sample, shared)
        except _RERAISED:
            raise
        except Exception:
            return _Attempt()  # it may accept another number of images
        expected = self._run_references(layer, sample, intact)
        try:
            attempt = self._try_trace(trace, layer, sample, expected, shared)
        except LayerError:
            if self.sites[layer].is_plain:
                raise
            return _Attempt()  # in the trace, another value may be where a pass has the tensor
        if attempt.cut is not None and not attempt.final:
            # If the network's own bits vary between passes, no cut can be bit-identical.
            again = verify.run_half_masked(self.network, self.sites[layer], sample)
            attempt.final = not torch.equal(again, expected.half_masked)
        return attempt

    def _cut_dynamically(self, layer: str, inputs: Inputs, shared: _Shared) -> Cut | None:
        """Cut the network exported for any number of images; None unless the bits are a hook's.

        Two of the images are compared if the export serves two; otherwise all are.
        """
        trace = self._get_dynamic_export(inputs)
        if trace is None:
            return None
        if (trace, layer) not in self._dynamic_cuts:
            sample = inputs.take(2)
            sample = sample if trace.serves(sample) else inputs
            attempt = _Attempt()
            try:
                expected = self._run_references(layer, sample, self._run_intact(sample, shared))
                attempt = self._try_trace(trace, layer, sample, expected, shared)
            except TRANSIENT:
                raise
            except Exception:  # the export for exactly this number of images raises it again
                attempt = _Attempt()
            self._dynamic_cuts[trace, layer] = attempt.cut if attempt.final else None
        return self._dynamic_cuts[trace, layer]

    def _cut_by_export(
        self, layer: str, inputs: Inputs, fx_attempt: _Attempt, shared: _Shared
    ) -> Cut:
        """Cut the exported network; return the cut by fx if the exported one is no better."""
        try:
            intact = self._run_intact(inputs, shared)
        except _RERAISED:
            raise
        except Exception as error:
            raise LayerError(self._describe_rejection(inputs, error)) from error
        expected = self._run_references(layer, inputs, intact)
        trace = self._get_export(inputs)
        if isinstance(trace, Untraceable):
            if fx_attempt.cut is not None:
                return fx_attempt.cut
            self._check_deterministic(inputs, intact)
            reason = self._get_fx_trace(layer, inputs.form)
            if isinstance(reason, Untraceable):
                raise LayerError(f"{reason}; torch.export can't either: {trace}") from trace
            raise LayerError(
                f"model: cut at {layer!r}, its torch.fx trace "
                f"{self._describe_failure(fx_attempt)}; torch.export can't trace it: {trace}"
            ) from trace
        try:
            attempt = self._try_trace(trace, layer, inputs, expected, shared)
        except LayerError:
            if fx_attempt.cut is None:
                raise
            return fx_attempt.cut
        cut = attempt.cut if attempt.final else fx_attempt.cut or attempt.cut
        if cut is None:
            self._check_deterministic(inputs, intact)
            raise LayerError(
                f"model: cut at {layer!r}, it {self._describe_failure(attempt)}; expected a model "
                "that uses the layer's output only as a value, and nothing that a trace can't see"
                f"{self._hint_at_nesting()}"
            )
        return cut

    def _try_trace(
        self,
        trace: Trace,
        layer: str,
        inputs: Inputs,
        expected: verify.ReferenceOutputs,
        shared: _Shared,
    ) -> _Attempt:
        """Cut a traced network, and compare it with passes of the network itself."""
        try:
            split = split_at_layer(trace, layer, inputs.copy(), shared.flops)
            agreement = verify.verify_cut(trace, split, inputs, expected)
        except _RERAISED:
            raise
        except Exception as error:  # the trace lacks something, such as autocast
            return _Attempt(error=error)
        if not agreement.close:
            return _Attempt()
        fused = self._find_slowed_modules(layer) or (trace.exported and self._has_fused_layers())
        split.hook_keeps_bits = agreement.hook_keeps_bits and not fused
        split.batchable &= agreement.batchable and not self._quantizes_batches()
        return _Attempt(Cut(trace, split), agreement.exact)

    def _run_references(
        self, layer: str, inputs: Inputs, intact: Tensor
    ) -> verify.ReferenceOutputs:
        try:
            outputs = verify.run_references(self.network, self.sites[layer], inputs, intact)
        except _RERAISED:
            raise
        except Exception as error:
            reason = first_line(error)
            if "nested" in reason.lower():
                reason = f"{reason.rstrip('.')}{self._hint_at_nesting()}"
            raise LayerError(
                f"model: it raises an error under a forward hook on {layer!r}: {reason}"
            ) from error
        if not verify.is_close(outputs.unmasked, intact):
            self._check_deterministic(inputs, intact)
            raise LayerError(
                f"model: replacing the output of {layer!r} by a clone changes the model's output; "
                "expected a model that uses the layer's output only as a value"
            )
        return outputs

    def _check_deterministic(self, inputs: Inputs, intact: Tensor) -> None:
        list_written = watch_writes(self._model)
        if not verify.is_close(verify.run_intact(self.network, inputs), intact):
            check_unwritten(list_written())
            raise LayerError(
                "model: two passes of the same images differ; "
                "expected a model without randomness or hidden state"
            )

    def _describe_failure(self, attempt: _Attempt) -> str:
        if attempt.error is None:
            return "differs from a whole pass"
        return f"raises an error that a whole pass doesn't ({first_line(attempt.error)})"

    def _hint_at_nesting(self) -> str:
        """Return a hint for models whose encoder may drop padding that a traced one computes."""
        encoders = (m for m in self._modules.values() if isinstance(m, nn.TransformerEncoder))
        return NESTED_HINT if any(m.enable_nested_tensor for m in encoders) else ""

    def _describe_rejection(self, inputs: Inputs, error: Exception) -> str:
        floating = (p for p in self._model.parameters() if p.is_floating_point())
        dtypes = " and ".join(dict.fromkeys(map(dtype_name, floating)))
        weights = f", with parameters of {dtypes}" if dtypes else ""
        kind = f"{inputs.describe()}{weights}"
        if self.network.call is not call_network:
            return f"call: it fails for these inputs, {kind}: {first_line(error)}"
        return f"model: it can't take these images, {kind}: {first_line(error)}"

    def _get_fx_trace(self, layer: str, form: Form = None) -> Trace | Untraceable:
        """Return the fx trace for a layer, shared by layers that slow the same modules."""
        slowed = self._find_slowed_modules(layer)
        key = slowed, form, contexts.read_switches()
        if key not in self._fx_traces:
            layers = [name for name in self.sites if self._find_slowed_modules(name) == slowed]
            self._fx_traces[key] = self._trace(layers, form=form)
        return self._fx_traces[key]

    def _get_export(self, inputs: Inputs) -> Trace | Untraceable:
        key = _make_key(inputs)
        if key not in self._exports:
            self._exports[key] = [self._trace(self.sites, inputs.copy())]
        return self._exports[key][0]

    def _get_dynamic_export(self, inputs: Inputs) -> Trace | None:
        """Return an export for any number of images that serves these; None if there is none."""

        def serves(export: Trace | Untraceable) -> TypeGuard[Trace]:
            return isinstance(export, Trace) and export.serves(inputs)

        if len(inputs) < 2:
            return None
        key = _make_key(inputs)
        if key not in self._served_by:
            exports = self._exports.setdefault(_make_key(inputs, any_count=True), [])
            if not any(map(serves, exports)):
                exports.append(self._trace(self.sites, inputs.copy(), dynamic=True))
            self._served_by[key] = next((x for x in exports if serves(x)), None)
        return self._served_by[key]

    def _trace(
        self,
        layers: Collection[str],
        like: Inputs | None = None,
        form: Form = None,
        dynamic: bool = False,
    ) -> Trace | Untraceable:
        options: dict[str, Any] = {"output": self._output, "call": self.network.call}
        try:
            return Trace(self._model, layers, like, form=form, dynamic=dynamic, **options)
        except Untraceable as error:
            return error

    def _find_slowed_modules(self, layer: str) -> tuple[str, ...]:
        """Return the modules that a hook for this layer moves off PyTorch's fast path.

        They are the encoder layers around it, and an attention module whose heads it is.
        """
        site = self.sites[layer]
        return tuple(
            name
            for name, module in self._modules.items()
            if (
                isinstance(module, nn.TransformerEncoderLayer) and is_within(site.module_name, name)
            )
            or (site.kind == "heads" and name == site.module_name)
        )

    def _quantizes_batches(self) -> bool:
        """Whether a module rounds each activation by the range of the whole batch."""
        kinds = (type(module).__module__ for module in self._modules.values())
        return any(kind.startswith("torch.ao.nn.quantized.dynamic") for kind in kinds)

    def _has_fused_layers(self) -> bool:
        return any(isinstance(module, FUSED) for module in self._modules.values())


def _make_key(inputs: Inputs, any_count: bool = False) -> tuple[object, ...]:
    return *inputs.make_key(any_count), contexts.read_switches()
