"""What a study is going to take: counts by hand, seconds from costs that are given."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _cli import fail_at_call, invoke
from _toy import toy_images, toy_study

from repsim_kernels.experiments import Study
from repsim_kernels.experiments.cli.tables import print_elapsed
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.runs import membership
from repsim_kernels.experiments.study import estimate as plans
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.estimate import Plan, plan
from repsim_kernels.experiments.study.memory import held
from repsim_kernels.experiments.study.units import Unit

# Multiply-adds of the toy: 3 x 3 kernels at 8 x 8 places; 256 numbers into 3.
CONV1, CONV2, FC = 4 * 3 * 9 * 64, 4 * 4 * 9 * 64, 256 * 3
TAIL = {"act1": 2 * (CONV2 + FC), "act2": 2 * FC}
WHOLE = 2 * (CONV1 + CONV2 + FC)


@pytest.mark.parametrize(
    ("changes", "targets", "stimuli", "spectral"),
    [
        ({}, 3, 15, 17),  # one Gram of everything, and PWCCA's weights of 16 cells
        ({"metrics": ["cka", "cca"]}, 3, 15, 1),
        ({"metrics": ["pwcca"], "metric_images": 4}, 3, 12, 17),
        ({"others": 1}, 3, 10, 17),
        ({"others": 1, "metric_images": 2, "targets": [1]}, 1, 4, 17),
        ({"grid": (2, 3), "targets": [0, 2]}, 2, 15, 7),
    ],
)
def test_operations_by_hand(
    changes: dict[str, Any], targets: int, stimuli: int, spectral: int
) -> None:
    found = plan(toy_study(**changes, memory="1GiB"))
    cells = math.prod(changes.get("grid", (4, 4)))
    assert (found.name, found.targets, found.cells) == ("toy", targets, cells)
    assert (found.images, found.stimuli, found.memory) == (5, stimuli, 2**30)
    assert (found.passes, found.pass_flops) == (1, 15 * WHOLE)
    assert [line.layer for line in found.layers] == ["act1", "act2"]
    for line in found.layers:
        assert line.neurons == 256
        assert line.forward_flops == targets * cells * 5 * TAIL[line.layer]
        assert line.metric_flops == targets * 2 * stimuli**2 * 256 * spectral
    each = [line.forward_flops + line.metric_flops for line in found.layers]
    assert found.flops == 15 * WHOLE + sum(each)


def test_seconds_are_positive_and_finite() -> None:
    found = plan(toy_study())
    for seconds in (found.pass_seconds, *(line.seconds for line in found.layers)):
        assert 0 < seconds < math.inf


def given_costs(study: Study, together: int) -> None:
    """Give a study's passes of 5 images costs: 1 + 4 s at act1, 3 + 2 s at act2."""
    seconds = {"act1": (1.0, 4.0), "act2": (3.0, 2.0)}
    real = study.forward.costs

    def costs(images: torch.Tensor, layers: Any = None, *, timed: bool = True) -> Any:
        found = real(images, layers, timed=False)
        assert not timed or len(images) == 5
        return {
            name: replace(
                cost,
                together=together,
                head_seconds=seconds[name][0],
                tail_seconds=seconds[name][1],
            )
            for name, cost in found.items()
        }

    study.forward.costs = costs  # type: ignore[method-assign]


@pytest.mark.parametrize("memory", ["1GiB", "150KiB"])
@pytest.mark.parametrize("together", [1, 10, 40])
def test_the_parts_add_up(monkeypatch: pytest.MonkeyPatch, memory: str, together: int) -> None:
    study = toy_study(memory=memory)
    given_costs(study, together)
    monkeypatch.setattr(plans, "_metric_seconds", lambda _study: (2.0, 0.25))
    found = plan(study)
    passes = {"1GiB": 1, "150KiB": 2}[memory]
    # A whole pass takes 5 s for 5 images. Each group shows 15; the plan itself tried the cuts.
    assert found.passes == passes
    assert found.pass_seconds == pytest.approx(passes * 15)
    tails = {"act1": 4 / 5, "act2": 2 / 5}
    for line in found.layers:
        # Cells that run together run no slower than the network as a whole, 1 s an image.
        fast = TAIL[line.layer] / WHOLE
        tail = tails[line.layer] if together == 1 else min(tails[line.layer], fast)
        assert line.together == min(together, 16)
        assert line.seconds == pytest.approx(3 * 16 * 5 * tail + 3 * (2 + 0.25 * 256))
    total = found.pass_seconds + sum(line.seconds for line in found.layers)
    assert found.seconds == pytest.approx(total)


