"""Linear decodability, against the reference's explicit fits and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import TORCH_LAYOUTS, classes, labels, memberships, representations
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

import repsim_kernels as rk


@given(st.data(), st.booleans(), st.sampled_from([0.01, 1.0, 10.0]))
def test_decodability_matches_the_reference(data, one_class, ridge):
    x = data.draw(
        representations(n=st.integers(4, 12), kinds=("gaussian", "relu"), layouts=TORCH_LAYOUTS)
    )
    cells = data.draw(st.one_of(labels(x.p).map(lambda c: c[0]), memberships(x.p)))
    y = data.draw(classes(x.n))
    options = {"target": int(y[0]) if one_class else None, "ridge": ridge}
    got = rk.ablation_decodability(x.torch(), cells, y, **options)
    want = rk.ablation_decodability(x.values(), cells, y, backend="reference", **options)
    assert got["intact"] == pytest.approx(want["intact"], abs=1e-12)
    for name in ("refit", "frozen"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-12, err_msg=name)


def predict_with_scikit_learn(x, y, cell, ridge):
    """Return held-out outputs of scikit-learn's Ridge, refitted and frozen, (n, k) each."""
    onehot = np.eye(y.max() + 1)[y]
    out = []
    ablated = np.where(cell, 0, x)
    for x_fit, x_test in ((ablated, ablated), (x, ablated)):
        centred = x_fit - x_fit.mean(0)
        alpha = ridge * (centred**2).sum() / len(x)
        rows = []
        for i in range(len(x)):
            train = np.arange(len(x)) != i
            model = Ridge(alpha=alpha).fit(x_fit[train], onehot[train])
            rows.append(model.predict(x_test[i : i + 1])[0])
        out.append(np.array(rows))
    return out


@pytest.mark.parametrize("p", [5, 60])
@pytest.mark.parametrize("mean", [0, 50])
def test_decodability_matches_scikit_learn(p, mean):
    rng = np.random.default_rng(p)
    y = np.arange(30) % 3
    x = np.maximum(rng.standard_normal((30, p)) + rng.standard_normal((3, p))[y], 0) + mean
    cells = rng.integers(0, 4, p)
    got = rk.ablation_decodability(x, cells, y, ridge=0.5)
    binary = rk.ablation_decodability(x, cells, y, target=1, ridge=0.5)
    for c in range(4):
        for name, outputs in zip(
            ("refit", "frozen"), predict_with_scikit_learn(x, y, cells == c, 0.5), strict=True
        ):
            assert got[name][c] == (outputs.argmax(1) == y).mean()
            predicted = outputs[:, 1] > 0.5
            want = (predicted[y == 1].mean() + (~predicted[y != 1]).mean()) / 2
            assert binary[name][c] == pytest.approx(want, abs=1e-12)


def test_information_in_one_cell_is_lost_with_it():
    """Only cell 2 separates class 1 from the rest."""
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = rng.standard_normal((40, 30)) * 0.1
    x[:, 20:] += 3 * y[:, None]
    for kind in (x, torch.from_numpy(x).float()):
        got = rk.ablation_decodability(kind, np.arange(30) // 10, y, target=1)
        assert got["intact"] == 1
        assert isinstance(got["intact"], float)
        for name in ("refit", "frozen"):
            assert (got[name][:2] == 1).all()
            assert got[name][2] < 0.8


def test_empty_cells_change_nothing_and_complete_ones_give_nan():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 9, 6)), np.arange(9) % 3
    cells = np.zeros((3, 6), bool)
    cells[1] = True
    got = rk.ablation_decodability(x, cells, y, batched=True)
    assert got["refit"].shape == (2, 3)
    assert got["intact"].shape == (2,)
    np.testing.assert_array_equal(got["refit"][:, 0], got["intact"])
    np.testing.assert_array_equal(got["frozen"][:, 0], got["intact"])
    assert np.isnan(got["refit"][:, 1]).all()
    assert np.isfinite(got["frozen"]).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("folds", [None, 4])
