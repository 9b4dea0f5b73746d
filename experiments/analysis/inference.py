"""Contrasts of mean correlations, the study's mixed model, and its three claims."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]

from repsim_kernels.experiments.analysis.correlations import RESULTS, check_columns
from repsim_kernels.experiments.analysis.resampling import compute_intervals as compute_intervals
from repsim_kernels.experiments.analysis.resampling import fisher_z as fisher_z
from repsim_kernels.experiments.analysis.resampling import holm as holm
from repsim_kernels.experiments.analysis.resampling import jackknife, sign_flips
from repsim_kernels.experiments.columns import BASELINE
from repsim_kernels.experiments.errors import StatsError

LEADERS = ("cka", "procrustes")
CCA_METRICS = ("pwcca", "cca", "cca_squared")
_ROUNDING = 1e-12  # a sum below this share of its terms is rounding, and counts as 0
_BOUNDARY = 1e-4  # share of the residual variance: an optimiser gets no closer to 0

CLUSTER = "class"  # the sampled unit, over which intervals and tests are computed


@dataclass(frozen=True)
class Contrast:
    """A difference of mean Fisher z, with its 95 % interval and two-sided p."""

    name: str
    estimate: float
    low: float
    high: float
    p: float
    clusters: int


@dataclass(frozen=True)
class MixedModel:
    """The contrasts of a mixed model; ``variance`` is that of the random intercept."""

    contrasts: list[Contrast]
    boundary: bool
    variance: float
    clusters: int
    observations: int


@dataclass(frozen=True)
class Claim:
    """A claim of the study: held, not held, or not decided (None)."""

    number: int
    text: str
    held: bool | None
    estimate: float
    low: float
    high: float
    p: float
    details: list[str]


def difference_weights(
    plus: tuple[Sequence[str], Sequence[str]], minus: tuple[Sequence[str], Sequence[str]]
) -> dict[tuple[str, str], float]:
    """Weights of one mean minus another, each over all pairs of its (distances, changes)."""
    weights: dict[tuple[str, str], float] = {}
    for sign, (distances, changes) in ((1, plus), (-1, minus)):
        for pair in itertools.product(distances, changes):
            weights[pair] = weights.get(pair, 0) + sign / (len(distances) * len(changes))
    return weights


def compare(
    per_group: pd.DataFrame, weights: Mapping[tuple[str, str], float], name: str = ""
) -> Contrast:
    """Test, paired by group, whether a weighted sum of mean Fisher z is 0.

    Parameters
    ----------
    per_group : DataFrame
        The result of :func:`compute_correlations`.
    weights : mapping of (distance, change) to float
        The weights of the sum; :func:`difference_weights` makes those of a difference of means.
    name : str
        Name of the contrast.

    Returns
    -------
    Contrast
        The value of a class is the mean of the sum over those of its groups in which all pairs are
        known. The estimate is the mean over the classes that have a value, with its jackknife-t
        interval; p is from :func:`sign_flips`. NaN for fewer than two classes.

    Raises
    ------
    StatsError
        A column or a pair is missing, there are no rows, or a group has duplicate rows of a pair.
    """
    z = _fisher_z_table(per_group, list(weights))
    terms = z * np.array(list(weights.values()))
    total, size = (t.sum(axis=1, skipna=False).dropna() for t in (terms, terms.abs()))
    total = total.where(total.abs() > _ROUNDING * size, 0.0)
    values = total.groupby(level=CLUSTER, observed=True).mean().to_numpy()
    estimate, low, high = map(float, jackknife(values, np.ones(len(values))))
    return Contrast(name, estimate, low, high, float(sign_flips(values)), len(values))


def fit_mixed_model(per_group: pd.DataFrame, performance: str, decodability: str) -> MixedModel:
    """Fit the study's mixed model, ``z ~ function * metric + (1 | class)``.

    Parameters
    ----------
    per_group : DataFrame
        The result of :func:`compute_correlations` for one model.
    performance, decodability : str
        The two changes that are the levels of ``function``.

    Returns
    -------
    MixedModel
        Three contrasts of the fixed effects: decodability minus performance; {CKA, Procrustes}
        minus {PWCCA, mean CCA, mean squared CCA}; and the second for decodability minus the second
        for performance. They are over those metrics that the table has. Intervals and p assume
        normality, as in statsmodels. ``boundary`` is true if the variance of the random intercept
        is 0, to an optimiser's accuracy, or if no optimum was reached; the numbers are still those
        of the fit.

    Raises
    ------
    StatsError
        A column, a change or all metrics of one side are missing, there are fewer than two
        classes, or the residual is 0.

    Notes
    -----
    There is one value per class, metric and function: the mean of Fisher's z over the layers where
    it is known. The fit is by REML. The fixed effects are coded as the means of metric x function,
    which span the same space as ``function * metric``.
    """
    from statsmodels.regression import mixed_linear_model  # type: ignore[import-untyped]

    check_columns(per_group, per_group=RESULTS[:3], cluster=[CLUSTER])
    leaders, cca_metrics = (_select_present(per_group, side) for side in (LEADERS, CCA_METRICS))
    for side, present in ((LEADERS, leaders), (CCA_METRICS, cca_metrics)):
        if not present:
            raise StatsError(f"per_group: no distance among {', '.join(side)}; expected one")
    pairs = list(itertools.product([*leaders, *cca_metrics], (performance, decodability)))
    means = _fisher_z_table(per_group, pairs).groupby(level=CLUSTER, observed=True).mean()
    means = means.loc[means.notna().any(axis=1)]
    for pair in pairs:
        if means[pair].isna().all():
            raise StatsError(f"per_group: {pair[0]} against {pair[1]} is NaN in all groups")
    if len(means) < 2:
        raise StatsError(f"per_group: {len(means)} {CLUSTER} with values; expected 2 or more")
    row, column = np.nonzero(means.notna().to_numpy())
    y, design = means.to_numpy()[row, column], np.eye(len(pairs))[column]
    additive = np.hstack([design, np.eye(len(means))[row]])
    residual = y - additive @ np.linalg.lstsq(additive, y, rcond=None)[0]
    if residual @ residual <= (_ROUNDING**2) * (y @ y):
        raise StatsError(f"per_group: {CLUSTER}, metric and change leave no residual; expected one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of variances below 0.01, whatever the unit
        try:
            # The gradient methods (of statsmodels 0.15) stop early if the variance is small.
            fit = mixed_linear_model.MixedLM(y, design, groups=row).fit(reml=True, method="nm")
        except (np.linalg.LinAlgError, ValueError) as reason:
            raise StatsError(f"per_group: the mixed model can't be fitted ({reason})") from None
    variance, scale = float(fit.cov_re[0, 0]), float(fit.scale)
    blocks = variance * (row[:, None] == row) + scale * np.eye(len(y))
    covariance = np.linalg.inv(design.T @ np.linalg.solve(blocks, design))
    contrasts = []
    for name, weights in _weigh_contrasts(leaders, cca_metrics, performance, decodability).items():
        w = np.array([weights.get(pair, 0.0) for pair in pairs])
        estimate, error = float(w @ fit.fe_params), float(np.sqrt(w @ covariance @ w))
        reach = error * float(scipy.stats.norm.ppf(0.975))
        p = float(2 * scipy.stats.norm.sf(abs(estimate) / error))
        contrasts.append(
            Contrast(name, estimate, estimate - reach, estimate + reach, p, len(means))
        )
    boundary = variance < _BOUNDARY * scale or not fit.converged
    return MixedModel(contrasts, bool(boundary), variance, len(means), len(y))


def compare_with_baseline(per_group: pd.DataFrame, change: str) -> list[Contrast]:
    """Test whether each metric follows a change better than the removed energy does.

    Parameters
    ----------
    per_group : DataFrame
        The result of :func:`compute_correlations` for one model; the baseline is a distance.
    change : str
        The function change.

    Returns
    -------
    list of Contrast
        One for each metric, under its name: the metric's mean Fisher z minus the baseline's, from
        :func:`compare`, with p Holm-adjusted over the metrics.

    Raises
    ------
    StatsError
        A column or the baseline is missing.
    """
    return _adjust_p(
        compare(per_group, {(name, change): 1, (BASELINE, change): -1}, name)
        for name in _list_metrics(per_group)
    )


def judge_claims(per_group: pd.DataFrame, performance: str, decodability: str) -> list[Claim]:
    """Judge the three claims of the study for one model: held, not held, or not decided.

    Parameters
    ----------
    per_group, performance, decodability
        As for :func:`fit_mixed_model`.

    Returns
    -------
    list of Claim
        A claim is held if the 95 % jackknife-t interval of its contrast (:func:`compare`) is above
        0, not held if it is below, and not decided (None) if it contains 0 or is unknown. Claim 1
        has a contrast for each distance except the baseline. It is held if all intervals are above
        0, and not held if one is below. Its numbers are those of the metric that supports it least:
        the one whose upper end is lowest if the claim is not held, and the one whose lower end is
        lowest otherwise. p is Holm-adjusted over all contrasts of the three claims, and does not
        affect the verdict. ``details`` has a line for what is missing and for each contrast.

    Raises
    ------
    StatsError
        A column is missing, or there are rows of more than one model.
    """
    check_columns(per_group, per_group=RESULTS[:3], cluster=[CLUSTER])
    if "model" in per_group and per_group["model"].nunique() > 1:
        raise StatsError("per_group: rows of more than one model; expected those of one")
    metrics = _list_metrics(per_group)
    leaders, cca_metrics = (_select_present(per_group, side) for side in (LEADERS, CCA_METRICS))
    _, lead, interaction = _weigh_contrasts(leaders, cca_metrics, performance, decodability).items()
    absent = [c for c in (performance, decodability) if c not in set(per_group["change"])]
    no_change = [f"the table has no change {name!r}" for name in absent]
    no_side = [*no_change] + [
        f"the table has none of {', '.join(side)}"
        for side, present in ((LEADERS, leaders), (CCA_METRICS, cca_metrics))
        if not present
    ]
    specifications = (  # for each claim: its text, its contrasts, and what is missing for it
        (
            "Every metric follows decodability more than network performance.",
            {m: difference_weights(([m], [decodability]), ([m], [performance])) for m in metrics},
            no_change if metrics else [*no_change, "the table has no metric"],
        ),
        (
            "CKA and Procrustes are ahead of the regularised CCA metrics on average.",
            dict([lead]),
            no_side,
        ),
        (
            "The lead of CKA and Procrustes is smaller for performance than for decodability.",
            dict([interaction]),
            no_side,
        ),
    )
    contrasts = [{} if missing else weights for _, weights, missing in specifications]
    tests = iter(_adjust_p(compare(per_group, w, m) for each in contrasts for m, w in each.items()))
    return [
        _judge(number, text, list(itertools.islice(tests, len(each))), missing)
        for number, ((text, _, missing), each) in enumerate(
            zip(specifications, contrasts, strict=True), 1
        )
    ]


def _judge(number: int, text: str, tests: list[Contrast], missing: list[str]) -> Claim:
    """Judge a claim by its contrasts; it is held only if all of them are above 0."""
    known = [test for test in tests if test.clusters > 1]
    details = [*missing, *map(_describe_contrast, tests)]
    if not known:
        return Claim(number, text, None, math.nan, math.nan, math.nan, math.nan, details)
    weakest = min(known, key=lambda test: test.high)
    held: bool | None = None
    if weakest.high < 0:
        held = False
    else:
        weakest = min(known, key=lambda test: test.low)
        if weakest.low > 0 and len(known) == len(tests):
            held = True
    return Claim(
        number, text, held, weakest.estimate, weakest.low, weakest.high, weakest.p, details
    )


def _describe_contrast(test: Contrast) -> str:
    if test.clusters < 2:
        return f"{test.name}: {test.clusters} classes have values; at least 2 are needed"
    return (
        f"{test.name}: {test.estimate:+.3f} [{test.low:+.3f}, {test.high:+.3f}], "
        f"p {test.p:.2g}, {test.clusters} classes"
    )


def _weigh_contrasts(
    leaders: list[str], cca_metrics: list[str], performance: str, decodability: str
) -> dict[str, dict[tuple[str, str], float]]:
    """Make the weights of the mixed model's three contrasts; none for a side without metrics."""
    both, metrics = [performance, decodability], [*leaders, *cca_metrics]
    leads = [
        difference_weights((leaders, [c]), (cca_metrics, [c])) for c in (decodability, performance)
    ]
    return {
        "decodability minus performance": difference_weights(
            (metrics, [decodability]), (metrics, [performance])
        ),
        "CKA and Procrustes minus CCA": difference_weights((leaders, both), (cca_metrics, both)),
        "this lead for decodability minus that for performance": leads[0]
        | {pair: -weight for pair, weight in leads[1].items()},
    }


