"""The report in a browser: it sorts, makes no requests, and fits a narrow screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from _browser import BROWSER, browse, probe_page
from _toy import toy_study
from PIL import Image

from repsim_kernels.experiments.report.page import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
]

# Runs after the page's script, in a frame of 400 pixels width.
PROBE = """<script>
const seen = {errors, width: innerWidth, scroll: document.documentElement.scrollWidth};
const table = document.querySelector("table.sortable");
const rows = () => [...table.tBodies[0].rows].map((row) =>
  [row.cells[0].textContent, parseFloat(row.cells[1].dataset.value)]);
const state = () => [...table.tHead.rows[0].cells].map((head) => head.getAttribute("aria-sort"));
const button = table.tHead.rows[0].cells[1].querySelector("button");
seen.heads = [...table.tHead.rows[0].cells].map((head) => head.children.length === 1 &&
  head.children[0].matches("button[type=button]") && head.children[0].tabIndex === 0);
seen.steps = [[rows(), state()]];
for (let click = 0; click < 2; click++) {
  button.focus();
  button.click();
  seen.steps.push([rows(), state()]);
}
seen.focused = document.activeElement === button;
table.tHead.rows[0].cells[0].querySelector("button").click();
seen.steps.push([rows(), state()]);
seen.tail = [...table.tBodies].slice(1).map((body) => body.textContent.trim().split("\\n")[0]);
const boxes = [...document.querySelectorAll("div.scroll")];
seen.wide = boxes.some((box) => box.scrollWidth > box.clientWidth);
seen.labels = [...document.querySelectorAll("svg")].every((svg) => svg.getAttribute("aria-label"));
seen.ink = getComputedStyle(document.body).color;
fetch("data:text/plain,x").then(() => "fetched", () => "refused").then((answer) => {
  seen.fetch = answer;
  seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two networks; the first has two metrics without any correlation."""
    table = toy_study().run().table
    table.loc[table["cell"] == 3, "pwcca"] = float("nan")
    both = pd.concat([table, table.assign(model="an ≤ other, of a very long name " * 3)])
    return write_report(both, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def seen(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return probe_page(page, PROBE, tmp_path_factory.mktemp("probe"))


def test_clicks_sort_a_table_and_reverse_the_order(seen: dict[str, Any]) -> None:
    (start, unsorted), (down, first), (up, second), (names, third) = seen["steps"]
    known = sorted((row for row in start if row[1] is not None), key=lambda row: -row[1])
    unknown = [row for row in start if row[1] is None]  # NaN in JSON
    assert {row[0] for row in unknown} == {"PWCCA", "SVCCA"}  # SVCCA is 0 for every cell
    assert start != [*known, *unknown]
    values = [row[1] for row in known]
    assert [row[1] for row in down] == [*values, None, None]
    assert [row[1] for row in up] == [*values[::-1], None, None]
    assert names == start
    heads = len(unsorted)
    assert unsorted == ["none"] * heads
    assert first == ["none", "descending", *["none"] * (heads - 2)]
    assert second == ["none", "ascending", *["none"] * (heads - 2)]
    assert third == ["ascending", *["none"] * (heads - 1)]
    assert seen["heads"] == [True] * heads
    assert seen["focused"]


def test_baseline_stays_below_the_metrics(seen: dict[str, Any]) -> None:
    assert [text.split("\n")[0] for text in seen["tail"]] == ["energy removed"]


def test_page_has_no_errors_and_makes_no_requests(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["fetch"] == "refused"  # by the content security policy


def test_only_tables_scroll_on_a_narrow_screen(seen: dict[str, Any]) -> None:
    assert seen["width"] == 400
    assert seen["scroll"] <= 400
    assert seen["wide"]
    assert seen["labels"]


@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)])
def test_page_follows_the_colour_scheme(
    page: Path, tmp_path: Path, scheme: int, dark: bool
) -> None:
    shot = tmp_path / "shot.png"
    setting = f"--blink-settings=preferredColorScheme={scheme}"
    browse(page.as_uri(), tmp_path, setting, f"--screenshot={shot}", "--window-size=1200,4000")
    with Image.open(shot) as image:
        grey = image.convert("L")
        assert (grey.getpixel((2, 2)) < 60) == dark
        counts = grey.histogram()
    ink = sum(counts[200:]) if dark else sum(counts[:60])
    assert 10_000 < ink < 0.2 * sum(counts)
