"""What the options of ``sweep`` come to; nothing is run."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _cli import invoke

from repsim_kernels.experiments.cli import request
from repsim_kernels.experiments.cli import sweep as sweeping
from repsim_kernels.experiments.cli.request import StudySet
from repsim_kernels.experiments.runs.shard import Shard

NAME = "mobilenet_v2_035"
RANDOM = ["--preset", NAME, "--weights", "random", "--images", "random", "--per-class", "2"]


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
def test_where_a_run_goes_and_whether_it_is_a_sample(
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    folder: str,
    sampled: bool,
    preset: bool,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        sweeping, "launch", lambda *given, **named: seen.append((*given, named["dry"]))
    )
    assert sweep(*arguments) == (0, "", "")
    ((recipe, out, how, dry),) = seen
    assert (out, dry, recipe.sampled) == (Path(folder), False, sampled)
    assert (recipe.preset is not None, recipe.names == ()) == (preset, preset)
    assert (how.workers, how.shard, how.executor) == (1, Shard(), "pool")
    calls: list[Any] = []
    monkeypatch.setattr(
        request, "make_model_studies", lambda *given: calls.append(given) or StudySet([], "")
    )
    monkeypatch.setattr(
        request, "make_preset_studies", lambda *given: calls.append(given) or StudySet([], "")
    )
    copy = pickle.loads(pickle.dumps(recipe))  # for another process
    assert copy("cuda:3") == []
    asked = replace(recipe.asked, study=recipe.asked.study | {"device": "cuda:3"})
    assert calls == [(NAME, asked) if preset else (recipe.names, asked, sampled)]


def test_tf32_is_passed_on_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sweeping, "launch", lambda *given, **_named: seen.append(given))
    assert sweep() == sweep("--tf32") == (0, "", "")
    (plain, *_), (asked, *_) = seen
    assert asked.asked.study == plain.asked.study | {"tf32": True}
    assert "tf32" not in plain.asked.study


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
def test_shards_and_devices_of_torchrun_and_slurm(
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    environment: dict[str, str],
    shard: Shard,
    device: str,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sweeping, "launch", lambda *given, **_named: seen.append(given))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sweep(*options) == (0, "", "")
    ((recipe, _, how),) = seen
    assert (how.shard, recipe.asked.study["device"]) == (shard, device)
