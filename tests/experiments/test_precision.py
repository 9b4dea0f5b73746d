"""A study turns TF32 off unless requested, and restores PyTorch's switches.

How a GPU responds to the switches is not tested here: only that they are set while the network
runs, that the forward engine's kernels read them, and that a run records them.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _study_factories import make_recording_studies
from _toy import Toy, stop_after, toy_study

from repsim_kernels.experiments.errors import StoreError
from repsim_kernels.experiments.runs.executors import Task
from repsim_kernels.experiments.runs.executors.pool import PoolExecutor
from repsim_kernels.experiments.runs.membership import open_run
from repsim_kernels.experiments.study.configuration import digest
from repsim_kernels.experiments.study.estimate import plan
from repsim_kernels.experiments.study.measure import describe
from repsim_kernels.experiments.study.precision import set_tf32
from repsim_kernels.forward import fusion

BACKENDS: Any = torch.backends
CUDA = [BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn]
CPU = [BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn]
PARENTS = [BACKENDS, BACKENDS.cudnn]
OFF, ON = ["ieee"] * 6, ["tf32"] * 3 + ["ieee"] * 3


def read_switches() -> list[str]:
    return [switch.fp32_precision for switch in (*CUDA, *CPU)]


def probe_switches() -> list[list[str]]:
    """The switches' effective values, the parents' own values, and the effect of other parents."""
    values_read, parents = [read_switches()], []
    for parent in PARENTS:
        parents.append(parent.fp32_precision)  # its own value, because its parent is "none" by now
        parent.fp32_precision = "none"
    for parent in PARENTS:
        for value in ("ieee", "tf32", "none"):
            parent.fp32_precision = value
            values_read.append(read_switches())
    for parent, value in zip(PARENTS, parents, strict=True):
        parent.fp32_precision = value
    return [*values_read, parents]


def read_legacy() -> list[Any]:
    """The switches' values under their old names, or "refused" if PyTorch raises."""
    values_read: list[Any] = []
    for read in (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            values_read.append(read())
        except RuntimeError:
            values_read.append("refused")
    return values_read


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Reset PyTorch's defaults before and after each test."""

    def reset() -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        for switch in (*PARENTS, BACKENDS.cuda.matmul, *CPU):
            switch.fp32_precision = "none"

    reset()
    yield
    reset()


class Watched(Toy):
    """Records the switches whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[list[str]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.recorded.append(read_switches())
        return super().forward(images)


@pytest.mark.parametrize(("tf32", "expected"), [(False, OFF), (True, ON)])
def test_the_network_runs_with_the_switches_of_the_study(tf32: bool, expected: list[str]) -> None:
    model, before = Watched(), probe_switches()
    study = toy_study(model=model, metrics=["cka"], tf32=tf32)
    during: list[Any] = []
    conv1 = model.conv1
    conv1.register_forward_pre_hook(lambda *_: during.append((read_switches(), read_legacy())))
    study.run(progress=lambda _step: during.append(probe_switches() == before))
    describe(study)
    plan(study)
    old = [tf32, tf32, "high" if tf32 else "highest"]  # old and new names agree
    assert (expected, old) in during
    assert all(each in ((expected, old), True) for each in during)
    assert len(model.recorded) > 3
    assert all(each == expected for each in model.recorded)
    assert probe_switches() == before


@pytest.mark.parametrize("seed", range(12))
def test_the_switches_are_restored(seed: int) -> None:
    draw = random.Random(seed)
    torch.set_float32_matmul_precision(draw.choice(["highest", "high", "medium"]))
    torch.backends.cudnn.allow_tf32 = draw.random() < 0.5
    for switch in draw.sample([*PARENTS, *CUDA, *CPU], draw.randrange(7)):
        switch.fp32_precision = draw.choice(["none", "ieee", "tf32"])
    before, old = probe_switches(), read_legacy()
    for allowed, expected in ((False, OFF), (True, ON)):
        with suppress(KeyboardInterrupt), set_tf32(allowed):
            assert read_switches() == expected
            with set_tf32(not allowed):
                assert read_switches() != expected
            assert read_switches() == expected
            raise KeyboardInterrupt
        assert (probe_switches(), read_legacy()) == (before, old)


@pytest.mark.parametrize("weight", [torch.ones(2, 2), torch.ones(2, 2, 1, 1)])
def test_the_kernels_after_a_cut_follow_the_study(weight: torch.Tensor) -> None:
    for tf32, precision in ((False, "tf32x3"), (True, "tf32")):
        with toy_study(tf32=tf32).hold_network():
            assert fusion._choose_precision(weight) == precision


class Branching(Toy):
    """Only torch.export can trace it, which reads the switches under their old names."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images if images.shape[1] == 3 else images[:, :3])


def test_a_network_that_is_exported_has_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    exported, export = [], torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda *args, **kw: exported.append(1) or export(*args, **kw)
    )
    expected = toy_study(metrics=["cka"]).run().table
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # type: ignore[attr-defined]
    study = toy_study(model=Branching(), metrics=["cka"])
    assert study.run().table.equals(expected)
    assert exported


def test_a_worker_process_sets_the_switches(tmp_path: Path) -> None:
    for tf32, expected in ((False, OFF), (True, ON)):
        out, log = tmp_path / f"run {tf32}", tmp_path / f"log {tf32}"
        make = partial(make_recording_studies, log=str(log), tf32=tf32)
        store = open_run(make("cpu"), out)
        log.unlink()
        units = deque(store.units[:1])
        events = list(PoolExecutor(Task(make, str(out)), ["cpu"]).run(units))
        assert [event.kind for event in events] == ["started", "done"]
        assert {tuple(json.loads(line)) for line in log.read_text().splitlines()} == {
            tuple(expected)
        }


def test_a_run_is_not_resumed_with_another_precision(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy_study(metrics=["cka"]).run(tmp_path, stop_after(1))
    with pytest.raises(StoreError, match=r"models\.toy\.tf32: false before, true now"):
        toy_study(metrics=["cka"], tf32=True).run(tmp_path)
    assert len(toy_study(metrics=["cka"]).run(tmp_path).table) == 2 * 3 * 16


def test_a_run_without_a_recorded_precision_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy_study(metrics=["cka"]).run(tmp_path, stop_after(1))
    path = tmp_path / "study.json"
    study = json.loads(path.read_text())
    del study["configuration"]["models"]["toy"]["tf32"]
    study["hash"] = digest(study["configuration"])
    path.write_text(json.dumps(study))
    with pytest.raises(StoreError, match=r"\(models\.toy\.tf32: false now, not recorded before\)"):
        toy_study(metrics=["cka"]).run(tmp_path)
