"""Presets from the command line: what is refused, what runs, and what says it is no evidence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from _cli import fail_at_call, invoke
from _toy import toy_study
from PIL import Image

from repsim_kernels.experiments.cli import request
from repsim_kernels.experiments.cli.request import (
    SAMPLES,
    SweepOptions,
    make_model_studies,
    make_preset_studies,
    space_evenly,
)
from repsim_kernels.experiments.columns import METRICS
from repsim_kernels.experiments.inputs.imagenet import outputs
from repsim_kernels.experiments.inputs.networks import SMALL, study_layers
from repsim_kernels.experiments.inputs.presets import (
    FIFTY,
    PRESETS,
    TEN,
    Loaded,
    Network,
    Preset,
    load_network,
)
from repsim_kernels.experiments.report.page import write_report
from repsim_kernels.experiments.runs.driver import run
from repsim_kernels.experiments.study import measure

pytestmark = pytest.mark.usefixtures("undrawn")
NAME = "mobilenet_v2_035"
LATE = ("features.17.conv.3", "features.18.1")
CUT = ["--classes", "junco,n01944390,859", "--layers", ",".join(LATE), "--metrics", "cka,cca"]
RANDOM = ["--preset", NAME, "--weights", "random", "--images", "random", "--per-class", "2"]


@pytest.fixture(scope="module", autouse=True)
def networks_are_made_once() -> Iterator[None]:
    made = cache(load_network)

    def load(network: Network, weights: str | None) -> Loaded:
        return (made if weights == "random" else load_network)(network, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "load_network", load)
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    return tmp_path


def sweep(*arguments: str) -> tuple[int, str, str]:
    return invoke("sweep", *arguments)


def some(**changes: Any) -> SweepOptions:
    given = {"weights": ["random"], "images": "random", "per_class": 2, "layers": list(LATE)}
    return SweepOptions(**{**given, "classes": ["junco", "snail", "toaster"]} | changes)


NARROW = ["--preset", NAME]
WITHOUT = ["--images", "random"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--preset", "vgg16", *WITHOUT],
            f"preset: 'vgg16' is unknown; expected one of {', '.join(PRESETS)}",
        ),
        (
            ["--preset", "alexnet", "--model", "alexnet", *WITHOUT],
            "preset: beside --model or --full",
        ),
        (["--preset", "alexnet", "--full", *WITHOUT], "preset: beside --model or --full"),
        (
            ["--preset", "alexnet", "--size", "64", *WITHOUT],
            "size: a preset's images have the size",
        ),
        (["--preset", "alexnet", "--weights", "random"], "images: a preset needs ImageNet's"),
        (
            ["--preset", "hayne2024", "--layers", "features.1", *WITHOUT],
            "layers: 'hayne2024' is of several",
        ),
        ([*NARROW, *WITHOUT], f"torchvision has none for '{NAME}' (of width 0.35"),
        ([*NARROW, "--weights", "none.pt", *WITHOUT], "none.pt"),
        (
            ["--preset", "hayne2024", "--weights", "a.pt", "--weights", "b.pt", *WITHOUT],
            "weights: a.pt, b.pt for 3",
        ),
        ([*RANDOM, "--classes", "junko,snail"], "classes: 'junko' is unknown; is 'junco' meant?"),
        (
            [*RANDOM[:-1], "1", "--classes", "junco,snail"],
            "images_per_class: 1 is too few; expected 2",
        ),
        ([*RANDOM, *CUT, "--memory", "1MiB"], f"or more, for what layer '{LATE[0]}' of {NAME}"),
        (
            [*NARROW, "--weights", "random", "--images", "nowhere"],
            "images: there is no directory nowhere",
        ),
    ],
)
def test_what_a_preset_can_not_do_is_said_in_a_line(
    here: Path, options: list[str], message: str
) -> None:
    code, _, err = sweep(*options)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not any(here.iterdir())


def assert_noted(out: str, folder: Path, note: str | None) -> None:
    """Every place where a result is seen says that it is no evidence, or none does."""
    said = "" if note is None else f" ({note})"
    words = " ".join(out.split())
    assert words.count(f"{NAME}{said} layers (2): {', '.join(LATE)}") == 1
    assert f"Mean Spearman correlation, {NAME}{said} rank log-" in words
    text = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    assert text["about"]["models"][NAME]["note"] == note
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.count(f"<strong>{NAME}: {note}.</strong>") == (note is not None)
    assert html.count(f"<caption>{NAME}, {note} ") == (note is not None)
    table = pd.read_parquet(folder / "results.parquet")
    notes = {} if note is None else {"notes": {NAME: note}}
    assert table.attrs == notes
    metadata = pq.read_schema(folder / "results.parquet").metadata
    assert json.loads(metadata.get(b"PANDAS_ATTRS", b"{}")) == notes
    if note is None:
        assert "not evidence" not in out + html


def test_a_random_run_from_start_to_report(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_target", fail_at_call(5, KeyboardInterrupt()))
        code, out, _ = sweep(*RANDOM, *CUT, "--block", "1")
    assert code == 130
    assert "Plan, mobilenet_v2_035: 3 target classes x 16 cells x 2 images, metrics over 6" in out
    assert "Took" not in out

    code, out, err = sweep(*RANDOM, *CUT, "--block", "1")
    assert (code, err) == (0, "")
    folder = Path("runs", NAME)
    assert f"Plan, {NAME}: 2 target classes x 16 cells x 2 images, metrics over 6 stimuli" in out
    assert "4/6 mobilenet_v2_035 features.18.1" in out
    assert out.splitlines()[-3:-1] == [str(folder / "results.parquet"), str(folder / "report.html")]
    last = out.splitlines()[-1]
    assert last.startswith("Took ")
    assert "; the plan said " in last
    assert_noted(out, folder, "not evidence: random weights, random images")
    table = pd.read_parquet(folder / "results.parquet")
    assert set(table["class"]) == {"junco", "snail", "toaster"}
    assert set(table["layer"]) == set(LATE)
    assert table[["cka", "cca"]].gt(0).any(axis=None)

    code, out, _ = sweep(*RANDOM, *CUT, "--block", "1")
    assert code == 0
    assert "All 6 units are done already." in out
    assert "Plan" not in out
    assert "Took" not in out
    assert_noted(out, folder, "not evidence: random weights, random images")
    undisturbed = (
        make_preset_studies(NAME, some(study={"metrics": ["cka", "cca"]})).studies[0].run()
    )
    pd.testing.assert_frame_equal(table, undisturbed, check_exact=True)


def imagenet_folder(root: Path) -> Path:
    """Three small images of each of three classes, in sub-folders by wnid."""
    rng = np.random.default_rng(0)
    for wnid in ("n01534433", "n01944390", "n04442312"):
        (root / wnid).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / wnid / f"ILSVRC2012_val_0000000{i}.JPEG")
    return root


@pytest.mark.parametrize("weights", ["random", "own.pt"])
def test_a_run_of_real_images_says_only_what_is_random(here: Path, weights: str) -> None:
    imagenet_folder(here / "val")
    if weights != "random":
        torch.save(
            request.load_network(PRESETS[NAME].networks[0], "random").model.state_dict(), weights
        )
    real = ["--preset", NAME, "--weights", f"{NAME}={weights}", "--images", "val", *CUT]
    code, out, err = sweep(*real, "--per-class", "2", "--out", "real")
    assert (code, err) == (0, "")
    assert "Images: 6 images of 3 classes in val" in out
    assert_noted(out, Path("real"), "not evidence: random weights" if weights == "random" else None)


def test_random_images_beside_real_weights_are_noted(here: Path) -> None:
    network = request.load_network(PRESETS[NAME].networks[0], "random").model
    torch.save(network.state_dict(), "own.pt")
    (study,) = make_preset_studies(NAME, some(weights=["own.pt"])).studies
    assert study.note == "not evidence: random images"
    assert (
        study.configuration()["weights"]
        == make_preset_studies(NAME, some()).studies[0].configuration()["weights"]
    )


@pytest.mark.slow
def test_the_published_study_has_its_papers_choices() -> None:
    classes = list(FIFTY[:12])
    job = make_preset_studies("hayne2024", some(layers=None, classes=classes))
    assert [s.name for s in job.studies] == ["alexnet", NAME, "resnet50"]
    assert [len(s.layers) for s in job.studies] == [7, 104, 16]
    assert [s.others for s in job.studies] == [10, None, None]
    assert [s.stimuli for s in job.studies] == [22, 24, 24]
    assert [s.draws.of(100_352) for s in job.studies] == [200, 1003, 2007]
    for study in job.studies:
        assert (study.edges, study.grid) == ("inclusive", (4, 4))
        assert study.options == {"ridge": 0.1, "penalty": 1e3, "probe_ridge": 1.0}
        assert study.metrics == ["cka", "procrustes", "pwcca", "cca", "cca_squared"]
        assert study.probes == ["paper"]
        assert not study.draws.paired
        assert study.targets == outputs(classes)
        assert [study.class_name(t) for t in study.targets][:3] == [
            "schooner",
            "brain coral",
            "junco",
        ]
        assert study.note == "not evidence: random weights, random images"
        assert study.images.shape == (24, 3, 224, 224)
    assert job.source == "random images, seed 0: not evidence"


@pytest.mark.parametrize(("count", "others"), [(3, None), (11, None), (12, 10)])
def test_others_are_drawn_only_from_more_classes(
    monkeypatch: pytest.MonkeyPatch, count: int, others: int | None
) -> None:
    network = replace(PRESETS[NAME].networks[0], others=10)
    monkeypatch.setitem(PRESETS, NAME, Preset((network,)))
    (study,) = make_preset_studies(NAME, some(classes=list(FIFTY[:count]))).studies
    assert (study.others, len(study.targets)) == (others, count)


def test_the_count_of_images_is_the_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    network = replace(PRESETS[NAME].networks[0], images_per_class=4)
    monkeypatch.setitem(PRESETS, NAME, Preset((network,)))
    (study,) = make_preset_studies(NAME, some(per_class=None)).studies
    assert study.labels.bincount()[study.targets].tolist() == [4, 4, 4]


def test_a_preset_by_itself_has_this_packages_choices() -> None:
    (study,) = make_preset_studies(NAME, some(layers=None, classes=None)).studies
    assert study.targets == outputs(TEN)
    assert (study.edges, study.others, study.metrics) == ("equal", None, list(METRICS))
    assert study.options == {"ridge": 0.1, "penalty": 0.0, "probe_ridge": 1.0}
    assert (study.layers, len(study.images)) == (study_layers(study.model), 20)


def test_options_replace_the_presets() -> None:
    given = {"metrics": ["cka"], "grid": (2, 3), "ridge": 0.5, "penalty": 2.0, "memory": "1GiB"}
    (study,) = make_preset_studies(NAME, some(study=given, stimuli=2, per_class=3)).studies
    assert (study.metrics, study.grid, study.memory) == (["cka"], (2, 3), 2**30)
    assert (study.options["ridge"], study.options["penalty"]) == (0.5, 2.0)
    assert (len(study.images), study.stimuli, study.layers) == (9, 6, list(LATE))


@pytest.mark.parametrize("sampled", [True, False])
def test_the_demo_is_three_small_networks(sampled: bool) -> None:
    job = make_model_studies(list(SMALL), SweepOptions(), sampled)
    assert [study.name for study in job.studies] == list(SAMPLES)
    for study in job.studies:
        sample, layers = SAMPLES[study.name], study_layers(study.model)
        assert study.layers == (space_evenly(layers, sample.layers) if sampled else layers)
        assert study.targets == (space_evenly(list(range(10)), 7) if sampled else list(range(10)))
        assert study.metric_images == (20 if sampled else None)
        assert (study.edges, study.others, study.note) == ("equal", None, None)
        assert study.metrics == list(METRICS)
    assert {study.block for study in job.studies} == {10}
    assert sum(len(study.units) for study in job.studies) == (23 if sampled else 127)


def test_a_note_is_of_its_own_study() -> None:
    noted = toy_study(name="a", metrics=["cka"], note="not evidence: random weights")
    table = run([toy_study(name="b", metrics=["cka"]), noted])
    assert table.attrs == {"notes": {"a": "not evidence: random weights"}}
    assert toy_study(metrics=["cka"]).run().attrs == {}


def test_a_report_of_a_table_alone_has_its_notes(tmp_path: Path) -> None:
    note = "not evidence: random weights"
    table = toy_study(metrics=["cka"], note=note).run()
    html = write_report(table, tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<strong>toy: {note}.</strong>" in html
    assert f"<caption>toy, {note} <small>" in html


@pytest.mark.parametrize("published", [True, False])
def test_the_report_tells_edges_and_drawn_classes(tmp_path: Path, published: bool) -> None:
    changes = {"edges": "inclusive", "others": 1, "seed": 7} if published else {}
    toy_study(metrics=["cka"], **changes).run(tmp_path / "run")
    html = write_report(tmp_path / "run", tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("neurons on an edge are in both cells or in none" in html) == published
    assert ("those of 1 other classes, drawn with seed 7" in html) == published
    assert f"{10 if published else 15} of them for the metrics" in html
