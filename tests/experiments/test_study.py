"""A study's table, its repr, and the errors that name wrong arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _toy import CLASSES, LAYERS, Toy, run_under_hook, toy_images, toy_study
from torch import nn

from repsim_kernels import LayerError
from repsim_kernels.experiments import Study
from repsim_kernels.experiments.columns import (
    ALL_METRICS,
    BASELINE,
    HALVES,
    METRICS,
    PERFORMANCE,
    PROBES,
    half_column,
)
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.reference.ablation import ablation_distances
from repsim_kernels.reference.cells import selectivity_grid
from repsim_kernels.reference.probe import ablation_decodability


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return toy_study(metric_images=4, metrics="all").run().table


def run_with_mask(model: nn.Module, layer: str, images: torch.Tensor, mask: torch.Tensor) -> Any:
    """Logits with a layer's output masked, and the unmasked output, from a plain forward hook."""
    return run_under_hook(model, layer, images, lambda out: out * mask.view(out.shape[1:]))


def test_the_table_has_a_row_for_each_cell_in_order(table: pd.DataFrame) -> None:
    keys = ["model", "class", "layer", "cell"]
    changes = [*PERFORMANCE, *PROBES["ridge"]]
    halves = [half_column(name, which) for which in HALVES for name in changes]
    whole = [*ALL_METRICS, BASELINE, *changes]
    counts = ["size", "nan_images"]
    assert list(table.columns[: len(keys) + 2 + len(whole)]) == [*keys, *counts, *whole]
    assert set(table.columns) == {*keys, *counts, *whole, *halves}
    assert table[keys].equals(table.sort_values(keys, ignore_index=True)[keys])
    expected = pd.MultiIndex.from_product([["toy"], sorted(CLASSES), LAYERS, range(16)])
    assert list(table[keys].itertuples(index=False, name=None)) == list(expected)
    assert (table[["cell", *counts]].dtypes == np.int64).all()
    assert (table["size"] == 16).all()
    assert (table["nan_images"] == 0).all()
    assert table[[*whole, *halves]].notna().all(axis=None)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("label", [0, 2])
def test_rows_match_brute_force(table: pd.DataFrame, layer: str, label: int) -> None:
    images, labels = toy_images()
    rows = table[(table["layer"] == layer) & (table["class"] == CLASSES[label])].set_index("cell")
    model = Toy().eval()

    first = torch.cat([torch.where(labels == c)[0][:4] for c in range(3)])
    _, x = run_with_mask(model, layer, images[first], torch.ones(4 * 64))
    x, y = x.double().numpy(), labels[first].numpy()
    cells = selectivity_grid(x, y, label)
    distances = ablation_distances(x, cells)
    probe = ablation_decodability(x, cells, y, target=label)
    for name in ALL_METRICS:
        np.testing.assert_allclose(rows[name], distances[name].values, rtol=1e-4, atol=1e-10)
    for kind in ("refit", "frozen"):
        change = float(probe["intact"]) - np.asarray(probe[kind])
        np.testing.assert_allclose(rows[f"decodability_{kind}"], change, atol=1e-9)
    energy = np.bincount(cells, x.var(0))
    np.testing.assert_allclose(rows[BASELINE], energy / energy.sum(), rtol=1e-9)
    for first, which in enumerate(HALVES):
        some = np.sort([np.flatnonzero(y == c)[i] for c in range(3) for i in (first, first + 2)])
        probe = ablation_decodability(x[some], cells, y[some], target=label)
        for kind in ("refit", "frozen"):
            change = float(probe["intact"]) - np.asarray(probe[kind])
            result = rows[half_column(f"decodability_{kind}", which)]
            np.testing.assert_allclose(result, change, atol=1e-9)

    mine = images[labels == label]
    intact, _ = run_with_mask(model, layer, mine, torch.ones(4 * 64))
    for cell in range(16):
        ablated, _ = run_with_mask(model, layer, mine, torch.from_numpy(cells != cell))
        before, after = intact.double().softmax(1)[:, label], ablated.double().softmax(1)[:, label]
        ranks = [
            [sum(float(v) > float(row[label]) for v in row) for row in logits]
            for logits in (intact, ablated)
        ]
        expected = {
            "rank_deficit": np.mean([max(0, b - a) for a, b in zip(*ranks, strict=True)]),
            "log_probability": float((before.log() - after.log()).mean()),
            "probability": float((before - after).mean()),
            "top1": np.mean([(a == 0) - (b == 0) for a, b in zip(*ranks, strict=True)]),
            "top5": 0.0,
        }
        for name, value in expected.items():
            assert rows.loc[cell, name] == pytest.approx(value, abs=1e-5), (cell, name)


