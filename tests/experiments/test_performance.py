"""Loss of performance: hand-computed cases, limits, and images without an answer."""

from __future__ import annotations

import json
import math
from typing import Any

import mpmath
import numpy as np
import pandas as pd
import pytest
import torch
from _toy import Toy, toy_images, toy_study
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from repsim_kernels.experiments.columns import HALVES, PERFORMANCE, half_column
from repsim_kernels.experiments.study.performance import measure_performance_loss

NAN, INF = math.nan, math.inf
ANY = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0, INF, -INF, NAN])


def test_loss_matches_hand_computed_values() -> None:
    intact = torch.tensor(
        [[3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 5.0, 1.0, 1.0, 1.0, 1.0]]
    )
    worse = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 2.0, 5.0, 1.0, 1.0, 1.0, 1.0]])
    better = torch.tensor(
        [[3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [9.0, 2.0, 5.0, 1.0, 1.0, 1.0, 1.0]]
    )
    tied = torch.zeros(2, 7)
    loss = measure_performance_loss(intact, torch.stack([intact, worse, better, tied]), 0)
    # Ranks of output 0: intact 0 and 6; worse 5 and 6; better 0 and 0; tied 0 and 0.
    assert loss["rank_deficit"].tolist() == [0.0, 2.5, 0.0, 0.0]
    assert loss["top1"].tolist() == [0.0, 0.5, -0.5, -0.5]
    assert loss["top5"].tolist() == [0.0, 0.5, -0.5, -0.5]
    assert loss["log_probability"][0] == loss["probability"][0] == 0
    assert loss["probability"][1] > 0 > loss["probability"][2]
    assert loss["rank_deficit_odd"].tolist() == [0.0, 5.0, 0.0, 0.0]
    assert loss["rank_deficit_even"].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert loss["top1_even"].tolist() == [0.0, 0.0, -1.0, -1.0]
    assert all(value.dtype == torch.float64 for value in loss.values())


def score_image(row: list[float], label: int) -> dict[str, float]:
    """One image's rank and probabilities of its class; infinite logits become very large."""
    if any(map(math.isnan, row)) or all(value == -INF for value in row):
        return dict.fromkeys(("rank", "log_probability", "probability", "top1", "top5"), NAN)
    rank = sum(value > row[label] for value in row)
    large = [mpmath.exp(max(-1e6, min(1e6, value))) for value in row]
    log_probability = float(mpmath.log(large[label] / mpmath.fsum(large)))
    return {
        "rank": rank,
        "log_probability": -INF if log_probability < -1e5 else log_probability,
        "probability": float(large[label] / mpmath.fsum(large)),
        "top1": float(rank < 1),
        "top5": float(rank < 5),
    }


def compute_loss(before: dict[str, float], after: dict[str, float], name: str) -> float:
    if name == "rank_deficit":
        lost = after["rank"] - before["rank"]
        return lost if math.isnan(lost) else max(0.0, lost)
    return 0.0 if before[name] == after[name] else before[name] - after[name]


@given(st.data(), st.integers(2, 7), st.integers(1, 4))
def test_losses_of_infinite_logits_are_limits_of_finite_ones(
    data: st.DataObject, k: int, n: int
) -> None:
    logits = st.lists(st.lists(ANY, min_size=k, max_size=k), min_size=n, max_size=n)
    intact, ablated = data.draw(logits), data.draw(logits)
    label = data.draw(st.integers(0, k - 1))
    result = measure_performance_loss(torch.tensor(intact), torch.tensor([ablated, intact]), label)
    before, after = ([score_image(row, label) for row in rows] for rows in (intact, ablated))
    for cell, each in enumerate((after, before)):
        for name in PERFORMANCE:
            lost = [compute_loss(*pair, name) for pair in zip(before, each, strict=True)]
            for column, some in (
                (name, lost),
                *((half_column(name, which), lost[first::2]) for first, which in enumerate(HALVES)),
            ):
                expected = (
                    math.fsum(some) / len(some) if some and INF not in map(abs, some) else None
                )
                if expected is None:  # an infinite loss, or no image
                    expected = sum(some) / len(some) if some else NAN
                assert float(result[column][cell]) == pytest.approx(
                    expected, abs=1e-12, nan_ok=True
                )
        no_answer = [math.isnan(b["rank"] + a["rank"]) for b, a in zip(before, each, strict=True)]
        assert result["nan_images"][cell] == sum(no_answer)


class Normed(nn.Module):
    """Divides its only layer's output by the norm: 0/0 if all of it is ablated."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 24), nn.ReLU())
        self.fc = nn.Linear(24, 3)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(images)
        logits: Tensor = self.fc(x / x.norm(dim=1, keepdim=True))
        return logits


def test_ablating_everything_gives_no_answer() -> None:
    arguments: dict[str, Any] = {"model": Normed(), "layers": ["act"], "metrics": ["cka"]}
    whole, parts = (toy_study(**arguments, grid=grid).run().table for grid in ((1, 1), (2, 2)))
    assert (whole["nan_images"] == 5).all()
    assert whole[list(PERFORMANCE)].isna().all(axis=None)
    assert (parts["nan_images"] == 0).all()
    assert parts[list(PERFORMANCE)].notna().all(axis=None)


class Unanswered(Toy):
    """Returns NaN for images whose first pixel is large, ablated or not."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).masked_fill(images[:, :1, 0, 0] > 1, NAN)


def test_images_without_an_answer_are_counted_as_wrong(tmp_path: Any) -> None:
    images, labels = toy_images()
    images[:, 0, 0, 0] = 0
    images[labels.eq(1).nonzero()[[1, 2], 0], 0, 0, 0] = 2  # the second and third bees
    study = toy_study(model=Unanswered(), images=images, labels=labels, metrics=["cka"])
    table = study.run(tmp_path).table
    bee = table["class"] == "bee"
    assert table["nan_images"].tolist() == np.where(bee, 2, 0).tolist()
    names = list(PERFORMANCE)
    assert table.loc[bee, names].isna().all(axis=None)
    assert table.loc[~bee, names].notna().all(axis=None)
    odd = [half_column(name, "odd") for name in names]  # the first, the third and the fifth image
    assert table.loc[bee, odd].isna().all(axis=None)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "results.parquet"), table)
    answers = Toy().eval()(images).argmax(1)
    answers[images[:, 0, 0, 0] > 1] = -1
    about = json.loads((tmp_path / "study.json").read_text())["about"]["models"]["toy"]
    assert about["accuracy"] == pytest.approx(float((answers == labels).double().mean()))
    assert about["outputs"] == 3
