"""Linear decodability by folds, scores and logistic regression, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import TORCH_LAYOUTS, classes, labels, memberships, representations
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score, r2_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict

import repsim_kernels as rk

SCORES = ("accuracy", "balanced_accuracy", "margin", "r2")
UNEVEN = np.array([0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 1, 0, 0, 0, 2, 3, 1, 1, 0, 2, 2, 3, 0, 0])


def make_stimuli(p, mean=0, seed=0):
    """Draw x (24, p) with three partly separable classes, a cell for each neuron, and classes."""
    rng = np.random.default_rng(seed + p)
    y = rng.permutation(np.arange(24) % 3)
    x = np.maximum(rng.standard_normal((24, p)) + rng.standard_normal((3, p))[y], 0) + mean
    return x, rng.integers(-1, 3, p), y


def stratify(y, k):
    seen: dict[int, int] = {}
    folds = []
    for label in y.tolist():
        folds.append(seen.get(label, 0) % k)
        seen[label] = seen.get(label, 0) + 1
    return np.array(folds)


def compute_kappa(x, ridge):
    return ridge * np.var(x, axis=0).sum()


def compute_decisions(x_fit, t, train, x_test, ridge):
    """Return decision values for x_test from scikit-learn's fit to (x_fit, t)[train]."""
    if t[train].min() == t[train].max():
        return np.inf if t[train][0] else -np.inf
    model = LogisticRegression(
        C=1 / compute_kappa(x_fit, ridge), solver="newton-cholesky", tol=1e-12, max_iter=1000
    )
    return model.fit(x_fit[train], t[train]).decision_function(x_test)


def compute_outputs(probe, x_fit, x_test, truth, ridge, folds):
    """Return held-out outputs (n, k) of scikit-learn's model, fold by fold."""
    onehot = np.eye(truth.max() + 1)[truth]
    out = np.empty_like(onehot)
    for k in np.unique(folds):
        train = folds != k
        if probe == "ridge":
            model = Ridge(alpha=compute_kappa(x_fit, ridge)).fit(x_fit[train], onehot[train])
            out[~train] = model.predict(x_test[~train])
        else:
            for j, t in enumerate(onehot.T):
                out[~train, j] = compute_decisions(x_fit, t, train, x_test[~train], ridge)
    return out


def score_outputs(name, out, truth, binary):
    """Compute a score from its definition; the margin of a binary task is balanced."""
    if name == "accuracy":
        return accuracy_score(truth, out.argmax(1))
    if name == "balanced_accuracy":
        return balanced_accuracy_score(truth, out.argmax(1))
    if name == "r2":
        return r2_score(np.eye(out.shape[1])[truth], out, multioutput="variance_weighted")
    margins = np.array([o[k] - np.delete(o, k).max() for o, k in zip(out, truth, strict=True)])
    if binary:
        return (margins[truth == 0].mean() + margins[truth == 1].mean()) / 2
    return margins.mean()


