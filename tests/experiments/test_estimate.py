"""Estimates of a study's cost: operations match hand counts, and seconds match set costs."""

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
from repsim_kernels.experiments.study import estimate as estimate_module
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.estimate import Plan, plan
from repsim_kernels.experiments.study.memory import bytes_held
from repsim_kernels.experiments.study.units import Unit

# Multiply-adds of the toy: 3 x 3 kernels at 8 x 8 positions; 256 inputs to 3 outputs.
CONV1, CONV2, FC = 4 * 3 * 9 * 64, 4 * 4 * 9 * 64, 256 * 3
TAIL = {"act1": 2 * (CONV2 + FC), "act2": 2 * FC}
WHOLE = 2 * (CONV1 + CONV2 + FC)


@pytest.mark.parametrize(
    ("changes", "targets", "stimuli", "spectral"),
    [
        ({}, 3, 15, 17),  # one Gram matrix, and PWCCA's weights for 16 cells
        ({"metrics": ["cka", "cca"]}, 3, 15, 1),
        ({"metrics": ["pwcca"], "metric_images": 4}, 3, 12, 17),
        ({"others": 1}, 3, 10, 17),
        ({"others": 1, "metric_images": 2, "targets": [1]}, 1, 4, 17),
        ({"grid": (2, 3), "targets": [0, 2]}, 2, 15, 7),
    ],
)
def test_operations_match_a_hand_count(
    changes: dict[str, Any], targets: int, stimuli: int, spectral: int
) -> None:
    estimate = plan(toy_study(**changes, memory="1GiB"))
    cells = math.prod(changes.get("grid", (4, 4)))
    assert (estimate.name, estimate.targets) == ("toy", targets)
    assert (estimate.images, estimate.stimuli, estimate.memory) == (5, stimuli, 2**30)
    assert (estimate.passes, estimate.pass_flops) == (1, 15 * WHOLE)
    assert [line.layer for line in estimate.layers] == ["act1", "act2"]
    for line in estimate.layers:
        assert (line.neurons, line.cells) == (256, cells)
        assert line.forward_flops == targets * cells * 5 * TAIL[line.layer]
        assert line.metric_flops == targets * 2 * stimuli**2 * 256 * spectral
    each = [line.forward_flops + line.metric_flops for line in estimate.layers]
    assert estimate.flops == 15 * WHOLE + sum(each)


def test_seconds_are_positive_and_finite() -> None:
    estimate = plan(toy_study())
    for seconds in (estimate.pass_seconds, *(line.seconds for line in estimate.layers)):
        assert 0 < seconds < math.inf


def set_costs(study: Study, together: int) -> None:
    """Set the cost of passes of 5 images: 1 + 4 s at act1, 3 + 2 s at act2."""
    seconds = {"act1": (1.0, 4.0), "act2": (3.0, 2.0)}
    real_costs = study.forward.costs

    def fake_costs(images: torch.Tensor, layers: Any = None, *, timed: bool = True) -> Any:
        costs = real_costs(images, layers, timed=False)
        assert not timed or len(images) == 5
        return {
            name: replace(
                cost,
                together=together,
                head_seconds=seconds[name][0],
                tail_seconds=seconds[name][1],
            )
            for name, cost in costs.items()
        }

    study.forward.costs = fake_costs  # type: ignore[method-assign]


@pytest.mark.parametrize("memory", ["1GiB", "150KiB"])
@pytest.mark.parametrize("together", [1, 10, 40])
def test_the_total_is_the_sum_of_the_parts(
    monkeypatch: pytest.MonkeyPatch, memory: str, together: int
) -> None:
    study = toy_study(memory=memory)
    set_costs(study, together)
    monkeypatch.setattr(
        estimate_module, "_time_metrics", lambda _study: lambda p, _cells: 2.0 + 0.25 * p
    )
    estimate = plan(study)
    passes = {"1GiB": 1, "150KiB": 2}[memory]
    # A whole pass costs 5 s for 5 images, and each group passes 15; verified cuts are not counted.
    assert estimate.passes == passes
    assert estimate.pass_seconds == pytest.approx(passes * 15)
    tails = {"act1": 4 / 5, "act2": 2 / 5}
    for line in estimate.layers:
        # Cells in one batch are no slower than the whole network, 1 s per image.
        batched = TAIL[line.layer] / WHOLE
        tail = tails[line.layer] if together == 1 else min(tails[line.layer], batched)
        assert line.cells_per_batch == min(together, 16)
        assert line.seconds == pytest.approx(3 * 16 * 5 * tail + 3 * (2 + 0.25 * 256))
    total = estimate.pass_seconds + sum(line.seconds for line in estimate.layers)
    assert estimate.seconds == pytest.approx(total)


