"""Pooling: how the output of a layer becomes a representation (n, p)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repsim_kernels import _options
from repsim_kernels.comparison import batches
from repsim_kernels.comparison.batches import Mask
from repsim_kernels.errors import LayerError, OptionError, ShapeError

POOLS = ("flatten", "mean", "max", "cls", "last", "tokens")
Pool = str | Callable[[Tensor], Tensor]


def check_pool(pool: Any) -> Pool:
    """Check that a pool is one of `POOLS` or a function."""
    if callable(pool):
        function: Callable[[Tensor], Tensor] = pool
        return function
    if not isinstance(pool, str) or pool not in POOLS:
        choices = ", ".join(map(repr, POOLS))
        raise OptionError(
            f"pool: {_options.short_repr(pool)}; expected one of {choices}, or a function of a "
            "layer's output"
        )
    return pool


def pool_output(output: Tensor, pool: Pool, attention: Mask | None, layer: str) -> Tensor:
    """Return the representation (n, p) of a layer's output (n, …).

    The attention mask (n, t) applies to outputs (n, t, …). Padding never counts. With "tokens" the
    stimuli are the tokens. Errors call the layer ``layer``.
    """
    output = output.detach()
    if callable(pool):
        return _call_pool(output, pool, layer)
    mask = _fit_mask(output, pool, attention, layer)
    if pool == "flatten":
        if mask is not None and not bool(mask.all()):
            raise LayerError(
                f"pool: 'flatten' at {layer}, whose batch has padded tokens, would count "
                "the padding; expected 'mean', 'max', 'cls', 'last' or 'tokens'"
            )
        return output.flatten(1)
    if output.ndim == 2:
        return output
    if pool != "tokens" and mask is not None and not bool(mask.any(1).all()):
        raise LayerError(f"pool: {pool!r} of a stimulus that is all padding; expected tokens")
    if pool in ("cls", "last", "tokens"):
        return _pick_tokens(output, pool, mask, layer)
    # Feature maps (n, c, h, w) have their positions last, sequences (n, t, d) second.
    tokens = output.flatten(2) if output.ndim == 3 or mask is not None else output.flatten(2).mT
    if mask is None:
        return tokens.mean(1) if pool == "mean" else tokens.amax(1)
    absent = ~mask[..., None]
    if pool == "max":
        return tokens.masked_fill(absent, -torch.inf).amax(1)
    # In float64, the mean of equal tokens is their value for any number of them: a layer that is
    # the same for all stimuli stays so. Products with the mask would turn padding that is NaN or
    # infinite into NaN.
    total = tokens.masked_fill(absent, 0).sum(1, dtype=torch.float64)
    return (total / mask.sum(1, keepdim=True)).to(tokens.dtype)


def _fit_mask(output: Tensor, pool: str, attention: Mask | None, layer: str) -> Tensor | None:
    """Return which tokens of an output (n, t, …) count, (n, t); None if there is no padding."""
    if attention is None or output.ndim < 3:
        return None
    if len(attention.names) > 1:
        raise LayerError(
            f"pool: {pool!r} at {layer} for a batch with {' and '.join(attention.names)}, which "
            "may mark the padding of other layers; expected one mask, or a function that pools it"
        )
    mask = attention.tokens.to(output.device)
    if output.shape[:2] == mask.shape:
        return mask
    if not bool(mask.all()):
        raise LayerError(
            f"pool: {pool!r} at {layer}, whose output {tuple(output.shape)} the attention_mask "
            f"{tuple(mask.shape)} does not fit, would count padding; expected a function that "
            "pools it"
        )
    return None


def _call_pool(output: Tensor, pool: Callable[[Tensor], Tensor], layer: str) -> Tensor:
    where = f"{layer}, whose output has shape {tuple(output.shape)}"
    version = batches.get_version(output)
    try:
        pooled = pool(output)
    except Exception as error:  # whatever a user's function raises
        reason = _options.to_one_line(f"{type(error).__name__}: {error}", 200)
        raise LayerError(f"pool: the function fails at {where}: {reason}") from error
    if batches.get_version(output) != version:
        raise OptionError(f"pool: the function writes to the output of {where}; expected a copy")
    if not isinstance(pooled, Tensor):
        raise ShapeError(f"pool: returned {type(pooled).__name__} for {where}; expected (n, p)")
    if pooled.ndim != 2 or not pooled.numel() or not pooled.is_floating_point():
        dtype = str(pooled.dtype).removeprefix("torch.")
        raise ShapeError(
            f"pool: returned {dtype} of shape {tuple(pooled.shape)} for {where}; expected "
            "floating-point numbers (n, p)"
        )
    return pooled


def _pick_tokens(output: Tensor, pool: str, mask: Tensor | None, layer: str) -> Tensor:
    if output.ndim != 3:
        raise LayerError(
            f"pool: {pool!r} at {layer}, whose output has shape {tuple(output.shape)}; "
            "expected tokens (n, t, d)"
        )
    if mask is None:
        if pool == "tokens":
            return output.flatten(0, 1)
        return output[:, 0 if pool == "cls" else -1]
    if pool == "tokens":
        return output[mask]
    positions = torch.arange(mask.shape[1], device=mask.device)
    if pool == "cls":
        index = positions.masked_fill(~mask, mask.shape[1]).amin(1)
    else:
        index = positions.masked_fill(~mask, -1).amax(1)
    return output[torch.arange(len(output), device=mask.device), index]