@pytest.mark.parametrize("score", [None, "margin", ["r2", "accuracy"]])
def test_several_targets_match_separate_calls(score, folds, backend):
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((20, 12)), np.arange(20) % 4 * 3 - 5
    cells, targets = rng.integers(0, 3, 12), (4, -5, 1)
    options = {"folds": folds, "score": score, "backend": backend}
    got = rk.ablation_decodability(x, cells, y, target=np.array(targets), **options)
    for i, target in enumerate(targets):
        separate = rk.ablation_decodability(x, cells, y, target=target, **options)
        assert got.keys() == separate.keys()
        for name in score if isinstance(score, list) else [None]:
            stacked, single = (a if name is None else a[name] for a in (got, separate))
            assert isinstance(single["intact"], float)
            for kind in ("refit", "frozen", "intact"):
                np.testing.assert_allclose(stacked[kind][i], single[kind], rtol=1e-12, atol=1e-13)


def test_the_default_score_depends_on_the_target():
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((18, 5)), np.repeat([0, 1, 2], [3, 5, 10])
    names = ["accuracy", "balanced_accuracy"]
    for target in (None, 2, [2]):
        every = rk.ablation_decodability(x, [0, 0, 1, 1, 1], y, target=target, score=names)
        got = rk.ablation_decodability(x, [0, 0, 1, 1, 1], y, target=target)
        assert every[names[0]]["intact"] != every[names[1]]["intact"]
        for kind, value in every[names[target is not None]].items():
            np.testing.assert_array_equal(got[kind], value)


def compute_gcv(x, onehot, ridge):
    """Return n ‖(I - H)Y‖² / tr(I - H)² from the hat matrix."""
    n, centred = len(x), x - x.mean(0)
    kappa = ridge * (centred**2).sum() / n
    inverse = np.linalg.inv(centred.T @ centred + kappa * np.eye(x.shape[1]))
    residual = np.eye(n) - centred @ inverse @ centred.T - 1 / n
    return n * ((residual @ onehot) ** 2).sum() / np.trace(residual) ** 2


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("p", [6, 40])
@pytest.mark.parametrize("target", [None, 0, (2, 1)])
def test_gcv_minimises_the_generalised_error(target, p, backend):
    rng = np.random.default_rng(p)
    y, cells = np.arange(24) % 3, rng.integers(0, 3, p)
    x = rng.standard_normal((24, p)) + 0.7 * rng.standard_normal((3, p))[y]
    onehot = np.eye(3)[y][:, [0, 1, 2] if target is None else np.atleast_1d(target)]
    grid = np.logspace(-6, 6, 2401)
    values = [compute_gcv(x, onehot, ridge) for ridge in grid]
    options = {"target": target, "score": ("margin", "r2"), "backend": backend}
    got = rk.ablation_decodability(x, cells, y, ridge="gcv", **options)
    best = int(np.argmin(values))
    assert 0 < best < 2400
    assert grid[best - 1] < got["ridge"] < grid[best + 1]
    assert compute_gcv(x, onehot, got["ridge"]) <= min(values) * (1 + 1e-12)
    again = rk.ablation_decodability(x, cells, y, ridge=got.pop("ridge"), **options)
    for name, kinds in again.items():
        for kind, value in kinds.items():
            np.testing.assert_allclose(got[name][kind], value, rtol=1e-12)


