"""A small network with its stimuli and representations, and a module that is any function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import repsim_kernels as rk

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Returns(nn.Module):
    """Returns what a function makes of its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.function(*arguments, **options)


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


WANT = rk.extract(make_network(), [IMAGES])


def assert_same(got: Mapping[str, Any], want: Mapping[str, Any] = WANT) -> None:
    assert list(got) == list(want)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=0)
