"""Images of a study from a Dataset or DataLoader of pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _toy import toy_images, toy_study
from torch.utils.data import DataLoader, Dataset, TensorDataset

from repsim_kernels.experiments.errors import StudyError


class Pairs(Dataset[Any]):
    """Pairs of an image and a label, a Python integer, as torchvision's datasets have them."""

    def __init__(self, change: Any = None) -> None:
        self.images, self.labels = toy_images()
        self.change = change

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        item = self.images[i], int(self.labels[i])
        return item if self.change is None else self.change(i, *item)


@pytest.mark.parametrize(
    "images",
    [
        TensorDataset(*toy_images()),
        Pairs(),
        DataLoader(Pairs(), batch_size=4),
    ],
    ids=["tensors", "dataset", "loader"],
)
def test_pairs_give_the_study_of_their_tensors(images: Any) -> None:
    study = toy_study(images=images, labels=None, metrics=["cka"])
    assert study.configuration() == toy_study(metrics=["cka"]).configuration()
    assert study.run().table.equals(toy_study(metrics=["cka"]).run().table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "labels: None; expected a label for each image, or images that"),
        ({"images": Pairs()}, "labels: given with a Pairs of images; expected None"),
        (
            {"images": Pairs(lambda i, x, y: (x[:, : 8 - i], y)), "labels": None},
            "images: Pairs can't be read .* tensors of one shape and integers",
        ),
        ({"images": Pairs(lambda i, x, y: x), "labels": None}, "images: Pairs can't be read"),
        (
            {"images": DataLoader(Pairs(), batch_size=None), "labels": None},
            "images: DataLoader can't be read",
        ),
        (
            {"images": Pairs(lambda i, x, y: (x, y + 0.5)), "labels": None},
            "labels: dtype float64; expected integers",
        ),
        (
            {"images": TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0)), "labels": None},
            "images: TensorDataset can't be read",
        ),
    ],
)
def test_what_are_no_pairs_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=f"^{message}") as caught:
        toy_study(**changes)
    assert "\n" not in str(caught.value)