def test_random_cells_have_the_sizes_of_the_grid() -> None:
    grid, random, reseeded = (
        toy_study(**options).run().table
        for options in (
            {"grid": (3, 5)},
            {"grid": (3, 5), "cells": "random"},
            {"grid": (3, 5), "cells": "random", "seed": 1},
        )
    )
    keys = ["class", "layer"]
    for key, rows in random.groupby(keys):
        same = grid.groupby(keys).get_group(key)
        assert sorted(rows["size"]) == sorted(same["size"])
        assert rows["energy"].sum() == pytest.approx(1)
        # Cells grouped by magnitude differ in energy; random cells hardly do.
        assert rows["energy"].std() < 0.7 * same["energy"].std()
    assert not np.allclose(random["energy"], reseeded["energy"])


def test_halves_with_too_few_stimuli_are_nan() -> None:
    table = toy_study(metric_images=3).run().table
    # The second class has stimuli four to six of nine; only one of these numbers is odd.
    few = np.where(table["class"] == CLASSES[1], "odd", "even")
    for which in HALVES:
        assert (table[half_column("margin_refit", which)].isna() == (few == which)).all()
    assert table["margin_refit"].notna().all()


def test_a_dead_layer_gives_nan_and_a_warning() -> None:
    model = Toy()
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.conv2.bias.fill_(-1)
    with pytest.warns(UserWarning, match="toy, layer act2 is the same for every stimulus"):
        table = toy_study(model=model, layers=["act2"], targets=[1]).run().table
    assert table[[*METRICS, BASELINE, *PROBES["ridge"]]].isna().all(axis=None)
    assert (table["rank_deficit"] == 0).all()


def test_numpy_arrays_work_and_the_model_stays_unchanged() -> None:
    images, labels = toy_images()
    model = Toy().train()
    study = Study(model, ["act1"], images.numpy(), labels.tolist(), targets=[2], grid=(2, 3))
    table = study.run().table
    assert model.training
    assert table["class"].tolist() == [2] * 6
    assert table["model"].tolist() == ["Toy"] * 6
    assert table.equals(Study(model, ["act1"], images, labels, [2], (2, 3)).run().table)


def test_all_names_every_metric() -> None:
    assert toy_study(metrics="all").metrics == toy_study(metrics=["all"]).metrics
    assert tuple(toy_study(metrics="all").metrics) == ALL_METRICS
    assert tuple(toy_study().metrics) == METRICS


def test_progress_counts_the_units() -> None:
    steps: list[Any] = []
    toy_study(metrics=["cka"], block=2).run(progress=steps.append)
    assert [(step.done, step.failed, step.total) for step in steps] == [
        (done, 0, 4) for done in range(1, 5)
    ]
    assert [step.event.kind for step in steps] == ["done"] * 4
    assert [step.event.unit for step in steps] == [
        ("toy", layer, block) for layer in ("act1", "act2") for block in (1, 2)
    ]


