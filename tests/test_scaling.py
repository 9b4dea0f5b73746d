from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.scaling import makespan

SECONDS = st.lists(st.integers(1, 100), min_size=1, max_size=30)


def test_by_hand() -> None:
    # One worker has 3 and 2, the other 4 and then 5, which is free to begin at 4.
    assert makespan([3, 4, 2, 5], 2) == 9
    assert makespan([3, 4, 2, 5], 4) == 5


@given(seconds=SECONDS, workers=st.integers(1, 40))
def test_no_schedule_is_shorter_and_none_wastes_more_than_the_last_unit(
    seconds: list[int], workers: int
) -> None:
    found = makespan(seconds, workers)
    assert found >= max(seconds)
    # In whole numbers, which know no rounding.
    assert sum(seconds) <= found * workers <= sum(seconds) + max(seconds) * (workers - 1)
    assert makespan(seconds, 1) == sum(seconds)
