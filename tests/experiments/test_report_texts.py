"""What a report says in words is true of its numbers, also where few were measured or they tie."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from _page import FIVE, drawn, page_of

from repsim_kernels.experiments.analysis.correlations import correlations, summary
from repsim_kernels.experiments.errors import ReportError
from repsim_kernels.experiments.report.page import write_report

TWO = ("cka", "procrustes")


def followed(table: pd.DataFrame, folder: Path) -> str:
    """What the report says of the loss of rank."""
    said = page_of(table, folder).said()
    found = re.findall(r"the loss of rank of the true class is followed (?!better)(.*?)[;.] ", said)
    return str(*found) if found else ""


@pytest.mark.usefixtures("undrawn")
def test_the_metrics_that_follow_most_and_least_are_those_of_the_statistics(tmp_path: Path) -> None:
    table = drawn(seed=4)
    rho = summary(correlations(table, FIVE, ["rank_deficit"])).set_index("distance")["spearman"]
    assert rho.round(2).is_unique
    names = dict(
        zip(FIVE, ("CKA", "Procrustes", "PWCCA", "mean CCA", "mean squared CCA"), strict=True)
    )
    most, least = (f"{names[name]} ({rho[name]:.2f})" for name in (rho.idxmax(), rho.idxmin()))
    assert followed(table, tmp_path) == f"most by {most}, least by {least}"


def alone(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="procrustes")


def alike(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(procrustes=2 * table["cka"])


def constant(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(procrustes=1.0)


def lossless(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(rank_deficit=0.0)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (alone, r"by CKA \(0\.\d\d\), the only metric measured"),
        (constant, r"by CKA \(0\.\d\d\), the only metric that has a correlation"),
        (alike, r"equally by all metrics \(0\.\d\d\)"),
        (lossless, ""),
    ],
)
def test_no_metric_follows_most_where_none_is_behind(
    change: Callable[[pd.DataFrame], pd.DataFrame], pattern: str, tmp_path: Path
) -> None:
    said = followed(change(drawn(distances=TWO)), tmp_path)
    assert re.fullmatch(pattern, said), said


@pytest.mark.usefixtures("undrawn")
def test_metrics_that_tie_at_an_end_are_all_named(tmp_path: Path) -> None:
    table = alike(drawn(distances=(*TWO, "pwcca"), seed=2))
    table["pwcca"] = -table["cka"]
    assert re.fullmatch(
        r"most by CKA and Procrustes \((0\.\d\d)\), least by PWCCA \(-\1\)",
        followed(table, tmp_path),
    )


def costs(table: pd.DataFrame, *means: float) -> pd.DataFrame:
    """Give each layer a loss of rank with such a mean."""
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
def test_a_layer_costs_most_where_others_cost_less(
    means: tuple[float, ...], caption: str, tmp_path: Path
) -> None:
    page = page_of(costs(drawn(layers=len(means), distances=TWO), *means), tmp_path)
    assert caption in page.said()
    if "costs most" not in caption:
        assert "costs most" not in page.said()


def test_where_nothing_costs_anything_nothing_is_said_to(tmp_path: Path) -> None:
    table = lossless(drawn(distances=(*TWO, "energy"), changes=("rank_deficit",)))
    page = page_of(table, tmp_path)
    assert "layer l.0: ablation costs the same in all layers" in page.said()
    for claim in ("costs most", "followed most", "is followed"):
        assert claim not in page.said()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("metrics", "said"),
    [(TWO, "neither better nor worse by any metric (i"), (("cka",), "neither better nor worse by")],
)
def test_no_others_are_left_where_no_metric_is_told_from_the_energy(
    metrics: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    table = drawn(distances=(*metrics, "energy"), changes=("rank_deficit",))
    table = table.assign(**dict.fromkeys(metrics, table["energy"]))
    text = page_of(table, tmp_path).said()
    start = "Against the mere energy removed, the loss of rank of the true class is followed "
    assert f"{start}{said}" in text
    assert "the others can" not in text


def test_a_page_is_a_file_in_a_folder_that_exists(tmp_path: Path) -> None:
    for path, said in (
        (tmp_path, "is a folder; expected the name of a file"),
        (Path("/"), "is a folder"),
        (tmp_path / "none" / "page.html", "there is no folder .*none for page.html; expected one"),
    ):
        with pytest.raises(ReportError, match=f"^out: .*{said}"):
            write_report([], path)
