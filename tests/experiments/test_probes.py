"""Probes of a study: their columns match brute force, and their draws are reproducible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _cli import invoke
from _toy import CLASSES, LAYERS, Toy, stop_after, toy_images, toy_study, write_image_folder
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss

from repsim_kernels.experiments.columns import (
    BASELINE,
    HALVES,
    METRICS,
    PERFORMANCE,
    PROBES,
    half_column,
)
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.inputs.presets import PRESETS
from repsim_kernels.experiments.study.checks import Draws
from repsim_kernels.experiments.study.estimate import plan
from repsim_kernels.experiments.study.memory import bytes_held
from repsim_kernels.experiments.study.probes import ERROR_COLUMN, list_columns
from repsim_kernels.reference.cells import selectivity_grid

PAPER = ["decodability_paper", ERROR_COLUMN]


def activations(layer: str) -> np.ndarray:
    """A layer's activations in the toy for all images, sorted by class."""
    images, labels = toy_images()
    outputs: list[torch.Tensor] = []
    model = Toy().eval()
    model.get_submodule(layer).register_forward_hook(
        lambda _m, _i, out: outputs.append(out.clone())
    )
    with torch.no_grad():
        model(images[labels.argsort(stable=True)])
    return outputs[0].flatten(1).double().numpy()


@pytest.mark.parametrize("probes", [["ridge"], ["paper"], ["paper", "ridge"]])
def test_columns(probes: list[str]) -> None:
    table = toy_study(probes=probes, layers=["act1"], draws=Draws(least=3)).run().table
    expected = [name for probe in probes for name in PROBES[probe]]
    expected += [ERROR_COLUMN] if "paper" in probes else []
    keys = ["model", "class", "layer", "cell", "size", "nan_images"]
    keys += [*METRICS, BASELINE, *PERFORMANCE]
    # Halves have their own columns, except for the paper's probe, which has an error instead.
    halved = [*PERFORMANCE, *(PROBES["ridge"] if "ridge" in probes else ())]
    halves = {half_column(name, which) for name in halved for which in HALVES}
    assert list(table.columns[: len(keys) + len(expected)]) == [*keys, *expected]
    assert set(table.columns) == {*keys, *expected, *halves}
    assert [name for name in list_columns(probes) if name not in halves] == expected
    assert table[expected].notna().all(axis=None)


def test_margins_match_scikit_learn() -> None:
    label = 1
    rows = toy_study(layers=["act2"], targets=[label]).run().table
    x, y = activations("act2"), np.repeat(np.arange(3), 5)
    cells = selectivity_grid(x, y, label)
    sign = np.where(y == label, 1, -1)

    def margin(fitted: np.ndarray, read: np.ndarray) -> float:
        """Twice the held-out output's signed distance from 1/2, averaged over both classes."""
        alpha = ((fitted - fitted.mean(0)) ** 2).sum() / len(y)
        out = np.empty(len(y))
        for i in range(len(y)):
            rest = np.arange(len(y)) != i
            model = Ridge(alpha=alpha).fit(fitted[rest], (y == label)[rest])
            out[i] = model.predict(read[i : i + 1])[0]
        right = (2 * out - 1) * sign
        return float((right[sign > 0].mean() + right[sign < 0].mean()) / 2)

    for c in (0, 7, 15):
        ablated = np.where(cells == c, 0, x)
        for name, fitted in (("margin_refit", ablated), ("margin_frozen", x)):
            lost = margin(x, x) - margin(fitted, ablated)
            assert rows[name][c] == pytest.approx(lost, abs=1e-6)


def test_the_papers_probe_matches_a_loop_over_scikit_learn(monkeypatch: Any) -> None:
    """With as many neurons per draw as survive, every draw is the same fit."""
    monkeypatch.setattr("repsim_kernels.experiments.study.probes.DRAW_SIZE", 128)
    label, x, y = 0, activations("act2")[:, :128], np.repeat(np.arange(3), 5) == 0
    images, labels = toy_images()

    class Half(Toy):
        """128 neurons after act2, as many as a draw."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.act1(self.conv1(images))
            return self.fc(self.act2(self.conv2(x)[:, :2]).flatten(1).repeat(1, 2))

    study = toy_study(
        model=Half(), layers=["act2"], targets=[label], probes=["paper"], draws=Draws(least=2)
    )
    rows = study.run().table
    cells = selectivity_grid(x, np.repeat(np.arange(3), 5), label)

    def score(values: np.ndarray) -> float:
        model = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(values, y)
        return float(np.exp(-log_loss(y, model.predict(values))))

    assert len(images) == len(labels) == len(x)
    for c in range(16):
        lost = score(x) - score(x[:, cells != c])
        assert rows["decodability_paper"][c] == pytest.approx(lost, abs=1e-9)
        assert rows[ERROR_COLUMN][c] == 0


def test_draws_are_reproducible_and_depend_on_seed_layer_and_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run has the same draws as an uninterrupted one."""
    monkeypatch.setattr("repsim_kernels.experiments.study.probes.DRAW_SIZE", 3)
    options: dict[str, Any] = {"probes": ["paper"], "draws": Draws(least=4)}
    whole = toy_study(**options).run().table
    with pytest.raises(KeyboardInterrupt):
        toy_study(**options).run(tmp_path / "run", stop_after(2))
    again = toy_study(**options).run(tmp_path / "run").table
    pd.testing.assert_frame_equal(whole, again)
    other = toy_study(**options, seed=1).run().table
    assert (other[ERROR_COLUMN] != whole[ERROR_COLUMN]).any()
    groups = whole.groupby(["layer", "class"])[ERROR_COLUMN].apply(tuple)
    assert len(groups) == len(LAYERS) * len(CLASSES)
    assert groups.nunique() == len(groups)


