"""The model of run time with more workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.scaling import compute_makespan

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
