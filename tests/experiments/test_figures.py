"""The report's figures as files."""

from __future__ import annotations

import re
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from _page import random_table, write_page
from PIL import Image

from repsim_kernels.experiments.errors import ReportError
from repsim_kernels.experiments.report.figures import Drawing, plot_cells, plot_strip
from repsim_kernels.experiments.report.page import write_report


@pytest.mark.parametrize(
    "kind",
    [
        "svg",
        pytest.param("pdf", marks=pytest.mark.slow),
        pytest.param("png", marks=pytest.mark.slow),
    ],
)
def test_figures_are_written_as_files(tmp_path: Path, kind: str) -> None:
    page = write_page(random_table(model="net/50"), tmp_path, figures=kind)
    files = sorted((tmp_path / "page_figures").iterdir())
    assert len(files) == len(page.tags("svg"))
    assert f"figure1_net-50_by_class_rank_deficit.{kind}" in {path.name for path in files}
    for path in files:
        assert re.fullmatch(rf"figure\d+_net-50_[a-z0-9_]+\.{kind}", path.name)
        if kind == "svg":
            assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
        elif kind == "png":
            with Image.open(path) as image:
                assert image.width > 500
                assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
        else:
            data = path.read_bytes()
            assert data.startswith(b"%PDF-")
            assert b"/FontFile2" in data  # editable text, not outlines


def test_figures_replace_only_those_of_an_earlier_report(tmp_path: Path) -> None:
    folder = tmp_path / "page_figures"
    write_page(random_table(), tmp_path, figures="png")
    write_page(random_table(changes=("top1",)), tmp_path, figures="svg")
    assert {path.suffix for path in folder.iterdir()} == {".svg"}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "notes.txt").write_text("my notes")
    with pytest.raises(ReportError, match=r"figures: .*page_figures holds notes\.txt; expected"):
        write_report(random_table(), tmp_path / "page.html", "png")
    (folder / "notes.txt").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ReportError, match="figures: 'gif' is unknown; expected svg, pdf, png"):
        write_report(random_table(), tmp_path / "page.html", "gif")
    (tmp_path / "other_figures").write_text("a file")
    with pytest.raises(ReportError, match="other_figures is a file; expected a folder"):
        write_report(random_table(), tmp_path / "other.html", "svg")


def test_failed_figures_leave_the_earlier_report_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_page(random_table(), tmp_path, figures="svg")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    save, saved = Drawing.save, []

    def fail_late(drawing: Drawing, folder: Path, name: str, kind: str) -> None:
        if len(saved) == 3:
            raise OSError("no space left")
        saved.append(name)
        save(drawing, folder, name, kind)

    monkeypatch.setattr(Drawing, "save", fail_late)
    with pytest.raises(OSError, match="no space left"):
        write_report(random_table(seed=1), tmp_path / "page.html", "svg")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(saved) == 3
    assert after == before


def test_bars_are_the_means_over_classes() -> None:
    table = random_table(cells=5, layers=1)
    drawing = plot_strip("net", "l.0", table, ["rank_deficit", "cka"])
    expected = table.groupby("cell")[["rank_deficit", "cka"]].mean()
    for axes, name in zip(drawing.figure.axes, expected, strict=True):
        (bars,) = axes.patches
        np.testing.assert_allclose(bars.get_data().values, expected[name])
        assert bars.get_data().edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5]


@pytest.mark.parametrize(("n_cells", "n_points"), [(500, 500), (501, 251), (2048, 410)])
def test_many_cells_are_drawn_in_part(n_cells: int, n_points: int) -> None:
    table = random_table(cells=n_cells, layers=1, classes=1)
    drawing = plot_cells("net", ("c", "l"), table, pd.Series({"cka": 0.5}), "rank_deficit")
    (points,) = drawing.figure.axes[0].lines
    ranks = table[["cka", "rank_deficit"]].rank()[:: -(-n_cells // 500)]
    assert len(points.get_xdata()) == n_points
    np.testing.assert_array_equal(points.get_xdata(), ranks["cka"])
    np.testing.assert_array_equal(points.get_ydata(), ranks["rank_deficit"])
    assert f"one point for each of {n_points} cells" in drawing.alt
