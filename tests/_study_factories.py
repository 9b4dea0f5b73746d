"""Studies as another process makes them: what a worker is to go wrong by is asked for by name."""

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
    """A study whose unit `BAD` goes wrong; how often it was tried is the size of a file."""
    study = toy_study(metrics=["cka", "procrustes"], block=block, device=device)

    def faulty(some: Study, units: Sequence[Unit]) -> Iterator[pd.DataFrame]:
        for unit, rows in zip(units, _rows(some, units), strict=True):
            if some is study and (unit == BAD or fault == "all killed"):
                tried = Path(folder, "tries")
                with tried.open("a") as file:
                    file.write("x")
                _go_wrong(fault, tried.stat().st_size)
            yield rows

    if fault:
        measure.rows = faulty
    return [study]


def make_recording_studies(device: str, log: str, tf32: bool) -> list[Study]:
    """A study whose network writes PyTorch's TF32 switches to a file whenever it runs."""
    backends: Any = torch.backends
    cuda, cudnn, cpu = backends.cuda, backends.cudnn, backends.mkldnn
    switches = (cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn)

    def note(*_: object) -> None:
        with Path(log).open("a") as file:
            file.write(json.dumps([switch.fp32_precision for switch in switches]) + "\n")

    model = Toy()
    model.conv1.register_forward_pre_hook(note)
    return [toy_study(model=model, metrics=["cka"], device=device, tf32=tf32)]


def _go_wrong(fault: str, tried: int) -> None:
    if fault == "always" or (fault == "twice" and tried <= 2):
        raise RuntimeError(f"attempt {tried}\nfailed")
    if fault == "study":
        raise StudyError("activations are not finite")
    if (fault == "killed" and tried == 1) or (fault == "all killed" and tried <= 3):
        os.kill(os.getpid(), signal.SIGKILL)


def fail_to_find_images(device: str) -> list[Study]:
    """There is nothing to make studies of."""
    raise FileNotFoundError(f"images: none for\n{device}")


def exit_process(device: str) -> list[Study]:
    """The process dies before it has its studies."""
    os._exit(7)
