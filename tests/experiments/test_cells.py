"""Cells of every kind in a study: rows match brute force, and large numbers fit the memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _cli import invoke
from _toy import CLASSES, Attending, Toy, run_under_hook, stop_after, toy_images, toy_study
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch import Tensor

from repsim_kernels import LayerError
from repsim_kernels._cell_sets import SparseCells
from repsim_kernels._check_cells import check_cells
from repsim_kernels.experiments import Draws
from repsim_kernels.experiments.columns import METRICS
from repsim_kernels.experiments.errors import StoreError, StudyError
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.cells import LayerCells
from repsim_kernels.reference.ablation import ablation_distances
from repsim_kernels.reference.probe import ablation_decodability

SHAPE = (4, 8, 8)  # of both layers of the toy
CHANNELS = np.repeat(np.arange(4), 64)


def draw_membership(seed: int, count: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 256)) < 0.3


def run_toy(layer: str, images: Tensor, off: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    """The toy's logits with some neurons of a layer off, and the layer's output, (n, p)."""
    mask = torch.from_numpy(np.zeros(256, dtype=bool) if off is None else off).view(SHAPE)
    return run_under_hook(Toy().eval(), layer, images, lambda out: out.masked_fill(mask, 0))


def assert_rows_match_brute_force(table: pd.DataFrame, layer: str, member: np.ndarray) -> None:
    """Compare the rows of a layer with the reference and hooks, for each class."""
    images, labels = toy_images()
    order = labels.argsort(stable=True)
    x = run_toy(layer, images[order])[1].double().numpy()
    distances = ablation_distances(x, member, n_cells=len(member))
    for label, name in enumerate(CLASSES):
        rows = table[(table["layer"] == layer) & (table["class"] == name)]
        assert rows["cell"].tolist() == list(range(len(member)))
        assert rows["size"].tolist() == member.sum(1).tolist()
        for metric in METRICS:
            np.testing.assert_allclose(
                rows[metric], distances[metric].values, rtol=1e-4, atol=1e-9, err_msg=metric
            )
        y = labels[order].numpy()
        probe = ablation_decodability(x, member, y, n_cells=len(member), target=label)
        for kind in ("refit", "frozen"):
            change = float(probe["intact"]) - np.asarray(probe[kind])
            np.testing.assert_allclose(rows[f"decodability_{kind}"], change, atol=1e-9)
        mine = images[labels == label]
        before = run_toy(layer, mine)[0].double().softmax(1)[:, label]
        after = [run_toy(layer, mine, off)[0].double().softmax(1)[:, label] for off in member]
        lost = [float((before - p).mean()) for p in after]
        np.testing.assert_allclose(rows["probability"], lost, atol=1e-6)


def test_rows_of_the_users_cells_match_brute_force() -> None:
    cells = {"act1": draw_membership(0), "act2": np.arange(256) % 5}
    table = toy_study(cells=cells).run().table
    assert len(table) == 3 * (7 + 5)
    assert_rows_match_brute_force(table, "act1", cells["act1"])
    assert_rows_match_brute_force(table, "act2", cells["act2"] == np.arange(5)[:, None])


@pytest.mark.parametrize("others", [None, 1])
def test_channels_are_the_same_as_their_labels(others: int | None) -> None:
    named = toy_study(cells="channels", others=others).run().table
    own = toy_study(cells={"act1": CHANNELS, "act2": CHANNELS}, others=others).run().table
    pd.testing.assert_frame_equal(named, own, check_exact=True)
    assert len(named) == 3 * 2 * 4
    if others is None:  # every class has the same distances
        by_cell = named.groupby(["layer", "cell"])["cka"]
        assert (by_cell.nunique() == 1).all()
        assert_rows_match_brute_force(named, "act2", np.arange(4)[:, None] == CHANNELS)


HEADS = [f"encoder.layers.{i}.self_attn:heads" for i in range(2)]


def test_heads_are_slices_of_the_attention_modules_output() -> None:
    model = Attending()
    table = toy_study(model=model, layers=HEADS, cells="heads").run().table
    assert (table["size"] == 4 * 2).all()  # four tokens
    slices = np.tile(np.repeat(np.arange(4), 2), 4)
    own = toy_study(model=model, layers=HEADS, cells=dict.fromkeys(HEADS, slices)).run().table
    pd.testing.assert_frame_equal(table, own, check_exact=True)
    # Without head 2: the same as if its columns of the output projection were zero.
    images, labels = toy_images()
    with torch.no_grad():
        before = model.eval()(images[labels == 1]).double().log_softmax(1)[:, 1]
        model.encoder.layers[1].self_attn.out_proj.weight[:, 4:6] = 0  # type: ignore[union-attr, index, operator]
        after = model(images[labels == 1]).double().log_softmax(1)[:, 1]
    rows = table[(table["layer"] == HEADS[1]) & (table["class"] == "bee")]
    lost = float((before - after).mean())
    assert rows["log_probability"].iloc[2] == pytest.approx(lost, abs=1e-5)


def test_a_function_gets_the_activations_of_the_metrics_images() -> None:
    images, labels = toy_images()
    calls = []

    def halve(shape: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
        calls.append((shape, x, y))
        return (x[y == 2].mean(0) > x[y != 2].mean(0)).long()

    study = toy_study(cells=halve, metric_images=3)
    assert [shape for shape, _, _ in calls] == [SHAPE, SHAPE]
    index = torch.cat([(labels == c).nonzero()[:3, 0] for c in range(3)])
    for layer, (_, x, y) in zip(("act1", "act2"), calls, strict=True):
        assert y.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        torch.testing.assert_close(x, run_toy(layer, images[index])[1])
    table = study.run().table
    assert table.groupby(["class", "layer"])["size"].sum().tolist() == [256] * 6
    assert len(calls) == 2  # once for each layer, for all classes


def test_layers_may_have_different_numbers_of_cells_and_cells_without_neurons() -> None:
    cells = {"act1": np.full(256, 2), "act2": torch.arange(256) % 3 - 1}
    study = toy_study(cells=cells, metrics=["cka", "procrustes"])
    table = study.run().table
    sizes = table[table["class"] == "bee"].groupby("layer")["size"].apply(list)
    assert sizes.to_dict() == {"act1": [0, 0, 256], "act2": [85, 85]}
    empty = table[table["size"] == 0]
    lost = ["probability", "margin_frozen", "margin_refit", "energy", "cka"]
    assert (empty[lost] == 0).all(axis=None)
    assert [study.count_cells(layer) for layer in study.layers] == [3, 2]


@st.composite
def layer_cells(draw: Any) -> LayerCells:
    count, seed = draw(st.integers(1, 9)), draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["labels", "membership", "sparse"]))
    if kind != "labels":
        member = rng.random((count, 12)) < 0.4
        sparse = check_cells(csr_array(member), 12)[0]
        assert isinstance(sparse, SparseCells)
        return LayerCells(sparse if kind == "sparse" else torch.from_numpy(member), count)
    return LayerCells(torch.from_numpy(rng.integers(-1, count, 12)), count)


def list_members(cells: LayerCells) -> list[list[int]]:
    own = cells.assignment
    if isinstance(own, SparseCells):
        return [own.members(c).tolist() for c in range(cells.count)]
    member = own if cells.overlap else own == torch.arange(cells.count)[:, None]
    return [row.nonzero()[:, 0].tolist() for row in member]


@given(layer_cells(), st.integers(1, 12))
def test_runs_of_cells_have_the_neurons_of_the_whole(cells: LayerCells, size: int) -> None:
    runs, members = list(cells.split(size)), list_members(cells)
    assert [run.count for run in runs[:-1]] == [size] * (len(runs) - 1)
    assert [each for run in runs for each in list_members(run)] == members
    for part in (cells, *runs):
        own = list_members(part)
        assert list_members(LayerCells(part.to_sparse(), part.count)) == own
        assert part.sizes.tolist() == [len(each) for each in own]
        values = torch.arange(12) ** 2
        assert part.sum_values(values).tolist() == [sum(i**2 for i in each) for each in own]


@pytest.mark.parametrize("kind", ["labels", "membership", "sparse"])
def test_rows_are_the_same_if_only_some_grams_fit(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    own = np.arange(256) % 11 if kind == "labels" else draw_membership(1, 11)
    own = csr_array(own) if kind == "sparse" else own
    options = {"layers": ["act2"], "cells": {"act2": own}, "probes": ("ridge", "paper")}
    whole = toy_study(**options, fill="mean").run().table
    held: list[int] = []
    cell_grams = measure.rk.cell_grams

    def record(*arguments: Any) -> Tensor:
        grams: Tensor = cell_grams(*arguments)
        held.append(len(grams))
        return grams

    monkeypatch.setattr(measure.rk, "cell_grams", record)
    monkeypatch.setattr(measure, "_count_grams", lambda _n, _free: 4)
    monkeypatch.setattr(measure, "_MIN_CELLS", 3)
    monkeypatch.setattr(measure, "_SCORE_BYTES", 2**60)  # performance: three cells at once
    parts = toy_study(**options, fill="mean").run().table
    assert held == [4, 4, 3]
    rounded = [name for name in whole if "probability" in name]  # in float32
    pd.testing.assert_frame_equal(parts[rounded], whole[rounded], rtol=1e-3, atol=1e-5)
    exact = whole.drop(columns=rounded)
    pd.testing.assert_frame_equal(parts.drop(columns=rounded), exact, rtol=1e-6, atol=1e-9)


def test_sparse_cells_are_never_dense_together(monkeypatch: pytest.MonkeyPatch) -> None:
    own = draw_membership(2, 23)
    options = {"layers": ["act2"], "probes": ("ridge", "paper"), "draws": Draws(least=3)}
    dense = toy_study(**options, cells={"act2": own}).run().table
    rows: list[int] = []
    to_membership = SparseCells.to_membership

    def record(cells: SparseCells) -> np.ndarray[Any, Any]:
        rows.append(len(cells))
        return to_membership(cells)

    monkeypatch.setattr(SparseCells, "to_membership", record)
    study = toy_study(**options, cells={"act2": csr_array(own)})
    assert isinstance(study.fixed_cells["act2"].assignment, SparseCells)
    monkeypatch.setattr(study.forward, "logits", partial(study.forward.logits, batch=5))
    sparse = study.run().table
    assert rows
    assert max(rows) <= 5
    rounded = [name for name in dense if "probability" in name]  # in float32
    pd.testing.assert_frame_equal(sparse[rounded], dense[rounded], rtol=1e-3, atol=1e-5)
    exact = dense.drop(columns=rounded)
    pd.testing.assert_frame_equal(sparse.drop(columns=rounded), exact, rtol=1e-6, atol=1e-9)


def test_the_grams_that_fit_follow_from_the_memory() -> None:
    assert measure._count_grams(100, 2**30) == 2**30 // (2 * 8 * 100**2)


def test_a_run_is_not_resumed_with_other_cells(tmp_path: Path) -> None:
    cells = {"act1": CHANNELS, "act2": CHANNELS}
    with pytest.raises(KeyboardInterrupt):
        toy_study(cells=cells, metrics=["cka"]).run(tmp_path, stop_after(1))
    same = {layer: torch.from_numpy(own) for layer, own in reversed(cells.items())}
    assert len(toy_study(cells=same, metrics=["cka"]).run(tmp_path).table) == 24
    other = cells | {"act2": CHANNELS[::-1].copy()}
    with pytest.raises(StoreError, match=r"another configuration \(models\.toy\.cells\.act2: "):
        toy_study(cells=other, metrics=["cka"]).run(tmp_path)
    with pytest.raises(StoreError, match=r"models\.toy\.cells: .* now"):
        toy_study(cells="channels", metrics=["cka"]).run(tmp_path)


def test_the_grid_does_not_matter_for_other_cells() -> None:
    one, other = (
        toy_study(cells="channels", grid=grid, edges=edges).configuration()
        for grid, edges in (((4, 4), "equal"), ((100, 100), "inclusive"))
    )
    assert one == other


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("head", "cells: 'head'; expected one of 'selectivity', 'random', 'channels', 'heads'"),
        (CHANNELS, r"cells: .*; expected one of .*, or a dict of cells by layer"),
        ({"act1": CHANNELS}, "cells: none for layer 'act2'; expected cells for each of"),
        (dict.fromkeys(("act1", "act2", "fc"), CHANNELS), "cells: 'fc' is not among the layers"),
        ({"act1": [0, 1], "act2": CHANNELS}, r"layer act1: cells: shape \(2,\)"),
        ({"act1": np.full(256, -1), "act2": CHANNELS}, "layer act1: cells: none; expected"),
        (lambda *_: np.full(256, -2), "layer act1: cells: label -2 is out of range"),
    ],
)
def test_wrong_cells_are_named(cells: Any, message: str) -> None:
    with pytest.raises(StudyError, match=f"^{message}") as caught:
        toy_study(cells=cells)
    assert "\n" not in str(caught.value)


def test_heads_of_a_layer_without_heads_are_named() -> None:
    message = "cells: 'heads' for layer 'act1'; expected layers that are the heads of an attention"
    with pytest.raises(StudyError, match=f"^{message} module, 'module:heads'$"):
        toy_study(cells="heads")


def test_a_layer_that_returns_a_tuple_names_what_can_be_ablated() -> None:
    name = "encoder.layers.0.self_attn"
    message = f"layer: '{name}' returns a tuple of 2; .* its heads, '{name}:heads'$"
    with pytest.raises(LayerError, match=message):
        toy_study(model=Attending(), layers=[name])
    assert toy_study(model=Attending(), layers=[f"{name}:heads", f"{name}:input"]).sizes.keys()


def test_the_summary_of_a_study_names_its_cells() -> None:
    cells = dict.fromkeys(("act1", "act2"), CHANNELS)
    assert ", cells='channels', fill='mean', metrics=[" in repr(
        toy_study(cells="channels", fill="mean")
    )
    assert ", cells=a dict, metrics=[" in repr(toy_study(cells=cells))


@pytest.mark.usefixtures("blank_reports")
def test_the_command_takes_kinds_of_cells_and_the_fill(folder: Path) -> None:
    options = ["--model", "_toy:Toy", "--size", "8", "--images", folder, "--metrics", "cka"]
    layers = ["--layers", "act1,act2", "--cells", "channels", "--fill", "mean"]
    code, out, err = invoke("sweep", *options, *layers, "--out", "run")
    assert (code, err) == (0, "")
    table = pd.read_parquet("run/results.parquet")
    assert len(table) == 3 * 2 * 4
    assert table.attrs == {"ablations": {"_toy:Toy": {"cells": "channels", "fill": "mean"}}}
    code, out, _ = invoke("sweep", *options, *layers, "--out", "plan", "--plan")
    assert "3 target classes x 4 cells x 4 images" in " ".join(out.split())
    code, _, err = invoke("sweep", *options, "--layers", "act1", "--cells", "heads")
    assert (code, err.startswith("error: cells: 'heads' for layer 'act1'")) == (2, True)
    code, _, err = invoke("sweep", "--model", "alexnet_small", "--cells", "heads")
    assert code == 2
    assert err == (
        "error: cells: heads, which no default layer of alexnet_small has; expected other cells, "
        "or --layers such as block.attn:heads\n"
    )
    options[1] = "_toy:Attending"
    layers = ["--layers", ",".join(HEADS), "--cells", "heads"]
    assert invoke("sweep", *options, *layers, "--out", "heads")[0] == 0
    assert set(pd.read_parquet("heads/results.parquet")["layer"]) == set(HEADS)
