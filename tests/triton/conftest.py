"""The Triton kernels: in the interpreter when TRITON_INTERPRET=1, else on a GPU.

``TRITON_INTERPRET=1 pytest tests/triton`` runs every kernel on CPU tensors; it has to be a process
of its own, since the mode is fixed when a kernel is imported. Without it these are the `gpu` tests.
All are skipped, with the reason, where the interpreter doesn't work with the installed NumPy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from repsim_kernels.kernels.triton import _launch

# cuBLAS is deterministic only with a workspace of its own, asked for before its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent != Path(__file__).parent:
            continue
        if INTERPRETED:
            reason = _launch.interpreter_unsupported()
        else:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic"))
            reason = None if torch.cuda.is_available() else "no CUDA device"
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session", autouse=True)
def exact_convolutions() -> Iterator[None]:
    """Those of PyTorch, which the kernels are held against, without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that a launcher leaves unwritten holds NaN (or the largest integer).

    PyTorch fills it where algorithms should be deterministic; those that can't be only warn.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The kernels that run: the name and the grid of each, and what it is given, by name."""
    seen: list[dict[str, Any]] = []
    start = _launch.launch

    def spy(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        seen.append({"kernel": kernel.fn.__name__, "grid": grid} | given)
        start(kernel, grid, *arguments, **options)

    monkeypatch.setattr(_launch, "launch", spy)
    return seen
