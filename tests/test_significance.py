"""The simulations of intervals and tests of similarities, in bench/COVERAGE.md."""

from __future__ import annotations

import numpy as np
import pytest

import repsim_kernels as rk
from bench import significance


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