def _adjust_p(tests: Iterable[Contrast]) -> list[Contrast]:
    """Replace the p values of contrasts by the Holm-adjusted ones."""
    tests = list(tests)
    adjusted = holm([test.p for test in tests])
    return [replace(test, p=float(p)) for test, p in zip(tests, adjusted, strict=True)]


def _list_metrics(per_group: pd.DataFrame) -> list[str]:
    return [name for name in per_group["distance"].unique() if name != BASELINE]


def _select_present(per_group: pd.DataFrame, distances: Sequence[str]) -> list[str]:
    return [name for name in distances if (per_group["distance"] == name).any()]


def _fisher_z_table(per_group: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Fisher z, with a row for each group and a column for each (distance, change)."""
    check_columns(per_group, per_group=RESULTS[:3], cluster=[CLUSTER])
    present = pd.MultiIndex.from_frame(per_group[["distance", "change"]])
    for distance, change in pairs:
        if (distance, change) not in present:
            raise StatsError(f"per_group: no row of {distance!r} against {change!r}")
    by = [name for name in per_group.columns if name not in RESULTS]
    rows = per_group.loc[present.isin(list(pairs))]
    if rows.duplicated([*by, "distance", "change"]).any():
        raise StatsError(f"per_group: duplicate pairs in a group; expected groups by {by}")
    keys = rows.set_index([*by, "distance", "change"])
    z = pd.Series(fisher_z(keys["spearman"], keys["n"]), keys.index)
    return z.unstack(["distance", "change"])[list(pairs)]
