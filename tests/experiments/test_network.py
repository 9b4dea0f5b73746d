"""A study computes with the user's own network and restores it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from _networks import mix_modes, snapshot
from _toy import LAYERS, Toy, list_study_calls, toy_images, toy_study
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from repsim_kernels import LayerError
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.network import prepare


class Storing(Toy):
    """Stores intermediate tensors, and has a lock, which can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None
        self.lock = threading.Lock()

    def forward(self, images: Tensor) -> Tensor:
        self.seen = self.conv1(images)
        self.fresh = self.seen + 1
        x = self.act1(self.seen)
        logits: Tensor = self.fc((x + self.act2(self.conv2(x))).flatten(1))
        return logits


def with_weight_norm() -> nn.Module:
    model = Toy()
    with pytest.warns(FutureWarning, match="weight_norm"):
        weight_norm(model.conv2)
    return model


def with_spectral_norm() -> nn.Module:
    model = Toy()
    spectral_norm(model.conv2)
    model(toy_images()[0])
    return model


def with_parametrization() -> nn.Module:
    model = Toy()
    parametrizations.weight_norm(model.conv2)
    return model


def with_pruning() -> nn.Module:
    model = Toy()
    prune.l1_unstructured(model.conv2, "weight", 0.5)  # type: ignore[no-untyped-call]
    return model


def with_stored_tensors() -> nn.Module:
    model = Storing()
    model(toy_images()[0])
    return model


KINDS = [
    with_weight_norm,
    with_spectral_norm,
    with_parametrization,
    with_pruning,
    with_stored_tensors,
]


@pytest.mark.parametrize("make", KINDS)
def test_rows_of_networks_that_cannot_be_copied_equal_those_of_plain_ones(
    make: Callable[[], nn.Module],
) -> None:
    model = mix_modes(make())
    plain = Toy()
    model.conv1.training = model.conv2.training = (
        False  # in training mode spectral_norm changes its weights
    )
    with torch.no_grad():
        model(toy_images()[0][:1])
    weights = {name: getattr(model, name).weight.detach() for name in ("conv1", "conv2", "fc")}
    with torch.no_grad():
        for name, weight in weights.items():
            plain.get_submodule(name).weight.copy_(weight)
    before = snapshot(model)
    study = toy_study(model=model, metrics=["cka"])
    assert study.model is model
    assert snapshot(model) == before
    rows = study.run().table
    measure.describe(study)
    assert snapshot(model) == before
    pd.testing.assert_frame_equal(rows, toy_study(model=plain, metrics=["cka"]).run().table)


def test_a_network_is_restored_between_units() -> None:
    model = mix_modes(Toy())
    before, restored = snapshot(model), []
    study = toy_study(model=model, metrics=["cka"], block=1)
    study.run(
        progress=lambda _step: restored.append((snapshot(model) == before, torch.is_grad_enabled()))
    )
    assert restored == [(True, True)] * 6


class Failing(Toy):
    """Raises an error once one is set."""

    error: BaseException | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.error is not None and isinstance(images, Tensor):
            raise self.error
        return super().forward(images)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_a_network_is_restored_after_an_error(error: BaseException) -> None:
    model = Failing()
    mix_modes(model)
    study = toy_study(model=model, metrics=["cka"])
    model.error = error
    before = snapshot(model)
    for call in (study.run, lambda: measure.describe(study), lambda: toy_study(model=model)):
        with pytest.raises((StudyError, LayerError, type(error))):
            call()
        assert snapshot(model) == before


class Counting(Toy):
    """Counts its passes in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.images.add_(1)
        return super().forward(images)


def test_a_network_that_writes_to_a_buffer_is_refused_and_restored() -> None:
    model = mix_modes(Counting())
    before = snapshot(model)
    with pytest.raises(LayerError, match="a pass writes to its 'images'"):
        toy_study(model=model)
    assert snapshot(model) == before


class Merging(Toy):
    """Merges weights when eval() is called, as LoRA's layers do."""

    def train(self, mode: bool = True) -> Merging:
        self.conv1.weight.data.mul_(1 if mode == self.training else 2 if mode else 0.5)
        return super().train(mode)  # type: ignore[return-value]


def test_overridden_train_and_eval_are_not_called() -> None:
    model = Merging()
    before = snapshot(model)
    expected = toy_study(metrics=["cka"]).run().table
    assert toy_study(model=model, metrics=["cka"]).run().table.equals(expected)
    assert snapshot(model) == before


