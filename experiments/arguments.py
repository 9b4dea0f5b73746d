"""Arguments of a study, each taken to one form or refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .measure import StudyError


def distinct(argument: str, values: Iterable[Any]) -> list[Any]:
    """The values as a list, at least one and none twice."""
    listed = list(values)
    if not listed or len(set(listed)) < len(listed):
        raise StudyError(f"{argument}: {listed} is empty or repeats; expected distinct values")
    return listed


def tensor(argument: str, values: Any) -> Tensor:
    """The values as a tensor."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise StudyError(f"{argument}: expected an array of numbers ({reason})") from error


def device_of(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """A device that can be used: the one that was asked for, or the model\'s."""
    if device is None:
        parameter = next(model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StudyError(f"device: {device} can't be used here ({reason})") from error
    return torch.device(device)
