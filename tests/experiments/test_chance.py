"""Networks that guess: said first, and not judged."""

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
from _page import CHANGES, FIVE, drawn, page_of
from _toy import CLASSES, Toy, toy_images, toy_study
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from repsim_kernels.experiments.cli.tables import print_results, warn_if_near_chance
from repsim_kernels.experiments.report.findings import near_chance
from repsim_kernels.experiments.runs.driver import run
from repsim_kernels.experiments.runs.membership import open_run
from repsim_kernels.experiments.runs.store import Store
from repsim_kernels.experiments.study.measure import describe


def about(right: int, images: int, classes: int, **more: Any) -> dict[str, Any]:
    return {"accuracy": right / images, "images": images, "image_classes": classes, **more}


@given(st.lists(st.integers(2, 30), min_size=2, max_size=12), st.data())
def test_chance_is_told_by_the_exact_test_and_the_margin(
    counts: list[int], data: st.DataObject
) -> None:
    images = sum(counts)
    right = data.draw(st.integers(0, images))
    p = Fraction(max(counts), images)
    tail = sum(comb(images, r) * p**r * (1 - p) ** (images - r) for r in range(right, images + 1))
    least = min(2 * p, p + Fraction(1, 10), (p + 1) / 2)
    near = tail > Fraction(1, 100) or Fraction(right, images) < least
    more = {"outputs": data.draw(st.integers(len(counts), 1000)), "largest_class": max(counts)}
    assert (near_chance(about(right, images, len(counts), **more)) is not None) == near


@pytest.mark.parametrize(
    ("right", "images", "classes", "largest", "near"),
    [
        (109, 1000, 10, 100, True),
        (1090, 10_000, 10, 1000, True),  # better than chance beyond doubt, and of no use
        (250, 1000, 10, 100, False),
        (50, 500, 10, 50, True),  # one answer to all images, whatever the number of outputs
        (550, 1000, 2, 500, True),
        (650, 1000, 2, 500, False),
        (600, 1000, 3, 600, True),  # one answer again, of unequal classes
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
    right: int, images: int, classes: int, largest: int, near: bool
) -> None:
    text = near_chance(about(right, images, classes, largest_class=largest, outputs=1000))
    assert (text is not None) == near
    if text is not None:
        assert text == (
            f"{100 * right / images:.1f} % of its answers to {images} images are right, and "
            f"{100 * largest / images:g} % would be if all named the largest class"
        )
    if largest * classes == images:  # as a run is taken that does not record the largest class
        assert near_chance(about(right, images, classes)) == text


class Constant(nn.Module):
    """Has one answer for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(images).flatten(1)[:, :3]
        return x * 1e-6 + torch.tensor([0.0, 1.0, 0.0])


def test_one_answer_to_unequal_classes_is_near_chance() -> None:
    labels = [0] * 3 + [1] * 9 + [2] * 3
    study = toy_study(model=Constant(), layers=["act"], labels=labels, metrics=["cka"])
    said = "60.0 % of its answers to 15 images are right, and 60 % would be if all named the"
    assert str(near_chance(describe(study))).startswith(said)


def test_what_is_not_recorded_is_not_near_chance() -> None:
    assert near_chance({"note": None}) is None


def stored(folder: Path, right: int) -> Path:
    """A finished run whose ten-class network has so many of 1,000 images right."""
    table = drawn(classes=8, seed=3)
    table["decodability_refit"] += 3 * table["cka"] + 3 * table["procrustes"]
    configured = {
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
        **about(right, 1000, 10),
    }
    store = Store.create(folder, configured, lambda: {"about": {"models": {"net": facts}}})
    for unit in store.units:
        store.save(unit, table[table["layer"] == unit.layer])
    store.compact()
    return folder


@pytest.mark.usefixtures("undrawn")
def test_a_report_says_so_first_and_judges_nothing(tmp_path: Path) -> None:
    guessing = page_of(stored(tmp_path / "guessing", 109), tmp_path)
    text = guessing.said()
    first = "net is near chance: 10.9 % of its answers to 1000 images are right"
    assert text.index(first) < text.index("Neurons of a network were ablated")
    assert "The claims are not judged: the network is near chance. 10.9 %" in text
    assert "exact one-sided binomial test" in text
    for said in ("Not held", "Not decided", "is followed better by"):
        assert said not in text
    assert "claims" not in [of.get("class") for _, of in guessing.elements]
    assert not [title for title in guessing.tables if title.startswith("net, mixed model")]
    able = page_of(stored(tmp_path / "able", 300), tmp_path)
    assert "near chance" not in able.said()
    assert "claims" in [of.get("class") for _, of in able.elements]
    assert [title for title in able.tables if title.startswith("net, mixed model")]
    correlations = "net (32 groups: 4 layers x 8 classes)"
    assert guessing.tables[correlations] == able.tables[correlations]


@pytest.mark.usefixtures("blank_reports")
def test_the_terminal_says_so_before_the_first_unit_and_before_the_table(folder: Path) -> None:
    words = ["--model", "_toy:Toy", "--layers", "act1", "--size", "8", "--metrics", "cka"]
    code, out, err = invoke("sweep", *words, "--images", folder, "--out", "run")
    assert (code, err) == (0, "")
    facts = json.loads(Path("run", "study.json").read_text())["about"]["models"]["_toy:Toy"]
    assert facts["outputs"] == 3
    said = f"_toy:Toy is near chance: {near_chance(facts)}."
    lines = out.splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith(said)]
    (started,) = (number for number, line in enumerate(lines) if line.endswith("1 started"))
    (table,) = (number for number, line in enumerate(lines) if line.startswith("Mean Spearman"))
    assert len(places) == 2
    assert places[0] < started < places[1] < table
    assert invoke("compact", "run")[1].startswith(said)


def test_an_able_network_is_not_called_one_that_guesses(
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
def test_nan_images_are_told_in_the_report_and_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = drawn().assign(nan_images=0)
    assert "gives no answer (" not in page_of(none, tmp_path).said()
    table = drawn(changes=(*CHANGES, "log_probability"), distances=(*FIVE, "energy"))
    table["nan_images"] = np.where(table.index % 24 == 3, 2, 0) + (table.index == 27)
    bad = table["nan_images"] > 0
    table.loc[bad, ["rank_deficit", "top1", "log_probability"]] = np.nan
    table.loc[table.index % 7 == 1, "log_probability"] = np.inf  # a probability that fell to 0
    said = (
        f"net: the network gives no answer (NaN, or all -inf) for images in {bad.sum()} of 192 "
        f"cells, up to 3 in one and {2 * bad.sum() + 1} in all; the loss of performance of "
        "these cells is not known."
    )
    assert said in page_of(table, tmp_path).said()
    store = Store.create(
        tmp_path / "run", {"models": {"net": {"layers": ["l"], "classes": ["c"], "block": 1}}}
    )
    store.save(store.units[0], table)
    print_results(Console(highlight=False, markup=False), store.compact(), store)
    assert said in capsys.readouterr().out.splitlines()
    older = pd.concat([table.drop(columns="nan_images"), none.assign(model="b")])
    assert "gives no answer (" not in page_of(older, tmp_path).said()
