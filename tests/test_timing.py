"""How work on a GPU is timed: a graph's replays, or what the profiler says of each call."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from bench.common import timing

INPUTS = [(torch.ones(3),)] * 4
TURNS = 12  # of as many inputs


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def event(name, start, microseconds, device=DeviceType.CUDA, annotation=False):
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


def turn(i, *microseconds):
    """The kernels of a turn, one after the other."""
    return [event(f"kernel{k}", 1000 * i + 100 * k, us) for k, us in enumerate(microseconds)]


@pytest.fixture
def profiled(monkeypatch):
    """What is made of a profiler's events, EventList of PyTorch's own."""

    def install(events, broken=False):
        class Profile:
            def __init__(self, activities):
                self.found = EventList(events, use_device="cuda")
                self.found._build_tree()

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def key_averages(self):
                return self.found.key_averages()

            def events(self):
                return 1 / 0 if broken else self.found

        monkeypatch.setattr(torch.profiler, "profile", Profile)
        return timing._profiled(lambda x: x, INPUTS)

    return install


def test_the_profilers_median_and_spread(profiled):
    """Turns of 31 to 42 µs whose events come in no order, beside what is no kernel."""
    turns = [e for i in range(TURNS) for e in turn(i, 30, 1 + i)]
    others = [event("call", 0, 9000, DeviceType.CPU), event("range", 0, 9000, annotation=True)]
    found = profiled([*turns[::-1], *others])
    assert found["ms"] == pytest.approx(36.5e-3)
    assert found["min_ms"] == pytest.approx(31e-3)
    assert found["max_ms"] == pytest.approx(42e-3)
    assert 0 < found["iqr_ms"] < 11e-3
    assert found["repeats"] == TURNS


@pytest.mark.parametrize("last", [(30, 6), (30,)], ids=["one more", "as many"])
def test_turns_that_differ_have_a_mean(profiled, last):
    """Whether their events can't be shared out, or could be, but aren't alike."""
    turns = [turn(0, 30, 6, 12), *(turn(i, 30, 6) for i in range(1, TURNS - 1)), turn(99, *last)]
    mean = 1e-3 * (48 + 36 * (TURNS - 2) + sum(last)) / TURNS
    assert profiled([e for one in turns for e in one]) == {"ms": pytest.approx(mean)}


def test_events_of_another_profiler_have_a_mean(profiled):
    events = [e for i in range(TURNS) for e in turn(i, 30, i)]
    assert profiled(events, broken=True) == {"ms": pytest.approx(35.5e-3)}


def test_a_profiler_that_sees_nothing_is_none(profiled):
    assert profiled([]) is None


@pytest.fixture
def replayed(monkeypatch):
    """What is made of a graph whose first replay gives a number, or of its failure."""

    def install(replay):
        def captured(call, inputs):
            if isinstance(replay, Exception):
                raise replay
            return None, torch.tensor(replay)

        monkeypatch.setattr(timing, "_not_capturable", lambda *_: None)
        monkeypatch.setattr(timing, "_captured", captured)
        monkeypatch.setattr(timing, "_replays", lambda *_: [1.0, 2.0, 3.0])
        monkeypatch.setattr(timing, "_profiled", lambda *_: {"ms": 5.0})
        return timing.on_device(lambda x: x.sum(), INPUTS, 0.1, 1.0)

    return install


def test_replays_that_give_the_calls_numbers_are_timed(replayed):
    found = replayed(3.0)
    assert found["how"] == "graph"
    assert found["ms"] == 2.0


def test_other_numbers_of_a_replay_spoil_nothing(replayed):
    why = "a replay gives other numbers"
    assert replayed(3.0000002) == {"ms": 5.0, "how": f"profiler; no graph: {why}"}


def test_a_capture_that_fails_spoils_the_process(replayed):
    found = replayed(RuntimeError("operation not permitted\nmore"))
    assert found == {"how": "events; no graph: operation not permitted", "spoiled": True}
