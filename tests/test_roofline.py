"""Roofline figures: the positions of points, and what is drawn for each kind of file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba

from bench import roofline
from bench.predict import model
from bench.roofline import Point, Roof

RATES = {"copy": 3e12, "tf32": 4e14, "tf32x3": 1e14, "ieee": 6e13, "float64": 6e13}
COUNTS = st.integers(1, 10**13)


def make_report(*rows, **changes):
    return {
        "environment": {"device": "Some GPU"},
        "ceilings": RATES,
        "rows": list(rows),
        **changes,
    }


def make_row(name="centered_gram", **changes):
    return {
        "name": name,
        "shape": "n = 500",
        "dtype": "float32",
        "precision": "tf32x3",
        "bytes": 10**8,
        "operations": 10**11,
        "status": "ok",
        "ms": 4.0,
        **changes,
    }


def make_benchmark(name="repsim_kernels", **info):
    return {
        "group": "cka, linear, n=500 p=10,000, float32",
        "name": name,
        "median_s": 0.5,
        "extra_info": {"bytes": 10**9, "operations": {"float64": 10**13}, **info},
    }


def make_run(*rows):
    return {"environment": {"device": "A CPU"}, "ceilings": RATES, "benchmarks": list(rows)}


def get_texts(figure):
    (ax,) = figure.axes
    return {t.get_text() for t in [*figure.texts, *ax.texts]}


def get_marks(figure):
    """Return the positions of the filled marks."""
    (ax,) = figure.axes
    lines = [line for line in ax.lines if line.get_marker() == "o"]
    filled = [line for line in lines if to_rgba(line.get_markerfacecolor()) != (1, 1, 1, 1)]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in filled]


@given(COUNTS, COUNTS, st.floats(1e6, 1e13), st.floats(1e6, 1e15))
def test_a_call_at_its_minimum_time_lies_on_the_roof(size, operations, bandwidth, rate):
    roof = Roof(bandwidth, {"ieee": rate})
    point = Point("gram", "", size, {"ieee": operations})
    point = Point("gram", "", size, {"ieee": operations}, roof.floor(point))
    intensity, height = roofline.bound_position(roof, point)
    assert intensity == operations / size
    assert height == pytest.approx(min(intensity * bandwidth, rate), rel=1e-12)
    assert point.attained == pytest.approx(height, rel=1e-12)


@given(COUNTS, COUNTS, st.floats(1, 1000))
def test_a_slower_call_lies_below_the_roof_by_the_same_factor(size, operations, times):
    roof = Roof(1e9, {"ieee": 1e12})
    floor = roof.floor(Point("gram", "", size, {"ieee": operations}))
    slow = Point("gram", "", size, {"ieee": operations}, floor * times)
    assert slow.attained == operations / (floor * times)
    assert roofline.bound_position(roof, slow)[1] / slow.attained == pytest.approx(times, rel=1e-12)


def test_operations_at_two_precisions_add_their_times():
    point = Point("gram", "", 1, {"tf32": 4 * 10**14, "ieee": 6 * 10**13})
    assert Roof(3e12, RATES).floor(point) == pytest.approx(2)


def test_predictions_match_the_page():
    chart = roofline.chart_predictions()
    floors = {chart.roof.floor(p) for p in chart.points}
    assert {model.predict(case.floor)[0] for _, case in model.list_cases()} == floors
    assert {p.group for p in chart.points} == {module for module, _ in model.list_cases()}
    assert not any(p.seconds for p in chart.points)
    figure = roofline.draw(chart)
    assert roofline.PREDICTED in get_texts(figure)
    assert get_marks(figure) == []
    assert {str(i) for i, p in enumerate(chart.points, 1) if p.total} <= get_texts(figure)


def test_rows_of_a_gpu_report_are_drawn_at_their_measured_rate():
    chart = roofline.chart_record(
        make_report(make_row(), make_row("riccati", ms=1.0, operations=10**9))
    )
    figure = roofline.draw(chart)
    assert chart.note == ""
    assert np.allclose(get_marks(figure), [(1000, 25), (10, 1)])
    assert {"1", "2", "4 ms, 25%", "1 ms, 3%"} <= get_texts(figure)
    assert any(t.startswith("riccati: n = 500") for t in get_texts(figure))
    assert not {roofline.PREDICTED, roofline.UNMEASURED} & get_texts(figure)


def test_a_row_without_a_time_is_predicted():
    waiting = make_row(status="not run", why="there is no GPU")
    del waiting["ms"]
    chart = roofline.chart_record(make_report(waiting, make_row(status="WRONG")))
    assert [p.attained for p in chart.points] == [None]  # the two share a position and a number
    figure = roofline.draw(chart)
    assert roofline.UNMEASURED in get_texts(figure)
    assert get_marks(figure) == []


def test_interpreter_times_do_not_count_as_measured():
    assert (
        roofline.chart_record(make_report(make_row(), interpreted=True)).note == roofline.UNMEASURED
    )


def test_a_row_without_operations_is_only_listed():
    figure = roofline.draw(
        roofline.chart_record(make_report(make_row(), make_row("ablate", operations=0, ms=1 / 15)))
    )
    assert len(get_marks(figure)) == 1
    assert {"-", "66.7 µs, 50%"} <= get_texts(figure)


def test_cpu_benchmarks_use_the_median_and_gpu_benchmarks_the_device_time():
    chart = roofline.chart_record(
        make_run(make_benchmark(), make_benchmark("loop over copies"), make_benchmark(bytes=0))
    )
    assert [(p.group, p.attained) for p in chart.points] == [("cka", 2e13)]
    gpu = make_benchmark(events={"ms": 300.0}, on_device={"ms": 200.0})
    assert roofline.chart_record(make_run(gpu)).points[0].attained == 5e13
    unprofiled = make_benchmark(events={"ms": 400.0}, on_device={"how": "events; no profiler"})
    assert roofline.chart_record(make_run(unprofiled)).points[0].attained == 2.5e13
    assert len(get_marks(roofline.draw(chart))) == 1


BAD = {
    "not JSON": "{",
    "a list": "[]",
    "an unknown record": '{"environment": {}}',
    "no ceilings": json.dumps(
        make_report(make_row(), ceilings={"why": "RuntimeError: it\nfailed"})
    ),
    "a row of an unknown format": json.dumps(make_report({"name": "gram"})),
    "a row that is a number": json.dumps(make_report(3)),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_bad_file_raises_a_one_line_error(tmp_path, text):
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(RuntimeError, match=r"report\.json: ") as error:
        roofline.draw_rooflines(file, tmp_path / "out.png")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.png").exists()


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(RuntimeError, match="No such file"):
        roofline.draw_rooflines(tmp_path / "none.json", None)


def test_gpu_reports_replace_the_predictions(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    assert roofline.draw_rooflines(None, None) == [tmp_path / "roofline-h200-predicted.png"]
    rehearsal = make_report(make_row(status="not run"), environment={"device": "A CPU"})
    (tmp_path / "gpu_report-a-cpu.json").write_text(json.dumps(rehearsal))
    assert roofline.draw_rooflines(None, None) == [tmp_path / "roofline-h200-predicted.png"]
    (tmp_path / "gpu_report-some-gpu.json").write_text(json.dumps(make_report(make_row())))
    assert roofline.draw_rooflines(None, None) == [tmp_path / "roofline-some-gpu.png"]
    assert (tmp_path / "roofline-some-gpu.png").read_bytes().startswith(b"\x89PNG")
    other = make_report(make_row(), environment={"device": "Another"})
    (tmp_path / "gpu_report-another.json").write_text(json.dumps(other))
    with pytest.raises(RuntimeError, match="2 reports"):
        roofline.draw_rooflines(None, tmp_path / "out.png")
