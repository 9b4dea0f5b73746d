from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from _toy import Toy, stop_after, toy_study

from experiments.run import RunError, run
from experiments.store import Store, StoreError, Unit, load, replacing


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = toy_study(stimuli_per_class=3).run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        toy_study(stimuli_per_class=3).run(tmp_path / "b", stop_after(2))
    parts = names(tmp_path / "b")
    assert parts == {
        "study.json",
        "parts/toy--act1--ant%2Fqueen.parquet",
        "parts/toy--act1--bee.parquet",
    }
    steps: list[int] = []
    resumed = toy_study(stimuli_per_class=3).run(
        tmp_path / "b", lambda step: steps.append(step.done)
    )
    assert steps == [2, 3, 4, 5, 6]
    pd.testing.assert_frame_equal(resumed, undisturbed, check_exact=True)
    pd.testing.assert_frame_equal(resumed, toy_study(stimuli_per_class=3).run(), check_exact=True)
    stored, study = load(tmp_path / "b")
    pd.testing.assert_frame_equal(stored, resumed, check_exact=True)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    about = study["about"]["models"]["toy"]
    assert about["images"] == 15
    assert about["stimuli"] == 9


def test_a_finished_run_computes_nothing(tmp_path: Path) -> None:
    first = toy_study(metrics=["cka"]).run(tmp_path)
    steps: list[Any] = []
    again = toy_study(metrics=["cka"]).run(tmp_path, steps.append)
    assert [step.done for step in steps] == [6]
    assert again.equals(first)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"grid": (2, 2)}, r"models.toy.grid: \[4, 4\] there, \[2, 2\] here"),
        ({"ridge": 0.5}, "models.toy.ridge: 0.1 there, 0.5 here"),
        ({"name": "other"}, "models.toy only there; models.other only here"),
        ({"layers": ["act1"]}, "models.toy.layers"),
        ({"model": "other weights"}, "models.toy.weights"),
        ({"images": torch.zeros(15, 3, 8, 8)}, "models.toy.images"),
    ],
)
def test_another_configuration_is_refused(
    tmp_path: Path, changes: dict[str, object], difference: str
) -> None:
    study = toy_study(metrics=["cka"])
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path, stop_after(1))
    before = names(tmp_path)
    if "model" in changes:
        changes = {"model": Toy()}
        with torch.no_grad():
            changes["model"].fc.bias += 1  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=difference) as caught:
        toy_study(**{"metrics": ["cka"], **changes}).run(tmp_path)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_other_peoples_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(StoreError, match=r"holds files but no study\.json"):
        toy_study().run(tmp_path)
    with pytest.raises(StoreError, match="is a file; expected a folder"):
        toy_study().run(tmp_path / "thesis.tex")
    assert names(tmp_path) == {"thesis.tex"}


def test_damage_is_named(tmp_path: Path) -> None:
    study = toy_study(metrics=["cka"])
    study.run(tmp_path)
    part = tmp_path / "parts" / "toy--act1--bee.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"toy--act1--bee\.parquet can't be read"):
        study.run(tmp_path)
    part.unlink()
    study.run(tmp_path)
    text = json.loads((tmp_path / "study.json").read_text())
    text["configuration"]["models"]["toy"]["ridge"] = 7
    (tmp_path / "study.json").write_text(json.dumps(text))
    with pytest.raises(StoreError, match=r"study\.json is damaged"):
        study.run(tmp_path)
    with pytest.raises(StoreError, match=r"has no study\.json"):
        load(tmp_path / "parts")


def test_units_never_share_a_file(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    units = [
        Unit("a", "b", "c--d"),
        Unit("a", "b--c", "d"),
        Unit("a", "b", "c/d"),
        Unit("a", "b", "c%2Fd"),
        Unit("a", "b-", "-d"),
        Unit("a", "b", "--d"),
        Unit("a", "b", "../d"),
        Unit("a", "b", "é"),
    ]
    assert len({store.path(unit) for unit in units}) == len(units)
    assert {store.path(unit).parent for unit in units} == {tmp_path / "parts"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def broken() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert names(tmp_path) == {"file"}
    assert path.read_text() == "old"


def test_two_studies_of_one_name_are_refused() -> None:
    study = toy_study()
    with pytest.raises(RunError, match="two have the same name"):
        run([study, study])


def test_several_studies_are_one_run() -> None:
    one, two = toy_study(name="one", metrics=["cka"]), toy_study(name="two", metrics=["cka"])
    both = run([two, one])
    assert both.equals(pd.concat([one.run(), two.run()], ignore_index=True))
