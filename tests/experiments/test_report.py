"""The report: its numbers, the sections that depend on the data, and what it must not contain."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from _page import CHANGES, FIVE, random_table, write_page
from _toy import stop_after, toy_study

from repsim_kernels.experiments.analysis.controls import compute_partial_correlations
from repsim_kernels.experiments.analysis.correlations import compute_correlations, summarise
from repsim_kernels.experiments.analysis.inference import (
    Claim,
    compare_with_baseline,
    compute_intervals,
    fit_mixed_model,
    judge_claims,
)
from repsim_kernels.experiments.analysis.shuffles import find_threshold
from repsim_kernels.experiments.columns import (
    BASELINE,
    CHANGE_NAMES,
    METRIC_NAMES,
    METRICS,
    PERFORMANCE,
    PROBES,
)
from repsim_kernels.experiments.errors import ReportError, StoreError
from repsim_kernels.experiments.report import findings
from repsim_kernels.experiments.report.page import write_report
from repsim_kernels.experiments.runs.driver import run
from repsim_kernels.experiments.runs.membership import open_run


def test_report_is_self_contained_and_shows_the_table(tmp_path: Path) -> None:
    study = toy_study(name="toy <b>")
    store = open_run([study], tmp_path, {"images": "some & others"})
    table = run([study], store).table
    store.save(store.units[0], store.read_finished()[store.units[0]], seconds=3725.4)
    page = write_page(tmp_path, tmp_path)
    html = page.html
    addresses = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')> ]+)", html)
    assert {address for address in addresses if not address.startswith("#")} == set()
    assert "@import" not in html
    spaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= spaces
    assert "toy <b>" not in html
    assert "some &amp; others" in html
    result = summarise(compute_correlations(table, METRICS, (*PERFORMANCE, *PROBES["ridge"])))
    for value in result["spearman"].dropna():
        assert f">{value:.2f}" in html
    assert html.count("<svg") == html.count('role="img" aria-label=') >= 10
    assert "#010203" not in html
    assert "15 of 3 classes, 3 x 8 x 8" in html
    assert re.search(r"units took 1:02:\d\d \(hours:minutes:seconds\)", page.visible_text())


def test_missing_units_are_reported(tmp_path: Path, undrawn: None) -> None:
    store = open_run([toy_study(block=1, grid=(2, 3))], tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run([toy_study(block=1, grid=(2, 3))], store, stop_after(5))
    store.compact()
    text = write_page(tmp_path / "cut", tmp_path).visible_text()
    assert "1 of 6 units of the run cut are missing" in text
    run([toy_study(block=1, grid=(2, 3))], store)
    assert "missing" not in write_page(tmp_path / "cut", tmp_path).visible_text()


def test_table_without_a_run_can_be_reported(tmp_path: Path) -> None:
    table = toy_study(metrics=["procrustes"], grid=(2, 3)).run().table
    html = write_report(table, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "made from a table alone" in html
    assert "Procrustes" in html
    assert "The grid of one layer" not in html  # six cells: 2 x 3 or 3 x 2?


def test_random_cells_are_reported_and_have_no_grid(tmp_path: Path) -> None:
    study = toy_study(metrics=["cka"], cells="random")
    run([study], open_run([study], tmp_path / "run"))
    text = write_page(tmp_path / "run", tmp_path).visible_text()
    assert "toy: its cells are a control, with neurons drawn at random" in text
    assert "then the same number of neurons drawn at random into each" in text
    assert "The grid of one layer" not in text


def test_page_makes_no_requests(tmp_path: Path) -> None:
    page = write_page(random_table(), tmp_path)
    policies = [of for tag, of in page.elements if of.get("http-equiv")]
    assert [of["http-equiv"] for of in policies] == ["Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in (policies[0]["content"] or "").split(";"))
    assert rules.pop("default-src") == "'none'"
    assert rules.pop("img-src") == "data:"
    assert set(rules.values()) == {"'unsafe-inline'", "'none'"}
    assert page.html.index("Content-Security-Policy") < page.html.index("<style>")
    assert not page.tags("link", "img", "iframe", "object", "embed", "form", "base", "a")


@pytest.mark.usefixtures("undrawn")
def test_table_shows_the_correlations_and_intervals(tmp_path: Path) -> None:
    table = random_table(distances=(*FIVE, "energy"), classes=4)
    table.loc[table["class"] == "class 1", "top1"] = 0.25
    table.loc[(table["class"] == "class 2") & (table["cell"] == 3), "pwcca"] = np.nan
    table["energy"] = table["energy"].to_numpy()[::-1]  # of other cells
    page = write_page(table, tmp_path)
    head, *rows = page.tables["net (16 groups: 4 layers x 4 classes)"]
    assert [cell.text for cell in head] == ["metric", *(CHANGE_NAMES[name] for name in CHANGES)]
    assert [row[0].text for row in rows] == [METRIC_NAMES[name] for name in (*FIVE, "energy")]
    per_group = compute_correlations(table, (*FIVE, "energy"), CHANGES)
    keys = ["distance", "change"]
    means = summarise(per_group).set_index(keys)
    result = compute_intervals(per_group).set_index(keys)
    threshold = find_threshold(table, (*FIVE, "energy"), CHANGES)
    missing, beyond = set(), 0
    for distance, row in zip((*FIVE, "energy"), rows, strict=True):
        for change, cell in zip(CHANGES, row[1:], strict=True):
            mean, interval = means.loc[(distance, change)], result.loc[(distance, change)]
            assert cell.value == pytest.approx(mean["spearman"], abs=1e-12)
            nan = f" ({mean['nan_groups']})" if mean["nan_groups"] else ""
            missing.add(mean["nan_groups"])
            mark = "*" if abs(mean["spearman"]) > threshold else ""
            beyond += bool(mark)
            limits = f"[{interval['low']:.2f}, {interval['high']:.2f}]"
            assert cell.text == f"{mean['spearman']:.2f}{mark}{nan}{limits}"
    assert missing == {0, 4, 8}
    assert 0 < beyond < 18
    stated = f"{beyond} of the 18 correlations are above {threshold:.2f} in absolute value"
    assert stated in page.visible_text()


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    evil = "\"'><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}"
    table = random_table(model=evil).replace({"layer": {"l.1": evil}, "class": {"class 1": evil}})
    # The cells that differ most: their class and layer are named in a caption.
    table.loc[(table["layer"] == evil) & (table["class"] == evil), "rank_deficit"] *= 9
    table.attrs = {"notes": {evil: evil}}
    page = write_page(table, tmp_path)
    assert page.tags("script", "img") == ["script"]
    assert not [of for _, of in page.elements if "onerror" in of]
    assert "49" not in page.tables  # expressions in names are not run
    captions = [caption for caption in page.tables if caption.startswith(evil)]
    assert len(captions) == 3
    labels = [of["aria-label"] for tag, of in page.elements if tag == "svg"]
    assert labels
    assert all(label and label.startswith(f"{evil}") for label in labels)


def test_headings_are_nested_and_tables_have_headers(tmp_path: Path) -> None:
    page = write_page(random_table(distances=(*FIVE, "energy")), tmp_path)
    levels = [int(tag[1]) for tag in page.tags("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    scopes = {of.get("scope") for tag, of in page.elements if tag == "th"}
    assert scopes == {"row", "col"}
    ids = [of["id"] for _, of in page.elements if "id" in of]
    assert len(ids) == len(set(ids)) > 0


@pytest.mark.usefixtures("undrawn")
def test_networks_of_several_runs_with_the_same_name_get_the_run_appended(tmp_path: Path) -> None:
    for name, seed in (("runA", 0), ("run <B>", 1)):
        shared = toy_study(name="both", metrics=["cka"], seed=seed, metric_images=5 - seed)
        own = toy_study(name=f"only {seed}", metrics=["cka"], layers=["act1"])
        run([shared, own], open_run([shared, own], tmp_path / name, {"images": f"set {seed}"}))
    folders = [tmp_path / "runA", tmp_path / "run <B>"]
    page = write_page(folders, tmp_path)
    names = {
        "both (runA)": (0, "both"),
        "only 0": (0, "only 0"),
        "both (run <B>)": (1, "both"),
        "only 1": (1, "only 1"),
    }
    for name, (number, name_in_run) in names.items():
        table = pd.read_parquet(folders[number] / "results.parquet")
        network = table[table["model"] == name_in_run]
        groups = f"{name} ({3 * network['layer'].nunique()} groups: "
        (rows,) = (
            rows
            for caption, rows in page.tables.items()
            if caption.startswith(groups) and "layers" in caption
        )
        per_group = compute_correlations(network, ["cka"], ["margin_refit"])
        column = [cell.text for cell in rows[0]].index(CHANGE_NAMES["margin_refit"])
        assert rows[1][column].value == pytest.approx(per_group["spearman"].mean(), abs=1e-12)
    assert "Images: set 0" in page.visible_text()
    assert "Images: set 1" in page.visible_text()


def test_empty_repeated_and_unfinished_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"runs: empty; expected the folder of a run, or a table"):
        write_report([], tmp_path / "page.html")
    with pytest.raises(ReportError, match=r"runs: .*/a is repeated; expected different runs"):
        write_report([tmp_path / "a", tmp_path / "b" / ".." / "a"], tmp_path / "page.html")
    with pytest.raises(StoreError, match=r"run: .* has no study\.json"):
        write_report([tmp_path], tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("undrawn")
def test_sections_appear_only_with_their_columns(tmp_path: Path) -> None:
    plain = random_table()
    halves = {f"top1_{half}": plain["top1"] for half in ("odd", "even")}
    for table, has_energy, has_halves in (
        (plain, False, False),
        (plain.assign(energy=plain["cka"] ** 2 + plain["size"]), True, False),
        (plain.assign(**halves), False, True),
    ):
        text = write_page(table, tmp_path).visible_text()
        assert ("Beyond the amount removed" in text) == has_energy
        assert ("Energy removed is not a metric" in text) == has_energy
        assert ("Corrected for noise" in text) == has_halves
        assert ("Reliability: how well" in text) == has_halves


@pytest.mark.usefixtures("undrawn")
def test_partial_correlations_are_shown_with_the_plain_ones(tmp_path: Path) -> None:
    table = random_table()
    table["energy"] = table["cka"] + np.random.default_rng(1).exponential(size=len(table))
    page = write_page(table, tmp_path)
    rows = page.tables["net, correlations given size and energy"][1:]
    changes = ["rank_deficit", "decodability_refit"]
    keys = ["distance", "change"]
    plain = compute_correlations(table, FIVE, changes).groupby(keys)["spearman"].mean()
    partial = compute_partial_correlations(table, FIVE, changes).groupby(keys)["spearman"].mean()
    assert [row[0].text for row in rows] == [METRIC_NAMES[name] for name in FIVE]
    for name, row in zip(FIVE, rows, strict=True):
        expected = [means[name, change] for change in changes for means in (plain, partial)]
        assert [cell.value for cell in row[1:]] == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("undrawn")
def test_reliability_and_corrected_correlations_are_shown(tmp_path: Path) -> None:
    table, rng = random_table(), np.random.default_rng(2)
    for half in ("odd", "even"):
        table[f"top1_{half}"] = table["top1"] + rng.normal(size=len(table))
    groups = [group for _, group in table.groupby(["class", "layer"])]
    r = np.mean([group["top1_odd"].corr(group["top1_even"], method="spearman") for group in groups])
    reliability = 2 * r / (1 + r)
    page = write_page(table, tmp_path)
    head, *rows = page.tables["net (12 groups)"]
    assert [cell.text for cell in head][-2:] == ["reliability", "by"]
    by_name = {row[0].text: row for row in rows}
    assert by_name["top-1 accuracy"][4].value == pytest.approx(reliability, abs=1e-12)
    assert by_name["top-1 accuracy"][5].text == "halves"
    assert by_name["rank of the true class"][4].text == "unknown"
    for row, name in zip(page.tables["net, corrected for noise"][1:], FIVE, strict=True):
        rho = np.mean([group[name].corr(group["top1"], method="spearman") for group in groups])
        expected = [rho, rho / np.sqrt(reliability)]
        assert [cell.value for cell in row[1:]] == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("undrawn")
def test_constant_nan_tied_and_dead_cells_are_counted(tmp_path: Path) -> None:
    table = random_table(cells=8, distances=("cka", "energy"))
    table.loc[table["layer"] == "l.2", "top1"] = 1.0
    table.loc[table.index[[3, 90]], "rank_deficit"] = np.nan
    table.loc[table["class"] == "class 0", "cka"] = 0.25
    table.loc[table.index[[5, 6, 40]], "energy"] = 0.0
    page = write_page(table, tmp_path)
    rows = {row[0].text: row[1:] for row in page.tables["net (12 groups)"][1:]}
    groups = [group for _, group in table.groupby(["class", "layer"])]
    tied = np.mean([group["top1"].duplicated(keep=False) for group in groups])
    assert [cell.value for cell in rows["top-1 accuracy"]] == [3, 0, pytest.approx(tied)]
    assert [cell.value for cell in rows["rank of the true class"]] == [0, 2, 0]
    assert "3 of 96 cells are dead" in page.visible_text()
    assert "CKA is constant in 4 groups." in page.visible_text()
    assert "energy removed is constant" not in page.visible_text()


@pytest.mark.usefixtures("undrawn")
def test_network_without_any_correlation(tmp_path: Path) -> None:
    table = pd.concat(
        [random_table(), random_table(model="still").assign(**dict.fromkeys(CHANGES, 0.0))]
    )
    page = write_page(table, tmp_path)
    cells = [
        cell
        for row in page.tables["still (12 groups: 4 layers x 3 classes)"][1:]
        for cell in row[1:]
    ]
    assert {cell.text for cell in cells} == {"none (12)"}
    assert page.visible_text().count("correlations are above") == 1  # of the other network
    unknown = random_table(model="unknown").assign(**dict.fromkeys(CHANGES, np.nan))
    rows = write_page(unknown, tmp_path).tables["unknown (12 groups)"][1:]
    assert [[cell.text for cell in row[1:]] for row in rows] == [["0", "12", "unknown"]] * 3


def test_table_with_one_distance_and_one_change(tmp_path: Path) -> None:
    table = random_table(distances=("svcca",), changes=("probability",)).drop(columns="size")
    page = write_page(table, tmp_path)
    ((_, row),) = [rows for caption, rows in page.tables.items() if "layers x" in caption]
    expected = compute_correlations(table, ["svcca"], ["probability"])["spearman"].mean()
    assert row[1].value == pytest.approx(expected, abs=1e-12)
    assert "The claims are not judged: they need the rank of the true class" in page.visible_text()


@pytest.mark.parametrize(
    ("probes", "second"),
    [
        (("decodability_refit",), "decodability_refit"),
        (("decodability_refit", "decodability_paper"), "decodability_paper"),
        (("decodability_refit", "margin_refit"), "margin_refit"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_verdicts_numbers_and_details_of_claims_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probes: tuple[str, ...], second: str
) -> None:
    calls = []

    def fake_claims(per_group: pd.DataFrame, performance: str, decodability: str) -> list[Claim]:
        calls.append((set(per_group["model"]), performance, decodability))
        return [
            Claim(1, "A <i>.", True, 0.512, 0.25, 0.77, 0.0004, ["cka: 1 & 2", "none: 3"]),
            Claim(2, "B.", False, -0.3, -0.4, -0.2, 0.0312, ["B: a repetition"]),
            Claim(3, "C.", None, *[float("nan")] * 4, ["C: unknown"]),
        ]

    monkeypatch.setattr(findings, "judge_claims", fake_claims)
    page = write_page(random_table(changes=("rank_deficit", *probes)), tmp_path)
    assert calls == [({"net"}, "rank_deficit", second)]
    text = page.visible_text()
    assert "Held A <i>. Weakest metric: difference 0.51 [0.25, 0.77], " in text
    assert "permutation p < 0.001. CKA: 1 & 2 none: 3" in text
    assert "Not held B. Difference -0.30 [-0.40, -0.20], permutation p = 0.031. Not dec" in text
    assert f"Not decided C. C: unknown Decodability here: {CHANGE_NAMES[second]}." in text


@pytest.mark.usefixtures("undrawn")
def test_claims_match_the_statistics(tmp_path: Path) -> None:
    table = random_table(classes=8, seed=3)
    table["decodability_refit"] += 3 * table["cka"] + 3 * table["procrustes"]
    text = write_page(table, tmp_path).visible_text()
    per_group = compute_correlations(table, FIVE, CHANGES)
    expected = judge_claims(per_group, "rank_deficit", "decodability_refit")
    assert [claim.held for claim in expected][1:] == [True, True]
    for claim in expected:
        verdict = {True: "Held", False: "Not held", None: "Not decided"}[claim.held]
        numbers = f"{claim.estimate:.2f} [{claim.low:.2f}, {claim.high:.2f}]"
        assert re.search(
            rf"{verdict} {re.escape(claim.text)} [^.]*{re.escape(numbers)}", text, re.I
        )


@pytest.mark.usefixtures("undrawn")
def test_mixed_model_and_baseline_match_the_statistics(tmp_path: Path) -> None:
    table = random_table(classes=8, seed=3)
    table["energy"] = table["procrustes"].to_numpy()[::-1]
    table["cka"] += 3 * table["rank_deficit"]
    table["pwcca"] -= 3 * table["rank_deficit"]
    page = write_page(table, tmp_path)
    per_group = compute_correlations(table, [*FIVE, BASELINE], CHANGES)
    model = fit_mixed_model(per_group, "rank_deficit", "decodability_refit")
    (rows,) = (rows for title, rows in page.tables.items() if title.startswith("net, mixed model"))
    assert [[cell.text for cell in row[:3]] for row in rows[1:]] == [
        [test.name, f"{test.estimate:.2f}", f"[{test.low:.2f}, {test.high:.2f}]"]
        for test in model.contrasts
    ]
    assert ("The fit is at its boundary" in page.visible_text()) is model.boundary
    tests = compare_with_baseline(per_group, "rank_deficit")
    better = ", ".join(METRIC_NAMES[test.name] for test in tests if test.low > 0)
    worse = ", ".join(METRIC_NAMES[test.name] for test in tests if test.high < 0)
    assert "CKA" in better
    assert "PWCCA" in worse
    verdict = f"is followed better by {better}; worse by {worse}"
    start = f"Compared with the energy removed, the loss of {CHANGE_NAMES['rank_deficit']}"
    assert f"{start} {verdict}" in page.visible_text()
    assert "k = 8: 0.0078" in page.visible_text()


@pytest.mark.slow
def test_page_of_three_networks_and_104_layers_is_below_2_mb(tmp_path: Path) -> None:
    table = pd.concat(
        [
            random_table("wide", classes=10, layers=7, distances=(*METRICS, "energy")),
            random_table("deep", classes=10, layers=16, distances=(*METRICS, "energy")),
            random_table("long", classes=4, layers=104, distances=(*METRICS, "energy")),
        ]
    )
    page = write_page(table, tmp_path)
    assert len(page.html.encode()) < 2e6
    ticks = re.findall(r">(l\.\d+)</text>", page.html)
    assert {"l.0", "l.7", "l.98"} <= set(ticks)
    assert len(ticks) < 100