@pytest.mark.parametrize(
    "changes", [{}, {"others": 1}, {"grid": (8, 16)}, {"metric_images": 2, "grid": (5, 5)}]
)
def test_the_metrics_are_timed_on_two_sizes(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    study, clock = toy_study(**changes), [0.0]

    def represent(
        _study: Study, probes: list[str], _layer: str, label: int, x: Any, y: Any, _room: int
    ) -> Any:
        assert probes == ["ridge"]
        chosen = [label, *study.others_of(label)] if study.others else study.present
        assert y.tolist() == [c for c in chosen for _ in range(study.counted(c))]
        assert x.shape[1] >= study.grid[0] * study.grid[1]
        assert (x == 0).float().mean() == pytest.approx(0.5, abs=0.2)
        loading = 100.0 if clock[0] == 0 else 0.0
        clock[0] += loading + 3.0 + 0.5 * x.shape[1]
        return SimpleNamespace(sizes=torch.zeros(1))

    monkeypatch.setattr(plans, "represent", represent)
    monkeypatch.setattr(plans.time, "perf_counter", lambda: clock[0])
    assert plans._metric_seconds(study) == pytest.approx((3.0, 0.5))


def test_only_units_that_are_left_are_counted() -> None:
    study = toy_study(memory="150KiB", metrics=["cka"], block=1)
    left = [Unit("toy", "act1", 3), *study.units[3:5]]
    found = plan(study, left)
    assert [line.layer for line in found.layers] == ["act1", "act2"]
    assert [line.forward_flops for line in found.layers] == [80 * TAIL["act1"], 160 * TAIL["act2"]]
    assert [line.metric_flops for line in found.layers] == [2 * 15**2 * 256, 4 * 15**2 * 256]
    assert (found.targets, found.passes) == (3, 2)
    last = plan(study, study.units[5:])
    assert [line.layer for line in last.layers] == ["act2"]
    assert (last.targets, last.passes, last.pass_flops) == (1, 1, 15 * WHOLE)
    assert last.flops < found.flops < plan(study).flops
    blocks = toy_study(memory="150KiB", metrics=["cka"], block=2)
    pair = plan(blocks, blocks.units[2:3])
    assert (pair.targets, pair.passes, pair.layers[0].layer) == (2, 1, "act2")
    assert pair.layers[0].forward_flops == 160 * TAIL["act2"]


def test_workers_pass_the_images_for_each_unit_up_to_its_layer() -> None:
    study = toy_study(memory="150KiB", metrics=["cka"], block=2)
    found = plan(study, study.units[1:], apart=True)
    assert found.passes == 3
    heads = [WHOLE - TAIL[layer] for layer in ("act1", "act2", "act2")]
    assert found.pass_flops == 15 * sum(heads)


def test_what_is_held_is_that_of_the_largest_group() -> None:
    sizes = held(toy_study())
    assert plan(toy_study(memory="1GiB")).held == sum(sizes.values())
    tight = plan(toy_study(memory="150KiB"))
    assert tight.passes == 2
    assert tight.flops == plan(toy_study(memory="1GiB")).flops + 15 * WHOLE
    assert tight.held == max(sizes.values()) <= 0.7 * tight.memory
    assert {line.layer: line.held for line in tight.layers} == sizes


def test_too_little_memory_is_named() -> None:
    with pytest.raises(StudyError, match=r"^memory: .* what layer 'act1' of toy gives"):
        plan(toy_study(memory=1000))


def test_a_target_may_have_more_images_than_another() -> None:
    images, labels = toy_images()
    keep = [i for i in range(15) if i not in (1, 4)]
    study = toy_study(images=images[keep], labels=labels[keep], metrics=["cka"])
    found = plan(study)
    assert found.pass_flops == 13 * WHOLE
    for line in found.layers:  # 5 + 3 + 5 images
        assert line.forward_flops == pytest.approx(13 * 16 * TAIL[line.layer])


TOY = ["sweep", "--model", "_toy:Toy", "--layers", "act1,act2", "--size", "8", "--metrics", "cka"]


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_a_plan_runs_nothing_and_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a unit is measured")

    monkeypatch.setattr(measure, "_target", never)
    monkeypatch.setattr(membership, "Store", never)
    before = files()
    code, out, err = invoke(*TOY, "--images", folder, "--plan")
    assert (code, err) == (0, "")
    assert files() == before
    assert [path.name for path in Path().iterdir()] == ["images"]
    lines = out.splitlines()
    assert "  layers (2): act1, act2" in lines
    assert "  target classes (3 of 3): ant, bee, wasp" in lines
    assert "Plan for _toy:Toy: 3 target classes x 16 cells x 4 images; metrics use 12 images" in (
        " ".join(out.split())
    )
    rows = {line.split()[0]: line.split() for line in lines if line.startswith("  act")}
    # neurons, cells together, TFLOP forward and of metrics: 2 x 12 x 12 x 256, three times
    assert rows["act1"][1] == "256"
    assert float(rows["act1"][3]) == pytest.approx(3 * 16 * 4 * TAIL["act1"] / 1e12, rel=0.005)
    assert float(rows["act2"][3]) == pytest.approx(3 * 16 * 4 * TAIL["act2"] / 1e12, rel=0.005)
    assert float(rows["act2"][4]) == pytest.approx(3 * 2 * 144 * 256 / 1e12, rel=0.005)
    assert any(line.startswith("  1 pass over all images for all layers: ") for line in lines)
    assert lines[-1].startswith("Plan: ")
    assert lines[-1].endswith(" s on this device.")


def test_a_plan_of_an_interrupted_run_is_of_what_is_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*TOY, "--images", folder, "--out", "cut", "--block", "1"]
    monkeypatch.setattr(measure, "_target", fail_at_call(5, KeyboardInterrupt()))
    assert invoke(*command)[0] == 130
    before = files()
    code, out, _ = invoke(*command, "--plan")
    assert code == 0
    assert files() == before
    # Four units are done: all of act1, and one class of act2.
    assert "2 target classes x 16 cells" in " ".join(out.split())
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  act")] == ["act2"]


def some_plan(seconds: float) -> Plan:
    return replace(plan(toy_study(metrics=["cka"])), layers=[], pass_seconds=seconds)


@pytest.mark.parametrize(
    ("seconds", "said", "line"),
    [
        (0.26, [1.0, 2.5], "Took 0.3 s (estimated: 3.5 s).\n"),
        (99.0, [100.0], "Took 99.0 s (estimated: 2 min).\n"),
        (5990.0, [3600.0, 7200.0], "Took 100 min (estimated: 3.0 h).\n"),
    ],
)
def test_what_a_run_took_is_held_against_all_its_plans(
    capsys: pytest.CaptureFixture[str], seconds: float, said: list[float], line: str
) -> None:
    print_elapsed(seconds, [some_plan(s) for s in said])
    assert capsys.readouterr().out == line
