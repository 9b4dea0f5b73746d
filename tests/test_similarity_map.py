"""Similarity maps: what they accept, and how they are drawn and saved."""

from __future__ import annotations

import csv
import html
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from _inputs import ODD
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

import repsim_kernels as rk
from repsim_kernels import comparison
from repsim_kernels.comparison import display, page

OPTIONS = {"debiased": True, "sigma": None, "precision": "float32"}
NASTY = [
    "</script><script>alert(1)</script>",
    "a & \"b\" 'c'",
    "$x_1$",
    "$\\frac{$",
    "@DATA@",
    "<!--",
    "π, é",
]


def make_map(values=((0.9, 0.2, 0.1), (0.3, 0.8, -0.1)), rows=None, columns=None, **other):
    values = np.asarray(values, dtype=float)
    rows = [f"conv{i}" for i in range(len(values))] if rows is None else rows
    columns = [f"block{i}" for i in range(values.shape[1])] if columns is None else columns
    arguments = {"metric": "cka", "options": OPTIONS, "n": 100} | other
    return rk.SimilarityMap(values, rows, columns, **arguments)


def draw_map(n_rows, n_columns=None, **other):
    names = [f"net.layers.{i}.out" for i in range(max(n_rows, n_columns or 0))]
    values = np.random.default_rng(0).random((n_rows, n_columns or n_rows))
    return make_map(values, names[:n_rows], names[: n_columns or n_rows], **other)


