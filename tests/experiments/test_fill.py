"""Mean ablation: what it changes in a study's rows, and what it leaves unchanged."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from _toy import CLASSES, Toy, run_under_hook, toy_images, toy_study
from torch import Tensor

from repsim_kernels.experiments.columns import BASELINE, METRICS, PERFORMANCE
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.study.checks import check_fill

CELLS = np.arange(256) % 6
OWN = dict.fromkeys(("act1", "act2"), CELLS)


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    """Rows of the user's cells, ablated to zero and to the mean, with three metric images."""
    return {
        fill: toy_study(cells=OWN, fill=fill, metric_images=3).run().table
        for fill in ("zero", "mean")
    }


def run_with_fill(layer: str, images: Tensor, cell: int, fill: Tensor) -> tuple[Tensor, Tensor]:
    """The toy's logits with a cell's neurons set to their fill, and the layer's output (n, p)."""
    mask, values = torch.from_numpy(cell == CELLS).view(4, 8, 8), fill.view(4, 8, 8)
    return run_under_hook(Toy().eval(), layer, images, lambda out: torch.where(mask, values, out))


def read_metric_activations(layer: str) -> tuple[Tensor, np.ndarray]:
    images, labels = toy_images()
    index = torch.cat([(labels == c).nonzero()[:3, 0] for c in range(3)])
    x = run_with_fill(layer, images[index], 0, torch.zeros(256))[1]
    return x, labels[index].numpy()


def predict_frozen(x: np.ndarray, y: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Predict each stimulus, filled, by ridge regression on the others, in primal form."""
    outputs = []
    centred = x - x.mean(0)
    kappa = (centred**2).sum() / len(x)
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        mean, offset = x[rest].mean(0), y[rest].mean()
        a = x[rest] - mean
        w = np.linalg.solve(a.T @ a + kappa * np.eye(x.shape[1]), a.T @ (y[rest] - offset))
        outputs.append(offset + (filled[i] - mean) @ w)
    return np.array(outputs)


def score_margin(outputs: np.ndarray, y: np.ndarray) -> float:
    """Mean of the class's output minus the rest's, on the right side, over both sides."""
    margin = (2 * outputs - 1) * (2 * y - 1)
    return float((margin[y == 1].mean() + margin[y == 0].mean()) / 2)


def score_accuracy(outputs: np.ndarray, y: np.ndarray) -> float:
    right = (outputs > 0.5) == (y == 1)
    return float((right[y == 1].mean() + right[y == 0].mean()) / 2)


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("layer", ["act1", "act2"])
def test_the_frozen_probe_matches_regressions_on_the_neurons(
    tables: dict[str, pd.DataFrame], layer: str, fill: str
) -> None:
    table = tables[fill]
    activations, labels = read_metric_activations(layer)
    x = activations.double().numpy()
    constant = x.mean(0) if fill == "mean" else np.zeros(256)
    for label, name in enumerate(CLASSES):
        rows = table[(table["layer"] == layer) & (table["class"] == name)]
        y = (labels == label).astype(float)
        before = predict_frozen(x, y, x)
        for cell in range(6):
            after = predict_frozen(x, y, np.where(cell == CELLS, constant, x))
            row = rows.iloc[cell]
            margin = score_margin(before, y) - score_margin(after, y)
            assert row["margin_frozen"] == pytest.approx(margin, abs=1e-6)
            accuracy = score_accuracy(before, y) - score_accuracy(after, y)
            assert row["decodability_frozen"] == pytest.approx(accuracy, abs=1e-9)


@pytest.mark.parametrize("layer", ["act1", "act2"])
def test_performance_matches_a_hook_that_writes_the_mean(
    tables: dict[str, pd.DataFrame], layer: str
) -> None:
    images, labels = toy_images()
    fill = read_metric_activations(layer)[0].double().mean(0).float()
    table = tables["mean"]
    for label, name in enumerate(CLASSES):
        mine = images[labels == label]
        with torch.no_grad():
            intact = Toy().eval()(mine).double().log_softmax(1)[:, label]
        lost = [
            float(
                (
                    intact
                    - run_with_fill(layer, mine, cell, fill)[0].double().log_softmax(1)[:, label]
                )
                .mean()
                .item()
            )
            for cell in range(6)
        ]
        rows = table[(table["layer"] == layer) & (table["class"] == name)]
        np.testing.assert_allclose(rows["log_probability"], lost, rtol=1e-4, atol=1e-4)


def test_distances_and_refitted_probes_do_not_see_the_fill(
    tables: dict[str, pd.DataFrame],
) -> None:
    zero, mean = tables["zero"], tables["mean"]
    same = ["cell", "size", *METRICS, BASELINE]
    pd.testing.assert_frame_equal(zero[same], mean[same], check_exact=True)
    refit = [name for name in zero if "refit" in name]
    pd.testing.assert_frame_equal(zero[refit], mean[refit], rtol=1e-6, atol=1e-8)
    assert (
        zero[["margin_frozen", "log_probability"]] != mean[["margin_frozen", "log_probability"]]
    ).all(axis=None)


def test_grids_are_filled_too() -> None:
    zero, mean = (toy_study(fill=fill, metrics=["cka"]).run().table for fill in ("zero", "mean"))
    pd.testing.assert_series_equal(zero["cka"], mean["cka"], check_exact=True)
    assert not np.allclose(zero["log_probability"], mean["log_probability"])
    assert set(PERFORMANCE) <= set(mean)


def test_a_constant_layer_loses_nothing_by_its_mean() -> None:
    model = Toy()
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.conv2.bias.fill_(1)
    study = toy_study(model=model, layers=["act2"], fill="mean", metrics=["cka"])
    with pytest.warns(UserWarning, match="act2 is the same for every stimulus"):
        table = study.run().table
    assert (table["log_probability"] == 0).all()
    assert table["cka"].isna().all()


def test_wrong_fills_are_named() -> None:
    with pytest.raises(StudyError, match=r"^fill: 'resample'; expected one of 'zero', 'mean'$"):
        toy_study(fill="resample")
    for metric in ("rsa_cosine", "rsa_correlation", "mutual_knn"):
        with pytest.raises(StudyError, match=f"^fill: 'mean' with the metric '{metric}', .* zero"):
            check_fill("mean", ["cka", metric])
        assert check_fill("zero", [metric]) == "zero"
