"""Digits and order of ablation distances, against 60-digit arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import _oracle
import numpy as np
import pytest
from _draw import SEEDS
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import DISTANCE, Tol, assert_close, assert_rank_fidelity

PLAIN = ("cka", "procrustes")
RIDGED = ("cca", "cca_squared")
N_CELLS = 3


@dataclass(frozen=True)
class Layer:
    """Parameters of reproducible activations whose neurons differ in energy, and of their cells."""

    n: int
    p: int
    spread: int  # decades between the strongest and the weakest neuron
    common: bool  # whether the neurons share a direction
    share: float  # fraction of neurons in a cell
    seed: int

    def make(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        x = rng.standard_normal((self.n, self.p)) * 10 ** -rng.uniform(0, self.spread, self.p)
        if self.common:
            x += rng.standard_normal((self.n, 1)) * rng.standard_normal(self.p)
        cells = rng.integers(0, N_CELLS, self.p)
        return x, np.where(rng.random(self.p) < self.share, cells, -1)


def layers(n: st.SearchStrategy[int], p: st.SearchStrategy[int]) -> st.SearchStrategy[Layer]:
    spread, share = st.sampled_from([0, 3, 6]), st.sampled_from([0.1, 0.5, 1.0])
    return st.builds(Layer, n, p, spread, st.booleans(), share, SEEDS)


def compute_exactly(x: np.ndarray, cells: np.ndarray, ridge: float) -> dict[str, np.ndarray]:
    """Return distances from the oracle; for ridge CCA, their excess over the self-distance."""
    similarity: dict[str, Any] = {
        "cka": _oracle.cka,
        "procrustes": _oracle.procrustes,
        "cca": lambda a, b: _oracle.cca(a, b, ridge=ridge),
        "cca_squared": lambda a, b: _oracle.cca(a, b, squared=True, ridge=ridge),
    }
    distances: dict[str, list[float]] = {name: [] for name in similarity}
    for c in range(N_CELLS):
        y = np.where(cells == c, 0.0, x)
        for name, function in similarity.items():
            if (y == 0).all():
                distances[name].append(np.nan)
            elif (y == x).all():
                distances[name].append(0.0)
            else:
                self_similarity = function(x, x) if name in RIDGED else 1
                scale = 2 if name == "procrustes" else 1
                distances[name].append(float(scale * (self_similarity - function(x, y))))
    return {name: np.array(values) for name, values in distances.items()}


def compute_excess(
    x: np.ndarray, cells: np.ndarray, ridge: float, metrics: Any
) -> dict[str, np.ndarray]:
    """Return the package's distances minus the self-distance, the distance of an empty cell."""
    members = np.append(cells == np.arange(N_CELLS)[:, None], [np.zeros(len(cells), bool)], axis=0)
    got = rk.ablation_distances(x, members, metrics=metrics, ridge=ridge)
    return {name: values[:-1] - values[-1] for name, values in got.items()}


def assert_digits(layer: Layer, ridge: float = 0.1) -> None:
    x, cells = layer.make()
    want = compute_exactly(x, cells, ridge)
    # Once with the iterations, and once with the eigenvectors that PWCCA needs.
    for metrics in ((*PLAIN, *RIDGED), (*RIDGED, "pwcca")):
        got = compute_excess(x, cells, ridge, metrics)
        for name in set(metrics) - {"pwcca"}:
            try:
                assert_close(got[name], want[name], DISTANCE["float64"], nan=True)
            except AssertionError as error:
                raise AssertionError(f"{name}, {layer}: {error}") from None
            finite = ~np.isnan(want[name])
            assert_rank_fidelity(got[name][finite], want[name][finite], DISTANCE["float64"])


@settings(max_examples=25)
@given(layers(st.integers(4, 7), st.integers(20, 60)), st.sampled_from([1e-3, 0.1, 1.0]))
def test_digits_with_more_neurons_than_stimuli(layer, ridge):
    assert_digits(layer, ridge)


@settings(max_examples=25)
@given(layers(st.integers(5, 8), st.integers(2, 9)), st.sampled_from([1e-3, 0.1, 1.0]))
def test_digits_with_about_as_many_neurons_as_stimuli_or_fewer(layer, ridge):
    assert_digits(layer, ridge)


@given(layers(st.integers(4, 12), st.integers(2, 60)), st.floats(-12, 12))
def test_scale_does_not_matter(layer, decades):
    x, cells = layer.make()
    scaled = 10**decades * x
    metrics = (*PLAIN, *RIDGED)
    want, got = (rk.ablation_distances(a, cells, metrics=metrics) for a in (x, scaled))
    for name, values in want.items():
        assert_close(got[name], values, Tol(1e-8, 1e-13), nan=True)