def read_data(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_fields_are_copied_and_cannot_change():
    values, options = np.eye(2), dict(OPTIONS)
    m = make_map(values, options=options, standard_error=torch.ones(2, 2))
    values[0, 0], options["debiased"] = 7, False
    assert m.values[0, 0] == 1
    assert m.options == OPTIONS
    assert (m.rows, m.columns) == (("conv0", "conv1"), ("block0", "block1"))
    assert m.standard_error.dtype == np.float64
    for change in (
        lambda: setattr(m, "n", 1),
        lambda: m.values.__setitem__((0, 0), 2),
        lambda: m.standard_error.fill(0),
    ):
        with pytest.raises((AttributeError, ValueError)):
            change()


@pytest.mark.parametrize(
    ("argument", "value", "error", "match"),
    [
        ("values", [1.0, 2.0], rk.ShapeError, r"values: shape \(2,\); expected \(R, C\)"),
        ("values", np.ones((0, 3)), rk.ShapeError, r"values: shape \(0, 3\)"),
        ("values", [[np.inf] * 3] * 2, rk.NonFiniteError, "values: infinite values"),
        ("values", [["a"] * 3] * 2, rk.DtypeError, "values: "),
        ("rows", ["a"], rk.ShapeError, "rows: 1 names; expected 2"),
        ("rows", "ab", rk.OptionError, "rows: 'ab'; expected a sequence of names"),
        ("columns", ["a", "b", "a"], rk.OptionError, "columns: 'a' is repeated"),
        ("columns", ["a", "b", 3], rk.OptionError, "columns: 3 is no name"),
        ("columns", None, rk.OptionError, "columns: None; expected a sequence"),
        ("metric", "ckka", rk.OptionError, "metric: 'ckka'; expected one of 'cka', "),
        ("options", [1], rk.OptionError, r"options: \[1\]; expected a mapping"),
        ("n", 0, rk.OptionError, "n: 0; expected a whole number of at least 1"),
        ("n_left_out", -1, rk.OptionError, "n_left_out: -1; expected a whole number"),
        ("standard_error", np.ones((3, 2)), rk.ShapeError, r"standard_error: shape \(3, 2\)"),
        ("standard_error", -np.ones((2, 3)), rk.OptionError, "standard_error: -1; expected no"),
        ("threshold", np.nan, rk.OptionError, "threshold: nan; expected a finite number"),
    ],
)
def test_wrong_fields_are_named(argument, value, error, match):
    fields = {
        "values": np.ones((2, 3)),
        "rows": ["a", "b"],
        "columns": ["a", "b", "c"],
        "metric": "cka",
        "options": {},
        "n": 10,
    }
    with pytest.raises(error, match=f"^{match}"):
        rk.SimilarityMap(**(fields | {argument: value}))


@pytest.mark.parametrize(
    "argument",
    ["rows", "columns", "metric", "options", "n", "standard_error", "n_left_out", "threshold"],
)
def test_odd_fields_are_refused_in_one_line(argument):
    for name, value in ODD.items():
        if (argument, name) in (("standard_error", "matrix"), ("options", "dict")):
            continue  # a map may hold these
        with pytest.raises(rk.RepsimError, match=f"^{argument}") as caught:
            make_map(np.eye(2), **{argument: value})
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 300


def test_repr_gives_sizes_metric_and_range():
    assert repr(make_map()) == ("SimilarityMap: debiased CKA of 2 x 3 layers, -0.1 … 0.9, n = 100")
    m = make_map([[np.nan, 0.5]], metric="procrustes_distance", n_left_out=3)
    assert repr(m).endswith(", 0.5 … 0.5, n = 100, 3 stimuli left out, 1 not defined")
    assert "…" not in repr(make_map([[np.nan]]))


def test_threshold_is_stated_and_counted():
    m = make_map([[0.1, 0.25, np.nan], [0.3, -0.2, 0.9]], threshold=np.float32(0.25))
    np.testing.assert_array_equal(
        m.is_above_threshold, [[False, False, False], [True, False, True]]
    )
    assert repr(m).endswith(", 1 not defined, 3 of 5 pairs not above the threshold 0.25")
    assert m.to_frame().attrs["threshold"] == 0.25
    assert not make_map().is_above_threshold.any()
    with pytest.raises(rk.OptionError, match=r"^threshold: given with 'procrustes_distance'; exp"):
        make_map(metric="procrustes_distance", threshold=0.1)


def test_frame_has_names_and_origin():
    frame = make_map(n_left_out=2).to_frame()
    assert frame.loc["conv1", "block2"] == -0.1
    assert frame.attrs == {"metric": "cka", "options": OPTIONS, "n": 100, "n_left_out": 2}


@given(
    st.lists(
        st.lists(st.floats(-1e9, 1e9) | st.just(np.nan), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_csv_and_parquet_keep_every_digit(tmp_path_factory, values):
    m = make_map(values, columns=["a,b", 'say "c"', "d\ne"])
    folder = tmp_path_factory.mktemp("map")
    with m.save(folder / "m.csv").open(newline="") as file:
        (_, *columns), *rows = csv.reader(file)
    assert (tuple(columns), tuple(name for name, *_ in rows)) == (m.columns, m.rows)
    read = [[float(cell or "nan") for cell in cells] for _, *cells in rows]
    np.testing.assert_array_equal(read, m.values)
    read = pd.read_parquet(m.save(folder / "m.parquet"))
    pd.testing.assert_frame_equal(read, m.to_frame(), check_exact=True)
    assert read.attrs == m.to_frame().attrs


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".SVG", b"<?xml")]
)
def test_pictures_are_saved_without_pyplot(tmp_path, suffix, start):
    content = make_map(NASTY_VALUES, NASTY, NASTY).save(tmp_path / f"m{suffix}").read_bytes()
    assert content.startswith(start)


def test_pictures_hold_what_the_values_are(tmp_path):
    m = make_map()
    with Image.open(m.save(tmp_path / "m.png")) as image:
        assert image.text["Title"] == m.describe()
        assert json.loads(image.text["Description"]) == m.get_origin()
    text = html.unescape(m.save(tmp_path / "m.svg").read_text("utf-8"))
    assert json.dumps(m.get_origin()) in text


NASTY_VALUES = np.random.default_rng(0).random((len(NASTY), len(NASTY)))


def test_neither_drawing_nor_the_page_needs_a_display_or_more_than_it_uses(tmp_path):
    code = (
        "import sys, repsim_kernels as rk;"
        "m = rk.SimilarityMap([[1.0]], ['a'], ['a'], 'cka', {}, 10);"
        f"m.save({str(tmp_path / 'm.html')!r});"
        "assert not {'matplotlib', 'pandas'} & set(sys.modules);"
        "m.plot();"
        "assert not {'matplotlib.pyplot', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "", "DISPLAY": ""})


@pytest.mark.parametrize(
    ("package", "suffix", "command"),
    [
        ("matplotlib", "png", "pip install 'repsim-kernels[plot]'"),
        ("pandas", "csv", "pip install 'repsim-kernels[plot]'"),
        ("pyarrow", "parquet", "pip install pyarrow"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, package, suffix, command):
    monkeypatch.delattr(comparison, "picture", raising=False)
    monkeypatch.delitem(sys.modules, "repsim_kernels.comparison.picture", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"{package} is not")) as caught:
        make_map().save(tmp_path / f"m.{suffix}")
    assert str(caught.value).endswith(f"; run: {command}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("m.jpeg", "expected a name that ends in one of .png, .pdf, .svg, .csv, .parquet, .html"),
        ("m", "expected a name that ends in"),
        ("none/m.png", "there is no folder"),
        (3, "path: 3; expected a path"),
    ],
)
def test_wrong_paths_are_refused(tmp_path, path, match):
    with pytest.raises(rk.OptionError, match=match):
        make_map().save(tmp_path / path if isinstance(path, str) else path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(1, 1), (20, 53), (150, 150), (3, 150), (150, 2)])
def test_labels_do_not_overlap(shape):
    ax = draw_map(*shape).plot()
    ax.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(low.x1 <= high.x0 + 1 for low, high in itertools.pairwise(boxes))
    assert ax.get_xticks()[0] == ax.get_yticks()[0] == 0
    if max(shape) <= 53:
        assert (len(ax.get_yticks()), len(ax.get_xticks())) == shape


def test_a_map_is_drawn_into_given_axes():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    m = draw_map(4)
    assert m.plot(right) is right
    assert not left.images
    (image,) = right.images
    np.testing.assert_array_equal(image.get_array(), m.values)
    assert right.child_axes[0].get_ylabel() == "debiased CKA, n = 100"


def test_the_diagonal_is_outlined_for_one_network_only():
    assert len(draw_map(4).plot().collections) == 1
    assert not draw_map(4, 5).plot().collections


def test_missing_cells_are_hatched_and_explained():
    ax = make_map([[np.nan, 0.5]]).plot()
    assert ax.patch.get_hatch()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["not defined"]
    assert make_map([[0.4, 0.5]]).plot().get_legend() is None


@pytest.mark.parametrize(("shape", "size"), [((5, 6), 2.5), ((160, 150), 0.8)])
def test_cells_not_above_the_threshold_have_dots(shape, size):
    options = OPTIONS | {"calibrate": {"permutations": 1000, "alpha": 0.01}}
    m = draw_map(*shape, threshold=0.7, options=options)
    values = m.values.copy()
    values[0, 1] = np.nan
    m = make_map(values, m.rows, m.columns, threshold=0.7, options=options)
    ax = m.plot(limits=(0, 1))
    (dots,) = ax.collections
    marked = {(row, column) for column, row in dots.get_offsets().astype(int).tolist()}
    assert marked == set(map(tuple, np.argwhere(values <= 0.7).tolist()))
    assert dots.get_sizes() == pytest.approx([size**2], rel=0.4)
    # White on dark cells, black on light ones.
    brightness = dots.get_facecolors()[:, 0].round().astype(int)
    levels = [values[row, column] for column, row in dots.get_offsets().astype(int)]
    assert set(brightness) == {0, 1}
    assert max(v for v, b in zip(levels, brightness, strict=True) if b) <= min(
        v for v, b in zip(levels, brightness, strict=True) if not b
    )
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["not defined", "not above 0.7; 99 % of 1,000 permuted maps stay below it"]
    assert ax.get_xlim() == (-0.5, shape[1] - 0.5)
    assert ax.get_ylim() == (-0.5, shape[0] - 0.5)


def test_light_means_alike_for_distances_too():
    similarity, distance = (
        make_map([[0.0, 1.0]], metric=metric).plot().images[0]
        for metric in ("cka", "procrustes_distance")
    )
    assert similarity.cmap(0.0) == distance.cmap(1.0)


@pytest.mark.parametrize(
    "odd",
    [
        {"limits": (1, 0)},
        {"limits": (0, np.nan)},
        {"limits": 3},
        {"limits": "01"},
        {"cmap": "virridis"},
        {"cmap": 3},
        {"ax": "axes"},
    ],
    ids=str,
)
def test_wrong_options_of_plot_are_named(odd):
    with pytest.raises(rk.OptionError, match=f"^{next(iter(odd))}: .*; expected"):
        make_map().plot(**odd)


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ([[0.113, 0.998]], (0.1, 1.0)),
        ([[-0.046, 0.993]], (-0.1, 1.0)),
        ([[0.3, 0.6]], (0.3, 0.6)),
        ([[0.92, 1.0]], (0.92, 1.0)),
        ([[1.0]], (0.5, 1.0)),
        ([[np.nan]], (0.0, 1.0)),
        ([[np.nan, 0.2, 0.4]], (0.2, 0.4)),
    ],
)
def test_limits_are_round_and_contain_the_values(values, limits):
    assert display.find_limits(make_map(values)) == pytest.approx(limits, abs=1e-12)


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12))
def test_limits_are_never_equal(low, span):
    first, last = display.find_limits(make_map([[low, low + span]]))
    assert first < last
    # A value that is a round number up to rounding of the range is its end.
    assert first <= low + 1e-9 * (last - first)
    assert last >= low + span - 1e-8 * (last - first)


