"""What a run returns: its table, the mean correlations that the command prints, and the report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from _cli import invoke
from _toy import toy_study

from repsim_kernels.experiments import Results
from repsim_kernels.experiments.columns import ALL_METRICS, BASELINE, METRIC_NAMES
from repsim_kernels.experiments.errors import ReportError
from repsim_kernels.experiments.report.figures import STYLES


@pytest.mark.usefixtures("undrawn")
def test_the_summary_is_what_the_command_prints(folder: Path) -> None:
    options = ["--model", "_toy:Toy", "--layers", "act1", "--size", "8", "--metrics", "cka,cca"]
    code, out, _ = invoke("sweep", *options, "--images", folder, "--out", "run")
    assert code == 0
    summary = Results(pd.read_parquet("run/results.parquet"), Path("run")).summary()
    lines = {line[1:17].strip(): line[17:].replace("*", " ").split() for line in out.splitlines()}
    for (_, name), row in summary.iterrows():
        printed = lines[METRIC_NAMES[name]]
        assert printed == [f"{value:.2f}" if value == value else "-" for value in row]


def test_the_summary_is_a_mean_over_layers_and_classes() -> None:
    results = toy_study(metrics=["cka"], grid=(2, 3)).run()
    groups = results.table.groupby(["class", "layer"])
    rho = groups.apply(lambda rows: rows["cka"].corr(rows["margin_frozen"], method="spearman"))
    assert results.summary().loc[("toy", "cka"), "margin_frozen"] == pytest.approx(rho.mean())


@pytest.mark.usefixtures("undrawn")
def test_the_report_is_written_into_the_runs_folder(tmp_path: Path) -> None:
    results = toy_study(metrics=["cka"], grid=(2, 2)).run(tmp_path / "run")
    assert results.folder == tmp_path / "run"
    assert results.report() == tmp_path / "run" / "report.html"
    assert "% of the 15 images below" in results.report(tmp_path / "a.html").read_text()
    assert repr(results) == (
        f"Results(models=1, layers=2, classes=3, rows=24, folder='{tmp_path / 'run'}')"
    )


@pytest.mark.usefixtures("undrawn")
def test_results_without_a_folder_need_a_path_for_the_report(tmp_path: Path) -> None:
    results = toy_study(metrics=["cka"], grid=(2, 2)).run()
    assert results.folder is None
    with pytest.raises(ReportError, match=r"^path: None for a run without a folder; expected"):
        results.report()
    with pytest.raises(ReportError, match=r"^path: there is no folder .* for x\.html"):
        results.report(tmp_path / "missing" / "x.html")
    with pytest.raises(ReportError, match=r"^path: 3; expected the name of an \.html file$"):
        results.report(3)  # type: ignore[arg-type]
    assert "was made from a table alone" in results.report(tmp_path / "a.html").read_text()


def test_all_metrics_are_reported(tmp_path: Path) -> None:
    assert {*ALL_METRICS, BASELINE} <= set(STYLES)
    looks = [(colour, marker) for colour, marker, *_ in STYLES.values()]
    assert len(set(looks)) == len({marker for _, marker in looks}) == len(STYLES)
    results = toy_study(layers=["act2"], metrics="all", grid=(2, 2)).run(tmp_path / "run")
    html = results.report().read_text()
    for name in ALL_METRICS:
        assert f">{METRIC_NAMES[name]}</th>" in html
