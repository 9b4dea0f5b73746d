"""Study factories for worker processes, some of which fail on purpose."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _toy import Toy, toy_study

from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.study import Study
from repsim_kernels.experiments.study.units import Unit

BAD = Unit("toy", "act1", 2)
_rows = measure.rows


def make_toy_studies(device: str, fault: str = "", folder: str = "", block: int = 1) -> list[Study]:
    """Return a study whose unit `BAD` fails; a file grows by one byte with each attempt."""
    study = toy_study(metrics=["cka", "procrustes"], block=block, device=device)

    def measure_with_fault(measured: Study, units: Sequence[Unit]) -> Iterator[pd.DataFrame]:
        for unit, rows in zip(units, _rows(measured, units), strict=True):
            if measured is study and (unit == BAD or fault == "all killed"):
                attempts = Path(folder, "tries")
                with attempts.open("a") as file:
                    file.write("x")
                _fail(fault, attempts.stat().st_size)
            yield rows

    if fault:
        measure.rows = measure_with_fault
    return [study]


def make_recording_studies(device: str, log: str, tf32: bool) -> list[Study]:
    """Return a study whose network appends PyTorch's TF32 switches to a file at every pass."""
    backends: Any = torch.backends
    cuda, cudnn, cpu = backends.cuda, backends.cudnn, backends.mkldnn
    switches = (cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn)

    def record(*_: object) -> None:
        with Path(log).open("a") as file:
            file.write(json.dumps([switch.fp32_precision for switch in switches]) + "\n")

    model = Toy()
    model.conv1.register_forward_pre_hook(record)
    return [toy_study(model=model, metrics=["cka"], device=device, tf32=tf32)]


def _fail(fault: str, attempt: int) -> None:
    """Raise an error or kill the process, if the fault is due at this attempt."""
    if fault == "always" or (fault == "twice" and attempt <= 2):
        raise RuntimeError(f"attempt {attempt}\nfailed")
    if fault == "study":
        raise StudyError("activations are not finite")
    if (fault == "killed" and attempt == 1) or (fault == "all killed" and attempt <= 3):
        os.kill(os.getpid(), signal.SIGKILL)


def fail_to_find_images(device: str) -> list[Study]:
    """Fail, as a factory does whose images are missing."""
    raise FileNotFoundError(f"images: none for\n{device}")


def exit_process(device: str) -> list[Study]:
    """End the process before it has its studies."""
    os._exit(7)