@pytest.mark.parametrize(
    ("names", "short", "shared"),
    [
        (["a.0.x", "a.1.x"], ["0", "1"], "a.*.x"),
        (["a.0", "a.1"], ["0", "1"], "a.*"),
        (["a", "a.b"], ["a", "a.b"], ""),
        (["a.a", "a.a.a"], ["a", "a.a"], "a.*"),
        (["only.one"], ["only.one"], ""),
        (["x" * 40, "y"], ["x" * 15 + "…" + "x" * 15, "y"], ""),
    ],
)
def test_shared_parts_of_names_are_shown_once(names, short, shared):
    assert display.shorten_names(names) == (short, shared)


def test_the_page_holds_what_the_map_holds():
    error = np.array([[0.01, np.nan, 0.03], [0, 0, 0]])
    m = make_map(standard_error=error, n_left_out=4, threshold=0.25)
    text = page.render(m)
    data = read_data(text)
    assert data["values"] == m.values.tolist()
    assert data["errors"] == [[0.01, None, 0.03], [0, 0, 0]]
    assert data["rows"] == list(m.rows)
    assert data["is_above"] == [[1, 0, 0], [1, 1, 0]]
    assert "Dots: not above 0.25." in text
    for fact in (m.describe(), "debiased=True", "sigma=None", "precision='float32'"):
        assert html.escape(fact) in text


def test_the_page_escapes_names_and_options():
    m = make_map(NASTY_VALUES, NASTY, NASTY[::-1], options={"<b>": "<i>&"})
    text = page.render(m)
    data = read_data(text)
    assert data["rows"] == NASTY
    assert data["columns"] == NASTY[::-1]
    assert "alert(1)</script>" not in text
    assert "<b>" not in text
    assert text.count("<script") == 2


def test_the_page_is_self_contained_and_small():
    text = page.render(draw_map(150, standard_error=np.full((150, 150), 1 / 3)))
    assert not re.search(r"https?:|src=|href=|@import|url\(", text)
    assert len(text) < 1e6
