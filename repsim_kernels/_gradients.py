"""Similarities of tensors that require grad, which PyTorch's autograd can differentiate once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repsim_kernels import _check, _dispatch
from repsim_kernels._arrays import Source
from repsim_kernels._typing import Array
from repsim_kernels.errors import GradientError


def is_required(*arguments: Any) -> bool:
    """Whether autograd records operations, and any of the arguments requires grad."""
    return torch.is_grad_enabled() and any(
        isinstance(a, Tensor) and a.requires_grad for a in arguments
    )


def attach(similarity: Array, operation: str, x: Any, y: Any, **options: Any) -> Array:
    """Return the result of an operation as a differentiable function of x and y, if required.

    Its value is unchanged. ``<operation>_gradients``, an internal operation, computes the gradients
    with these options, when they are needed.
    """
    if not is_required(x, y):
        return similarity
    result: Tensor = _Similarity.apply(x, y, similarity, operation, options)
    return result


class _Similarity(torch.autograd.Function):
    """A similarity computed already; its backward pass computes the gradients from x and y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, similarity: Tensor, operation: str, options: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.operation, ctx.options = operation, options
        return similarity.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        sides = tuple(side for side in (0, 1) if ctx.needs_input_grad[side])
        gradients = _Gradients.apply(
            *ctx.saved_tensors, upstream, sides, ctx.operation, ctx.options
        )
        by_side = dict(zip(sides, gradients, strict=True))
        return by_side.get(0), by_side.get(1), None, None, None


class _Gradients(torch.autograd.Function):
    """The gradients of a similarity, as a function that can't be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        upstream: Tensor,
        sides: tuple[int, ...],
        operation: str,
        options: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        ctx.operation = operation
        xs = [_check.to_float(a.detach().resolve_neg()) for a in (x, y)]
        gradients = _dispatch.call(
            f"{operation}_gradients",
            "torch",
            Source("torch", str(x.device)),
            *xs,
            upstream.detach()[..., None, None],
            sides=sides,
            **options,
        )
        # Sum over the dimensions of a batch along which a side was repeated.
        shapes = (xs[side].shape for side in sides)
        return tuple(g.sum_to_size(shape) for g, shape in zip(gradients, shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise GradientError(
            f"{ctx.operation}: second derivatives are not computed, since its gradient is a closed "
            "form outside autograd; expected one backward pass through it, without create_graph"
        )
