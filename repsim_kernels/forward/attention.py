"""Attention modules: where the outputs of their heads are, and how many heads they have.

The heads' outputs, concatenated, are the input of the output projection. That is a module in most
implementations, but `nn.MultiheadAttention` reads the weights of its projection only.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repsim_kernels.errors import LayerError

# The output projections of timm and Hugging Face, by their names inside an attention module.
_PROJECTIONS = "proj", "out_proj", "o_proj", "c_proj", "output.dense", "out_lin", "dense", "o"
_INNER = {"query", "key", "value"}  # BERT's self-attention: its projection is in another module
_COUNTS = "num_heads", "num_attention_heads", "n_heads", "n_head"
_PATCHING = threading.RLock()


def find_projection(module: nn.Module, layer: str) -> str | None:
    """Return the name of an attention module's output projection; None if it has none.

    Raises LayerError if the module is not an attention module that is known.
    """
    modules = dict(module.named_modules())
    if find_head_count(module) is not None:
        for name in _PROJECTIONS:
            if name in modules:
                return name
        if {name for name, one in modules.items() if isinstance(one, nn.Linear)} == _INNER:
            return None
    raise LayerError(
        f"layer: {layer!r}: {type(module).__name__} is not a known attention module; expected one "
        "of PyTorch, timm or Hugging Face, or the input of its output projection, '….proj:input'"
    )


def find_head_count(module: nn.Module) -> int | None:
    """Return the number of heads of an attention module; None if it has no such attribute."""
    owners = [module, getattr(module, "self", None)]
    if "Attention" in type(module).__name__:
        owners.append(getattr(module, "config", None))
    for owner in owners:
        for name in _COUNTS:
            count = getattr(owner, name, None)
            if isinstance(count, int):
                return count
    return None


@contextmanager
def replace_heads(
    module: nn.MultiheadAttention, layer: str, function: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Replace the heads' outputs (n, t, d) of PyTorch's attention by a function of them.

    Inside, its calls don't take PyTorch's fast path, which never stores these outputs.
    """
    calls = ExitStack()

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        query = args[0] if args else kwargs["query"]
        if query.ndim != 3:
            shape = tuple(query.shape)
            raise LayerError(f"layer: {layer!r} gets a query of shape {shape}; expected (n, t, d)")
        n = query.shape[0 if module.batch_first else 1]

        def replace(x: Tensor) -> Tensor:
            heads = function(x.unflatten(0, (-1, n)).transpose(0, 1))
            return heads.transpose(0, 1).flatten(0, 1)

        calls.enter_context(_disable_fast_path())
        calls.enter_context(_replace_operand(replace))

    def leave(*_: Any) -> None:
        calls.close()

    handles = (
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        calls.close()
        for handle in handles:
            handle.remove()


@contextmanager
def _disable_fast_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _replace_operand(function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the operand of a matrix in this thread's calls of ``F.linear``.

    Inside PyTorch's attention, only the output projection has a matrix (t n, d): others get
    (t, n, d).
    """
    thread = threading.get_ident()
    with _PATCHING:
        linear = F.linear

        def project(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if threading.get_ident() == thread and x.ndim == 2:
                x = function(x)
            return linear(x, *args, **kwargs)

        F.linear = project  # type: ignore[assignment]
        try:
            yield
        finally:
            F.linear = linear


def run_attention(
    module: nn.MultiheadAttention,
    mark: Callable[[Any], Any],
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """Run ``module(query, key, value, …)`` without the checks of shapes, which fx can't evaluate.

    `mark` gets the heads' outputs (n, t, d). Behind it, sizes are those of its result, so that a
    pass may have several cells. Raises LayerError for options that it does not support.
    """
    plain = type(module).forward is nn.MultiheadAttention.forward
    hooked = module._forward_hooks or module._forward_pre_hooks
    extended = module.bias_k is not None or module.add_zero_attn or module.in_proj_weight is None
    fixed = attn_mask is None or (isinstance(attn_mask, Tensor) and attn_mask.ndim == 2)
    if not plain or hooked or extended or key_padding_mask is not None or not fixed:
        raise LayerError("options of attention that torch.fx can't trace")
    if module.batch_first:
        same = query is key
        key, value = (key.transpose(1, 0),) * 2 if key is value else _transpose(key, value)
        query = key if same else query.transpose(1, 0)
    (t, n), s = (query.shape[0], query.shape[1]), key.shape[0]
    h, e, d = module.num_heads, module.head_dim, module.embed_dim
    project_in: Any = vars(F)["_in_projection_packed"]
    q, k, v = project_in(query, key, value, module.in_proj_weight, module.in_proj_bias)
    q, k, v = (x.view(length, n * h, e).transpose(0, 1) for x, length in ((q, t), (k, s), (v, s)))
    mask = None if is_causal and not need_weights else _to_float(attn_mask, module.in_proj_weight)
    weights = None
    if need_weights:
        scaled, transposed = q * math.sqrt(1.0 / float(e)), k.transpose(-2, -1)
        if mask is None:
            weights = torch.bmm(scaled, transposed)
        else:
            weights = torch.baddbmm(mask.unsqueeze(0), scaled, transposed)
        weights = F.softmax(weights, dim=-1)
        x = torch.bmm(weights, v).transpose(0, 1).reshape(t * n, d)
        weights = weights.view(n, h, t, s)
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        q, k, v = (x.view(n, h, length, e) for x, length in ((q, t), (k, s), (v, s)))
        mask = None if mask is None else mask.unsqueeze(0).unsqueeze(0)
        x = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal)
        x = x.permute(2, 0, 1, 3).reshape(n * t, d)
    heads = mark(x.view(t, n, d).transpose(0, 1))
    out = F.linear(heads.transpose(0, 1), module.out_proj.weight, module.out_proj.bias)
    return (out.transpose(1, 0) if module.batch_first else out), weights


def _transpose(key: Any, value: Any) -> tuple[Any, Any]:
    return key.transpose(1, 0), value.transpose(1, 0)


def _to_float(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a mask as the number that is added: -inf where a boolean mask is true."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
