"""Presets on the command line: refused options, runs, and notes on random weights or images."""

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
from repsim_kernels.experiments.inputs.imagenet import find_outputs
from repsim_kernels.experiments.inputs.networks import SMALL, list_default_layers
from repsim_kernels.experiments.inputs.presets import (
    FIFTY,
    PRESETS,
    TEN,
    LoadedNetwork,
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
RANDOM = ["--preset", NAME, "--weights", "random", "--images", "random", "--images-per-class", "2"]


@pytest.fixture(scope="module", autouse=True)
def make_networks_once() -> Iterator[None]:
    cached_load = cache(load_network)

    def load(network: Network, weights: str | None) -> LoadedNetwork:
        return (cached_load if weights == "random" else load_network)(network, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "load_network", load)
        yield


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    return tmp_path


def sweep(*arguments: str) -> tuple[int, str, str]:
    return invoke("sweep", *arguments)


def options_with(**changes: Any) -> SweepOptions:
    defaults = {
        "weights": ["random"],
        "images": "random",
        "images_per_class": 2,
        "layers": list(LATE),
    }
    return SweepOptions(**{**defaults, "classes": ["junco", "snail", "toaster"]} | changes)


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
            "preset: can't be combined with --model or --full",
        ),
        (
            ["--preset", "alexnet", "--full", *WITHOUT],
            "preset: can't be combined with --model or --full",
        ),
        (
            ["--preset", "alexnet", "--size", "64", *WITHOUT],
            "size: does not apply to presets",
        ),
        (["--preset", "alexnet", "--weights", "random"], "images: required for a preset"),
        (
            ["--preset", "hayne2024", "--layers", "features.1", *WITHOUT],
            "layers: 'hayne2024' has several networks",
        ),
        ([*NARROW, *WITHOUT], f"torchvision has none for '{NAME}' (of width 0.35"),
        ([*NARROW, "--weights", "none.pt", *WITHOUT], "none.pt"),
        (
            ["--preset", "hayne2024", "--weights", "a.pt", "--weights", "b.pt", *WITHOUT],
            "weights: a.pt, b.pt for 3",
        ),
        (
            [*RANDOM, "--classes", "junko,snail"],
            "classes: 'junko' is unknown; did you mean 'junco'?",
        ),
        (
            [*RANDOM[:-1], "1", "--classes", "junco,snail"],
            "images_per_class: 1 is too few; expected 2",
        ),
        ([*RANDOM, *CUT, "--memory", "1MiB"], f"or more, to hold layer {LATE[0]!r} of {NAME}"),
        (
            [*NARROW, "--weights", "random", "--images", "nowhere"],
            "images: there is no folder nowhere",
        ),
    ],
)
def test_invalid_options_of_a_preset_give_a_one_line_error(
    working_folder: Path, options: list[str], message: str
) -> None:
    code, _, err = sweep(*options)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not any(working_folder.iterdir())


def assert_note(out: str, folder: Path, note: str | None) -> None:
    """Check that every output carries the note, or that none does."""
    suffix = "" if note is None else f" ({note})"
    words = " ".join(out.split())
    assert words.count(f"{NAME}{suffix} layers (2): {', '.join(LATE)}") == 1
    assert f"Mean Spearman correlation, {NAME}{suffix} rank log-" in words
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


