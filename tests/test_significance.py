"""The simulations of similarities and of shuffled cells, in bench/COVERAGE.md."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import repsim_kernels as rk
from bench import coverage, significance
from repsim_kernels.experiments.analysis.correlations import compute_correlations, summarise
from repsim_kernels.experiments.analysis.shuffles import find_threshold
from repsim_kernels.experiments.columns import GROUP_KEYS


@pytest.mark.parametrize("truth", significance.TRUTHS)
@pytest.mark.parametrize("spectrum", significance.SPECTRA.values(), ids=significance.SPECTRA)
def test_pairs_have_the_similarity_of_their_population(truth, spectrum):
    rng = np.random.default_rng(0)
    x, y = significance.draw_pair(rng, 4_000, truth, spectrum)
    assert float(rk.cka(x, y, debiased=True)) == pytest.approx(truth, abs=0.03)
    np.testing.assert_allclose(np.cov(x.T), np.cov(y.T), atol=0.12)


def test_coverage_and_size_are_plausible(monkeypatch):
    monkeypatch.setattr(significance, "STIMULI", {40: 1.0, 60: 0.25})
    rows = list(significance.iter_coverages(80))
    assert [(row.n, row.truth, row.pairs) for row in rows] == [
        (n, truth, count) for n, count in ((40, 80), (60, 20)) for truth in significance.TRUTHS
    ]
    for row in rows[:3]:
        assert all(85 < share <= 100 for share in row.shares)
        assert all(0 < width < 1 for width in row.widths)
    monkeypatch.setattr(significance, "TEST_STIMULI", (15,))
    sizes = significance.compute_sizes(60)[15]
    assert sizes.shape == (len(significance.METRICS), len(significance.NULLS), 2)
    assert (sizes[:, :2, 0] < 15).all()
    assert (sizes[..., 1] <= sizes[..., 0]).all()


def test_the_section_has_a_line_for_each_row(monkeypatch):
    monkeypatch.setattr(significance, "STIMULI", {20: 1.0})
    monkeypatch.setattr(significance, "TEST_STIMULI", (10, 12))
    lines = significance.render_section(pairs=2).splitlines()
    assert len([line for line in lines if line.startswith("| 20 | ")]) == 3
    assert len([line for line in lines if line.startswith(("| 10 | ", "| 12 | "))]) == 6


# Shuffled cells


def test_thresholds_of_shared_shuffles_are_those_of_the_report():
    values = coverage.draw_unrelated(np.random.default_rng(0), 3, 0.5)
    x, y = coverage.rank_cells(values)
    got = coverage.find_thresholds(x, y, coverage.draw_shuffles(1, 0))
    levels = [["net"], range(coverage.CLASSES), range(coverage.LAYERS), range(coverage.CELLS)]
    index = pd.MultiIndex.from_product(levels, names=[*GROUP_KEYS, "cell"])
    columns = coverage.DISTANCES, coverage.CHANGES
    names = [*columns[0], *columns[1]]
    for i, table in enumerate(values):
        frame = pd.DataFrame(table.reshape(len(index), -1), index, names).reset_index()
        assert got[i] == pytest.approx(find_threshold(frame, *columns), abs=1e-14)
        means = summarise(compute_correlations(frame, *columns))["spearman"]
        np.testing.assert_allclose((x[i].mT @ y[i]).mean(0).ravel(), means, atol=1e-14)


def test_separate_shuffles_move_the_cells_of_each_group(monkeypatch):
    monkeypatch.setattr(coverage, "SHUFFLES", 19)
    values = coverage.draw_unrelated(np.random.default_rng(1), 2, 0.25)
    x, y = coverage.rank_cells(values)
    orders = coverage.draw_shuffles(x.shape[1], 5)
    want = [
        sorted(
            np.abs((a.mT @ np.take_along_axis(b, order[..., None], 1)).mean(0)).max()
            for order in orders
        )[18]  # ⌈0.95 x 20⌉ = 19
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(coverage.find_thresholds(x, y, orders), want, atol=1e-11)


def test_common_variance_is_beyond_separate_shuffles_only(monkeypatch):
    monkeypatch.setattr(coverage, "SHUFFLES", 99)
    for row in coverage.iter_beyond(60):
        assert row.separate > 40
        assert row.shared < 5 + 3 * np.sqrt(5 * 95 / 60)
    x, _ = np.moveaxis(coverage.draw_unrelated(np.random.default_rng(2), 300, 0.25)[:, :2], 1, 0)
    other = coverage.draw_unrelated(np.random.default_rng(2), 300, 0.25)[:, 1]
    assert np.corrcoef(x.ravel(), other.ravel())[0, 1] == pytest.approx(0.25, abs=0.04)