@pytest.mark.parametrize(
    "changes", [{}, {"others": 1}, {"grid": (8, 16)}, {"metric_images": 2, "grid": (5, 5)}]
)
def test_the_metrics_are_timed_on_two_sizes(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    study, clock = toy_study(**changes), [0.0]

    def measure_representation(
        _study: Study,
        probes: list[str],
        _layer: str,
        labels: list[int],
        x: Any,
        y: Any,
        _free: int,
        fixed: Any,
    ) -> Any:
        label = labels[0]
        assert fixed is None
        assert labels == study.targets[: 1 if study.others else 2]
        assert probes == ["ridge"]
        chosen = [label, *study.draw_other_classes(label)] if study.others else study.unique_labels
        assert y.tolist() == [c for c in chosen for _ in range(study.count_metric_images(c))]
        assert x.shape[1] >= study.grid[0] * study.grid[1]
        assert (x == 0).float().mean() == pytest.approx(0.5, abs=0.2)
        loading = 100.0 if clock[0] == 0 else 0.0
        clock[0] += loading + len(labels) * (3.0 + 0.5 * x.shape[1])
        return [SimpleNamespace(cells=SimpleNamespace(sizes=torch.zeros(1)))]

    monkeypatch.setattr(estimate_module, "measure_representation", measure_representation)
    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: clock[0])
    estimate = estimate_module._time_metrics(study)
    assert estimate(1000, 16) == pytest.approx(3.0 + 0.5 * 1000)


def test_more_cells_are_timed_where_all_targets_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {"act1": [0] * 100 + [1] * 156, "act2": torch.arange(256) % 9}
    study, clock = toy_study(cells=own), [0.0]

    def measure_representation(*arguments: Any) -> Any:
        _, _, _, labels, x, _, _, fixed = arguments
        assert labels == [0, 1, 2]
        assert fixed.sizes.sum() == x.shape[1]
        clock[0] += 3 * (3.0 + 0.5 * x.shape[1] + 7.0 * fixed.count)
        return [SimpleNamespace(cells=fixed)]

    monkeypatch.setattr(estimate_module, "measure_representation", measure_representation)
    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: clock[0])
    estimate = estimate_module._time_metrics(study)
    assert estimate(1000, 1000) == pytest.approx(3.0 + 0.5 * 1000 + 7.0 * 1000)


def test_operations_of_cells_that_targets_share_match_a_hand_count() -> None:
    own = {"act1": [0] * 100 + [1] * 156, "act2": torch.arange(256) % 9}
    lines = plan(toy_study(cells=own, block=2)).layers
    for line, count in zip(lines, (2, 9), strict=True):
        assert line.cells == count
        assert line.forward_flops == 3 * count * 5 * TAIL[line.layer]
        # Metrics once for each block of classes, of which there are two.
        assert line.metric_flops == 2 * 2 * 15**2 * 256 * (1 + count)


