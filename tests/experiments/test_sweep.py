"""How the options of ``sweep`` are interpreted; nothing is run."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _cli import invoke

from repsim_kernels.experiments.cli import request
from repsim_kernels.experiments.cli import sweep as sweeping
from repsim_kernels.experiments.cli.request import StudySet
from repsim_kernels.experiments.runs.shard import Shard

NAME = "mobilenet_v2_035"
RANDOM = ["--preset", NAME, "--weights", "random", "--images", "random", "--images-per-class", "2"]


def sweep(*arguments: str) -> tuple[int, str, str]:
    return invoke("sweep", *arguments)


@pytest.mark.parametrize(
    ("arguments", "folder", "sampled", "preset"),
    [
        ([], "runs/demo", True, False),
        (["--full"], "runs/demo-full", False, False),
        (["--model", "alexnet_small"], "runs/alexnet_small", True, False),
        (
            ["--model", "_toy:Toy", "--images", "i", "--layers", "act1"],
            "runs/_toy.Toy",
            False,
            False,
        ),
        (RANDOM, f"runs/{NAME}", False, True),
        ([*RANDOM, "--out", "mine"], "mine", False, True),
    ],
)
def test_the_run_folder_and_whether_the_run_is_a_sample(
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    folder: str,
    sampled: bool,
    preset: bool,
) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(
        sweeping, "launch", lambda *args, **kwargs: launches.append((*args, kwargs["plan_only"]))
    )
    assert sweep(*arguments) == (0, "", "")
    ((factory, out, launch_options, plan_only),) = launches
    assert (out, plan_only, factory.sampled) == (Path(folder), False, sampled)
    assert (factory.preset is not None, factory.names == ()) == (preset, preset)
    assert (launch_options.shard, launch_options.executor) == (Shard(), "pool")
    calls: list[Any] = []
    monkeypatch.setattr(
        request, "make_model_studies", lambda *args: calls.append(args) or StudySet([], "")
    )
    monkeypatch.setattr(
        request, "make_preset_studies", lambda *args: calls.append(args) or StudySet([], "")
    )
    copy = pickle.loads(pickle.dumps(factory))  # as in a worker process
    assert copy("cuda:3") == []
    options = replace(factory.options, study=factory.options.study | {"device": "cuda:3"})
    assert calls == [(NAME, options) if preset else (factory.names, options, sampled)]


@pytest.mark.parametrize(
    ("arguments", "cores", "workers", "threads"),
    [
        ([], 1, 1, 1),
        (["--full"], 3, 3, 1),
        ([], 64, 4, 1),
        (["--threads", "2"], 5, 2, 2),
        (["--workers", "1"], 2, 1, 1),
        (["--shard", "1/2"], 2, 1, 1),
        (["--executor", "ray"], 2, None, 1),
        (["--model", "alexnet_small"], 2, 1, 1),
        (["--images", "i"], 2, 1, 1),
    ],
)
def test_the_demo_has_a_worker_for_each_core(
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    cores: int,
    workers: int | None,
    threads: int,
) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(sweeping, "launch", lambda *args, **_kwargs: launches.append(args))
    monkeypatch.setattr(sweeping, "count_cores", lambda: cores)
    before = torch.get_num_threads()
    try:
        assert sweep(*arguments) == (0, "", "")
    finally:
        torch.set_num_threads(before)
    ((_, _, options),) = launches
    assert (options.workers, options.threads) == (workers, threads)


def test_tf32_is_passed_on_only_if_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(sweeping, "launch", lambda *args, **_kwargs: launches.append(args))
    assert sweep() == sweep("--tf32") == (0, "", "")
    (plain, *_), (requested, *_) = launches
    assert requested.options.study == plain.options.study | {"tf32": True}
    assert "tf32" not in plain.options.study


@pytest.mark.parametrize(
    ("options", "environment", "shard", "device"),
    [
        (["--shard", "2/3"], {"RANK": "0", "WORLD_SIZE": "2"}, Shard(2, 3), "cpu"),
        ([], {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, Shard(2, 4), "cpu"),
        (
            ["--device", "cuda"],
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
            Shard(6, 8),
            "cuda:1",
        ),
        (
            ["--device", "cuda"],
            {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"},
            Shard(2, 2),
            "cuda",
        ),
    ],
)
def test_shards_and_devices_from_torchrun_and_slurm(
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    environment: dict[str, str],
    shard: Shard,
    device: str,
) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(sweeping, "launch", lambda *args, **_kwargs: launches.append(args))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sweep(*options) == (0, "", "")
    ((factory, _, launch_options),) = launches
    assert (launch_options.shard, factory.options.study["device"]) == (shard, device)
