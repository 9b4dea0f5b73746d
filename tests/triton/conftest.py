"""The Triton kernels, in the interpreter when TRITON_INTERPRET=1 and otherwise on a GPU.

``TRITON_INTERPRET=1 pytest tests/triton`` runs every kernel on CPU tensors. It needs a separate
process, since the mode is fixed when a kernel is imported. Without it these are the `gpu` tests.
They are skipped, with the reason, if the interpreter doesn't work with the installed NumPy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from repsim_kernels.kernels.triton import _launch

# cuBLAS is deterministic only with a fixed workspace, configured before its first use.
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
    """Disable TF32 in PyTorch's convolutions, which the kernels are compared with."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill new memory with NaN (or the largest integer), so unwritten results show.

    PyTorch does this in deterministic mode, where nondeterministic algorithms only warn.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the name, grid and named arguments of each kernel that is started."""
    records: list[dict[str, Any]] = []
    start = _launch.launch

    def spy(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        records.append({"kernel": kernel.fn.__name__, "grid": grid} | named)
        start(kernel, grid, *arguments, **options)

    monkeypatch.setattr(_launch, "launch", spy)
    return records