def test_repr_summarises_the_study_in_one_line() -> None:
    assert repr(toy_study(metrics=["cka", "pwcca"])) == (
        "Study(model=Toy, name='toy', layers=['act1', 'act2'], images=(15, 3, 8, 8), classes=3, "
        "targets=[0, 1, 2], grid=(4, 4), metrics=['cka', 'pwcca'], probes=['ridge'], device='cpu')"
    )
    layers = ["conv1", "act1", "conv2", "act2", "fc"]
    study = toy_study(
        layers=layers, grid=(1, 2), metric_images=4, others=1, cells="random", targets=[0]
    )
    text = repr(study)
    assert "\n" not in text
    assert "layers=[5: 'conv1', …, 'fc']" in text
    assert "targets=[0], metric_images=4, others=1, grid=(1, 2), cells='random', metrics=[" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": [0, 7]}, "targets: 7 is not among the labels"),
        ({"targets": []}, "targets: .* expected distinct"),
        ({"metrics": ["cka", "ccka"]}, "metrics: 'ccka'; expected one of 'cka'"),
        ({"metrics": ["cka", "cka"]}, "metrics: .* repeats"),
        ({"metrics": ["cka", "all"]}, "metrics: 'all'; expected one of 'cka'"),
        ({"metrics": "all", "metric_images": 3}, "metrics: 'mutual_knn' .* 9; expected at least"),
        ({"grid": (0, 4)}, "grid: .* expected two whole numbers of at least 1"),
        ({"grid": (100, 4)}, "grid: 100 x 4 cells for the 256 neurons of layer 'act1'"),
        ({"ridge": -1.0}, "ridge: -1.0; expected a finite number"),
        ({"penalty": float("nan")}, "penalty: nan; expected a finite number"),
        ({"metric_images": 1}, "metric_images: 1; expected a whole number of at least 2"),
        ({"labels": torch.zeros(15)}, "labels: dtype float32; expected integers"),
        ({"labels": [0, 1]}, r"labels: 2 for 15 images; expected one label for each"),
        ({"labels": ["a"] * 15}, "labels: dtype <U1; expected integers"),
        ({"labels": torch.zeros(15, dtype=torch.long)}, "labels: all are 0"),
        ({"labels": torch.arange(15) % 3 - 1}, "labels: -1; expected output indices"),
        ({"labels": [0] + [1, 2] * 7}, "images: class 'ant/queen' has one image"),
        ({"labels": torch.arange(15) % 3 + 1}, "classes: 3 names, but labels up to 3"),
        (
            {"labels": torch.arange(15) % 3 + 1, "classes": None},
            "labels: up to 3, but toy has 3 outputs; expected labels below 3",
        ),
        ({"classes": ["a", "a", "b"]}, "classes: two targets share a name"),
        ({"images": torch.zeros(15, 3, 9, 9)}, r"images: toy can't take one of shape \(3, 9, 9\)"),
        (
            {"images": torch.zeros(15, 3, 8, 8, dtype=torch.float64)},
            r"dtype float64 .*; its weights are torch.float32: pass images.to\(torch.float32\)$",
        ),
        (
            {"model": nn.Sequential(nn.Tanh()), "layers": ["0"]},
            "model: .*; expected logits",
        ),
        ({"probe_ridge": 0.0}, "probe_ridge: 0.0; expected a finite number of at least 1e-06"),
        ({"ridge": 1e20}, r"ridge: 1e\+20; expected .* at most 1e\+10"),
        ({"device": "cuda:99"}, "device: cuda:99 can't be used here"),
    ],
)
def test_errors_name_the_wrong_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message) as caught:
        toy_study(**changes)
    assert "\n" not in str(caught.value)


class Twice(Toy):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(
            self.act1(self.conv2(self.act1(self.conv1(images)))).flatten(1)
        )
        return logits


def test_error_names_a_layer_that_runs_twice_or_never() -> None:
    with pytest.raises(LayerError, match=r"act1.* 2 times.*conv1.*conv2"):
        toy_study(model=Twice(), layers=["conv1", "act1"])
    with pytest.raises(LayerError, match=r"act2.* never called"):
        toy_study(model=Twice(), layers=["conv1", "act2"])


def test_error_names_an_unknown_layer() -> None:
    with pytest.raises(LayerError, match="act3"):
        toy_study(layers=["act3"])


def test_error_names_the_layer_with_nonfinite_activations() -> None:
    images, _ = toy_images()
    images[3] = float("inf")
    with pytest.raises(StudyError, match="toy, layer act1: x: 256 of 3840 values are NaN"):
        toy_study(images=images).run()
