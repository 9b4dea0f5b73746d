"""Partial correlations and reliability, against definitions and known effects."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from repsim_kernels.experiments.analysis.controls import (
    compute_partial_correlations,
    correct_for_noise,
    measure_reliability,
)
from repsim_kernels.experiments.analysis.correlations import compute_correlations, summarise
from repsim_kernels.experiments.errors import StatsError

KEYS = ["model", "class", "layer"]


def random_table(groups: int, cells: int = 16, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    size = groups * cells
    energy = rng.random(size)
    truth = rng.standard_normal(size) + energy
    table = pd.DataFrame(
        {
            "model": "net",
            "class": np.repeat(np.arange(groups) % 5, cells),
            "layer": np.repeat(np.arange(groups), cells),
            "cell": np.tile(np.arange(cells), groups),
            "size": rng.integers(6, 8, size),
            "energy": energy,
            "near": energy + 0.2 * rng.random(size),
            "far": rng.standard_normal(size),
            "lost": truth,
        }
    )
    for which in ("odd", "even"):
        table[f"lost_{which}"] = truth + 0.8 * rng.standard_normal(size)
    return table


def residual_correlation(
    group: pd.DataFrame, distance: str, change: str, controls: list[str]
) -> float:
    """The correlation of the residuals of ranks on ranks, by least squares with an intercept."""
    ranks = group[[distance, change, *controls]].rank().to_numpy()
    design = np.column_stack([np.ones(len(group)), ranks[:, 2:]])
    x, y = (v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in ranks[:, :2].T)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


@pytest.mark.parametrize("controls", [["energy"], ["size", "energy"]])
def test_partial_correlations_equal_those_of_residuals(controls: list[str]) -> None:
    table = random_table(12).sample(frac=0.9, random_state=1)
    result = compute_partial_correlations(table, ["near", "far"], ["lost"], controls)
    assert len(result) == 24
    for row in result.itertuples():
        group = table[table["layer"] == row.layer]
        assert row.n == len(group)
        assert row.spearman == pytest.approx(
            residual_correlation(group, row.distance, "lost", controls), abs=1e-9
        )


def test_one_control_matches_the_textbook_formula() -> None:
    table = random_table(1)
    ab, ac, bc = (
        scipy.stats.spearmanr(table[one], table[other])[0]
        for one, other in (("near", "lost"), ("near", "energy"), ("lost", "energy"))
    )
    expected = (ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2))
    (result,) = compute_partial_correlations(table, ["near"], ["lost"], ["energy"])["spearman"]
    assert result == pytest.approx(expected, abs=1e-12)


def test_columns_explained_by_the_controls_have_no_partial_correlation() -> None:
    table = random_table(3)
    table["same"] = 7 * table["energy"]
    table.loc[table["layer"] == 1, "size"] = 5  # constant: explains nothing
    table.loc[(table["layer"] == 2) & (table["cell"] == 3), "energy"] = np.nan
    result = compute_partial_correlations(table, ["same", "far"], ["lost"]).set_index(
        ["distance", "layer"]
    )
    rho = result["spearman"]
    assert rho["same"].isna().all()
    assert rho["far"].isna().tolist() == [False, False, True]
    expected = residual_correlation(table[table["layer"] == 1], "far", "lost", ["energy"])
    assert rho["far", 1] == pytest.approx(expected, abs=1e-9)
    with pytest.raises(StatsError, match="controls: the table has no column 'colour'"):
        compute_partial_correlations(table, ["far"], ["lost"], ["colour"])


def test_halves_give_the_known_reliability() -> None:
    """Normal scores with noise 0.8; with many cells per group, ranks lose little."""
    table = random_table(40, cells=400)
    table["lost"] = (table["lost_odd"] + table["lost_even"]) / 2
    (row,) = measure_reliability(table, ["lost"]).itertuples()
    truth = 1 + 1 / 12  # the variance that both halves share
    assert row.reliability == pytest.approx(truth / (truth + 0.8**2 / 2), abs=0.02)
    assert (row.source, row.groups) == ("halves", 40)
    rho = [
        scipy.stats.spearmanr(group["lost_odd"], group["lost_even"])[0]
        for _, group in table.groupby("layer")
    ]
    mean = np.mean(rho)
    assert row.reliability == pytest.approx(2 * mean / (1 + mean), abs=1e-12)


def test_a_standard_error_gives_the_reliability_of_draws() -> None:
    table = random_table(10, cells=300).drop(columns=["lost_odd", "lost_even"])
    rng = np.random.default_rng(5)
    truth = table["lost"].to_numpy()
    table["lost_error"] = rng.uniform(0.4, 0.6, len(table))
    table["lost"] = truth + table["lost_error"] * rng.standard_normal(len(table))
    (row,) = measure_reliability(table, ["lost"]).itertuples()
    variance = truth.var()
    noise = (table["lost_error"] ** 2).mean()
    assert row.reliability == pytest.approx(variance / (variance + noise), abs=0.03)
    assert (row.source, row.groups) == ("draws", 10)
    # Unknown for a change with neither halves nor an error, and for a constant change.
    assert measure_reliability(table, ["far"]).empty
    table["lost"] = 1.0
    assert measure_reliability(table, ["lost"])["reliability"].isna().all()


def test_corrected_correlations_equal_those_without_noise() -> None:
    rng = np.random.default_rng(6)
    table = random_table(30, cells=400, seed=6)
    truth = table["lost"].to_numpy()
    table["near"] = truth + rng.standard_normal(len(table))
    clean = summarise(compute_correlations(table, ["near"], ["lost"]))["spearman"][0]
    table["lost"] = (table["lost_odd"] + table["lost_even"]) / 2
    means = summarise(compute_correlations(table, ["near"], ["lost"]))
    (row,) = correct_for_noise(means, measure_reliability(table, ["lost"])).itertuples()
    assert row.spearman < clean - 0.03
    assert row.corrected == pytest.approx(clean, abs=0.01)
    assert row.corrected == row.spearman / np.sqrt(row.reliability)
    # Halves with a negative correlation give no reliability to correct by.
    table["lost_even"] = -table["lost_odd"]
    (row,) = correct_for_noise(means, measure_reliability(table, ["lost"])).itertuples()
    assert np.isnan(row.corrected)
