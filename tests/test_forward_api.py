"""The import and the reprs of `repsim_kernels.forward`."""

from __future__ import annotations

import subprocess
import sys

import torch
from test_forward import build_network
from torch import nn

from repsim_kernels.forward import AblatedForward


def test_repr_is_one_line():
    layers = ["classifier.2", *(f"features.{i}" for i in range(5))]
    model = build_network("alexnet_small")
    forward = AblatedForward(model, layers[:2])
    described = "layers=['classifier.2', 'features.0'], device='cpu'"
    assert repr(forward) == f"AblatedForward({type(model).__name__}, {described})"
    assert repr(AblatedForward(model, layers)).endswith(
        "'features.1', 'features.2', … 6 in all], device='cpu')"
    )
    no_parameters = nn.Sequential(nn.ReLU()).eval()
    assert repr(AblatedForward(no_parameters, "0")) == "AblatedForward(Sequential, layers=['0'])"
    state = AblatedForward(model, "features.0").prefix(torch.randn(2, 3, 32, 32))
    shape = tuple(state.activation.shape)
    assert repr(state) == (
        f"State(layer='features.0', images=2, activation={shape}, dtype='float32', device='cpu')"
    )


def test_forward_is_imported_on_first_use():
    code = """
import sys
import repsim_kernels as rk

assert "forward" in dir(rk)
loaded = {"torch", "repsim_kernels.forward"} & sys.modules.keys()
assert not loaded, loaded
assert rk.forward.AblatedForward.__module__.startswith("repsim_kernels.forward")
assert rk.forward is sys.modules["repsim_kernels.forward"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