def test_a_run_with_random_weights_and_images(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_measure_target", fail_at_call(5, KeyboardInterrupt()))
        code, out, _ = sweep(*RANDOM, *CUT, "--block", "1")
    assert code == 130
    assert "Plan for mobilenet_v2_035: 3 target classes x 16 cells x 2 images; metrics use 6" in out
    assert "Took" not in out

    code, out, err = sweep(*RANDOM, *CUT, "--block", "1")
    assert (code, err) == (0, "")
    folder = Path("runs", NAME)
    assert f"Plan for {NAME}: 2 target classes x 16 cells x 2 images; metrics use 6 images" in out
    assert "4/6 mobilenet_v2_035 features.18.1" in out
    assert out.splitlines()[-3:-1] == [str(folder / "results.parquet"), str(folder / "report.html")]
    last = out.splitlines()[-1]
    assert last.startswith("Took ")
    assert " (estimated: " in last
    assert_note(out, folder, "not evidence: random weights, random images")
    table = pd.read_parquet(folder / "results.parquet")
    assert set(table["class"]) == {"junco", "snail", "toaster"}
    assert set(table["layer"]) == set(LATE)
    assert table[["cka", "cca"]].gt(0).any(axis=None)

    code, out, _ = sweep(*RANDOM, *CUT, "--block", "1")
    assert code == 0
    assert "All 6 units are already done." in out
    assert "Plan" not in out
    assert "Took" not in out
    assert_note(out, folder, "not evidence: random weights, random images")
    (study,) = make_preset_studies(NAME, options_with(study={"metrics": ["cka", "cca"]})).studies
    pd.testing.assert_frame_equal(table, study.run().table, check_exact=True)


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
def test_the_note_of_a_run_on_real_images_names_only_random_weights(
    working_folder: Path, weights: str
) -> None:
    imagenet_folder(working_folder / "val")
    if weights != "random":
        torch.save(
            request.load_network(PRESETS[NAME].networks[0], "random").model.state_dict(), weights
        )
    real = ["--preset", NAME, "--weights", f"{NAME}={weights}", "--images", "val", *CUT]
    code, out, err = sweep(*real, "--images-per-class", "2", "--out", "real")
    assert (code, err) == (0, "")
    assert "Images: 6 images of 3 classes in val" in out
    assert_note(out, Path("real"), "not evidence: random weights" if weights == "random" else None)


def test_random_images_with_real_weights_are_noted(working_folder: Path) -> None:
    network = request.load_network(PRESETS[NAME].networks[0], "random").model
    torch.save(network.state_dict(), "own.pt")
    (study,) = make_preset_studies(NAME, options_with(weights=["own.pt"])).studies
    assert study.note == "not evidence: random images"
    assert (
        study.configuration()["weights"]
        == make_preset_studies(NAME, options_with()).studies[0].configuration()["weights"]
    )


@pytest.mark.slow
def test_the_published_study_has_the_choices_of_the_paper() -> None:
    classes = list(FIFTY[:12])
    study_set = make_preset_studies("hayne2024", options_with(layers=None, classes=classes))
    assert [s.name for s in study_set.studies] == ["alexnet", NAME, "resnet50"]
    assert [len(s.layers) for s in study_set.studies] == [7, 104, 16]
    assert [s.others for s in study_set.studies] == [10, None, None]
    assert [s.n_stimuli for s in study_set.studies] == [22, 24, 24]
    assert [s.draws.count_for(100_352) for s in study_set.studies] == [200, 1003, 2007]
    for study in study_set.studies:
        assert (study.edges, study.grid) == ("inclusive", (4, 4))
        assert study.options == {"ridge": 0.1, "penalty": 1e3, "probe_ridge": 1.0}
        assert study.metrics == ["cka", "procrustes", "pwcca", "cca", "cca_squared"]
        assert study.probes == ["paper"]
        assert not study.draws.paired
        assert study.targets == find_outputs(classes)
        assert [study.class_name(t) for t in study.targets][:3] == [
            "schooner",
            "brain coral",
            "junco",
        ]
        assert study.note == "not evidence: random weights, random images"
        assert study.images.shape == (24, 3, 224, 224)
    assert study_set.source == "random images, seed 0: not evidence"


@pytest.mark.parametrize(("count", "others"), [(3, None), (11, None), (12, 10)])
def test_other_classes_are_drawn_only_if_there_are_more(
    monkeypatch: pytest.MonkeyPatch, count: int, others: int | None
) -> None:
    network = replace(PRESETS[NAME].networks[0], others=10)
    monkeypatch.setitem(PRESETS, NAME, Preset((network,)))
    (study,) = make_preset_studies(NAME, options_with(classes=list(FIFTY[:count]))).studies
    assert (study.others, len(study.targets)) == (others, count)


def test_the_preset_sets_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    network = replace(PRESETS[NAME].networks[0], images_per_class=4)
    monkeypatch.setitem(PRESETS, NAME, Preset((network,)))
    (study,) = make_preset_studies(NAME, options_with(images_per_class=None)).studies
    assert study.labels.bincount()[study.targets].tolist() == [4, 4, 4]


def test_a_single_preset_has_the_choices_of_this_package() -> None:
    (study,) = make_preset_studies(NAME, options_with(layers=None, classes=None)).studies
    assert study.targets == find_outputs(TEN)
    assert (study.edges, study.others, study.metrics) == ("equal", None, list(METRICS))
    assert study.options == {"ridge": 0.1, "penalty": 0.0, "probe_ridge": 1.0}
    assert (study.layers, len(study.images)) == (list_default_layers(study.model), 20)


def test_options_override_the_preset() -> None:
    arguments = {"metrics": ["cka"], "grid": (2, 3), "ridge": 0.5, "penalty": 2.0, "memory": "1GiB"}
    (study,) = make_preset_studies(
        NAME, options_with(study=arguments, metric_images=2, images_per_class=3)
    ).studies
    assert (study.metrics, study.grid, study.memory) == (["cka"], (2, 3), 2**30)
    assert (study.options["ridge"], study.options["penalty"]) == (0.5, 2.0)
    assert (len(study.images), study.n_stimuli, study.layers) == (9, 6, list(LATE))


@pytest.mark.parametrize("sampled", [True, False])
def test_the_demo_is_the_small_networks(sampled: bool) -> None:
    study_set = make_model_studies(list(SMALL), SweepOptions(), sampled)
    assert [study.name for study in study_set.studies] == list(SAMPLES)
    for study in study_set.studies:
        sample, layers = SAMPLES[study.name], list_default_layers(study.model)
        assert study.layers == (space_evenly(layers, sample.layers) if sampled else layers)
        assert study.targets == (space_evenly(list(range(10)), 7) if sampled else list(range(10)))
        assert study.metric_images == (20 if sampled else None)
        assert (study.edges, study.others, study.note) == ("equal", None, None)
        assert study.metrics == list(METRICS)
    assert {study.block for study in study_set.studies} == {10}
    assert sum(len(study.units) for study in study_set.studies) == (26 if sampled else 135)


def test_a_note_belongs_to_its_study() -> None:
    noted = toy_study(name="a", metrics=["cka"], note="not evidence: random weights")
    table = run([toy_study(name="b", metrics=["cka"]), noted]).table
    assert table.attrs == {"notes": {"a": "not evidence: random weights"}}
    assert toy_study(metrics=["cka"]).run().table.attrs == {}


def test_a_report_of_a_table_shows_its_notes(tmp_path: Path) -> None:
    note = "not evidence: random weights"
    table = toy_study(metrics=["cka"], note=note).run().table
    html = write_report(table, tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<strong>toy: {note}.</strong>" in html
    assert f"<caption>toy, {note} <small>" in html


@pytest.mark.parametrize("published", [True, False])
def test_the_report_states_edges_and_drawn_classes(tmp_path: Path, published: bool) -> None:
    changes = {"edges": "inclusive", "others": 1, "seed": 7} if published else {}
    toy_study(metrics=["cka"], **changes).run(tmp_path / "run")
    html = write_report(tmp_path / "run", tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("neurons on an edge are in several cells or in none" in html) == published
    assert ("those of 1 other classes, drawn with seed 7" in html) == published
    assert f"{10 if published else 15} of them for the metrics" in html
