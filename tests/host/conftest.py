"""Run the CUDA C++ kernels on the CPU through their launchers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from repsim_kernels.kernels.cupy import module

from . import _build


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Launch kernels built by g++; call the fixture with a sanitizer's name to run under it.

    Memory that kernels must fill holds NaN or -1 beforehand.
    """
    if _build.COMPILER is None:
        pytest.skip("no g++")

    def use(sanitizer: str | None = None) -> None:
        def launch(
            source: str, name: str, grid: Any, block: Any, *arguments: Any, shared: int = 0
        ) -> None:
            library = _build.load_library(source, sanitizer)
            library.launch(name, grid, block, *map(view_memory, arguments), shared=shared)

        monkeypatch.setattr(module, "launch", launch)

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    use()
    yield use
    torch.use_deterministic_algorithms(before)


def view_memory(argument: Any) -> Any:
    """Return the memory from a tensor's first to its last element, as a kernel sees it."""
    if not isinstance(argument, torch.Tensor) or not argument.numel():
        return argument
    steps = zip(argument.shape, argument.stride(), strict=True)
    return argument.as_strided((1 + sum((size - 1) * step for size, step in steps),), (1,))
