"""The page of a similarity map: one HTML file that needs nothing from elsewhere."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from repsim_kernels.comparison import display
from repsim_kernels.comparison.similarity_map import SimilarityMap

# Matplotlib's viridis at 17 even steps; between these, colours are interpolated.
_VIRIDIS = (
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
    "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
)
_DIGITS = 6  # of values and standard errors; the page shows fewer


def render(m: SimilarityMap) -> str:
    """Return the page of a map."""
    colours = [list(bytes.fromhex(colour)) for colour in _VIRIDIS.split()]
    data = {
        "rows": m.rows,
        "columns": m.columns,
        "short_rows": display.shorten_names(m.rows)[0],
        "short_columns": display.shorten_names(m.columns)[0],
        "values": _round(m.values),
        "errors": None if m.standard_error is None else _round(m.standard_error),
        "is_above": None if m.threshold is None else m.is_above_threshold.astype(int).tolist(),
        "limits": [float(f"{limit:.6g}") for limit in display.find_limits(m)],
        "colours": colours[::-1] if m.is_distance else colours,
        "has_equal_names": m.has_equal_names,
    }
    # An escaped "<" can't end the script element or begin a comment.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # The data come last, since names may contain a placeholder.
    for name, value in (
        ("TITLE", html.escape(m.describe())),
        ("FACTS", html.escape(_describe_origin(m))),
        ("DATA", text),
    ):
        page = page.replace(f"@{name}@", value)
    return page


def _describe_origin(m: SimilarityMap) -> str:
    """Return the metric, its options and what is shown, as a sentence."""
    origin = m.get_origin()
    options = ", ".join(f"{name}={value!r}" for name, value in origin["options"].items())
    text = f"Metric {origin['metric']!r}, options: {options or 'none'}."
    if m.standard_error is not None:
        text += " Values ± standard error."
    if m.threshold is not None:
        text += f" Dots: {display.describe_threshold(m)}."
    return text


def _round(values: np.ndarray[Any, Any]) -> list[list[float | None]]:
    """Round to a few digits, which keeps the page small; JSON has no NaN."""
    return [
        [None if np.isnan(value) else float(f"{value:.{_DIGITS}g}") for value in row]
        for row in values.tolist()
    ]
