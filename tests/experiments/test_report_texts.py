"""The report's sentences agree with its numbers, also for few metrics and for ties."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from _page import FIVE, Page, random_table, write_page
from _toy import toy_study

from repsim_kernels.experiments.analysis.correlations import compute_correlations, summarise
from repsim_kernels.experiments.analysis.published import PUBLISHED
from repsim_kernels.experiments.errors import ReportError
from repsim_kernels.experiments.report.page import write_report

TWO = ("cka", "procrustes")


def following_text(table: pd.DataFrame, folder: Path) -> str:
    """Return what the report says about the metrics that follow the loss of rank."""
    text = write_page(table, folder).visible_text()
    matches = re.findall(
        r"the loss of rank of the true class is followed (?!better)(.*?)[;.] ", text
    )
    return str(*matches) if matches else ""


@pytest.mark.usefixtures("undrawn")
def test_metrics_that_follow_most_and_least_are_named(tmp_path: Path) -> None:
    table = random_table(seed=4)
    rho = summarise(compute_correlations(table, FIVE, ["rank_deficit"])).set_index("distance")[
        "spearman"
    ]
    assert rho.round(2).is_unique
    names = dict(
        zip(FIVE, ("CKA", "Procrustes", "PWCCA", "mean CCA", "mean squared CCA"), strict=True)
    )
    most, least = (f"{names[name]} ({rho[name]:.2f})" for name in (rho.idxmax(), rho.idxmin()))
    assert following_text(table, tmp_path) == f"most by {most}, least by {least}"


def with_one_metric(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="procrustes")


def with_equal_metrics(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(procrustes=2 * table["cka"])


def with_constant_metric(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(procrustes=1.0)


def without_loss(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(rank_deficit=0.0)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (with_one_metric, r"by CKA \(0\.\d\d\), the only metric measured"),
        (with_constant_metric, r"by CKA \(0\.\d\d\), the only metric that has a correlation"),
        (with_equal_metrics, r"equally by all metrics \(0\.\d\d\)"),
        (without_loss, ""),
    ],
)
def test_no_metric_follows_most_if_there_is_nothing_to_compare(
    change: Callable[[pd.DataFrame], pd.DataFrame], pattern: str, tmp_path: Path
) -> None:
    text = following_text(change(random_table(distances=TWO)), tmp_path)
    assert re.fullmatch(pattern, text), text


@pytest.mark.usefixtures("undrawn")
def test_all_tied_metrics_are_named(tmp_path: Path) -> None:
    table = with_equal_metrics(random_table(distances=(*TWO, "pwcca"), seed=2))
    table["pwcca"] = -table["cka"]
    assert re.fullmatch(
        r"most by CKA and Procrustes \((0\.\d\d)\), least by PWCCA \(-\1\)",
        following_text(table, tmp_path),
    )


def with_layer_means(table: pd.DataFrame, *means: float) -> pd.DataFrame:
    """Give each layer a loss of rank with the given mean."""
    shift = table["layer"].map({f"l.{i}": mean for i, mean in enumerate(means)})
    return table.assign(rank_deficit=shift + (table["cell"] - 7.5) / 8)


@pytest.mark.parametrize(
    ("means", "caption"),
    [
        ((1, 3, 2), "layer l.1: of those that ran, the one where ablation costs most (rank of"),
        ((1, 3, 3), "layer l.1: of those that ran, one of 2 where ablation costs most (rank of"),
        ((2, 2, 2), "layer l.0: ablation costs the same in all layers (rank of the true class)"),
        ((2,), "layer l.0: the only one with a value (rank of the true class)"),
        ((np.nan, 2, np.nan), "layer l.1: the only one with a value (rank of the true class)"),
    ],
)
def test_caption_says_whether_one_layer_costs_most(
    means: tuple[float, ...], caption: str, tmp_path: Path
) -> None:
    page = write_page(
        with_layer_means(random_table(layers=len(means), distances=TWO), *means), tmp_path
    )
    assert caption in page.visible_text()
    if "costs most" not in caption:
        assert "costs most" not in page.visible_text()


def test_no_layer_or_metric_is_singled_out_if_nothing_is_lost(tmp_path: Path) -> None:
    table = without_loss(random_table(distances=(*TWO, "energy"), changes=("rank_deficit",)))
    page = write_page(table, tmp_path)
    assert "layer l.0: ablation costs the same in all layers" in page.visible_text()
    for claim in ("costs most", "followed most", "is followed"):
        assert claim not in page.visible_text()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        (TWO, "neither better nor worse by any metric (95"),
        (("cka",), "neither better nor worse by the metric (95"),
    ],
)
def test_no_metric_differs_from_the_energy_removed(
    metrics: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    table = random_table(distances=(*metrics, "energy"), changes=("rank_deficit",))
    table = table.assign(**dict.fromkeys(metrics, table["energy"]))
    page = write_page(table, tmp_path).visible_text()
    start = "Compared with the energy removed, the loss of rank of the true class is followed "
    assert f"{start}{text}" in page
    assert "the other metrics" not in page


def test_page_must_be_a_file_in_an_existing_folder(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "is a folder; expected the name of a file"),
        (Path("/"), "is a folder"),
        (tmp_path / "none" / "page.html", "there is no folder .*none for page.html; expected one"),
    ):
        with pytest.raises(ReportError, match=f"^path: .*{message}"):
            write_report([], path)


@pytest.mark.usefixtures("undrawn")
def test_published_numbers_are_shown_only_with_their_own_network(tmp_path: Path) -> None:
    page = write_page(pd.concat([random_table(), random_table(model="resnet50")]), tmp_path)
    head, *rows = page.tables["resnet50 (12 groups: 4 layers x 3 classes)"]
    assert [i for i, cell in enumerate(head) if cell.text == "published"] == [2, 5]
    assert [(row[2].value, row[5].value) for row in rows] == list(PUBLISHED["resnet50"].values())
    assert "published" not in [
        cell.text for cell in page.tables["net (12 groups: 4 layers x 3 classes)"][0]
    ]
    assert "a difference from net says nothing about either" in page.visible_text()
    published = page.tables["As published"]
    assert [cell.text for cell in published[1]] == [
        "CKA", "0.158", "0.474", "0.169", "0.633", "0.404", "0.769",
    ]  # fmt: skip
    page = write_page(random_table(model="alexnet"), tmp_path)
    assert "for reference" not in page.visible_text()


@pytest.mark.parametrize("stored", [True, False])
def test_channels_are_drawn_as_bars_instead_of_a_grid(tmp_path: Path, stored: bool) -> None:
    results = toy_study(metrics=["cka"], cells="channels").run(tmp_path / "run" if stored else None)
    page = Page(results.report(tmp_path / "page.html"))
    text = page.visible_text()
    assert "were ablated (set to zero) in 4 cells per layer and target class. For each" in text
    assert "toy: its cells are the channels of each layer, the same ones for all" in text
    assert "The cells of one layer Each bar is a cell" in text
    assert "The grid of one layer" not in text
    labels = [of.get("aria-label") or "" for tag, of in page.elements if tag == "svg"]
    assert len([label for label in labels if label.endswith("as a bar for each of 4 cells")]) == 1
    facts = "the same ones for all target classes; 4, 4 in the layers above; ablated neurons set to"
    assert (facts in page.html) == stored


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_what_the_cells_and_their_fill_are(tmp_path: Path) -> None:
    own = {"act1": np.arange(256) % 3, "act2": np.arange(256) % 7}
    study = toy_study(metrics=["cka"], cells=own, fill="mean")
    text = Page(study.run(tmp_path / "run").report()).visible_text()
    assert "were ablated (set to their means) in 3 to 7 cells per layer" in text
    assert "toy: its cells are chosen by the user" in text
    toy_study(metrics=["cka"]).run(tmp_path / "grid")
    both = write_page([tmp_path / "run", tmp_path / "grid"], tmp_path).visible_text()
    assert "(set to zero or their means) in 3 to 16 cells per layer" in both
    assert "differ in how selective their neurons are" in both