def test_gcv_stays_within_the_allowed_ridges():
    """Uninformative neurons, and one that separates the classes among more neurons than stimuli."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 10)
    noise = rng.standard_normal((20, 5))
    uninformative = noise - np.stack([noise[y == k].mean(0) for k in (0, 1)])[y]
    clear = np.column_stack([y * 1e3, rng.standard_normal((20, 30)) * 1e-4])
    batch = np.stack([clear, clear * 7])
    got = rk.ablation_decodability(batch, [0] * 31, y, ridge="gcv", batched=True)
    np.testing.assert_allclose(got["ridge"], 1e-6, rtol=1e-6)
    got = rk.ablation_decodability(uninformative, [0] * 5, y, ridge="gcv")
    assert got["ridge"] == pytest.approx(1e6, rel=1e-6)
    assert isinstance(got["ridge"], float)


X, Y = np.random.default_rng(0).standard_normal((6, 4)), [0, 0, 1, 1, 2, 2]
ERRORS = [
    ({"ridge": "cv"}, rk.OptionError, r"ridge: 'cv'; expected a finite number .*, or 'gcv'"),
    ({"ridge": -1}, rk.OptionError, "ridge: -1; expected a finite number of at least 1e-06"),
    ({"probe": "svm"}, rk.OptionError, "probe: 'svm'; expected one of 'ridge', 'logistic'"),
    ({"probe": "logistic"}, rk.OptionError, "folds: None with probe='logistic'; .* closed form"),
    (
        {"probe": "logistic", "folds": 2, "ridge": "gcv"},
        rk.OptionError,
        "ridge: 'gcv' with probe='logistic'; expected a number",
    ),
    (
        {"probe": "logistic", "folds": 2, "score": ["margin", "r2"]},
        rk.OptionError,
        "score: 'r2' with probe='logistic'; expected other scores",
    ),
    ({"score": "f1"}, rk.OptionError, "score: 'f1'; expected one of 'accuracy', "),
    ({"score": ["r2", 1]}, rk.OptionError, "score: 1; expected one of 'accuracy', "),
    ({"score": []}, rk.OptionError, r"score: \[\]; expected a name or a sequence of different"),
    ({"score": ["r2", "r2"]}, rk.OptionError, r"score: \['r2', 'r2'\]; expected a name or"),
    ({"score": 2}, rk.OptionError, "score: 2; expected a name or a sequence"),
    ({"folds": 1}, rk.OptionError, "folds: 1; expected 2 or more, and at most 2, the size"),
    ({"folds": 0}, rk.OptionError, "folds: 0; expected 2 or more"),
    ({"folds": 7}, rk.OptionError, "folds: 7; expected 2 or more, and at most 2, the size of"),
    ({"folds": True}, rk.OptionError, "folds: True; expected a whole number of at least 2, or int"),
    ({"folds": 2.0}, rk.OptionError, "folds: 2.0; expected a whole number"),
    ({"folds": [0, 1, 2]}, rk.OptionError, r"folds: \[0, 1, 2\]; .* integers \(6,\), a fold for"),
    ({"folds": np.eye(6, dtype=int)}, rk.OptionError, r"folds: array\(.*; .* integers \(6,\)"),
    ({"folds": [True, False] * 3}, rk.OptionError, r"folds: \[True, .*; expected a whole number"),
    ({"folds": torch.ones(6)}, rk.OptionError, r"folds: tensor\(.*; expected a whole number"),
    ({"folds": "five"}, rk.OptionError, "folds: 'five'; expected a whole number"),
    ({"folds": [3] * 6}, rk.OptionError, "folds: only fold 3; expected at least two folds"),
    ({"target": [0, 5]}, rk.LabelError, "target: no stimulus has label 5; expected one of 0, 1, 2"),
    ({"target": []}, rk.LabelError, r"target: \[\]; expected a label or a sequence of different"),
    ({"target": (1, 1)}, rk.LabelError, r"target: \(1, 1\); expected a label or a sequence"),
    ({"target": [0, True]}, rk.LabelError, "target: True; expected an integer label"),
    ({"target": "01"}, rk.LabelError, "target: '01'; expected an integer label"),
    ({"target": np.array(1.5)}, rk.LabelError, "target: array.1.5.; expected an integer label"),
]


@pytest.mark.parametrize(("options", "error", "match"), ERRORS, ids=[str(e[0]) for e in ERRORS])
def test_bad_options_are_refused(options, error, match):
    with pytest.raises(error, match=match) as caught:
        rk.ablation_decodability(X, [0, 0, 1, 1], Y, **options)
    assert len(str(caught.value).splitlines()) == 1
