"""A study's rows match brute force, and don't depend on how layers and images are grouped."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _toy import Toy, run_under_hook, stop_after, toy_images, toy_study
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repsim_kernels.experiments import Study
from repsim_kernels.experiments.columns import METRICS
from repsim_kernels.experiments.errors import StoreError, StudyError
from repsim_kernels.experiments.study import measure, memory
from repsim_kernels.experiments.study.memory import bytes_held, choose_batch_size, group_layers
from repsim_kernels.reference.ablation import ablation_distances
from repsim_kernels.reference.cells import selectivity_grid
from repsim_kernels.reference.probe import ablation_decodability

DEEP = ("conv1", "act1", "conv2", "act2")
# Bytes per image, float32: every layer of the toy has 256 outputs, and a cut at conv2 or act2 also
# keeps the skip connection. Grouping neurons into cells needs 190 bytes per neuron.
ACTIVATION, SKIP, SORTING = 1024, 1024, 190 * 256


def assert_same_rows(actual: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Bit-identical except probabilities: on some CPUs their rounding depends on batch size."""
    rounded = [name for name in expected if "probability" in name]
    pd.testing.assert_frame_equal(
        actual.drop(columns=rounded), expected.drop(columns=rounded), check_exact=True
    )
    pd.testing.assert_frame_equal(actual[rounded], expected[rounded], rtol=1e-3, atol=1e-5)


def deep_study(**changes: Any) -> Study:
    images, labels = toy_images(7)
    return toy_study(**{"layers": DEEP, "images": images, "labels": labels} | changes)


@pytest.fixture
def batches_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BATCH", 4)


def uneven() -> tuple[Tensor, Tensor]:
    """Five images of class 0, three of class 1, four of class 2."""
    images, labels = toy_images()
    keep = torch.ones(15, dtype=torch.bool)
    keep[[1, 7, 14]] = False
    return images[keep], labels[keep]


