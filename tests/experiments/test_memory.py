"""The memory that a study takes beside its model and images, by the kernel's own count."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLEAR = Path("/proc/self/clear_refs")

# A process of its own: what was freed before stays with a process, and would be taken again unseen.
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
def study(per_class, memory):
    images, labels = torch.randn(2 * per_class, 3, 64, 64), torch.arange(2).repeat(per_class)
    return Study(model, ["1", "3", "5"], images, labels, [0], (2, 2), ["cka", "procrustes"],
                 memory=memory)
study(2, "1GiB").run()  # libraries are loaded, and their own memory is taken
real = study(70, sys.argv[1])
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
rows = real.run()
print(len(rows), len(group_layers(real, real.layers)), real.memory, resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR.exists(), reason="the kernel keeps no count of the memory in use")
@pytest.mark.parametrize(
    ("memory", "layout", "passes"),
    [
        ("230MiB", "contiguous_format", 3),
        ("230MiB", "channels_last", 3),
        ("430MiB", "contiguous_format", 2),
        ("2GiB", "contiguous_format", 1),
    ],
)
def test_a_study_keeps_to_its_memory(memory: str, layout: str, passes: int) -> None:
    command = [sys.executable, "-c", PROGRAM, memory, layout]
    # What is freed goes back at once, as blocks above 32 MiB do: glibc keeps smaller ones, and
    # the count would be of them.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    rows, groups, allowed, peak = map(int, done.stdout.split())
    assert (rows, groups) == (3 * 4, passes)
    # The activations of one layer, 105 MiB, are among it: the count is not of something else.
    assert 100 * 2**20 < peak < 1.1 * allowed
