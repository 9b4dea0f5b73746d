"""A study's memory in addition to its model and images, as counted by the Linux kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLEAR = Path("/proc/self/clear_refs")

# Runs in its own process: memory that was freed earlier would be reused without being counted.
PROGRAM = """
import sys
from pathlib import Path
import torch
from torch import nn
from repsim_kernels.experiments import Study
from repsim_kernels.experiments.study.measure import group_layers

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024

torch.manual_seed(0)
torch.set_num_threads(1)
conv = lambda inner: nn.Conv2d(inner, 48, 3, padding=1)
model = nn.Sequential(conv(3), nn.ReLU(True), conv(48), nn.ReLU(True), conv(48), nn.ReLU(True),
                      nn.MaxPool2d(8), nn.Flatten(), nn.Linear(48 * 64, 2)).eval()
model = model.to(memory_format=getattr(torch, sys.argv[2]))
def make_study(n, memory):
    images, labels = torch.randn(2 * n, 3, 64, 64), torch.arange(2).repeat(n)
    return Study(model, ["1", "3", "5"], images, labels, [0], (2, 2), ["cka", "procrustes"],
                 memory=memory)
make_study(2, "1GiB").run()  # loads libraries, which allocate memory of their own
study = make_study(70, sys.argv[1])
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
rows = study.run().table
print(len(rows), len(group_layers(study, study.layers)), study.memory, resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR.exists(), reason="needs the kernel's count of peak memory")
@pytest.mark.parametrize(
    ("memory", "layout", "passes"),
    [
        ("230MiB", "contiguous_format", 3),
        ("230MiB", "channels_last", 3),
        ("430MiB", "contiguous_format", 2),
        ("2GiB", "contiguous_format", 1),
    ],
)
def test_a_study_stays_within_its_memory(memory: str, layout: str, passes: int) -> None:
    command = [sys.executable, "-c", PROGRAM, memory, layout]
    # Makes glibc return freed blocks of 1 MiB and more at once. By default it keeps those below
    # 32 MiB, which would be counted.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    rows, groups, allowed, peak = map(int, done.stdout.split())
    assert (rows, groups) == (3 * 4, passes)
    # The peak must include one layer's activations, 105 MiB.
    assert 100 * 2**20 < peak < 1.1 * allowed