def run_with_neurons_off(
    layer: str, images: Tensor, off: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The toy's logits with some neurons of a layer off, and the layer's output, (n, p)."""

    def change(output: Tensor) -> Tensor:
        zeroed = torch.zeros(output.shape[1:], dtype=torch.bool)
        return output.masked_fill(zeroed if off is None else off.view_as(zeroed), 0)

    return run_under_hook(Toy().eval(), layer, images, change)


def assert_rows_match_reference(
    rows: pd.DataFrame, layer: str, label: int, classes: list[int], metric_images: int, edges: str
) -> None:
    """Compare a unit of a study of the uneven images, penalty 5, with hooks and the reference."""
    images, labels = uneven()
    index = torch.cat([torch.where(labels == c)[0][:metric_images] for c in classes])
    x = run_with_neurons_off(layer, images[index])[1].double().numpy()
    names, y = np.unique(labels[index].numpy(), return_inverse=True)
    target = int(np.flatnonzero(names == label)[0])
    cells = selectivity_grid(x, y, target, edges=edges)
    member = cells if cells.dtype == bool else cells == np.arange(16)[:, None]
    assert rows["size"].tolist() == member.sum(1).tolist()
    distances = ablation_distances(x, cells, n_cells=16, penalty=5.0)
    for name in METRICS:
        np.testing.assert_allclose(
            rows[name], distances[name].values, rtol=1e-4, atol=1e-9, err_msg=name
        )
    probe = ablation_decodability(x, cells, y, n_cells=16, target=target)
    for kind in ("refit", "frozen"):
        change = float(probe["intact"]) - np.asarray(probe[kind])
        np.testing.assert_allclose(rows[f"decodability_{kind}"], change, atol=1e-9)
    mine = images[labels == label]
    before = run_with_neurons_off(layer, mine)[0].double().softmax(1)[:, label]
    after = [
        run_with_neurons_off(layer, mine, torch.from_numpy(off))[0].double().softmax(1)
        for off in member
    ]
    lost = [float((before - p[:, label]).mean()) for p in after]
    np.testing.assert_allclose(rows["probability"], lost, atol=1e-6)


@pytest.mark.parametrize("layer", ["conv1", "act2"])
@pytest.mark.parametrize("label", [0, 1])
def test_rows_with_inclusive_edges_match_brute_force(layer: str, label: int) -> None:
    images, labels = uneven()
    study = toy_study(
        images=images, labels=labels, layers=[layer], targets=[label], edges="inclusive", penalty=5
    )
    rows = study.run().table
    assert_rows_match_reference(rows, layer, label, [0, 1, 2], 5, "inclusive")
    assert rows["size"].sum() != 256  # edge neurons are in two cells or none


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_rows_with_drawn_classes_match_brute_force(seed: int) -> None:
    images, labels = uneven()
    study = toy_study(
        images=images, labels=labels, others=1, seed=seed, metric_images=4, penalty=5, block=1
    )
    rows = study.run().table
    for unit in study.units:
        (label,) = study.targets_of(unit)
        target = ("ant/queen", "bee", "wasp")[label]
        mine = rows[(rows["layer"] == unit.layer) & (rows["class"] == target)]
        (other,) = study.draw_other_classes(label)
        assert_rows_match_reference(mine, unit.layer, label, [label, other], 4, "equal")


def test_other_classes_depend_on_seed_and_target() -> None:
    drawn = {
        seed: [toy_study(others=1, seed=seed).draw_other_classes(t) for t in range(3)]
        for seed in range(12)
    }
    for seed, others in drawn.items():
        assert others == [toy_study(others=1, seed=seed).draw_other_classes(t) for t in range(3)]
    for target in range(3):
        result = [others[target][0] for others in drawn.values()]
        assert set(result) == {0, 1, 2} - {target}
    assert toy_study(others=2).draw_other_classes(1) == [0, 2]


def test_stimuli_belong_to_the_target_and_its_drawn_classes() -> None:
    images, labels = uneven()
    arguments = {"images": images, "labels": labels}
    assert toy_study(**arguments).n_stimuli == toy_study(**arguments).n_metric_images == 12
    assert toy_study(**arguments, metric_images=4).n_stimuli == 11
    for seed in range(6):
        study = toy_study(**arguments, targets=[2], others=1, seed=seed, metric_images=4)
        assert study.n_metric_images == 11
        assert study.n_stimuli == 4 + {0: 4, 1: 3}[study.draw_other_classes(2)[0]]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (0, "0; expected a whole number of at least 1"),
        (-1, "-1; expected a whole number of at least 1"),
        (3, "3 of 3 classes; expected at most 2, the classes other than the target"),
    ],
)
def test_others_out_of_range_raise(others: int, message: str) -> None:
    with pytest.raises(StudyError, match=f"^others: {message}$"):
        toy_study(others=others)


def test_unknown_edges_raise() -> None:
    with pytest.raises(StudyError, match=r"^edges: 'open'; expected one of 'equal', 'inclusive'$"):
        toy_study(edges="open")


@pytest.mark.parametrize("memory", ["150KiB", "250KiB", "330KiB", "10MiB"])
@pytest.mark.usefixtures("batches_of_four")
def test_rows_do_not_depend_on_how_layers_are_grouped(memory: str) -> None:
    study = deep_study(memory=memory)
    counts = {"150KiB": 4, "250KiB": 3, "330KiB": 2, "10MiB": 1}
    assert len(group_layers(study, DEEP)) == counts[memory]
    assert choose_batch_size(study) == 4
    together = study.run().table
    alone = pd.concat([deep_study(layers=[layer]).run().table for layer in DEEP])
    alone = alone.sort_values(["class", "layer", "cell"], ignore_index=True)
    assert_same_rows(together, alone)


@cache
def full_run() -> tuple[Study, list[pd.DataFrame]]:
    study = deep_study(
        memory="250KiB", others=1, metric_images=3, metrics=["cka", "pwcca"], block=1
    )
    return study, list(measure.rows(study, study.units))


@settings(max_examples=15, deadline=None)
@given(st.sets(st.sampled_from(range(12)), min_size=1))
def test_rows_of_some_units_equal_those_of_a_full_run(chosen: set[int]) -> None:
    (study, expected), indices = full_run(), sorted(chosen)
    tables = list(measure.rows(study, [study.units[i] for i in indices]))
    assert len(tables) == len(indices)
    for i, rows in zip(indices, tables, strict=True):
        assert (rows["layer"] == study.units[i].layer).all()
        assert (rows["class"] == ("ant/queen", "bee", "wasp")[i % 3]).all()
        pd.testing.assert_frame_equal(rows, expected[i], check_exact=True)


class Wide(nn.Sequential):
    """A network whose linear layers round differently for few images than for many."""

    def __init__(self) -> None:
        def conv(channels: int) -> nn.Conv2d:
            return nn.Conv2d(channels, 4, 3, padding=1)

        head = (nn.Flatten(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
        super().__init__(conv(3), nn.ReLU(), conv(4), nn.ReLU(), conv(4), nn.ReLU(), *head)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                scale = max(1, parameter[0].numel()) ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def test_a_resumed_run_is_bit_identical_when_memory_is_tight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = torch.arange(3).repeat_interleave(3)
    images = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images += labels[:, None, None, None]
    study = Study(
        Wide(), ["1", "3", "5"], images, labels, metrics=["cka"], memory="234KiB", block=1
    )
    assert len(group_layers(study, study.layers)) > 1
    budgets: dict[tuple[str, int], set[int]] = {}
    measure_target = measure._measure_target

    def record(
        study: Study, layer: str, label: int, x: Any, free_bytes: int, result: Any
    ) -> pd.DataFrame:
        budgets.setdefault((layer, label), set()).add(free_bytes)
        return measure_target(study, layer, label, x, free_bytes, result)

    monkeypatch.setattr(measure, "_measure_target", record)
    whole = list(measure.rows(study, study.units))
    for start in range(len(whole)):
        for rows, expected in zip(
            measure.rows(study, study.units[start:]), whole[start:], strict=True
        ):
            pd.testing.assert_frame_equal(rows, expected, check_exact=True)
    # Batching, and hence rounding, depends on the free memory, which must not change on a resume.
    assert {len(seen) for seen in budgets.values()} == {1}


@pytest.mark.usefixtures("batches_of_four")
@pytest.mark.parametrize(
    ("memory", "metric_images", "units", "calls"),
    [
        ("10MiB", None, slice(None), 6),  # one group; 4 + 3 images of each of three classes
        ("250KiB", None, slice(None), 18),
        ("150KiB", None, slice(None), 24),
        ("150KiB", None, slice(3, 6), 6),  # act1 alone
        ("10MiB", 4, slice(0, 1), 4),  # the other classes' last three images are not needed
        ("10MiB", 4, slice(None), 6),
    ],
)
def test_images_pass_once_for_each_group(
    memory: str, metric_images: int | None, units: slice, calls: int
) -> None:
    study = deep_study(memory=memory, metric_images=metric_images, metrics=["cka"], block=1)
    selected, batches = study.units[units], []
    study.model.conv1.register_forward_pre_hook(lambda _m, inputs: batches.append(len(inputs[0])))
    assert len(list(measure.rows(study, selected))) == len(selected)
    assert len([n for n in batches if n > 2]) == calls  # cuts are verified on two images


def test_bytes_held_match_a_hand_count() -> None:
    images, labels = uneven()
    study = toy_study(images=images, labels=labels, layers=DEEP)
    assert bytes_held(study) == {
        "conv1": 12 * ACTIVATION + SORTING,
        "act1": 12 * ACTIVATION + SORTING,
        "conv2": 12 * (ACTIVATION + SKIP) + SORTING,
        "act2": 12 * (ACTIVATION + SKIP) + SORTING,
    }
    # Activations of all stimuli, a copy for the target's comparison, and the target's skips.
    some = toy_study(images=images, labels=labels, targets=[2], others=2, metric_images=2)
    assert bytes_held(some)["act1"] == 6 * ACTIVATION + 6 * ACTIVATION + SORTING
    assert bytes_held(some)["act2"] == 6 * ACTIVATION + 4 * SKIP + 6 * ACTIVATION + SORTING


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=12),
    st.floats(1.0, 4.0),
)
def test_groups_are_as_large_as_fits_and_in_order(sizes: list[int], slack: float) -> None:
    by_name = {f"layer{i}": size for i, size in enumerate(sizes)}
    study = toy_study()
    study.memory = int(slack * max(sizes) / 0.7) + 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "bytes_held", lambda _study: by_name)
        result = group_layers(study, list(by_name))
    assert [name for group in result for name in group] == list(by_name)
    limit = 0.7 * study.memory
    for group, following in zip(result, [*result[1:], None], strict=True):
        size = sum(by_name[name] for name in group)
        assert group
        assert size <= limit
        if following is not None:
            assert size + by_name[following[0]] > limit - 1  # no group ends early


@pytest.mark.parametrize("memory", [1, 2**15, 2**20, 10**6, "1GiB"])
def test_the_batch_size_fits_the_memory(memory: int | str) -> None:
    study = toy_study()
    study.memory = toy_study(memory="1GiB").memory if memory == "1GiB" else int(memory)
    limit, pass_bytes = 0.15 * study.memory, 3 * 1024  # conv1 or its ReLU, conv2, and their sum
    size = choose_batch_size(study)
    assert 1 <= size <= 64
    assert size == 1 or size * pass_bytes <= limit
    assert size == 64 or (size + 1) * pass_bytes > limit


@pytest.mark.parametrize(
    ("memory", "size"),
    [(10**6, 10**6), ("1GiB", 2**30), (" 1.5 MiB", 3 * 2**19), ("500 MB", 5 * 10**8)],
)
def test_memory_is_bytes_or_a_string(memory: int | str, size: int) -> None:
    assert toy_study(memory=memory).memory == size


@pytest.mark.parametrize("memory", ["8 apples", "GiB", "", "-1GiB", "0", 0, -5, "1e3"])
def test_invalid_memory_raises(memory: int | str) -> None:
    with pytest.raises(StudyError, match=r"^memory: .*expected") as caught:
        toy_study(memory=memory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", ["act1", "act2"])
@pytest.mark.parametrize("memory", [1, 1000, "80KiB"])
def test_too_little_memory_names_the_layer_and_the_memory_needed(
    layer: str, memory: int | str
) -> None:
    with pytest.raises(
        StudyError, match=f"^memory: .*; expected .* to hold layer '{layer}' of toy"
    ) as caught:
        toy_study(layers=[layer], memory=memory).run()
    message = str(caught.value)
    assert "\n" not in message
    enough = re.search(r"expected (\S+ ?[KMGT]iB) or more", message)
    assert enough is not None
    rows = toy_study(layers=[layer], memory=enough[1]).run().table
    pd.testing.assert_frame_equal(rows, toy_study(layers=[layer]).run().table)


def test_a_run_may_be_resumed_with_another_memory_and_note(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        deep_study(memory="250KiB", note="a", block=1).run(tmp_path, stop_after(4))
    resumed = deep_study(memory="1GiB", note="ignored", block=1).run(tmp_path).table
    assert resumed.attrs == {"notes": {"toy": "a"}}
    assert_same_rows(resumed, deep_study().run().table)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"edges": "inclusive"}, r'edges: "equal" before, "inclusive" now'),
        ({"others": 2}, "others: 1 before, 2 now"),
        ({"seed": 4}, "seed: 0 before, 4 now"),
        ({"penalty": 2.0}, "penalty: 0.0 before, 2.0 now"),
    ],
)
def test_a_run_is_not_resumed_with_other_options(
    tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    arguments: dict[str, Any] = {"others": 1, "metrics": ["cka"]}
    with pytest.raises(KeyboardInterrupt):
        toy_study(**arguments).run(tmp_path, stop_after(1))
    with pytest.raises(StoreError, match=rf"models\.toy\.{difference}"):
        toy_study(**arguments | changes).run(tmp_path)
