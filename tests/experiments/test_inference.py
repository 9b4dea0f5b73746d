"""Contrasts, the mixed model and claims, against SciPy, statsmodels and known effects."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from _correlations import BOTH, METRICS, make_table, random_z
from statsmodels.regression.mixed_linear_model import MixedLM

from repsim_kernels.experiments.analysis.inference import (
    compare,
    compare_with_baseline,
    difference_weights,
    fit_mixed_model,
    holm,
    judge_claims,
)
from repsim_kernels.experiments.errors import StatsError

# Comparisons


@pytest.mark.parametrize("classes", [2, 5, 10, 13])
def test_comparison_equals_scipys_permutation_test_and_t_interval(classes):
    z = random_z(classes=classes, seed=classes, lead=0.05)
    z[0, 1, 0, 1] = np.nan
    weights = difference_weights((["cka", "procrustes"], ["dec"]), (["cca"], BOTH))
    result = compare(make_table(z), weights, "name")
    better, worse = z[:, :, :2, 1].mean(-1), z[:, :, 3].mean(-1)
    values = np.nanmean(better - worse, axis=1)
    theirs = scipy.stats.permutation_test(
        (values, np.zeros(classes)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    interval = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert result.name == "name"
    assert result.clusters == classes
    np.testing.assert_allclose(result.p, theirs.pvalue, rtol=1e-12)
    np.testing.assert_allclose(result.estimate, values.mean(), rtol=1e-10)
    np.testing.assert_allclose([result.low, result.high], interval, rtol=1e-10)


def test_comparison_uses_groups_that_both_sides_have():
    z = random_z(classes=4, layers=2)
    z[0, 0, 0, 0] = 9.0
    z[0, 0, 2, 0] = np.nan
    z[3, :, 2, 0] = np.nan
    result = compare(make_table(z), difference_weights((["cka"], ["perf"]), (["pwcca"], ["perf"])))
    gain = z[:3, :, 0, 0] - z[:3, :, 2, 0]
    assert result.clusters == 3
    np.testing.assert_allclose(result.estimate, np.nanmean(gain, axis=1).mean())


def test_comparison_refuses_missing_and_duplicate_pairs():
    per_group = make_table(random_z())
    with pytest.raises(StatsError, match="no row of 'rsa' against 'dec'"):
        compare(per_group, {("rsa", "dec"): 1.0})
    with pytest.raises(StatsError, match="duplicate pairs in a group"):
        compare(pd.concat([per_group, per_group]), {("cka", "dec"): 1.0})


def test_metrics_are_compared_with_the_baseline():
    z = np.concatenate([random_z(seed=4), random_z(seed=5)[:, :, :1]], axis=2)
    z[:, :, 0] = z[:, :, 5] + 0.3 + 0.05 * z[:, :, 1]
    per_group = make_table(z, (*METRICS, "energy"))
    result = compare_with_baseline(per_group, "dec")
    assert [test.name for test in result] == list(METRICS)
    separate = [compare(per_group, {(m, "dec"): 1, ("energy", "dec"): -1}) for m in METRICS]
    np.testing.assert_array_equal([t.estimate for t in result], [t.estimate for t in separate])
    np.testing.assert_array_equal([t.p for t in result], holm([t.p for t in separate]))
    assert result[0].low > 0.25
    with pytest.raises(StatsError, match="no row of 'energy' against 'dec'"):
        compare_with_baseline(make_table(random_z()), "dec")


# The mixed model


def test_balanced_mixed_model_equals_the_anova():
    z = random_z(seed=9, dec=0.2, lead=0.1, shrink=0.1)
    result = fit_mixed_model(make_table(z), "perf", "dec")
    means = z.mean(1).reshape(10, 10)
    cells = means.mean(0).reshape(5, 2)
    deviations = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    residual = (deviations**2).sum() / (9 * 9)
    between = 10 * means.mean(1).var(ddof=1)
    ahead, behind = cells[:2].mean(0), cells[2:].mean(0)
    estimates = [
        (cells[:, 1] - cells[:, 0]).mean(),
        (ahead - behind).mean(),
        (ahead - behind)[1] - (ahead - behind)[0],
    ]
    weights = [10 * 0.2**2, 4 * 0.25**2 + 6 / 6**2, 4 * 0.5**2 + 6 / 3**2]
    errors = np.sqrt(residual * np.array(weights) / 10)
    contrasts = result.contrasts
    np.testing.assert_allclose([c.estimate for c in contrasts], estimates, rtol=1e-8)
    half = [(c.high - c.low) / 2 / scipy.stats.norm.ppf(0.975) for c in contrasts]
    np.testing.assert_allclose(half, errors, rtol=1e-4)
    np.testing.assert_allclose(
        [c.p for c in contrasts], 2 * scipy.stats.norm.sf(np.abs(estimates) / errors), rtol=0.02
    )
    np.testing.assert_allclose(result.variance, (between - residual) / 10, rtol=1e-3)
    assert not result.boundary
    assert (result.clusters, result.observations) == (10, 100)


def test_unbalanced_mixed_model_equals_that_of_the_formula():
    z = random_z(classes=8, seed=10, dec=0.2, lead=0.1)
    z[0, :, 1, 0] = z[5, :, 3, 1] = z[6, :2, 0, 0] = np.nan
    result = fit_mixed_model(make_table(z), "perf", "dec")
    rows = make_table(z).assign(z=z.ravel()).dropna()
    rows = rows.groupby(["class", "distance", "change"], as_index=False).z.mean()
    fit = MixedLM.from_formula("z ~ change * distance", rows, groups="class").fit(method="powell")
    cells = pd.DataFrame(itertools.product(METRICS, BOTH), columns=["distance", "change"])
    new = np.asarray(fit.predict(cells)).reshape(5, 2)
    assert result.observations == 78
    np.testing.assert_allclose(
        result.contrasts[0].estimate, (new[:, 1] - new[:, 0]).mean(), rtol=1e-4
    )
    lead = new[:2].mean(0) - new[2:].mean(0)
    np.testing.assert_allclose(result.contrasts[1].estimate, lead.mean(), rtol=1e-4)
    np.testing.assert_allclose(result.contrasts[2].estimate, lead[1] - lead[0], rtol=1e-4)
    np.testing.assert_allclose(result.variance, float(fit.cov_re.iloc[0, 0]), rtol=1e-2)


def test_mixed_model_without_variance_between_classes_is_at_the_boundary():
    z = random_z(seed=11, spread=0.0, dec=0.2)
    z -= z.mean((1, 2, 3), keepdims=True)
    result = fit_mixed_model(make_table(z), "perf", "dec")
    assert result.boundary
    assert result.variance < 1e-5
    means = z.mean(1).reshape(10, 10)
    residual = ((means - means.mean(0)) ** 2).sum() / (100 - 10)
    first = result.contrasts[0]
    np.testing.assert_allclose(first.estimate, (z[..., 1] - z[..., 0]).mean())
    width = 2 * scipy.stats.norm.ppf(0.975) * np.sqrt(residual * 10 * 0.2**2 / 10)
    np.testing.assert_allclose(first.high - first.low, width, rtol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_small_variance_equals_the_anovas_and_a_negative_one_is_at_the_boundary(seed):
    z = random_z(seed=seed, spread=0.02)
    result = fit_mixed_model(make_table(z), "perf", "dec")
    means = z.mean(1).reshape(10, 10)
    deviations = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    residual = (deviations**2).sum() / (9 * 9)
    variance = means.mean(1).var(ddof=1) - residual / 10
    assert result.boundary == (variance <= 0)
    np.testing.assert_allclose(result.variance, max(variance, 0), atol=1e-3 * residual)


def test_boundary_does_not_depend_on_the_scale_of_z():
    z = random_z(seed=17, dec=0.2)
    whole, tenth = (fit_mixed_model(make_table(scale * z), "perf", "dec") for scale in (1, 0.1))
    assert not whole.boundary
    assert not tenth.boundary
    assert whole.variance > 0.01 > tenth.variance > 0
    np.testing.assert_allclose(tenth.variance, whole.variance / 100, rtol=1e-2)


def test_mixed_model_uses_present_metrics_and_names_a_missing_side():
    per_group = make_table(random_z(dec=0.2))
    few = per_group[per_group.distance.isin(["cka", "cca"])]
    assert fit_mixed_model(few, "perf", "dec").observations == 40
    with pytest.raises(StatsError, match="no distance among cka, procrustes"):
        fit_mixed_model(per_group[per_group.distance == "cca"], "perf", "dec")
    with pytest.raises(StatsError, match="no distance among pwcca, cca, cca_squared"):
        fit_mixed_model(per_group[per_group.distance == "cka"], "perf", "dec")
    with pytest.raises(StatsError, match="no row of 'cka' against 'loss'"):
        fit_mixed_model(few, "perf", "loss")
    with pytest.raises(StatsError, match="1 class with values; expected 2 or more"):
        fit_mixed_model(few[few["class"] == 0], "perf", "dec")
    unknown = few.assign(spearman=few.spearman.where(few.distance != "cka"))
    with pytest.raises(StatsError, match="cka against perf is NaN in all groups"):
        fit_mixed_model(unknown, "perf", "dec")


# Claims


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        ({"dec": 0.4, "lead": 0.2, "shrink": 0.2}, [True, True, True]),
        ({"dec": -0.4, "lead": -0.2, "shrink": -0.2}, [False, False, False]),
        ({"dec": 0.4, "lead": 0.2, "shrink": -0.2}, [True, True, False]),
    ],
)
def test_claims_match_the_known_effects(effects, expected):
    z = random_z(seed=12, noise=0.05, **effects)
    result = judge_claims(make_table(z), "perf", "dec")
    assert [claim.number for claim in result] == [1, 2, 3]
    assert [claim.held for claim in result] == expected
    assert [len(claim.details) for claim in result] == [5, 1, 1]
    assert all(claim.p == pytest.approx(7 * 2 / 2**10) for claim in result)
    second = compare(make_table(z), difference_weights((METRICS[:2], BOTH), (METRICS[2:], BOTH)))
    assert (result[1].estimate, result[1].low) == (second.estimate, second.low)


def test_claims_are_not_decided_if_intervals_contain_zero():
    z = random_z(seed=13, noise=0.05)
    means = z.mean((0, 1))
    z += means.mean() - means
    result = judge_claims(make_table(z), "perf", "dec")
    assert [claim.held for claim in result] == [None, None, None]
    assert all(claim.low < 0 < claim.high for claim in result)
    assert all(claim.p == 1 for claim in result)


def test_differences_from_rounding_decide_nothing():
    per_group = make_table(np.full((10, 3, 5, 2), 0.5))
    for claim in judge_claims(per_group, "perf", "dec"):
        assert (claim.held, claim.estimate, claim.low, claim.high) == (None, 0, 0, 0)
        assert claim.p == 1
    with pytest.raises(StatsError, match="leave no residual"):
        fit_mixed_model(per_group, "perf", "dec")


def test_one_metric_refutes_the_first_claim_and_the_baseline_cannot():
    z = random_z(seed=14, noise=0.02, dec=0.4)
    z[:, :, 3, 1] -= 0.8
    per_group = make_table(z)
    first = judge_claims(per_group, "perf", "dec")[0]
    gain = compare(per_group, difference_weights((["cca"], ["dec"]), (["cca"], ["perf"])))
    assert first.held is False
    assert first.estimate == gain.estimate
    renamed = per_group.replace({"distance": {"cca": "energy"}})
    assert judge_claims(renamed, "perf", "dec")[0].held is True
    z[:, :, 3, 1] = np.nan
    first = judge_claims(make_table(z), "perf", "dec")[0]
    assert first.held is None
    assert "cca: 0 classes have values; at least 2 are needed" in first.details


def test_first_claim_is_not_decided_if_one_metric_is_not():
    z = random_z(seed=18, noise=0.05, dec=0.4)
    z[:, :, 2, 1] += (z[:, :, 2, 0] - z[:, :, 2, 1]).mean()
    first = judge_claims(make_table(z), "perf", "dec")[0]
    gain = compare(make_table(z), difference_weights((["pwcca"], ["dec"]), (["pwcca"], ["perf"])))
    assert first.held is None
    assert (first.estimate, first.low, first.high) == (gain.estimate, gain.low, gain.high)
    assert first.low < 0 < first.high


def test_claims_list_missing_metrics_changes_and_classes():
    per_group = make_table(random_z(seed=15, dec=0.4, noise=0.02))
    result = judge_claims(per_group[per_group.distance == "cka"], "perf", "dec")
    assert [claim.held for claim in result] == [True, None, None]
    assert result[1].details == ["the table has none of pwcca, cca, cca_squared"]
    assert np.isnan(result[1].p)
    for claim in judge_claims(per_group, "loss", "dec"):
        assert claim.held is None
        assert claim.details == ["the table has no change 'loss'"]
    for claim in judge_claims(per_group[per_group["class"] == 0], "perf", "dec"):
        assert claim.held is None
        assert claim.details[0].endswith("1 classes have values; at least 2 are needed")
    two = pd.concat([per_group, per_group.assign(model="other")])
    with pytest.raises(StatsError, match="more than one model"):
        judge_claims(two, "perf", "dec")
