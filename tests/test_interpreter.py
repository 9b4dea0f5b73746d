"""Versions with which Triton's interpreter can't run the kernels, and how they are reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import repsim_kernels as rk
from repsim_kernels import _dispatch
from repsim_kernels.kernels.triton import _launch

triton = pytest.importorskip("triton")


def install(monkeypatch, triton_version: str, numpy_version: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(np, "__version__", numpy_version)


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0+git1234", "2.5.0.dev0", False),
        ("3.6.0", "2.10.1", False),
        ("3.6.0", "3.0.0", False),
        ("3.7.0", "2.3.5", True),
        ("3.7.0", "2.4.0", True),
        ("3.10.0", "2.4.6", True),
        ("4.0.0", "2.5.0", True),
    ],
)
def test_supported_versions(monkeypatch, triton_version, numpy_version, works):
    install(monkeypatch, triton_version, numpy_version)
    reason = _launch.interpreter_unsupported()
    assert (reason is None) == works
    assert _dispatch.unavailable_reason("triton") == reason
    assert _launch.unsupported(torch.ones(2, 2)) == reason
    if not works:
        assert f"Triton {triton_version}'s interpreter fails with NumPy {numpy_version}" in reason


def test_explicit_backend_gives_the_reason(monkeypatch, capsys):
    install(monkeypatch, "3.6.0", "2.4.6")
    with pytest.raises(rk.BackendUnavailable, match=r"centered_gram: Triton 3.6.0's interpreter"):
        rk.centered_gram(torch.eye(3), backend="triton")
    rk.show_config()
    assert "no: Triton 3.6.0's interpreter fails with NumPy 2.4.6; expected Triton >= 3.7" in (
        capsys.readouterr().out
    )


def test_compiled_kernels_need_no_interpreter(monkeypatch):
    install(monkeypatch, "3.6.0", "2.4.6")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _dispatch.unavailable_reason("triton") is None
