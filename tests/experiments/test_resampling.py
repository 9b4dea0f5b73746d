"""Intervals and tests over clusters, against SciPy, statsmodels and slow loops."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from _correlations import make_table, random_z
from statsmodels.stats.multitest import multipletests

from bench import coverage
from repsim_kernels.experiments.analysis.correlations import summarise
from repsim_kernels.experiments.analysis.inference import compute_intervals, fisher_z, holm
from repsim_kernels.experiments.analysis.resampling import sign_flips
from repsim_kernels.experiments.errors import StatsError

ENDS = ["low", "high"]


def slow_jackknife(values, units):
    """The jackknife by its definition, in a loop over classes."""
    values, units = values[~np.isnan(values)], units[~np.isnan(values)]
    names = np.unique(units)
    k, whole = len(names), values.mean()
    pseudo = [k * whole - (k - 1) * values[units != name].mean() for name in names]
    reach = scipy.stats.t.ppf(0.975, k - 1) * np.std(pseudo, ddof=1) / np.sqrt(k)
    return whole - reach, whole + reach


# Fisher z


@pytest.mark.parametrize("n", [4, 7])
def test_z_of_perfect_correlation_is_that_of_half_a_step_below(n):
    """All possible correlations of untied ranks come from permutations."""
    ranks = np.arange(n)
    possible = np.unique(
        [np.round(np.corrcoef(ranks, p)[0, 1], 12) for p in itertools.permutations(ranks)]
    )
    half_way = (possible[-1] + possible[-2]) / 2
    np.testing.assert_allclose(fisher_z([1.0, -1.0], n), np.arctanh([half_way, -half_way]))
    inner = possible[1:-1]
    assert np.array_equal(fisher_z(inner, n), np.arctanh(inner))


def test_fisher_z_keeps_nan_and_order():
    rho = np.array([-1, -0.5, 0.0, 0.9, 1 - 1e-9, 1, np.nan])
    z = fisher_z(rho, [16, 16, 16, 16, 16, 16, 16])
    assert np.isnan(z[-1])
    assert np.isfinite(z[:-1]).all()
    assert (np.diff(z[:-1]) >= 0).all()
    assert np.isnan(fisher_z(np.nan, 1))


# Intervals


def test_balanced_jackknife_equals_the_t_interval_of_class_means():
    per_group = make_table(random_z(seed=1))
    result = compute_intervals(per_group)
    assert len(result) == 10
    for row in result.itertuples():
        rows = per_group[(per_group.distance == row.distance) & (per_group.change == row.change)]
        means = rows.groupby("class").spearman.mean()
        low, high = scipy.stats.t.interval(0.95, len(means) - 1, means.mean(), means.sem())
        np.testing.assert_allclose([row.low, row.high], [low, high], rtol=1e-10)


def test_unbalanced_jackknife_equals_a_loop_and_its_estimate_the_summary():
    rng = np.random.default_rng(2)
    per_group = make_table(random_z(classes=6, layers=5, seed=2))
    per_group.loc[rng.random(len(per_group)) < 0.3, ["spearman", "kendall"]] = np.nan
    missing = (per_group["class"] == 3) & (per_group.distance == "cka")
    per_group.loc[missing, ["spearman", "kendall"]] = np.nan
    other = per_group.assign(model="other", spearman=per_group.spearman / 2)
    both = pd.concat([per_group, other], ignore_index=True).sample(frac=1, random_state=0)
    result, means = compute_intervals(both), summarise(both)
    assert result[["model", "distance", "change"]].equals(means[["model", "distance", "change"]])
    np.testing.assert_allclose(result.estimate, means.spearman, rtol=1e-12)
    assert result.nan_groups.equals(means.nan_groups)
    assert (result.groups == 30).all()
    for row in result.itertuples():
        rows = both[
            (both.model == row.model)
            & (both.distance == row.distance)
            & (both.change == row.change)
        ]
        expected = slow_jackknife(rows.spearman.to_numpy(), rows["class"].to_numpy())
        np.testing.assert_allclose([row.low, row.high], expected, rtol=1e-9)
        assert row.clusters == (5 if row.distance == "cka" else 6)


def test_one_class_has_no_interval_and_none_no_estimate():
    z = random_z(classes=3)
    z[1:, :, 0] = np.nan
    z[:, :, 1] = np.nan
    result = compute_intervals(make_table(z)).set_index("distance")
    assert result.loc[["cka", "procrustes"], ENDS].isna().all(axis=None)
    assert result.loc["cka", "estimate"].notna().all()
    assert result.loc["procrustes", "estimate"].isna().all()
    assert (result.clusters.to_numpy() == [1, 1, 0, 0, 3, 3, 3, 3, 3, 3]).all()
    assert result.loc["cca", ENDS].notna().all(axis=None)


def test_interval_of_a_correlation_stays_within_one():
    per_group = make_table(
        np.arctanh(np.array([0.99, -0.2, 0.98]))[:, None, None, None], ["cka"], ["f"]
    )
    (row,) = compute_intervals(per_group).itertuples()
    assert row.high == 1
    assert -1 <= row.low < row.estimate


def test_bootstrap_of_few_classes_matches_all_resamples():
    """4 classes with different numbers of groups have 256 resamples."""
    counts = np.array([2.0, 1.0, 3.0, 2.0])
    sums = np.array([0.3, 0.5, -0.6, 1.1])
    resamples = np.array(list(itertools.product(range(4), repeat=4)))
    means = sums[resamples].sum(1) / counts[resamples].sum(1)
    _, low, high = coverage.compute_bootstrap(
        sums[None], counts[None], 0, level=0.5, resamples=200_000
    )
    np.testing.assert_allclose([low[0], high[0]], np.quantile(means, [0.25, 0.75]), atol=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cluster": "unit"}, "cluster: the table has no column 'unit'"),
        ({"by": ["class"]}, "cluster: 'class' is in by; expected"),
    ],
)
def test_wrong_arguments_of_intervals_are_refused(arguments, message):
    with pytest.raises(StatsError, match=message):
        compute_intervals(make_table(random_z()), **arguments)


# Tests


def test_random_flips_estimate_the_exact_p():
    values = np.random.default_rng(5).standard_normal((4, 15)) + np.array([[0], [0.2], [0.4], [9]])
    signs = np.array(list(itertools.product((1, -1), repeat=15)))
    exact = (np.abs(values @ signs.T) >= np.abs(values.sum(1))[:, None] * (1 - 1e-12)).mean(1)
    result = sign_flips(values)
    error = np.sqrt(exact * (1 - exact) / 10_000)
    assert (np.abs(result - exact) < 4 * error + 2e-4).all()
    assert result[3] >= 1 / 10_001
    assert np.array_equal(result, sign_flips(values))


def test_flips_count_ties_and_differences_of_zero():
    assert sign_flips(np.zeros(5)) == 1
    assert sign_flips(np.full(5, 0.1)) == 2 / 32
    assert sign_flips(np.array([0.1, 0.2, 0.3, -0.1 - 0.2])) == 12 / 16  # 0.3 + 0 among 16 sums
    assert np.isnan(sign_flips(np.ones(1)))


def test_holm_equals_statsmodels_and_ignores_nan():
    rng = np.random.default_rng(8)
    for size in (1, 2, 7):
        p = rng.random(size) ** 3
        np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
        padded = np.concatenate([[np.nan], p, [np.nan]])
        np.testing.assert_array_equal(holm(padded), [np.nan, *holm(p), np.nan])
    assert holm([]).size == 0


# The simulation


def test_simulated_coverage_size_and_power_are_plausible():
    rows = {row.name: row for row in coverage.compute_rows(200, coverage.compute_truth(2_000))}
    assert 0.9 < rows["coverage, jackknife-t"].share < 0.99
    assert 0.8 < rows["coverage, bootstrap of classes"].share < 0.96
    assert rows["size, permutation test"].share < 0.1
    assert rows["power"].share > 0.7
    lone = coverage.Row("", np.array([True, False, True, True]))
    assert (lone.share, lone.error) == (0.75, np.sqrt(0.75 * 0.25 / 4))


def test_coverage_page_has_a_line_for_each_row(monkeypatch):
    monkeypatch.setattr(coverage, "compute_truth", lambda: 0.3172)
    page = coverage.render_page(studies=40, pairs=2, tables=3)
    assert "40 studies of 10 classes" in page
    assert "seed 20241125: 0.3172." in page
    for row in coverage.iter_beyond(3):
        assert f"| {100 * row.common:.0f} | {row.separate:.1f} | {row.shared:.1f} |" in page
    for row in coverage.compute_rows(40, 0.3172):
        assert f"| {row.name} | {100 * row.share:.1f} | {100 * row.error:.1f} |" in page
