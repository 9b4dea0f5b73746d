"""The model of run time with more workers."""

from __future__ import annotations

from pathlib import Path

from _run_data import make_configuration, make_rows
from hypothesis import given
from hypothesis import strategies as st

from bench.scaling import compute_makespan, load_unit_seconds
from repsim_kernels.experiments.runs.store import Store

SECONDS = st.lists(st.integers(1, 100), min_size=1, max_size=30)


def test_known_schedules() -> None:
    # One worker runs 3 and 2; the other 4, and then 5 from second 4 on.
    assert compute_makespan([3, 4, 2, 5], 2) == 9
    assert compute_makespan([3, 4, 2, 5], 4) == 5


@given(seconds=SECONDS, workers=st.integers(1, 40))
def test_makespan_bounds(seconds: list[int], workers: int) -> None:
    """At least the longest unit; at most the even share plus the longest unit's idle time."""
    makespan = compute_makespan(seconds, workers)
    assert makespan >= max(seconds)
    # Integers, so that nothing is rounded.
    assert sum(seconds) <= makespan * workers <= sum(seconds) + max(seconds) * (workers - 1)
    assert compute_makespan(seconds, 1) == sum(seconds)


def test_unit_seconds_come_from_the_finished_units_of_a_run(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "run", make_configuration())
    for unit, seconds in zip(store.units[1:4], (3.0, 1.0, 2.0), strict=True):
        store.save(unit, make_rows(unit), seconds=seconds)
    assert load_unit_seconds(tmp_path / "run") == [3.0, 1.0, 2.0]