def test_only_the_given_units_are_counted() -> None:
    study = toy_study(memory="150KiB", metrics=["cka"], block=1)
    units = [Unit("toy", "act1", 3), *study.units[3:5]]
    estimate = plan(study, units)
    assert [line.layer for line in estimate.layers] == ["act1", "act2"]
    assert [line.forward_flops for line in estimate.layers] == [
        80 * TAIL["act1"],
        160 * TAIL["act2"],
    ]
    assert [line.metric_flops for line in estimate.layers] == [2 * 15**2 * 256, 4 * 15**2 * 256]
    assert (estimate.targets, estimate.passes) == (3, 2)
    last = plan(study, study.units[5:])
    assert [line.layer for line in last.layers] == ["act2"]
    assert (last.targets, last.passes, last.pass_flops) == (1, 1, 15 * WHOLE)
    assert last.flops < estimate.flops < plan(study).flops
    blocks = toy_study(memory="150KiB", metrics=["cka"], block=2)
    pair = plan(blocks, blocks.units[2:3])
    assert (pair.targets, pair.passes, pair.layers[0].layer) == (2, 1, "act2")
    assert pair.layers[0].forward_flops == 160 * TAIL["act2"]


def test_separate_passes_end_at_each_units_layer() -> None:
    study = toy_study(memory="150KiB", metrics=["cka"], block=2)
    estimate = plan(study, study.units[1:], separate_passes=True)
    assert estimate.passes == 3
    heads = [WHOLE - TAIL[layer] for layer in ("act1", "act2", "act2")]
    assert estimate.pass_flops == 15 * sum(heads)


def test_bytes_held_are_those_of_the_largest_group() -> None:
    sizes = bytes_held(toy_study())
    assert plan(toy_study(memory="1GiB")).bytes_held == sum(sizes.values())
    tight = plan(toy_study(memory="150KiB"))
    assert tight.passes == 2
    assert tight.flops == plan(toy_study(memory="1GiB")).flops + 15 * WHOLE
    assert tight.bytes_held == max(sizes.values()) <= 0.7 * tight.memory
    assert {line.layer: line.bytes_held for line in tight.layers} == sizes


def test_too_little_memory_raises() -> None:
    with pytest.raises(StudyError, match=r"^memory: .* to hold layer 'act1' of toy"):
        plan(toy_study(memory=1000))


def test_a_target_may_have_more_images_than_another() -> None:
    images, labels = toy_images()
    keep = [i for i in range(15) if i not in (1, 4)]
    study = toy_study(images=images[keep], labels=labels[keep], metrics=["cka"])
    estimate = plan(study)
    assert estimate.pass_flops == 13 * WHOLE
    for line in estimate.layers:  # 5 + 3 + 5 images
        assert line.forward_flops == pytest.approx(13 * 16 * TAIL[line.layer])


TOY = ["sweep", "--model", "_toy:Toy", "--layers", "act1,act2", "--size", "8", "--metrics", "cka"]


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_the_plan_measures_and_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a unit was measured")

    monkeypatch.setattr(measure, "_measure_target", never)
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


def test_the_plan_of_an_interrupted_run_covers_the_remaining_units(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*TOY, "--images", folder, "--out", "cut", "--block", "1"]
    monkeypatch.setattr(measure, "_measure_target", fail_at_call(5, KeyboardInterrupt()))
    assert invoke(*command)[0] == 130
    before = files()
    code, out, _ = invoke(*command, "--plan")
    assert code == 0
    assert files() == before
    # Four units are done: all of act1, and one class of act2.
    assert "2 target classes x 16 cells" in " ".join(out.split())
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  act")] == ["act2"]


def plan_of(seconds: float) -> Plan:
    return replace(plan(toy_study(metrics=["cka"])), layers=[], pass_seconds=seconds)


@pytest.mark.parametrize(
    ("seconds", "estimates", "line"),
    [
        (0.26, [1.0, 2.5], "Took 0.3 s (estimated: 3.5 s).\n"),
        (99.0, [100.0], "Took 99.0 s (estimated: 2 min).\n"),
        (5990.0, [3600.0, 7200.0], "Took 100 min (estimated: 3.0 h).\n"),
    ],
)
def test_elapsed_time_is_compared_with_the_sum_of_the_plans(
    capsys: pytest.CaptureFixture[str], seconds: float, estimates: list[float], line: str
) -> None:
    print_elapsed(seconds, [plan_of(s) for s in estimates])
    assert capsys.readouterr().out == line
