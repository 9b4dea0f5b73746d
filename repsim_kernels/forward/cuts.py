"""The cuts of a network at its layers: traced, and compared with the network on first use."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from repsim_kernels._arrays import dtype_name
from repsim_kernels.errors import LayerError
from repsim_kernels.forward import contexts, verify
from repsim_kernels.forward.dataflow import (
    NOT_NESTED,
    Split,
    check_unwritten,
    split,
    watch_writes,
)
from repsim_kernels.forward.passes import copied
from repsim_kernels.forward.trace import (
    FUSED,
    TRANSIENT,
    Trace,
    Untraceable,
    first_line,
    is_within,
    keep_attributes,
)

_OWN = LayerError, *TRANSIENT  # with a message of their own, or not about the cut


class Cut(NamedTuple):
    trace: Trace
    split: Split


@dataclasses.dataclass
class _Attempt:
    """What came of a cut by one of the two tracers."""

    cut: Cut | None = None  # one that gives what a hook gives, at least up to rounding
    settled: bool = False  # there is no better one
    error: Exception | None = None  # what the cut raised where the network itself doesn't


class Cuts:
    """A model's cuts at its layers, for images of any kind.

    One trace by torch.fx serves any number of images. Where its result isn't bit-identical to a
    hook's, or fx can't trace the model, torch.export makes one for each shape.
    """

    def __init__(self, model: nn.Module, layers: Collection[str]) -> None:
        self._model, self._layers = model, layers
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._traces: dict[object, Trace | Untraceable] = {}
        self._exports: dict[object, Trace | Untraceable] = {}
        self._symbolic: dict[object, _Attempt] = {}
        self._exported: dict[object, Cut] = {}
        for layer in layers:
            trace = self._symbolic_trace(layer)
            if isinstance(trace, Trace):
                trace.cut(layer)

    def find(self, layer: str, images: Tensor) -> Cut:
        """The network cut at a layer, for images like these; raises LayerError without one."""
        few = images[:2]
        key = layer, _key_of(few)
        if key not in self._symbolic:
            with keep_attributes(self._model):
                self._symbolic[key] = self._cut_by_fx(layer, few)
        attempt = self._symbolic[key]
        if attempt.cut is not None and attempt.settled:
            return attempt.cut
        key = layer, _key_of(images)
        if key not in self._exported:
            with keep_attributes(self._model):
                cut = self._cut_by_export(layer, images, attempt)
            if cut is attempt.cut:
                attempt.settled = True
                return cut
            self._exported[key] = cut
        return self._exported[key]

    def _cut_by_fx(self, layer: str, few: Tensor) -> _Attempt:
        trace = self._symbolic_trace(layer)
        if isinstance(trace, Untraceable):
            return _Attempt()
        try:
            plain = verify.run_plain(self._model, few)
        except _OWN:
            raise
        except Exception:
            return _Attempt()  # it may take another number of images
        wanted = self._run_passes(layer, few, plain)
        attempt = self._try_trace(trace, layer, few, wanted)
        if attempt.cut is not None and not attempt.settled:
            # Where the network's own bits vary, a cut's can't be the same.
            again = verify.run_half(self._model, layer, self._modules[layer], few)
            attempt.settled = not torch.equal(again, wanted.half)
        return attempt

    def _cut_by_export(self, layer: str, images: Tensor, by_fx: _Attempt) -> Cut:
        """The cut of the exported network; or that by fx, where it is as good."""
        try:
            plain = verify.run_plain(self._model, images)
        except _OWN:
            raise
        except Exception as error:
            raise LayerError(self._describe_misfit(images, error)) from error
        wanted = self._run_passes(layer, images, plain)
        trace = self._exported_trace(images)
        if isinstance(trace, Untraceable):
            if by_fx.cut is not None:
                return by_fx.cut
            self._check_repeats(images, plain)
            reason = self._symbolic_trace(layer)
            if isinstance(reason, Untraceable):
                raise LayerError(f"{reason}; torch.export can't either: {trace}") from trace
            raise LayerError(
                f"model: cut at {layer!r} it {self._describe_failure(by_fx)} where torch.fx traces "
                f"it; torch.export can't trace it: {trace}"
            ) from trace
        try:
            attempt = self._try_trace(trace, layer, images, wanted)
        except LayerError:
            if by_fx.cut is None:
                raise
            return by_fx.cut
        cut = attempt.cut if attempt.settled else by_fx.cut or attempt.cut
        if cut is None:
            self._check_repeats(images, plain)
            raise LayerError(
                f"model: cut at {layer!r} it {self._describe_failure(attempt)}; expected one which "
                "uses the layer's output only as a value, and nothing that a trace can't see"
                f"{self._describe_nested()}"
            )
        return cut

    def _try_trace(
        self, trace: Trace, layer: str, images: Tensor, wanted: verify.Passes
    ) -> _Attempt:
        """Cut a traced network, and hold it against passes of the network itself."""
        try:
            part = split(trace, layer, copied(images))
            agreement = verify.compare(trace, part, images, wanted)
        except _OWN:
            raise
        except Exception as error:  # a trace that lost what an operation needs, such as autocast
            return _Attempt(error=error)
        if not agreement.close:
            return _Attempt()
        fused = self._slowed_by(layer) or (trace.exported and self._has_fused())
        part.plain = agreement.plain and not fused
        part.batchable &= agreement.together and not self._quantizes_batches()
        return _Attempt(Cut(trace, part), agreement.exact)

    def _run_passes(self, layer: str, images: Tensor, plain: Tensor) -> verify.Passes:
        try:
            wanted = verify.run_passes(self._model, layer, self._modules[layer], images, plain)
        except _OWN:
            raise
        except Exception as error:
            raise LayerError(
                f"model: it raises under a forward hook on {layer!r}: {first_line(error)}"
            ) from error
        if not verify.is_close(wanted.same, plain):
            self._check_repeats(images, plain)
            raise LayerError(
                f"model: a clone in place of the output of {layer!r} changes what it gives; "
                "expected one which uses the layer's output only as a value"
            )
        return wanted

    def _check_repeats(self, images: Tensor, plain: Tensor) -> None:
        written_since = watch_writes(self._model)
        if not verify.is_close(verify.run_plain(self._model, images), plain):
            check_unwritten(written_since())
            raise LayerError(
                "model: two passes of the same images differ; "
                "expected one without randomness or hidden state"
            )

    def _describe_failure(self, attempt: _Attempt) -> str:
        if attempt.error is None:
            return "differs from a whole pass"
        return f"raises what a whole pass doesn't ({first_line(attempt.error)})"

    def _describe_nested(self) -> str:
        """A hint, where an encoder may drop the padding that a traced one computes."""
        encoders = (m for m in self._modules.values() if isinstance(m, nn.TransformerEncoder))
        return NOT_NESTED if any(m.enable_nested_tensor for m in encoders) else ""

    def _describe_misfit(self, images: Tensor, error: Exception) -> str:
        floating = (p for p in self._model.parameters() if p.is_floating_point())
        dtypes = " and ".join(dict.fromkeys(map(dtype_name, floating)))
        weights = f", with parameters of {dtypes}" if dtypes else ""
        what = f"{dtype_name(images)} of shape {tuple(images.shape)}"
        return f"model: it can't take these images, {what}{weights}: {first_line(error)}"

    def _symbolic_trace(self, layer: str) -> Trace | Untraceable:
        """The trace by fx that a layer shares with those whose hooks have the same effect."""
        around = self._slowed_by(layer)
        key = around, contexts.read_switches()
        if key not in self._traces:
            layers = [name for name in self._layers if self._slowed_by(name) == around]
            try:
                self._traces[key] = Trace(self._model, layers)
            except Untraceable as error:
                self._traces[key] = error
        return self._traces[key]

    def _exported_trace(self, images: Tensor) -> Trace | Untraceable:
        key = _key_of(images)
        if key not in self._exports:
            try:
                self._exports[key] = Trace(self._model, self._layers, like=copied(images))
            except Untraceable as error:
                self._exports[key] = error
        return self._exports[key]

    def _slowed_by(self, layer: str) -> tuple[str, ...]:
        """The encoder layers that a hook on this layer takes off PyTorch's fast path."""
        return tuple(
            name
            for name, module in self._modules.items()
            if isinstance(module, nn.TransformerEncoderLayer) and is_within(layer, name)
        )

    def _quantizes_batches(self) -> bool:
        """Whether a module rounds each activation by the range of all the batch."""
        kinds = (type(module).__module__ for module in self._modules.values())
        return any(kind.startswith("torch.ao.nn.quantized.dynamic") for kind in kinds)

    def _has_fused(self) -> bool:
        return any(isinstance(module, FUSED) for module in self._modules.values())


def _key_of(images: Tensor) -> tuple[object, ...]:
    switches = contexts.read_switches()
    return images.shape, images.stride(), images.dtype, images.device, switches
