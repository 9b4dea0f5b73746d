"""Random tables of a run, and a parser for the report's page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from repsim_kernels.experiments.report.page import write_report

FIVE = ("cka", "procrustes", "pwcca", "cca", "cca_squared")
CHANGES = ("rank_deficit", "top1", "decodability_refit")
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Cell(NamedTuple):
    text: str
    value: float | None  # data-value


class Page(HTMLParser):
    """A parsed page: its elements, its text, and its tables by caption."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[Cell]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self._cell: tuple[str, float | None] | None = None
        self._rows: list[list[Cell]] = []
        self._caption = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            value = dict(attrs).get("data-value")
            self._cell = "", None if value is None else float(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag
        if tag in ("td", "th") and self._cell is not None:
            self._rows[-1].append(Cell(_collapse_whitespace(self._cell[0]), self._cell[1]))
            self._cell = None
        elif tag == "table":
            assert self._caption not in self.tables
            self.tables[_collapse_whitespace(self._caption)] = self._rows

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell = self._cell[0] + data, self._cell[1]
        elif "caption" in self.open:
            self._caption += data
        if not {"style", "script"} & set(self.open):
            self.text += data

    def tags(self, *names: str) -> list[str]:
        return [tag for tag, _ in self.elements if tag in names]

    def visible_text(self) -> str:
        """The text that a reader sees, with runs of whitespace as one space."""
        return _collapse_whitespace(self.text)


def _collapse_whitespace(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def random_table(
    model: str = "net",
    classes: int = 3,
    layers: int = 4,
    distances: tuple[str, ...] = FIVE,
    changes: tuple[str, ...] = CHANGES,
    cells: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """Make a run's table: distances correlate with changes, and top-1 has many ties."""
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product(
        [
            [model],
            [f"class {i}" for i in range(classes)],
            [f"l.{i}" for i in range(layers)],
            range(cells),
        ],
        names=["model", "class", "layer", "cell"],
    )
    table = index.to_frame(index=False)
    table["size"] = rng.integers(1, 100, len(table))
    cause = rng.exponential(size=len(table))
    for name in distances:
        table[name] = cause + 1.5 * rng.exponential(size=len(table))
    for name in changes:
        table[name] = cause + 1.5 * rng.exponential(size=len(table))
    if "top1" in changes:
        table["top1"] = table["top1"].round()
    return table


def write_page(runs: Any, folder: Path, **options: Any) -> Page:
    return Page(write_report(runs, folder / "page.html", **options))