@pytest.mark.parametrize("mean", [0, 50])
@pytest.mark.parametrize("p", [6, 60])
@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("probe", ["ridge", "logistic"])
@pytest.mark.parametrize("folds", [3, UNEVEN], ids=["stratified", "custom"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_scores_match_scikit_learn(backend, folds, probe, target, p, mean):
    x, cells, y = make_stimuli(p, mean)
    truth = y if target is None else (y == target).astype(int)
    names = SCORES if probe == "ridge" else SCORES[:3]
    options = {"target": target, "ridge": 0.3, "probe": probe, "score": names, "backend": backend}
    got = rk.ablation_decodability(x, cells, y, folds=folds, **options)
    fold = stratify(y, 3) if isinstance(folds, int) else folds
    for name in names:
        assert set(got[name]) == {"refit", "frozen", "intact"}
    for c in range(-1, 3):
        ablated = np.where((cells == c) & (c >= 0), 0, x)
        for kind, x_fit in (("refit", ablated), ("frozen", x)):
            out = compute_outputs(probe, x_fit, ablated, truth, 0.3, fold)
            for name in names:
                value = got[name][kind][c] if c >= 0 else got[name]["intact"]
                want = score_outputs(name, out, truth, target is not None)
                assert value == pytest.approx(want, rel=1e-8, abs=1e-9), (name, kind, c)


@pytest.mark.parametrize("p", [6, 60])
def test_r2_matches_cross_val_predict(p):
    x, _, y = make_stimuli(p)
    onehot = np.eye(3)[y]
    for folds in (UNEVEN, np.arange(24)):
        model = Ridge(alpha=compute_kappa(x, 2.0))
        out = cross_val_predict(model, x, onehot, cv=PredefinedSplit(folds))
        want = r2_score(onehot, out, multioutput="variance_weighted")
        got = rk.ablation_decodability(x, [-1] * p, y, ridge=2.0, folds=folds, score="r2")
        assert got["intact"] == pytest.approx(want, abs=1e-12)
        assert got["refit"].shape == got["frozen"].shape == (0,)


@given(st.data(), st.sampled_from(["ridge", "logistic"]), st.sampled_from([0.01, 1.0, "gcv"]))
def test_margins_match_the_reference(data, probe, ridge):
    """Against explicit held-out fits, for any folds, cells, layout and targets."""
    x = data.draw(
        representations(n=st.integers(5, 12), kinds=("gaussian", "relu"), layouts=TORCH_LAYOUTS)
    )
    cells = data.draw(st.one_of(labels(x.p).map(lambda c: c[0]), memberships(x.p)))
    y = data.draw(classes(x.n)) - 7
    rng = np.random.default_rng(x.seed)
    folds = data.draw(st.sampled_from([None, 2, rng.permutation(np.arange(x.n) % 3)]))
    target = data.draw(st.sampled_from([None, int(y[0]), np.unique(y)[::-1]]))
    options = {"ridge": ridge, "folds": folds, "target": target, "probe": probe, "score": "margin"}
    if probe == "logistic":
        options |= {"ridge": 1.0 if ridge == "gcv" else ridge}
        options |= {"folds": np.arange(x.n) if folds is None else folds}
    if isinstance(folds, int) and np.bincount(y + 7).max() < 2:
        options["folds"] = np.arange(x.n)
    got = rk.ablation_decodability(x.torch(), cells, y, **options)
    want = rk.ablation_decodability(x.values(), cells, y, backend="reference", **options)
    assert got.keys() == want.keys()
    # The minimum that "gcv" finds is flat, so it is located with only half of the digits.
    tolerance = 1e-5 if ridge == "gcv" else 1e-9
    for name, values in got.items():
        np.testing.assert_allclose(values, want[name], tolerance, tolerance, err_msg=name)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("probe", ["ridge", "logistic"])
def test_a_class_in_a_single_fold_is_not_learnt(probe, target, backend):
    x, cells, y = make_stimuli(8, seed=5)
    folds = np.where(y == 1, 3, np.arange(24) % 3)
    names = SCORES if probe == "ridge" else SCORES[:3]
    options = {"target": target, "ridge": 0.3, "probe": probe, "score": names, "folds": folds}
    got = rk.ablation_decodability(x, cells, y, backend=backend, **options)
    truth = y if target is None else (y == 1).astype(int)
    for c in range(3):
        ablated = np.where(cells == c, 0, x)
        for kind, x_fit in (("refit", ablated), ("frozen", x)):
            out = compute_outputs(probe, x_fit, ablated, truth, 0.3, folds)
            np.testing.assert_allclose(
                out[y == 1, 1], 0 if probe == "ridge" else -np.inf, atol=1e-12
            )
            for name in names:
                want = score_outputs(name, out, truth, target is not None)
                assert got[name][kind][c] == pytest.approx(want, rel=1e-8, abs=1e-9), (name, kind)
    if probe == "logistic":
        assert got["margin"]["intact"] == -np.inf


@pytest.mark.parametrize("ridge", [1e3, 1.0, 1e-3])
def test_logistic_outputs_have_ten_digits(ridge):
    """Each fold has one stimulus of each class, so its margins are differences of outputs."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((12, 5)), np.arange(12) % 2
    folds = np.arange(12) // 2
    got = rk.ablation_decodability(
        x, [-1] * 5, y, target=1, probe="logistic", folds=folds, ridge=ridge, score="margin"
    )
    splits = [(folds != k, x[folds == k]) for k in range(6)]
    values = [compute_decisions(x, y, train, x_test, ridge) @ [-1, 1] for train, x_test in splits]
    assert got["intact"] == pytest.approx(np.mean(values), rel=1e-10)


@pytest.mark.parametrize("seed", [26, 38, 93])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_logistic_steps_that_overshoot_are_shortened(backend, seed):
    """With heavy tails and a small ridge, full Newton steps diverge."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_t(1, (12, 3)), rng.permutation(np.arange(12) % 3 == 0).astype(int)
    folds = np.arange(12) % 2
    options = {"folds": folds, "ridge": 1e-5, "probe": "logistic", "score": "margin"}
    got = rk.ablation_decodability(x, [-1] * 3, y, target=1, backend=backend, **options)
    want = score_outputs("margin", compute_outputs("logistic", x, x, y, 1e-5, folds), y, True)
    assert got["intact"] == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("probe", ["ridge", "logistic"])
def test_batches_of_tensors_match_single_calls(probe):
    x = np.stack([make_stimuli(9, seed=s)[0] for s in range(3)]).reshape(3, 1, 24, 9)
    _, cells, y = make_stimuli(9)
    options = {"target": [2, 0], "folds": 4, "probe": probe, "score": ["margin", "accuracy"]}
    got = rk.ablation_decodability(torch.from_numpy(x), cells, y, batched=True, **options)
    assert set(got) == {"margin", "accuracy"}
    for b in range(3):
        single = rk.ablation_decodability(x[b, 0], cells, y, **options)
        for name, kinds in got.items():
            for kind, values in kinds.items():
                assert isinstance(values, torch.Tensor)
                np.testing.assert_allclose(values[b, 0], single[name][kind], rtol=1e-9, atol=1e-12)


def test_empty_cells_change_nothing_and_complete_ones_give_nan():
    x, _, y = make_stimuli(7)
    cells = np.array([np.zeros(7), np.ones(7)], dtype=bool)
    for probe in ("ridge", "logistic"):
        for backend in ("torch", "reference"):
            options = {"folds": 4, "probe": probe, "score": "margin", "backend": backend}
            got = rk.ablation_decodability(x, cells, y, **options)
            for kind in ("refit", "frozen"):
                assert got[kind][0] == pytest.approx(got["intact"], rel=1e-12)
            assert np.isnan(got["refit"][1])
            assert np.isfinite(got["frozen"][1])
