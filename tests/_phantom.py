"""A CUDA device that is not there: its tensors say cuda:0, hold CPU memory, and are strict.

A `PhantomTensor` wraps a CPU tensor. PyTorch's C++ takes it for a meta tensor, so that nothing
needs a driver; what the dispatcher hands over is computed on the CPU, checked and counted, as
`_phantom_counts.py` says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _phantom_counts import STAGED_BYTES, SYNCS, Counts
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
META = torch.device("meta")  # what C++ sees in place of the device
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NOT_FUNCTIONAL = {"resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_"}


class PhantomError(RuntimeError):
    """A call that a GPU would refuse, or that this device can't represent."""


class PhantomTensor(Tensor):
    """A tensor on the device; ``elem`` is its memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> PhantomTensor:
        assert not isinstance(elem, PhantomTensor)
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=META,
        )
        self.elem = elem.detach()
        return self

    def __init__(self, elem: Tensor) -> None:
        pass

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> Any:
        return self.elem.untyped_storage()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def tolist(self) -> Any:
        _current().record("sync", "tolist")
        return self.elem.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # kDLCUDA

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("the memory of cuda:0 is not accessible from here")

    def __repr__(self, *_: Any, **__: Any) -> str:
        _current().record("sync", "repr")
        return f"{self.elem!r} on {DEVICE}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> PhantomTensor:
        copy = memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad)
        return copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().call(func, args, kwargs or {})


def unwrap(value: Any) -> Any:
    """Replace the tensors of the device in a nested value by their memory."""
    return pytree.tree_map(lambda a: a.elem if isinstance(a, PhantomTensor) else a, value)


class Device:
    """Runs, checks and counts what reaches the device."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.captured: list[Callable[[], object]] | None = None  # of a graph being captured
        self.refuses_syncs = False  # as `torch.cuda.set_sync_debug_mode("error")` asks
        self.pinned: dict[int, Tensor] = {}  # by address
        self.mode = _DispatchMode(self)

    def record(self, kind: str, what: str) -> None:
        if kind == "sync" and (self.captured is not None or self.refuses_syncs):
            raise PhantomError(f"{what}: the host waits, which is not allowed now")
        if self.captured is not None:
            kind = "captured"
        self.counts.record(kind, what)

    @contextlib.contextmanager
    def count(self) -> Iterator[Counts]:
        """Count what a block does."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an ATen operation, on the device if an argument or the result is there."""
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
            with self.mode:  # in inference mode composite operations arrive whole
                return func._op_dk(key, *args, **kwargs)
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        phantoms = [t for t in tensors if isinstance(t, PhantomTensor)]
        target = kwargs.get("device")
        if _is_device(target, "cuda"):  # from Python code within PyTorch
            target = kwargs["device"] = META
        if not phantoms and not _is_device(target, "meta"):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in NOT_FUNCTIONAL:
            raise PhantomError(f"{name}: changes a shape in place")
        if name == "_local_scalar_dense":
            self.record("sync", "item")
            return func(args[0].elem)
        if name == "_to_copy":
            return self._convert(func, args[0], kwargs)
        if name == "copy_":
            return self._copy(*args, **kwargs)
        plain = [t for t in tensors if not isinstance(t, PhantomTensor)]
        if any(t.is_meta for t in plain):
            raise PhantomError(f"{name}: a meta tensor, made by C++ code that reads the device")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self._check_indices(name, *args)
        elif phantoms:
            for t in plain:
                self._check_scalar(func, name, t, len(tensors))
        self._record_call(func, name, args, kwargs)
        return self._run(func, name, phantoms, args, kwargs)

    def _run(
        self, func: Any, name: str, phantoms: list[PhantomTensor], args: Any, kwargs: Any
    ) -> Any:
        target = kwargs.get("device")
        on_device = target is None or _is_device(target, "meta")
        if target is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
        plain_args, plain_kwargs = unwrap((args, kwargs))
        if self.captured is not None and not func.is_view:
            if not func._schema.is_mutable:
                raise PhantomError(f"{name}: allocates memory during the capture of a graph")
            self.captured.append(lambda: func(*plain_args, **plain_kwargs))
            return kwargs["out"] if "out" in kwargs else args[0]
        result = func(*plain_args, **plain_kwargs)
        owners = {id(p.elem): p for p in phantoms}
        for p in phantoms:
            if p.elem.shape != p.shape:
                raise PhantomError(f"{name}: resizes its output from {tuple(p.shape)}")

        def wrap(a: Any) -> Any:
            if not isinstance(a, Tensor) or not on_device:
                return a
            return owners.get(id(a)) if id(a) in owners else PhantomTensor(a)

        return pytree.tree_map(wrap, result)

    def _record_call(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if func.is_view or name in ALLOCATIONS or name in ("_unsafe_view", "lift_fresh"):
            return
        self.record("launch", name)
        if name in SYNCS or (
            name == "repeat_interleave" and kwargs.get("output_size") is None  # their number
        ):
            self.record("sync", name)
        elif name == "histc" and len(args) < 4:
            self.record("sync", "histc without limits")

    def _check_scalar(self, func: Any, name: str, t: Tensor, tensors: int) -> None:
        """Check that a CPU tensor is a number that an elementwise operation passes by value."""
        by_value = torch.Tag.pointwise in func.tags and (tensors <= 2 or name == "where")
        if t.dim() or not (by_value or name in ("fill_", "masked_fill", "masked_fill_")):
            raise PhantomError(
                f"{name}: a CPU tensor of shape {tuple(t.shape)}; "
                "expected all tensors to be on the same device"
            )

    def _check_indices(
        self, name: str, x: Tensor, indices: Any, values: Tensor | None = None, *_: Any
    ) -> None:
        """Check and count what an index operation copies or waits for."""
        indices = [i for i in indices if i is not None]
        if not isinstance(x, PhantomTensor):
            raise PhantomError(f"{name}: a CPU tensor is indexed by tensors on {DEVICE}")
        for i in indices:
            if not isinstance(i, PhantomTensor):
                self.record("sync", f"{name} by a CPU index")
        is_mask = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        on_cpu = values is not None and not isinstance(values, PhantomTensor)
        if on_cpu and values.dim():
            raise PhantomError(f"{name}: CPU values; expected all tensors to be on the same device")
        if on_cpu and is_mask and len(indices) == 1:
            return  # PyTorch fills by the mask
        if on_cpu:
            self.record("sync", f"{name} of a Python number")
        if is_mask:
            self.record("sync", f"{name} by a mask")

    def _convert(self, func: Any, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        target = kwargs.get("device")
        was_there = isinstance(source, PhantomTensor)
        will_be = was_there if target is None else target.type == "meta"
        self._record_copy(source, was_there, will_be, bool(kwargs.get("non_blocking")))
        if self.captured is not None:
            raise PhantomError("_to_copy: allocates memory during the capture of a graph")
        kwargs = kwargs | {"device": torch.device("cpu"), "non_blocking": False}
        kwargs.pop("pin_memory", None)
        result = func(unwrap(source), **kwargs)
        return PhantomTensor(result) if will_be else result

    def _copy(self, x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        ends = isinstance(source, PhantomTensor), isinstance(x, PhantomTensor)
        self._record_copy(source, *ends, non_blocking)
        x_memory, memory = unwrap((x, source))
        if self.captured is None:
            x_memory.copy_(memory)
        else:
            self.captured.append(lambda: x_memory.copy_(memory))
        return x

    def _record_copy(self, source: Tensor, was_there: bool, will_be: bool, relaxed: bool) -> None:
        if was_there and will_be:
            self.record("launch", "copy")
        elif will_be:
            small = source.numel() * source.element_size() <= STAGED_BYTES
            waits = not (relaxed and (small or self.is_pinned(source)))
            self.record("sync" if waits else "launch", "copy to the device")
        else:
            # PyTorch allocates pinned memory for a copy that does not block.
            self.record("launch" if relaxed else "sync", "copy to the host")

    def is_pinned(self, t: Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self.pinned

    def pin(self, t: Tensor) -> Tensor:
        copy = t.clone()
        self.pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    @contextlib.contextmanager
    def active(self) -> Iterator[Device]:
        """Let PyTorch's functions find the device."""
        global _device
        before, _device = _device, self
        try:
            with _FunctionMode(self), self.mode:
                yield self
        finally:
            _device = before


_device: Device | None = None


def _current() -> Device:
    if _device is None:
        raise PhantomError("a tensor of the device is used after the test")
    return _device


class _DispatchMode(TorchDispatchMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.target = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.target.call(func, args, kwargs or {})


def _is_device(value: Any, kind: str) -> bool:
    return isinstance(value, torch.device) and value.type == kind


def _parse_device(value: Any) -> Any:
    """Parse the name of a device, and replace the phantom device by what C++ sees."""
    if isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu", "meta"):
        value = torch.device(value)
    if _is_device(value, "cuda"):
        if value.index:
            raise PhantomError(f"{value}: expected cuda:0, the only device")
        return META
    return value


def _parse_index(index: Any) -> Any:
    """Replace the lists and arrays of an index by CPU tensors, which are copied to the device."""
    if isinstance(index, tuple):
        return tuple(map(_parse_index, index))
    return torch.as_tensor(index) if isinstance(index, (list, np.ndarray)) else index


class _FunctionMode(TorchFunctionMode):
    """Replaces the device in the arguments of PyTorch's functions, before any needs a driver."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.target = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._C._nn._parse_to:  # only reads the arguments
            return func(*args, **kwargs)
        if func in (Tensor.pin_memory, Tensor.is_pinned) and not isinstance(args[0], PhantomTensor):
            pin = self.target.pin if func is Tensor.pin_memory else self.target.is_pinned
            return pin(args[0])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], PhantomTensor):
            x, index, *values = args
            # As for CUDA tensors, numbers become tensors on the CPU.
            values = [
                v if isinstance(v, Tensor) else torch.tensor(v, dtype=x.dtype) for v in values
            ]
            return func(x, _parse_index(index), *values)
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], DEVICE)
        names_meta = any(
            _is_device(torch.device(a) if a == "meta" else a, "meta")
            for a in (*args, *kwargs.values())
            if isinstance(a, (str, torch.device))
        )
        if names_meta:
            with torch.utils._python_dispatch._disable_current_modes():
                return func(*unwrap(args), **unwrap(kwargs))
        if func is Tensor.to:
            args = tuple(map(_parse_device, args))
            others = [a for a in args[1:] if isinstance(a, PhantomTensor)]
            if others:  # to(other)
                args = (args[0], META, others[0].dtype)
        if "device" in kwargs:
            kwargs["device"] = _parse_device(kwargs["device"])
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            return self._make(func, args, kwargs)
        return func(*args, **kwargs)

    def _make(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Make a tensor from data: on the CPU, then copied to the device."""
        device = kwargs.pop("device", None)
        if func is Tensor.new_tensor:
            x, *args = args
            kwargs.setdefault("dtype", x.dtype)
            device = device or (META if isinstance(x, PhantomTensor) else None)
            func = torch.tensor
        data = args[0]
        if isinstance(data, Tensor):
            if func is torch.tensor:
                data = data.clone()
            return data.to(device or (META if isinstance(data, PhantomTensor) else None), **kwargs)
        result = func(*args, **kwargs)
        return result if device is None else result.to(device)
