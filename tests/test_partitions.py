"""Several partitions of the neurons in one call, and Gram matrices that are known already."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from _draw import representations
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import DISTANCE, assert_close
from repsim_kernels.ops.ablation import METRICS

KINDS = ("gaussian", "relu", "constant columns")


@st.composite
def partitioned(draw, dtypes=("float64", "float32")):
    """Draw a representation, partitions (T, p) with empty cells and neurons in none, and classes.

    The last partition has one cell of all neurons.
    """
    x = draw(representations(st.integers(4, 14), st.integers(2, 30), KINDS, dtypes))
    rng = np.random.default_rng(x.seed)
    cells = rng.integers(-1, 4, (draw(st.integers(1, 3)), x.p))
    cells[-1] = 0
    return x.numpy(), cells, np.arange(x.n) % 3


def compute_distances(x, cells, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        return rk.ablation_distances(x, cells, **options)


@given(partitioned(), st.booleans(), st.sampled_from(["torch", "reference"]))
def test_distances_of_partitions_match_separate_calls(case, known, backend):
    x, cells, _ = case
    n_cells = int(cells.max()) + 1
    grams = rk.cell_grams(x, cells) if known else None
    got, info = compute_distances(x, cells, grams=grams, info=True, backend=backend)
    for t, labels in enumerate(cells):
        want = compute_distances(x, labels, backend=backend)
        for name in METRICS:
            assert got[name].shape == info[name].route.shape == (len(cells), n_cells)
            part = got[name][t, : len(want[name])]
            assert_close(part, want[name], DISTANCE[str(x.dtype)], nan=True)


@given(partitioned(), st.booleans())
def test_a_partition_does_not_depend_on_the_others(case, known):
    """To the last bit, except for PWCCA's products, which are made in blocks."""
    x, cells, _ = case
    got, alone = (
        compute_distances(x, labels, grams=rk.cell_grams(x, labels) if known else None)
        for labels in (cells, cells[:1])
    )
    for name in set(METRICS) - {"pwcca"}:
        (want,) = alone[name]
        np.testing.assert_array_equal(got[name][0, : len(want)], want, err_msg=name)


@given(
    partitioned(("float64",)),
    st.booleans(),
    st.sampled_from([None, 1, "each"]),
    st.sampled_from([{}, {"folds": 2}, {"folds": 2, "probe": "logistic"}]),
)
def test_decodability_of_partitions_matches_the_reference(case, known, target, options):
    x, cells, y = case
    if target == "each":
        target = [2, 0, 1][: len(cells)]
    grams = rk.cell_grams(x, cells) if known else None
    options = options | {"target": target, "score": "margin"}
    got = rk.ablation_decodability(x, cells, y, grams=grams, **options)
    want = rk.ablation_decodability(x, cells, y, backend="reference", **options)
    n_cells = int(cells.max()) + 1
    for kind, shape in (("intact", cells.shape[:1]), ("refit", (len(cells), n_cells))):
        assert got[kind].shape == shape
    for kind, value in want.items():
        np.testing.assert_allclose(got[kind], value, rtol=1e-7, atol=1e-9, err_msg=kind)


@given(partitioned(), st.booleans())
def test_known_grams_serve_one_partition_or_a_membership(case, overlap):
    x, cells, y = case
    cells = cells[0] == np.arange(4)[:, None] if overlap else cells[0]
    if overlap:
        cells[0] |= cells[1]
    grams = rk.cell_grams(x, cells)
    got, want = (compute_distances(x, cells, grams=g) for g in (grams, None))
    for name in METRICS:
        assert_close(got[name], want[name], DISTANCE[str(x.dtype)], nan=True)
    got, want = (
        rk.ablation_decodability(x, cells, y, grams=g, score="margin") for g in (grams, None)
    )
    for kind, value in want.items():
        np.testing.assert_allclose(got[kind], value, rtol=1e-7, atol=1e-9, err_msg=kind)


def test_known_grams_are_not_computed_again():
    """Grams of other data give other distances."""
    rng = np.random.default_rng(0)
    x, cells = rng.standard_normal((8, 20)), np.arange(20) % 3
    grams = rk.cell_grams(rng.standard_normal((8, 20)), cells)
    got = rk.ablation_distances(x, cells, metrics=["cka"], grams=grams)["cka"]
    assert (got != rk.ablation_distances(x, cells, metrics=["cka"])["cka"]).all()
    margins = [
        rk.ablation_decodability(x, cells, np.arange(8) % 2, score="margin", grams=g)["refit"]
        for g in (grams, None)
    ]
    assert (margins[0] != margins[1]).all()


def test_a_batch_may_have_partitions():
    rng = np.random.default_rng(1)
    x, cells, y = rng.standard_normal((2, 9, 12)), rng.integers(0, 3, (2, 12)), np.arange(9) % 3
    distances = rk.ablation_distances(x, cells, batched=True)
    scores = rk.ablation_decodability(x, cells, y, target=[1, 2], batched=True)
    assert scores["intact"].shape == (2, 2)
    for b, each in enumerate(x):
        for name, values in rk.ablation_distances(each, cells).items():
            np.testing.assert_allclose(distances[name][b], values, rtol=1e-12)
        for kind, values in rk.ablation_decodability(each, cells, y, target=[1, 2]).items():
            np.testing.assert_allclose(scores[kind][b], values, rtol=1e-12)


X, CELLS = np.random.default_rng(2).standard_normal((6, 4)), np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
GRAMS = rk.cell_grams(X, CELLS)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"grams": GRAMS[0]}, rk.ShapeError, r"grams: shape \(2, 6, 6\); expected \(2, 2, 6, 6\)"),
        ({"grams": torch.from_numpy(GRAMS)}, rk.DeviceError, "grams: a torch array on cpu, but x"),
        ({"grams": GRAMS > 0}, rk.DtypeError, "grams: dtype bool; expected float64"),
        ({"grams": [[1], [2, 3]]}, rk.DtypeError, "grams: "),
    ],
)
def test_wrong_grams_are_refused(options, error, match):
    for call in (
        lambda: rk.ablation_distances(X, CELLS, **options),
        lambda: rk.ablation_decodability(X, CELLS, np.arange(6) % 2, **options),
    ):
        with pytest.raises(error, match=match):
            call()


def test_a_batch_takes_no_known_grams():
    with pytest.raises(rk.ShapeError, match=r"grams: .*; expected None with batched=True"):
        rk.ablation_distances(X[None], CELLS, grams=GRAMS, batched=True)


def test_each_partition_has_one_target():
    with pytest.raises(rk.LabelError, match="target: 3 targets for 2 partitions; expected one for"):
        rk.ablation_decodability(X, CELLS, np.arange(6) % 3, target=[0, 1, 2])


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_no_neuron_may_be_in_a_cell(shape):
    cells = np.full(shape, -1)
    for grams in (None, rk.cell_grams(X, cells)):
        for values in compute_distances(X, cells, grams=grams).values():
            assert values.shape == (*shape[:-1], 0)


def test_known_grams_may_have_any_strides_and_are_not_changed():
    grams = np.moveaxis(np.moveaxis(GRAMS, 1, -1).copy(), -1, 1)
    assert not grams.flags["C_CONTIGUOUS"]
    before = grams.copy()
    want = compute_distances(X, CELLS)
    for name, values in compute_distances(X, CELLS, grams=grams).items():
        np.testing.assert_allclose(values, want[name], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(grams, before)