def test_a_network_on_another_device_is_moved_and_moved_back() -> None:
    """To PyTorch "cpu:0" is a device other than "cpu", so moving there copies."""
    here = torch.device("cpu:0")
    model = mix_modes(nn.Sequential(Toy(), nn.BatchNorm1d(3)))
    layers = [f"0.{name}" for name in LAYERS]
    expected = toy_study(model=model, layers=layers, metrics=["cka"]).run().table
    before, pointers = snapshot(model), {t.data_ptr() for t in model.state_dict().values()}
    with suppress(KeyboardInterrupt), prepare(model, here):
        assert pointers.isdisjoint(t.data_ptr() for t in model.state_dict().values())
        assert all(parameter.grad is None for parameter in model.parameters())
        raise KeyboardInterrupt
    assert snapshot(model) == before
    study = toy_study(model=model, layers=layers, metrics=["cka"])
    study.device = here
    configuration = study.configuration()
    assert study.run().table.equals(expected)
    assert snapshot(model) == before
    assert study.configuration() == configuration


def train_one_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(toy_images()[0]).sum().backward()
    optimizer.step()


def write_weight(model: nn.Module) -> None:
    model.fc.weight.data[0, 0] += 1e-6  # type: ignore[operator,union-attr]


def load_other_weights(model: nn.Module) -> None:
    model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})


def change_buffer(model: nn.Module) -> None:
    model.scale.add_(1)  # type: ignore[operator]


def round_to_half(model: nn.Module) -> None:
    model.half()


@pytest.mark.parametrize(
    "change", [train_one_step, write_weight, load_other_weights, change_buffer, round_to_half]
)
@pytest.mark.parametrize("use", ["run", "store", "measure", "about", "plan"])
def test_weights_that_have_changed_are_refused(
    change: Callable[[nn.Module], None], use: str, tmp_path: Path
) -> None:
    model = Toy()
    model.register_buffer("scale", torch.ones(3), persistent=False)
    study = toy_study(model=model, metrics=["cka"])
    old = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    calls = list_study_calls(study, tmp_path / "run")
    change(model)
    with pytest.raises(StudyError, match=r"^model: the weights or buffers of toy have changed sin"):
        calls[use]()
    assert not (tmp_path / "run").exists()
    model.float()
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            t.copy_(old[name])
    calls[use]()


def test_weights_that_change_during_a_run_are_refused() -> None:
    model = Toy()
    study = toy_study(model=model, metrics=["cka"], block=1)
    steps = []

    def progress(step: Any) -> None:
        steps.append(step)
        write_weight(model)

    with pytest.raises(StudyError, match=r"^model: the weights"):
        study.run(progress=progress)
    assert len(steps) == 1


def test_two_studies_share_a_network() -> None:
    model = mix_modes(Toy())
    before = snapshot(model)
    a, b = (toy_study(model=model, metrics=[name], block=1) for name in ("cka", "cca"))
    expected = [toy_study(metrics=[name]).run().table for name in ("cka", "cca")]
    pairs = list(zip(measure.rows(a, a.units), measure.rows(b, b.units), strict=True))
    for rows, table_expected in zip(zip(*pairs, strict=True), expected, strict=True):
        table = pd.concat(rows).sort_values(["class", "layer", "cell"], ignore_index=True)
        pd.testing.assert_frame_equal(table, table_expected)
    tables: dict[str, pd.DataFrame] = {}
    studies = {"a": a, "b": b}
    threads = [
        threading.Thread(target=lambda key=key: tables.update({key: studies[key].run().table}))
        for key in studies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, table_expected in zip(studies, expected, strict=True):
        pd.testing.assert_frame_equal(tables[key], table_expected)
    assert snapshot(model) == before


@pytest.mark.parametrize("make", [nn.LazyLinear, lambda n: nn.Linear(192, n, device="meta")])
def test_error_names_a_tensor_without_values(make: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(nn.Flatten(), make(3))
    with pytest.raises(StudyError, match=r"^model: '1\.weight' has no values yet; expected an in"):
        toy_study(model=model, layers=["1"])


def test_a_run_in_a_folder_has_identical_rows(tmp_path: Path) -> None:
    model = mix_modes(Storing())  # which has stored nothing yet
    before = snapshot(model)
    rows = toy_study(model=model, metrics=["cka"]).run(tmp_path).table
    assert rows.equals(toy_study(metrics=["cka"]).run().table)
    assert snapshot(model) == before
