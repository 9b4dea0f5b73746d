"""The page of a similarity map in a browser: it draws, answers, and makes no requests."""

from __future__ import annotations

import numpy as np
import pytest
from _browser import BROWSER, browse, probe_page
from PIL import Image

import repsim_kernels as rk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
]

ROWS = ["</script><b>one</b>", 'a & "two"', "three"]
COLUMNS = ["w", "x", "y", "z"]
VALUES = np.arange(12).reshape(3, 4) / 11
VALUES[2, 3] = np.nan

# Points at the second row and third column, then walks from the first cell with the keys.
PROBE = """<script>
const seen = {errors, answers: [], names: [...document.querySelectorAll("b")].length};
const read = () => seen.answers.push(tip.hidden ? null : tip.innerText.split("\\n"));
const shape = canvas.getBoundingClientRect();
const place = {clientX: shape.x + left + 2.5 * cell, clientY: shape.y + 1.5 * cell};
canvas.dispatchEvent(new PointerEvent("pointermove", place));
read();
canvas.dispatchEvent(new PointerEvent("pointerleave"));
read();
const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", {key}));
canvas.focus();
seen.focused = document.activeElement === canvas;
for (const key of ["ArrowUp", "ArrowUp", "ArrowRight", "ArrowUp", "ArrowUp", "End"]) press(key);
read();
for (let step = 0; step < 5; step++) press("ArrowRight");
read();
press("Escape");
read();
seen.scroll = document.documentElement.scrollWidth;
seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
parent.postMessage(JSON.stringify(seen), "*");
</script>"""


@pytest.fixture
def page(tmp_path):
    error = np.full((3, 4), 0.0123)
    m = rk.SimilarityMap(VALUES, ROWS, COLUMNS, "cka", {"<i>": "&"}, 20, error, threshold=0.55)
    return m.save(tmp_path / "map.html")


def test_values_are_read_with_the_pointer_and_the_keys(page, tmp_path):
    seen = probe_page(page, PROBE, tmp_path)
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["focused"]
    assert seen["scroll"] <= 400
    pointed, left, walked, last, closed = seen["answers"]
    assert pointed == ["0.5455 ± 0.012, not above the threshold", f"row {ROWS[1]}", "column y"]
    assert walked == ["0.8182 ± 0.012", "row three", "column x"]
    assert last == ["not defined", "row three", "column z"]
    assert left is closed is None


@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)])
def test_the_page_follows_the_colour_scheme(page, tmp_path, scheme, dark):
    shot = tmp_path / "shot.png"
    setting = f"--blink-settings=preferredColorScheme={scheme}"
    browse(page.as_uri(), tmp_path, setting, f"--screenshot={shot}", "--window-size=800,600")
    with Image.open(shot) as image:
        assert (image.convert("L").getpixel((2, 2)) < 60) == dark
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20)}
    assert {(0x44, 0x01, 0x54)} <= colours  # the smallest value
