"""Timing of GPU work: replays of a graph, or the profiler's sums for each call."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from bench.common import timing

INPUTS = [(torch.ones(3),)] * 4
TURNS = 12  # over these inputs


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def make_event(name, start, microseconds, device=DeviceType.CUDA, annotation=False):
    return FunctionEvent(
        id=0,
        name=name,
        thread=0,
        start_us=start,
        end_us=start + microseconds,
        device_type=device,
        stack=[],
        is_user_annotation=annotation,
        use_device="cuda",
    )


def make_turn(i, *microseconds):
    """Return the events of one turn's kernels, one after another."""
    return [make_event(f"kernel{k}", 1000 * i + 100 * k, us) for k, us in enumerate(microseconds)]


@pytest.fixture
def profile_events(monkeypatch):
    """Install a profiler that returns given events, and time a call with it."""

    def install(events, broken=False):
        class Profile:
            def __init__(self, activities):
                self.list = EventList(events, use_device="cuda")
                self.list._build_tree()

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def key_averages(self):
                return self.list.key_averages()

            def events(self):
                return 1 / 0 if broken else self.list

        monkeypatch.setattr(torch.profiler, "profile", Profile)
        return timing._profile(lambda x: x, INPUTS)

    return install


def test_median_and_spread_of_profiled_turns(profile_events):
    """Turns of 31 to 42 µs, unordered, mixed with CPU events and annotations."""
    kernels = [e for i in range(TURNS) for e in make_turn(i, 30, 1 + i)]
    others = [
        make_event("call", 0, 9000, DeviceType.CPU),
        make_event("range", 0, 9000, annotation=True),
    ]
    times = profile_events([*kernels[::-1], *others])
    assert times["ms"] == pytest.approx(36.5e-3)
    assert times["min_ms"] == pytest.approx(31e-3)
    assert times["max_ms"] == pytest.approx(42e-3)
    assert 0 < times["iqr_ms"] < 11e-3
    assert times["repeats"] == TURNS


@pytest.mark.parametrize("last", [(30, 6), (30,)], ids=["uneven", "even but different"])
def test_turns_that_differ_have_only_a_mean(profile_events, last):
    """The number of events per turn may be uneven, or even although the turns differ."""
    middle = (make_turn(i, 30, 6) for i in range(1, TURNS - 1))
    turns = [make_turn(0, 30, 6, 12), *middle, make_turn(99, *last)]
    mean = 1e-3 * (48 + 36 * (TURNS - 2) + sum(last)) / TURNS
    assert profile_events([e for turn in turns for e in turn]) == {"ms": pytest.approx(mean)}


def test_events_of_an_unknown_profiler_have_only_a_mean(profile_events):
    events = [e for i in range(TURNS) for e in make_turn(i, 30, i)]
    assert profile_events(events, broken=True) == {"ms": pytest.approx(35.5e-3)}


def test_a_profiler_without_events_gives_none(profile_events):
    assert profile_events([]) is None


@pytest.fixture
def time_replays(monkeypatch):
    """Time a call whose graph's first replay returns a given number, or fails to be captured."""

    def install(replay):
        def capture(call, inputs):
            if isinstance(replay, Exception):
                raise replay
            return None, torch.tensor(replay)

        monkeypatch.setattr(timing, "_explain_no_capture", lambda *_: None)
        monkeypatch.setattr(timing, "_capture", capture)
        monkeypatch.setattr(timing, "_time_replays", lambda *_: [1.0, 2.0, 3.0])
        monkeypatch.setattr(timing, "_profile", lambda *_: {"ms": 5.0})
        return timing.measure_on_device(lambda x: x.sum(), INPUTS, 0.1, 1.0)

    return install


def test_replays_with_the_same_result_are_timed(time_replays):
    times = time_replays(3.0)
    assert times["how"] == "graph"
    assert times["ms"] == 2.0


def test_replays_with_another_result_are_not_timed(time_replays):
    why = "a replay gives a different result"
    assert time_replays(3.0000002) == {"ms": 5.0, "how": f"profiler; no graph: {why}"}


def test_a_failed_capture_spoils_the_process(time_replays):
    times = time_replays(RuntimeError("operation not permitted\nmore"))
    assert times == {"how": "events; no graph: operation not permitted", "spoiled": True}
