"""Errors of bad input name the argument, what is wrong with it, and what is expected."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import repsim_kernels as rk
from repsim_kernels import RepsimError
from repsim_kernels._metrics import METRICS

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((6, 4)), RNG.standard_normal((6, 2))
NAN, INF = X.copy(), torch.from_numpy(X.copy())
NAN[2, 3] = np.nan
INF[1, 0] = torch.inf
PAIRS = {
    metric.name: {"k": 2} if metric.neighbours else {} for metric in METRICS if metric.has_function
}
CELLS, LABELS = [0, 0, 1, 1], [0, 0, 1, 1, 2, 2]


def list_calls(x):
    """List a call of every operation that takes one representation."""
    return [
        lambda: rk.centered_gram(x),
        lambda: rk.cell_grams(x, CELLS),
        lambda: rk.class_means(x, LABELS),
        lambda: rk.selectivity_grid(x, LABELS, 1),
        lambda: rk.ablation_distances(x, CELLS),
        lambda: rk.ablation_decodability(x, CELLS, LABELS),
    ]


BAD = [
    (NAN, rk.NonFiniteError, r"x: 1 of 24 values are NaN or infinite .*index \(2, 3\)"),
    (INF, rk.NonFiniteError, r"x: 1 of 24 values .*\(1, 0\)"),
    (NAN.astype(np.float32), rk.NonFiniteError, r"x: 1 of 24 values .*\(2, 3\)"),
    (INF.bfloat16(), rk.NonFiniteError, r"x: 1 of 24 values .*\(1, 0\)"),
    (X[0], rk.ShapeError, r"x: shape \(4,\); expected \(n, p\)"),
    (X[:, :0], rk.ShapeError, "x: no neurons"),
    (X + 1j, rk.DtypeError, "x: dtype complex128; expected real numbers"),
    (torch.zeros(6, 4, dtype=torch.complex64), rk.DtypeError, "x: dtype complex64"),
    (X.astype(object), rk.DtypeError, "x: dtype object"),
    (np.full((6, 4), "a"), rk.DtypeError, "x: dtype <U1"),
    ([[1, 2], [3]], rk.DtypeError, "x: not an array of numbers"),
    (np.ma.masked_less(X, 0), rk.DtypeError, "x: a masked array with masked entries"),
    (torch.eye(6).to_sparse(), rk.DtypeError, "x: a tensor of layout torch.sparse_coo"),
    (X * 1e200, rk.NonFiniteError, r"x: the largest magnitude is .*e\+200"),
]


@pytest.mark.parametrize(("x", "error", "match"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_representations_are_refused(x, error, match):
    for call in list_calls(x):
        with pytest.raises(error, match=match):
            call()
    like = torch.from_numpy if isinstance(x, torch.Tensor) else np.asarray
    for name, options in PAIRS.items():
        with pytest.raises(error, match=match):
            getattr(rk, name)(x, like(Y), **options)
        with pytest.raises(error, match=match.replace("x: ", "y: ", 1)):
            getattr(rk, name)(like(Y), x, **options)
    for options in ({}, {"debiased": True}, {"kernel": "rbf"}):
        with pytest.raises(error, match=match):
            rk.cka(x, like(Y), **options)
        with pytest.raises(error, match=r"xs\[1\]: "):
            rk.pairwise([like(X), x], **options)
        with pytest.raises(error, match=r"ys\[0\]: "):
            rk.pairwise([like(X), like(Y)], [x], **options)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_do_not_match_are_refused(name):
    metric = functools.partial(getattr(rk, name), **PAIRS[name])
    with pytest.raises(rk.ShapeError, match="y: 5 stimuli, but x has 6; expected the same"):
        metric(X, Y[:5])
    with pytest.raises(rk.ShapeError, match=r"x: [12] stimuli.*expected at least [23]"):
        metric(X[:1], Y[:1])
    with pytest.raises(rk.ConstantError, match="y: the representation is the same for every"):
        metric(X, np.full((6, 3), 0.1))
    with pytest.raises(rk.ShapeError, match=r"y: batch dimensions \(3,\), but x has \(2,\)"):
        metric(np.stack([X] * 2), np.stack([Y] * 3), batched=True)
    with pytest.raises(rk.DeviceError, match="y: a torch array on cpu, but x is a numpy array"):
        metric(X, torch.from_numpy(Y))
    with pytest.raises(rk.OptionError, match="backend: 'numpy'; expected one of 'reference'"):
        metric(X, Y, backend="numpy")
    with pytest.raises(rk.BackendUnavailable, match=f"'triton' can't serve {name}: "):
        metric(X, Y, backend="triton")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_finite_values_with_an_overflowing_sum_are_accepted(kind):
    big = (X / np.abs(X).max() * 3e38).astype(np.float32)
    rk.cka(kind(np.abs(big)), kind(big))
    infinite = np.concatenate([np.full((1, 4), np.inf), np.full((1, 4), -np.inf), X[2:]])
    with pytest.raises(rk.NonFiniteError, match="x: 8 of 24 values"):
        rk.cka(kind(infinite.astype(np.float32)), kind(big))


@pytest.mark.parametrize(("stimulus", "neuron"), [(1, 0), (20, 3), (20, 39)])
def test_a_single_differing_value_makes_x_not_constant(stimulus, neuron):
    x = np.full((21, 40), 0.1)
    with pytest.raises(rk.ConstantError, match="x: "):
        rk.cka(x, x)
    x[stimulus, neuron] = 0.2
    assert rk.cka(x, x) == pytest.approx(1)


def test_one_constant_item_of_a_batch_is_refused():
    x = np.stack([X, X * 0 + 0.1])
    with pytest.raises(rk.ConstantError, match="x: "):
        rk.cka(x, Y, batched=True)
    with pytest.raises(rk.ConstantError, match="x: "):
        rk.ablation_distances(x, CELLS, batched=True)


OPTIONS = [
    (lambda: rk.cka(X[:3], Y[:3], debiased=True), "x: 3 stimuli.*at least 4"),
    (lambda: rk.cka(X, Y, kernel="poly"), "kernel: 'poly'; expected one of 'linear', 'rbf'"),
    (lambda: rk.cka(X, Y, sigma=1.0), "sigma: 1.0 with kernel='linear'"),
    (lambda: rk.cka(X, Y, kernel="rbf", sigma=0), "sigma: 0; expected .* of at least 1e-10 and"),
    (lambda: rk.cca(X, Y, ridge=-1), "ridge: -1; expected a finite number of at least 0"),
    (lambda: rk.cca(X, Y, ridge=10**400), "ridge: 1000.*…; expected a finite number of at least 0"),
    (lambda: rk.cca(X, Y, penalty=-(10**400)), "penalty: -1000.*…; expected a finite number"),
    (lambda: rk.cca(X, Y, ridge=10**5000), "ridge: int; expected a finite number of at least 0"),
    (lambda: rk.cca(X, Y, ridge=np.eye(2)), r"ridge: array\(\[\[1., 0.\], .*expected a finite"),
    (lambda: rk.cca(X, Y, squared="no"), "squared: 'no'; expected True or False"),
    (lambda: rk.cka(X, Y, debiased="no"), "debiased: 'no'; expected True or False"),
    (lambda: rk.cka(X, Y, debiased=np.eye(2)), r"debiased: array\(.*; expected True or False"),
    (lambda: rk.pairwise([X], debiased=None), "debiased: None; expected True or False"),
    (lambda: rk.pairwise([X], metric="cca", squared=1), "squared: 1; expected True or False"),
    (lambda: rk.eigh(np.eye(2), vectors=0), "vectors: 0; expected True or False"),
    (lambda: rk.ablation_distances(X, CELLS, info="no"), "info: 'no'; expected True or False"),
    (lambda: rk.cca(X, Y, ridge=1, penalty=1), "ridge: 1 together with penalty=1"),
    (lambda: rk.pwcca(X, Y, penalty=np.inf), "penalty: inf; expected a finite number"),
    (lambda: rk.svcca(X, Y, variance=99), "variance: 99; expected .* above 0 and at most 1"),
    (lambda: rk.procrustes_distance(X, Y, form="raw"), "form: 'raw'; expected one of 'squared'"),
    (lambda: rk.rsa(X, Y, distance="cityblock"), "distance: 'cityblock'; expected one of"),
    (lambda: rk.rsa(X, Y, compare="kendall"), "compare: 'kendall'; expected one of"),
    (lambda: rk.rsa(X[:2], Y[:2]), "x: 2 stimuli.*at least 3"),
    (lambda: rk.pairwise([X], metric="cka2"), "metric: 'cka2'; expected one of 'cka'"),
    (lambda: rk.pairwise([X], ridge=1), "ridge: not an option of metric 'cka'; .* debiased"),
    (lambda: rk.pairwise([]), "xs: an empty list"),
    (lambda: rk.pairwise(3), "xs: int; expected a list"),
    (lambda: rk.pairwise([X], [Y, Y[:5]]), r"ys\[1\]: 5 stimuli, but xs\[0\] has 6"),
    (lambda: rk.ablation_distances(X, CELLS, metrics=["cka", "mse"]), "metrics: 'mse'; expected"),
    (lambda: rk.ablation_distances(X, CELLS, metrics="cka"), "metrics: 'cka'; expected a sequence"),
    (lambda: rk.ablation_distances(X, CELLS, metrics=[X[0]]), r"metrics: array\(.*; expected one"),
    (lambda: rk.ablation_distances(X, CELLS, metrics=[X]), r"metrics: array\(.*; expected one of"),
    (lambda: rk.ablation_distances(X, CELLS, metrics=[np.array(["cka"])]), "metrics: .* one of"),
    (lambda: rk.ablation_distances(X, CELLS, metrics=np.array("cka")), "metrics: .* a sequence of"),
    (lambda: rk.ablation_distances(X, CELLS, memory=0), "memory: 0; expected"),
    (lambda: rk.ablation_decodability(X, CELLS, LABELS, memory=0), "memory: 0; expected"),
    (lambda: rk.ablation_distances(X[:3], CELLS), "x: 3 stimuli.*at least 4"),
    (lambda: rk.ablation_distances(X, [0, 0, 1]), r"cells: shape \(3,\).*integer labels \(4,\)"),
    (lambda: rk.ablation_distances(X, [0, 0, -2, 1]), "cells: label -2 is out of range; expected"),
    (lambda: rk.ablation_distances(X, [0.0, 1, 1, 0]), "cells: dtype float64; expected integers"),
    (lambda: rk.ablation_distances(X, np.ones((2, 5), bool)), r"cells: a membership .*\(C, 4\)"),
    (lambda: rk.ablation_distances(X, np.ones(3, bool)), r"cells: shape \(3,\).*mask \(4,\)"),
    (lambda: rk.cell_grams(X, CELLS, n_cells=1), "cells: label 1 is out of range; expected 0 … 0"),
    (lambda: rk.cell_grams(X, CELLS, n_cells=-1), "n_cells: -1; expected a whole number"),
    (lambda: rk.cell_grams(X, np.ones((2, 4), bool), n_cells=3), "n_cells: 3, but cells has 2"),
    (lambda: rk.class_means(X, [0, 0, 0, 2, 2, 2]), "labels: class 1 has no stimulus"),
    (lambda: rk.class_means(X, LABELS, n_classes=4), "labels: class 3 has no stimulus"),
    (lambda: rk.class_means(X, LABELS, n_classes=2), "labels: values 0 … 2 with n_classes=2"),
    (lambda: rk.class_means(X, [0, 1]), r"labels: shape \(2,\); expected \(6,\)"),
    (lambda: rk.class_means(X, [0.5] * 6), "labels: dtype float64; expected integers"),
    (
        lambda: rk.selectivity_grid(X, LABELS, 7),
        "target: no stimulus has label 7; expected one of 0, 1",
    ),
    (lambda: rk.selectivity_grid(X, LABELS, "a"), "target: 'a'; expected an integer label"),
    (lambda: rk.selectivity_grid(X, [1] * 6, 1), "labels: only class 1; expected at least two"),
    (lambda: rk.selectivity_grid(X, LABELS, 1, grid=(4, 0)), r"grid: \(4, 0\); expected two whole"),
    (
        lambda: rk.selectivity_grid(X, LABELS, 1, grid=np.array(4)),
        r"grid: array\(4\); expected two",
    ),
    (lambda: rk.selectivity_grid(X, LABELS, 1, grid=4), "grid: 4; expected two whole numbers"),
    (lambda: rk.selectivity_grid(X, LABELS, 1, edges="both"), "edges: 'both'; expected one of"),
    (lambda: rk.ablation_decodability(X, CELLS, LABELS, target=5), "target: no stimulus has"),
    (
        lambda: rk.ablation_decodability(X, CELLS, LABELS, ridge=0),
        "ridge: 0; expected .* least 1e-06 .*, or 'gcv'",
    ),
    (lambda: rk.ablation_decodability(X * 0, CELLS, LABELS), "x: the representation is the same"),
    (lambda: rk.logistic_fits(X, LABELS, [[0, 4]]), r"columns: neurons 0 … 4; expected .* 0 … 3"),
    (lambda: rk.logistic_fits(X, LABELS, [[-1, 2]]), "columns: neurons -1 … 2; expected integers"),
    (lambda: rk.logistic_fits(X, LABELS, [0, 1]), r"columns: shape \(2,\); expected \(b, d\)"),
    (lambda: rk.logistic_fits(X, LABELS, [[0] * 129]), r"columns: shape .*of 1 … 128 neurons"),
    (lambda: rk.logistic_fits(X, LABELS, np.zeros((0, 2), int)), r"columns: shape \(0, 2\)"),
    (lambda: rk.logistic_fits(X, LABELS, [[0.5]]), "columns: dtype float64; expected integers"),
    (lambda: rk.logistic_fits(X, LABELS, [[True]]), "columns: neurons .*; expected integers"),
    (lambda: rk.logistic_fits(X, [0] * 6, [[0]]), "y: one class, 0; expected at least two"),
    (lambda: rk.logistic_fits(X, [0, 2] * 3, [[0]]), "y: class 1 has no stimulus"),
    (lambda: rk.logistic_fits(X, [-1, 1] * 3, [[0]]), "y: values -1 … 1; expected integers from 0"),
    (lambda: rk.logistic_fits(X, [0, 1], [[0]]), r"y: shape \(2,\); expected \(6,\)"),
    (lambda: rk.logistic_fits(X, LABELS, [[0]], C=0), "C: 0; expected a finite number above 0"),
    (lambda: rk.logistic_fits(X, LABELS, [[0]], tol=-1), "tol: -1; expected a finite number above"),
    (lambda: rk.logistic_fits(X, LABELS, [[0]], max_iter=0), "max_iter: 0; expected a whole"),
    (lambda: rk.logistic_fits(X, LABELS, [[0]], start=3), "start: not a pair; expected"),
    (
        lambda: rk.logistic_fits(X, LABELS, [[0]], start=([[0]], [0])),
        r"start: shapes \(1, 1\) and \(1,\); expected \(1, 3, 1\) and \(1, 3\)",
    ),
    (lambda: rk.logistic_fits(X[None], LABELS, [[0]]), r"x: shape .*; expected \(n, p\)"),
    (lambda: rk.logistic_fits(NAN, LABELS, [[0]]), "x: 1 of 24 values are NaN or infinite"),
    (lambda: rk.probe_paper(NAN, CELLS, LABELS, 1), "x: 1 of 24 values are NaN or infinite"),
    (lambda: rk.probe_paper(X[0], CELLS, LABELS, 1), r"x: shape \(4,\); expected \(n, p\)"),
    (lambda: rk.probe_paper(X, CELLS, LABELS, 7), "target: no stimulus has label 7"),
    (lambda: rk.probe_paper(X, CELLS, LABELS, None), "target: None; expected an integer label"),
    (lambda: rk.probe_paper(X, CELLS, LABELS, 1, draws=0), "draws: 0; expected a whole number"),
    (lambda: rk.probe_paper(X, CELLS, LABELS, 1, size=129), "size: 129; expected at most 128"),
    (lambda: rk.probe_paper(X, CELLS, LABELS, 1, seed=-1), "seed: -1; expected .* of at least 0"),
    (lambda: rk.probe_paper(X, CELLS, LABELS, 1, paired=1), "paired: 1; expected True or False"),
    (lambda: rk.probe_paper(X * 0, CELLS, LABELS, 1), "x: the representation is the same"),
]


@pytest.mark.parametrize(("call", "match"), OPTIONS, ids=[o[1][:40] for o in OPTIONS])
def test_bad_options_are_refused(call, match):
    with pytest.raises(RepsimError, match=match) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1


def test_errors_are_also_value_or_type_errors():
    with pytest.raises(ValueError, match="stimuli"):
        rk.cka(X, Y[:3])
    with pytest.raises(TypeError, match="dtype"):
        rk.cka(X, Y + 1j)


@pytest.mark.parametrize("cells", [[0, 1, 2, 0], [-1] * 4, [1, 1, 0, 1]], ids=str)
@pytest.mark.parametrize("metrics", [["cka"], ["cka_debiased", "cka"], ["cka", "svcca"]], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_for_any_cells(cells, metrics, backend, bad):
    """Unnoticed, it makes CKA's distances NaN, except those that are 0 for any values."""
    x = X.astype(np.float32)
    x[:, 3] = x[0, 3]
    x[2, 2] = bad
    with pytest.raises(rk.NonFiniteError, match=r"x: 1 of 24 .*\(2, 2\)"):
        rk.ablation_distances(x, cells, metrics=metrics, backend=backend)
