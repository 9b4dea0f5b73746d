"""The arrays and options that a study accepts, and the errors for all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _toy import toy_study
from torch import nn

from repsim_kernels.experiments import Study
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.runs.driver import run
from repsim_kernels.experiments.study.checks import Draws

N, P = 12, 6
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((N, P)).astype(np.float32)
LABELS = RNG.permutation(np.repeat([0, 1, 2], 4))
INDEX = RNG.permutation(N) + 100  # index of a table sampled from a larger one


def flat_study(**changes: Any) -> Study:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(P, 16), nn.ReLU(), nn.Linear(16, 3))
    arguments: dict[str, Any] = {"layers": ["1"], "images": IMAGES, "labels": LABELS}
    return Study(net, **arguments | {"metrics": ["cka"]} | changes)


def as_reversed_view(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return a[::-1].copy()[::-1]


def as_foreign_endian(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return a.astype(a.dtype.newbyteorder("S"))


def as_unmasked(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ma.masked_array(a, mask=False)


ANY = [
    as_reversed_view,
    as_foreign_endian,
    as_unmasked,
    np.asfortranarray,
    torch.from_numpy,
    np.ndarray.tolist,
]


@pytest.mark.parametrize(
    "form", [*ANY, lambda a: pd.DataFrame(a, index=INDEX, columns=list("abcdef"))]
)
def test_images_of_every_array_kind_are_equal(form: Callable[[Any], Any]) -> None:
    assert torch.equal(flat_study(images=form(IMAGES)).images, torch.tensor(IMAGES))


@pytest.mark.parametrize(
    "form",
    [
        *ANY,
        lambda a: pd.Series(a, index=INDEX),
        lambda a: a.astype(np.uint8),
        lambda a: torch.from_numpy(a).to(torch.int16),
    ],
)
def test_labels_of_every_array_kind_are_equal(form: Callable[[Any], Any]) -> None:
    assert torch.equal(flat_study(labels=form(LABELS)).labels, torch.tensor(LABELS))


@pytest.mark.parametrize(
    "targets",
    [
        np.array([9, 2, 9, 0])[1::2],
        np.array([0, 2])[::-1],
        np.array([2, 0], dtype=">i8"),
        pd.Series([2, 0], index=[7, 3]),
        torch.tensor([2, 0]),
        (np.uint8(2), torch.tensor(0)),
        iter([2, 0]),
        {2: "c", 0: "a"}.keys(),
    ],
)
def test_targets_of_every_array_kind_are_equal(targets: Any) -> None:
    result = flat_study(targets=targets).targets
    assert result == [2, 0]
    assert {type(label) for label in result} == {int}


def test_labels_are_copied() -> None:
    labels = LABELS.copy()
    study = flat_study(labels=labels)
    labels[:] = 0
    assert torch.equal(study.labels, torch.tensor(LABELS))


MASKED = np.ma.masked_greater(IMAGES, 1)
FRACTION = np.where(LABELS == 1, 0.5, LABELS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": MASKED}, "images: .*masked"),
        ({"labels": np.ma.masked_equal(LABELS, 2)}, "labels: .*masked"),
        ({"targets": np.ma.masked_equal([0, 1, 2], 2)}, "targets: .*masked"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images: empty; expected two or more of e"),
        ({"images": IMAGES.astype(object)}, "images: dtype object; expected real numbers"),
        ({"images": [["a"] * P] * N}, "images: dtype <U1; expected real numbers"),
        ({"images": torch.eye(N).to_sparse()}, "images: .*dense"),
        ({"labels": FRACTION}, "labels: dtype float64; expected integers"),
        ({"labels": list("abc") * 4}, "labels: dtype <U1; expected integers"),
        ({"labels": LABELS[:, None]}, r"labels: shape \(12, 1\); expected integers of shape \(n,"),
        ({"targets": [1.7]}, "targets: dtype float64; expected integers"),
        ({"targets": [0, 1.0]}, "targets: dtype float64; expected integers"),
        ({"targets": 1}, "targets: 1; expected a sequence of integer labels"),
        ({"targets": torch.tensor(1)}, r"targets: tensor\(1\); expected a sequence of integer la"),
        ({"targets": "12"}, "targets: '12'; expected a sequence of integer labels"),
        ({"targets": ["cat"]}, r"targets: \['cat'\]; expected a sequence of integer labels"),
        ({"targets": [True, False]}, r"targets: \[True, False\]; expected a sequence of integer"),
        ({"targets": [[0, 1]]}, r"targets: \[\[0, 1\]\]; expected a sequence of integer labels"),
        ({"targets": [1, 1]}, r"targets: \[1, 1\] is empty or repeats"),
        ({"grid": (2.9, 2)}, r"grid: \(2.9, 2\); expected two whole numbers"),
        ({"grid": (True, 2)}, r"grid: \(True, 2\); expected two whole numbers"),
        ({"grid": (2, 2, 2)}, r"grid: \(2, 2, 2\); expected two whole numbers"),
        ({"grid": "4x4"}, "grid: '4x4'; expected two whole numbers"),
        ({"grid": 4}, "grid: 4; expected two whole numbers"),
        ({"layers": "1"}, "layers: '1'; expected a sequence of names"),
        ({"layers": [1]}, r"layers: \[1\]; expected a sequence of names"),
        ({"metrics": "cka"}, "metrics: 'cka'; expected a sequence of names"),
        ({"metrics": None}, "metrics: None; expected a sequence of names"),
        ({"probes": "ridge"}, "probes: 'ridge'; expected a sequence of names"),
        ({"classes": "abc"}, "classes: 'abc'; expected a sequence of names"),
        ({"classes": {0: "a", 1: "b", 2: "c"}}, "classes: .*; expected a sequence of names"),
        ({"name": 3}, "name: 3; expected a string"),
        ({"note": b"a"}, "note: b'a'; expected a string"),
        ({"others": 1.5}, "others: 1.5; expected a whole number of at least 1"),
        ({"others": True}, "others: True; expected a whole number of at least 1"),
        ({"metric_images": 2.5}, "metric_images: 2.5; expected a whole number"),
        ({"block": 2.5}, "block: 2.5; expected a whole number of at least 1"),
        ({"block": "10"}, "block: '10'; expected a whole number of at least 1"),
        ({"seed": -1}, "seed: -1; expected a whole number of at least 0"),
        ({"seed": 0.5}, "seed: 0.5; expected a whole number of at least 0"),
        ({"ridge": "0.1"}, "ridge: '0.1'; expected a finite number of at least 0"),
        ({"penalty": np.inf}, "penalty: inf; expected a finite number of at least 0"),
        ({"tf32": "no"}, "tf32: 'no'; expected True or False"),
        ({"draws": 200}, "draws: 200; expected a repsim_kernels.experiments.Draws"),
        ({"draws": Draws(least=2.5)}, "draws.least: 2.5; expected a whole number"),  # type: ignore[arg-type]
        ({"draws": Draws(paired=1)}, "draws.paired: 1; expected True or False"),  # type: ignore[arg-type]
        ({"memory": [1]}, r"memory: \[1\]; expected a finite number"),
        ({"device": 1.5}, "device: 1.5 can't be used here"),
        ({"device": "meta"}, "device: meta can't be used here"),
        ({"images": IMAGES.astype(np.float64)}, "images: .* dtype float64 "),
    ],
)
def test_errors_name_the_wrong_argument_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=f"^{message}") as caught:
        flat_study(**changes)
    assert "\n" not in str(caught.value)


def test_error_names_a_model_that_is_not_a_module() -> None:
    with pytest.raises(StudyError, match=r"^model: 'resnet50'; expected a torch\.nn\.Module$"):
        Study("resnet50", ["1"], IMAGES, LABELS)  # type: ignore[arg-type]


def test_progress_that_is_not_callable_raises_before_anything_is_written(tmp_path: Path) -> None:
    study = toy_study(metrics=["cka"])
    for call in (
        lambda: study.run(tmp_path / "run", progress=True),  # type: ignore[arg-type]
        lambda: run([study], progress="bar"),  # type: ignore[arg-type]
    ):
        with pytest.raises(StudyError, match=r"^progress: .*; expected a function that takes a Ru"):
            call()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", [3, b"run", ["run"], "caf\udce9"])
def test_error_names_a_folder_that_is_not_a_path(out: Any) -> None:
    with pytest.raises(
        StudyError, match=r"^out: .*; expected the path of a folder, in UTF-8$"
    ) as error:
        toy_study(metrics=["cka"]).run(out)
    str(error.value).encode()


def test_numpy_options_are_written_as_json(tmp_path: Path) -> None:
    whole, real = np.int64(2), np.float32(0.5)
    study = flat_study(seed=whole, block=whole, ridge=real, grid=np.array([2, 2]), others=whole)
    plain = flat_study(seed=2, block=2, ridge=0.5, grid=(2, 2), others=2)
    assert study.configuration() == plain.configuration()
    study.run(tmp_path)