def test_pairing_lowers_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repsim_kernels.experiments.study.probes.DRAW_SIZE", 3)
    errors = [
        toy_study(probes=["paper"], draws=Draws(least=20, paired=paired))
        .run()
        .table[ERROR_COLUMN]
        .mean()
        for paired in (True, False)
    ]
    assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize(
    ("draws", "neurons", "count"),
    [
        (Draws(), 10**6, 200),
        (Draws(200, 100), 12_544, 200),
        (Draws(200, 100), 200_799, 2007),
        (Draws(1, 50), 100_352, 2007),
        (Draws(1, 50), 30, 1),
    ],
)
def test_number_of_draws(draws: Draws, neurons: int, count: int) -> None:
    assert draws.count_for(neurons) == count


def test_presets_have_the_papers_numbers_of_draws() -> None:
    paper = PRESETS["hayne2024"]
    assert (paper.options["probes"], paper.paired) == (("paper",), False)
    drawn = [(n.name, n.draws, n.neurons_per_draw) for n in paper.networks]
    assert drawn == [
        ("alexnet", 200, None),
        ("mobilenet_v2_035", 200, 100),
        ("resnet50", 1, 50),
    ]


def test_a_dead_layer_has_no_decodability() -> None:
    model = Toy()
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.conv2.bias.fill_(-1)
    study = toy_study(model=model, layers=["act2"], targets=[1], probes=["ridge", "paper"])
    with pytest.warns(UserWarning, match="toy, layer act2 is the same for every stimulus"):
        table = study.run().table
    assert table[[*PROBES["ridge"], *PAPER]].isna().all(axis=None)


def test_an_estimate_counts_and_times_the_fits() -> None:
    study = toy_study(probes=["paper"], draws=Draws(least=30), targets=[0, 2])
    estimate = plan(study)
    assert [line.fits for line in estimate.layers] == [2 * 17 * 30] * 2
    assert all(line.seconds > 0 for line in estimate.layers)
    assert [line.fits for line in plan(toy_study()).layers] == [0, 0]
    one, two = (bytes_held(toy_study(probes=[probe]))["act1"] for probe in ("ridge", "paper"))
    assert two - one == 15 * 256 * 4  # the copy that is stored neuron by neuron


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": ["svm"]}, "probes: 'svm'; expected one of 'ridge', 'paper'"),
        ({"probes": []}, r"probes: \[\] is empty or repeats"),
        ({"draws": Draws(least=0)}, "draws.least: 0; expected a whole number of at least 1"),
        ({"draws": Draws(every=0)}, "draws.every: 0; expected a whole number of at least 1"),
    ],
)
def test_invalid_probes_and_draws_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        toy_study(**changes)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a sweep of the toy in an empty folder, without --probes."""
    monkeypatch.chdir(tmp_path)
    images = write_image_folder(tmp_path / "images")
    return ["--model", "_toy:Toy", "--layers", "act1", "--size", "8", "--images", str(images)]


@pytest.mark.usefixtures("undrawn")
def test_output_and_report_have_the_requested_probes(options: list[str]) -> None:
    code, out, err = invoke("sweep", *options, "--out", "run", "--probes", "paper")
    assert code == 0, err
    assert "paper" in out
    assert "refit" not in out
    report = Path("run/report.html").read_text()
    assert "logistic regressions on neurons drawn at random" in report
    assert "refitted" not in report


@pytest.mark.usefixtures("blank_reports")
def test_columns_of_both_probes_are_not_truncated(options: list[str]) -> None:
    code, out, err = invoke("sweep", *options, "--out", "run", "--probes", "ridge,paper")
    assert code == 0, err
    assert "…" not in out


@pytest.mark.usefixtures("blank_reports")
def test_the_table_for_one_probe_fits_80_characters(options: list[str]) -> None:
    lines = invoke("sweep", *options, "--out", "run", "--probes", "ridge")[1].splitlines()
    (head,) = (line for line in lines if line.split()[:2] == ["metric", "deficit"])
    assert head.split()[-4:] == ["refit", "frozen", "refit", "frozen"]
    assert max(len(line) for line in lines if "CKA" in line or "deficit" in line) <= 80
