"""Networks near chance: reported first, and their claims are not judged."""

from __future__ import annotations

import json
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _cli import invoke
from _page import CHANGES, FIVE, random_table, write_page
from _toy import CLASSES, Toy, toy_images, toy_study
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from repsim_kernels.experiments.cli.tables import print_results, warn_if_near_chance
from repsim_kernels.experiments.report.findings import describe_near_chance
from repsim_kernels.experiments.runs.driver import run
from repsim_kernels.experiments.runs.membership import open_run
from repsim_kernels.experiments.runs.store import Store
from repsim_kernels.experiments.study.measure import describe


def describe_run(correct: int, images: int, classes: int, **more: Any) -> dict[str, Any]:
    return {"accuracy": correct / images, "images": images, "image_classes": classes, **more}


@given(st.lists(st.integers(2, 30), min_size=2, max_size=12), st.data())
def test_near_chance_follows_the_exact_test_and_the_margin(
    counts: list[int], data: st.DataObject
) -> None:
    images = sum(counts)
    correct = data.draw(st.integers(0, images))
    p = Fraction(max(counts), images)
    tail = sum(comb(images, r) * p**r * (1 - p) ** (images - r) for r in range(correct, images + 1))
    threshold = min(2 * p, p + Fraction(1, 10), (p + 1) / 2)
    near = tail > Fraction(1, 100) or Fraction(correct, images) < threshold
    more = {"outputs": data.draw(st.integers(len(counts), 1000)), "largest_class": max(counts)}
    assert (
        describe_near_chance(describe_run(correct, images, len(counts), **more)) is not None
    ) == near


@pytest.mark.parametrize(
    ("correct", "images", "classes", "largest", "near"),
    [
        (109, 1000, 10, 100, True),
        (1090, 10_000, 10, 1000, True),  # significantly better than chance, but useless
        (250, 1000, 10, 100, False),
        (50, 500, 10, 50, True),  # the same answer to all images, whatever the number of outputs
        (550, 1000, 2, 500, True),
        (650, 1000, 2, 500, False),
        (600, 1000, 3, 600, True),  # the same answer again, unequal classes
        (680, 1000, 3, 600, True),
        (700, 1000, 3, 600, False),
        (960, 1000, 2, 950, True),
        (990, 1000, 2, 950, False),
        (0, 20, 10, 2, True),
        (20, 20, 2, 10, False),
        (5, 6, 2, 3, True),  # too few images to tell
    ],
)
def test_networks_near_chance_and_others(
    correct: int, images: int, classes: int, largest: int, near: bool
) -> None:
    text = describe_near_chance(
        describe_run(correct, images, classes, largest_class=largest, outputs=1000)
    )
    assert (text is not None) == near
    if text is not None:
        assert text == (
            f"it is right for {100 * correct / images:.1f} % of {images} images, and would be for "
            f"{100 * largest / images:g} % if it always named the largest class"
        )
    if (
        largest * classes == images
    ):  # older runs don't record the largest class; classes are then taken as equal
        assert describe_near_chance(describe_run(correct, images, classes)) == text


