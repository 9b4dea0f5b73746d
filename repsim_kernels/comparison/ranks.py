"""The ranks of torch.distributed, each of which sees its own part of the stimuli."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from repsim_kernels.errors import RepsimError

_T = TypeVar("_T")


def count() -> int:
    """Return the number of ranks; 1 without torch.distributed."""
    return distributed.get_world_size() if _are_many() else 1


def is_first() -> bool:
    """Whether this is the first rank, or the only process."""
    return not _are_many() or distributed.get_rank() == 0


def _are_many() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks; of one process, its own."""
    if not _are_many():
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def run_on_all(function: Callable[[], _T]) -> _T:
    """Return a function's result; an error on one rank is raised on all, so that none waits."""
    if not _are_many():
        return function()
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    texts = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise RepsimError(f"rank {rank}: {text}")
    return result  # type: ignore[return-value]


def gather_stimuli(x: Tensor) -> Tensor:
    """Return a representation (n, p) of the stimuli of all ranks, in the order of the ranks."""
    counts = gather(len(x))
    if len(counts) == 1:
        return x
    device = torch.device("cuda") if distributed.get_backend() == "nccl" else x.device
    rows = torch.zeros(max(counts), x.shape[1], dtype=x.dtype, device=device)
    rows[: len(x)] = x
    parts = [torch.empty_like(rows) for _ in counts]
    # As bytes, since not every backend can send every dtype.
    distributed.all_gather([a.view(torch.uint8) for a in parts], rows.view(torch.uint8))
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(x.device)