@given(st.integers(3, 12), st.integers(2, 30), st.integers(1, 3), SEEDS)
def test_removing_copies_gives_the_self_distance(n, p, copies, seed):
    """A representation without copies of its neurons is as far as from an unchanged one."""
    x = np.random.default_rng(seed).standard_normal((n, p))
    x = np.concatenate([x, np.repeat(x, copies, axis=1)], axis=1)
    cells = np.where(np.arange(x.shape[1]) < p, -1, 0)
    metrics = (*PLAIN, "svcca", *RIDGED, "pwcca")
    got = rk.ablation_distances(x, [cells == 0, cells == 1], metrics=metrics)
    for name in metrics:
        assert_close(got[name][0], got[name][1], Tol(0, 1e-12))


@given(st.integers(4, 20), st.integers(2, 200), st.floats(0.99, 0.99999), SEEDS)
def test_a_cell_with_nearly_all_the_energy_matches_the_reference(n, p, share, seed):
    """Far from the original, iterations need the most steps. The second cell has all neurons."""
    x = np.random.default_rng(seed).standard_normal((n, p))
    x[:, : p // 2] *= np.sqrt(share / (1 - share))
    cells = [np.arange(p) < p // 2, np.arange(p) < p]
    metrics = (*PLAIN, *RIDGED, "svcca", "pwcca")
    got = rk.ablation_distances(x, cells, metrics=metrics)
    want = rk.ablation_distances(x, cells, metrics=metrics, backend="reference")
    for name, values in want.items():
        assert np.isnan(got[name][1])
        assert_close(got[name][:1], values[:1], Tol(1e-8, 1e-12))


@given(st.integers(4, 12), st.integers(4, 40), st.booleans(), SEEDS)
def test_rank_deficient_grams_match_the_reference(n, p, duplicate, seed):
    """Duplicated stimuli, or neurons in few directions: ranks below n - 1."""
    rng = np.random.default_rng(seed)
    if duplicate:
        x = np.repeat(rng.standard_normal((n, p)), 2, axis=0)
    else:
        r = max(1, min(n, p) // 3)
        x = rng.integers(-3, 4, (n, r)) @ rng.integers(-3, 4, (r, p)) * 1.0
        x[0, 0] += (x == x[0]).all()
    cells = np.arange(p) % 4
    metrics = (*PLAIN, *RIDGED, "svcca")
    got, want = (
        rk.ablation_distances(x, cells, metrics=metrics, backend=b) for b in ("torch", "reference")
    )
    for name, values in want.items():
        assert_close(got[name], values, Tol(1e-8, 1e-12), nan=True)


@given(SEEDS, st.sampled_from([2.0, 30.0, 1e2, 1e3, 1e5]))
def test_removing_scaled_copies_gives_distance_zero(seed, factor):
    """Without the copies, a representation differs only in scale."""
    x = np.random.default_rng(seed).standard_normal((6, 12))
    cells = np.repeat([0, -1], 12)
    y = np.concatenate([factor * x, x], axis=1)
    got = rk.ablation_distances(y, cells, metrics=("cka", "procrustes"))
    assert_close(got["cka"], [0.0], Tol(0, 1e-14))
    assert_close(got["procrustes"], [0.0], Tol(0, 3e-14))


@given(SEEDS, st.floats(-3, 0))
def test_removing_a_whole_direction_keeps_the_digits(seed, decades):
    """The remaining Gram is singular: the iterations must not stop at a wrong value."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 12))
    x[0, 2:] = x[1, 2:]
    x[:, :2] *= 10**decades
    cells = np.where(np.arange(12) < 2, 0, -1)
    got = rk.ablation_distances(x, cells, metrics=("procrustes",))["procrustes"]
    want = _oracle.procrustes_distance(x, np.where(cells == 0, 0.0, x))
    assert_close(got, [float(want)], DISTANCE["float64"])


@pytest.mark.parametrize("ridge", [1e-1, 1e-4, 1e-5, 1e-6])
def test_a_small_ridge_does_not_hide_a_lost_direction(ridge):
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.standard_normal((5, 16))
        x[0, 4:] = x[1, 4:]
        cells = np.where(np.arange(16) < 4, 0, -1)
        got = rk.ablation_distances(x, cells, metrics=("pwcca",), ridge=ridge)
        want = rk.ablation_distances(x, cells, metrics=("pwcca",), ridge=ridge, backend="reference")
        assert_close(got["pwcca"], want["pwcca"], Tol(1e-5, 1e-9))


@pytest.mark.parametrize("factor", [3e2, 3e5, 3e8])
def test_ridge_cca_is_accurate_after_removing_a_large_cell(factor):
    rng = np.random.default_rng(1)
    y = np.concatenate([factor * rng.standard_normal((6, 9)), rng.standard_normal((6, 9))], axis=1)
    cells, metrics = np.repeat([0, -1], 9), (*RIDGED, "pwcca")
    got, want = (
        rk.ablation_distances(y, cells, metrics=metrics, backend=b) for b in ("torch", "reference")
    )
    for name in metrics:
        assert_close(got[name], want[name], Tol(1e-7))