class Constant(nn.Module):
    """Gives the same answer to all images."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(images).flatten(1)[:, :3]
        return x * 1e-6 + torch.tensor([0.0, 1.0, 0.0])


def test_a_constant_answer_with_unequal_classes_is_near_chance() -> None:
    labels = [0] * 3 + [1] * 9 + [2] * 3
    study = toy_study(model=Constant(), layers=["act"], labels=labels, metrics=["cka"])
    message = "it is right for 60.0 % of 15 images, and would be for 60 % if it always named"
    assert str(describe_near_chance(describe(study))).startswith(message)


def test_a_run_without_recorded_accuracy_is_not_near_chance() -> None:
    assert describe_near_chance({"note": None}) is None


def make_run(folder: Path, correct: int) -> Path:
    """Store a finished run of a ten-class network with this many of 1,000 images correct."""
    table = random_table(classes=8, seed=3)
    table["decodability_refit"] += 3 * table["cka"] + 3 * table["procrustes"]
    configuration = {
        "models": {
            "net": {
                "weights": "0" * 64,
                "images": "0" * 64,
                "layers": [f"l.{i}" for i in range(4)],
                "classes": sorted(table["class"].unique()),
                "block": 8,
                "grid": [4, 4],
                "metric_images": None,
                "penalty": 0.0,
                "ridge": 0.1,
                "probe_ridge": 1.0,
            }
        }
    }
    facts = {
        "network": "Net",
        "parameters": 7,
        "image_shape": [3, 8, 8],
        "stimuli": 1000,
        "note": None,
        "device": "CPU",
        **describe_run(correct, 1000, 10),
    }
    store = Store.create(folder, configuration, lambda: {"about": {"models": {"net": facts}}})
    for unit in store.units:
        store.save(unit, table[table["layer"] == unit.layer])
    store.compact()
    return folder


@pytest.mark.usefixtures("undrawn")
def test_a_report_starts_with_chance_and_judges_no_claims(tmp_path: Path) -> None:
    guessing = write_page(make_run(tmp_path / "guessing", 109), tmp_path)
    text = guessing.visible_text()
    first = "net is near chance: it is right for 10.9 % of 1000 images"
    assert text.index(first) < text.index("Neurons of a network were ablated")
    assert (
        "The claims are not judged, because the network is near chance: it is right for 10.9 %"
        in text
    )
    assert "exact one-sided binomial test" in text
    for verdict in ("Not held", "Not decided", "is followed better by"):
        assert verdict not in text
    assert "claims" not in [attributes.get("class") for _, attributes in guessing.elements]
    assert not [title for title in guessing.tables if title.startswith("net, mixed model")]
    able = write_page(make_run(tmp_path / "able", 300), tmp_path)
    assert "near chance" not in able.visible_text()
    assert "claims" in [attributes.get("class") for _, attributes in able.elements]
    assert [title for title in able.tables if title.startswith("net, mixed model")]
    correlations = "net (32 groups: 4 layers x 8 classes)"
    assert guessing.tables[correlations] == able.tables[correlations]


@pytest.mark.usefixtures("blank_reports")
def test_the_terminal_warns_before_the_first_unit_and_before_the_table(folder: Path) -> None:
    words = ["--model", "_toy:Toy", "--layers", "act1", "--size", "8", "--metrics", "cka"]
    code, out, err = invoke("sweep", *words, "--images", folder, "--out", "run")
    assert (code, err) == (0, "")
    facts = json.loads(Path("run", "study.json").read_text())["about"]["models"]["_toy:Toy"]
    assert facts["outputs"] == 3
    warning = f"_toy:Toy is near chance: {describe_near_chance(facts)}."
    lines = out.splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith(warning)]
    (started,) = (number for number, line in enumerate(lines) if line.endswith("1 started"))
    (table,) = (number for number, line in enumerate(lines) if line.startswith("Mean Spearman"))
    assert len(places) == 2
    assert places[0] < started < places[1] < table
    assert invoke("compact", "run")[1].startswith(warning)


def test_an_accurate_network_gets_no_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, _ = toy_images(10)
    labels = Toy().eval()(images).argmax(1)
    keep = labels.bincount(minlength=3) > 1
    images, labels = images[keep[labels]], labels[keep[labels]]
    study = toy_study(images=images, labels=labels, classes=CLASSES, metrics=["cka"])
    store = open_run([study], tmp_path)
    run([study], store)
    assert store.study["about"]["models"]["toy"]["accuracy"] == 1
    warn_if_near_chance(store)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("undrawn")
def test_report_and_terminal_mention_nan_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = random_table().assign(nan_images=0)
    assert "gives no answer (" not in write_page(none, tmp_path).visible_text()
    table = random_table(changes=(*CHANGES, "log_probability"), distances=(*FIVE, "energy"))
    table["nan_images"] = np.where(table.index % 24 == 3, 2, 0) + (table.index == 27)
    bad = table["nan_images"] > 0
    table.loc[bad, ["rank_deficit", "top1", "log_probability"]] = np.nan
    table.loc[table.index % 7 == 1, "log_probability"] = np.inf  # a probability that fell to 0
    message = (
        f"net: the network gives no answer (NaN, or all -inf) for images in {bad.sum()} of 192 "
        f"cells, up to 3 in one and {2 * bad.sum() + 1} in all; the loss of performance of "
        "these cells is not known."
    )
    assert message in write_page(table, tmp_path).visible_text()
    layers = table["layer"].unique().tolist()
    store = Store.create(
        tmp_path / "run", {"models": {"net": {"layers": layers, "classes": ["c"], "block": 1}}}
    )
    for unit in store.units:
        store.save(unit, table[table["layer"] == unit.layer])
    print_results(Console(highlight=False, markup=False), store.compact(), store)
    assert message in capsys.readouterr().out.splitlines()
    older = pd.concat([table.drop(columns="nan_images"), none.assign(model="b")])
    assert "gives no answer (" not in write_page(older, tmp_path).visible_text()
