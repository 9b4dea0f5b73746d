"""What the study asks of its correlations: contrasts, a mixed model, and its claims."""

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
from repsim_kernels.experiments.analysis.resampling import fisher_z as fisher_z
from repsim_kernels.experiments.analysis.resampling import holm as holm
from repsim_kernels.experiments.analysis.resampling import intervals as intervals
from repsim_kernels.experiments.analysis.resampling import jackknife, sign_flips
from repsim_kernels.experiments.columns import BASELINE
from repsim_kernels.experiments.errors import StatsError

AHEAD = ("cka", "procrustes")
BEHIND = ("pwcca", "cca", "cca_squared")
_ROUNDING = 1e-12  # of a sum's terms: what is no more is 0
_BOUNDARY = 1e-4  # of the residual's variance: an optimiser comes no nearer to 0

CLUSTER = "class"  # what was sampled: intervals and tests are over it


@dataclass(frozen=True)
class Contrast:
    """A difference of mean Fisher z with its 95 % interval and its two-sided p."""

    name: str
    estimate: float
    low: float
    high: float
    p: float
    clusters: int


@dataclass(frozen=True)
class MixedModel:
    """The contrasts of a mixed model; ``variance`` is of the random intercept."""

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


def versus(
    better: tuple[Sequence[str], Sequence[str]], worse: tuple[Sequence[str], Sequence[str]]
) -> dict[tuple[str, str], float]:
    """Weights of one mean less another, each over all pairs of its (distances, changes)."""
    weights: dict[tuple[str, str], float] = {}
    for sign, (distances, changes) in ((1, better), (-1, worse)):
        for pair in itertools.product(distances, changes):
            weights[pair] = weights.get(pair, 0) + sign / (len(distances) * len(changes))
    return weights


def compare(
    per_group: pd.DataFrame, weights: Mapping[tuple[str, str], float], name: str = ""
) -> Contrast:
    """Paired test of whether a weighted sum of mean Fisher z is 0.

    Parameters
    ----------
    per_group : DataFrame
        What :func:`correlations` returns.
    weights : mapping of (distance, change) to float
        The sum; that of a difference of means is :func:`versus`.
    name : str
        Of the contrast.

    Returns
    -------
    Contrast
        A class's value is the mean of the sum over its groups in which all pairs are known. The
        estimate is the mean over the classes that have one, with its jackknife-t interval; p is
        that of :func:`sign_flips`. NaN for fewer than two classes.

    Raises
    ------
    StatsError
        A column or a pair is missing, there are no rows, or a group has two rows of a pair.
    """
    z = _wide(per_group, list(weights))
    terms = z * np.array(list(weights.values()))
    total, size = (t.sum(axis=1, skipna=False).dropna() for t in (terms, terms.abs()))
    total = total.where(total.abs() > _ROUNDING * size, 0.0)
    values = total.groupby(level=CLUSTER, observed=True).mean().to_numpy()
    estimate, low, high = map(float, jackknife(values, np.ones(len(values))))
    return Contrast(name, estimate, low, high, float(sign_flips(values)), len(values))


def mixed_model(per_group: pd.DataFrame, performance: str, decodability: str) -> MixedModel:
    """The study's mixed model, ``z ~ function * metric + (1 | class)``, and its three contrasts.

    Parameters
    ----------
    per_group : DataFrame
        What :func:`correlations` returns, of one model.
    performance, decodability : str
        The two changes that are the function.

    Returns
    -------
    MixedModel
        Contrasts of the fixed effects: decodability less performance; {CKA, Procrustes} less
        {PWCCA, mean CCA, mean squared CCA}; the second for decodability less that for performance.
        Of the metrics those that the table has. Intervals and p are normal, as statsmodels gives
        them. ``boundary`` says that the random intercept's variance is 0, to an optimiser's
        accuracy, or that no optimum was reached; the numbers are those of the fit all the same.

    Raises
    ------
    StatsError
        A column, a change or a side's metrics are missing, there are fewer than two clusters, or
        the table leaves no residual.

    Notes
    -----
    One value per class, metric and function: the mean of Fisher's z over the layers where it is
    known. REML. The fixed effects are coded as the means of metric x function, which spans what
    ``function * metric`` does.
    """
    from statsmodels.regression import mixed_linear_model  # type: ignore[import-untyped]

    check_columns(per_group, per_group=RESULTS[:3], cluster=[CLUSTER])
    ahead, behind = (_present(per_group, side) for side in (AHEAD, BEHIND))
    for side, found in ((AHEAD, ahead), (BEHIND, behind)):
        if not found:
            raise StatsError(f"per_group: has no distance of {', '.join(side)}; expected one")
    pairs = list(itertools.product([*ahead, *behind], (performance, decodability)))
    means = _wide(per_group, pairs).groupby(level=CLUSTER, observed=True).mean()
    means = means.loc[means.notna().any(axis=1)]
    for pair in pairs:
        if means[pair].isna().all():
            raise StatsError(f"per_group: {pair[0]} against {pair[1]} is nowhere known")
    if len(means) < 2:
        raise StatsError(f"per_group: has {len(means)} {CLUSTER} with values; expected at least 2")
    row, column = np.nonzero(means.notna().to_numpy())
    y, design = means.to_numpy()[row, column], np.eye(len(pairs))[column]
    additive = np.hstack([design, np.eye(len(means))[row]])
    left = y - additive @ np.linalg.lstsq(additive, y, rcond=None)[0]
    if left @ left <= (_ROUNDING**2) * (y @ y):
        raise StatsError(f"per_group: {CLUSTER}, metric and change leave no residual; expected one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statsmodels' is of a variance below 0.01, in any unit
        try:
            # Its other methods stop short of a small variance (0.15: those that follow a gradient).
            fit = mixed_linear_model.MixedLM(y, design, groups=row).fit(reml=True, method="nm")
        except (np.linalg.LinAlgError, ValueError) as reason:
            raise StatsError(f"per_group: the mixed model has no fit ({reason})") from None
    variance, scale = float(fit.cov_re[0, 0]), float(fit.scale)
    blocks = variance * (row[:, None] == row) + scale * np.eye(len(y))
    covariance = np.linalg.inv(design.T @ np.linalg.solve(blocks, design))
    contrasts = []
    for name, weights in _contrasts(ahead, behind, performance, decodability).items():
        w = np.array([weights.get(pair, 0.0) for pair in pairs])
        estimate, error = float(w @ fit.fe_params), float(np.sqrt(w @ covariance @ w))
        reach = error * float(scipy.stats.norm.ppf(0.975))
        p = float(2 * scipy.stats.norm.sf(abs(estimate) / error))
        contrasts.append(
            Contrast(name, estimate, estimate - reach, estimate + reach, p, len(means))
        )
    boundary = variance < _BOUNDARY * scale or not fit.converged
    return MixedModel(contrasts, bool(boundary), variance, len(means), len(y))


def beyond(per_group: pd.DataFrame, change: str) -> list[Contrast]:
    """Whether each metric follows a change more than the energy that was removed does.

    Parameters
    ----------
    per_group : DataFrame
        What :func:`correlations` returns, of one model and with the baseline
        among its distances.
    change : str
        The function change.

    Returns
    -------
    list of Contrast
        For each metric, whose name it has, its mean Fisher z less the baseline's, as
        :func:`compare` gives it; p is Holm-adjusted over the metrics.

    Raises
    ------
    StatsError
        A column or the baseline is missing.
    """
    return _adjust(
        compare(per_group, {(name, change): 1, (BASELINE, change): -1}, name)
        for name in _metrics(per_group)
    )


def claims(per_group: pd.DataFrame, performance: str, decodability: str) -> list[Claim]:
    """The three claims of the study, for one model: held, not held, or not decided.

    Parameters
    ----------
    per_group, performance, decodability
        As :func:`mixed_model` takes them.

    Returns
    -------
    list of Claim
        Each is held if the 95 % jackknife-t interval of its contrast (:func:`compare`) is above 0,
        not held if it is below, and not decided (None) if it contains 0 or is not known. Claim 1
        has a contrast for each distance but the baseline. It is held if all are above 0, and not
        held if one is below; its numbers are of the metric that decides: the one whose upper end
        is lowest if it is not held, and whose lower end is lowest otherwise. p is Holm-adjusted
        over all contrasts of the three claims, and doesn't decide. ``details`` says what is
        missing, or has a line for each contrast.

    Raises
    ------
    StatsError
        A column is missing, or there are rows of more than one model.
    """
    check_columns(per_group, per_group=RESULTS[:3], cluster=[CLUSTER])
    if "model" in per_group and per_group["model"].nunique() > 1:
        raise StatsError("per_group: has rows of more than one model; expected those of one")
    metrics = _metrics(per_group)
    ahead, behind = (_present(per_group, side) for side in (AHEAD, BEHIND))
    _, lead, shrinks = _contrasts(ahead, behind, performance, decodability).items()
    lacking = [c for c in (performance, decodability) if c not in set(per_group["change"])]
    why = [f"the table has no change {name!r}" for name in lacking]
    sides = [*why] + [
        f"the table has none of {', '.join(side)}"
        for side, found in ((AHEAD, ahead), (BEHIND, behind))
        if not found
    ]
    asked = (
        (
            "Every metric follows decodability more than network performance.",
            {m: versus(([m], [decodability]), ([m], [performance])) for m in metrics},
            why if metrics else [*why, "the table has no metric"],
        ),
        (
            "CKA and Procrustes are ahead of the regularised CCA metrics on average.",
            dict([lead]),
            sides,
        ),
        (
            "The lead of CKA and Procrustes is smaller for performance than for decodability.",
            dict([shrinks]),
            sides,
        ),
    )
    contrasts = [{} if missing else named for _, named, missing in asked]
    tests = iter(_adjust(compare(per_group, w, m) for own in contrasts for m, w in own.items()))
    return [
        _claim(number, text, list(itertools.islice(tests, len(own))), missing)
        for number, ((text, _, missing), own) in enumerate(zip(asked, contrasts, strict=True), 1)
    ]


def _claim(number: int, text: str, tests: list[Contrast], details: list[str]) -> Claim:
    """What the contrasts of a claim, all of which it needs, say of it."""
    known = [test for test in tests if test.clusters > 1]
    details = [*details, *map(_line, tests)]
    if not known:
        return Claim(number, text, None, math.nan, math.nan, math.nan, math.nan, details)
    lowest = min(known, key=lambda test: test.high)
    held: bool | None = None
    if lowest.high < 0:
        held = False
    else:
        lowest = min(known, key=lambda test: test.low)
        if lowest.low > 0 and len(known) == len(tests):
            held = True
    return Claim(number, text, held, lowest.estimate, lowest.low, lowest.high, lowest.p, details)


def _line(test: Contrast) -> str:
    if test.clusters < 2:
        return f"{test.name}: {test.clusters} classes have values; at least 2 are needed"
    return (
        f"{test.name}: {test.estimate:+.3f} [{test.low:+.3f}, {test.high:+.3f}], "
        f"p {test.p:.2g}, {test.clusters} classes"
    )


def _contrasts(
    ahead: list[str], behind: list[str], performance: str, decodability: str
) -> dict[str, dict[tuple[str, str], float]]:
    """The three contrasts of the mixed model; those of a side without metrics have no weights."""
    both, metrics = [performance, decodability], [*ahead, *behind]
    leads = [versus((ahead, [c]), (behind, [c])) for c in (decodability, performance)]
    return {
        "decodability less performance": versus(
            (metrics, [decodability]), (metrics, [performance])
        ),
        "CKA and Procrustes less CCA": versus((ahead, both), (behind, both)),
        "that lead for decodability less that for performance": leads[0]
        | {pair: -weight for pair, weight in leads[1].items()},
    }


def _adjust(tests: Iterable[Contrast]) -> list[Contrast]:
    """Contrasts with their p values Holm-adjusted over all of them."""
    tests = list(tests)
    adjusted = holm([test.p for test in tests])
    return [replace(test, p=float(p)) for test, p in zip(tests, adjusted, strict=True)]


def _metrics(per_group: pd.DataFrame) -> list[str]:
    return [name for name in per_group["distance"].unique() if name != BASELINE]


def _present(per_group: pd.DataFrame, distances: Sequence[str]) -> list[str]:
    return [name for name in distances if (per_group["distance"] == name).any()]


def _wide(per_group: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Fisher z of each group, a row, and pair, a column."""
    check_columns(per_group, per_group=RESULTS[:3], cluster=[CLUSTER])
    have = pd.MultiIndex.from_frame(per_group[["distance", "change"]])
    for distance, change in pairs:
        if (distance, change) not in have:
            raise StatsError(f"per_group: has no row of {distance!r} against {change!r}")
    by = [name for name in per_group.columns if name not in RESULTS]
    rows = per_group.loc[have.isin(list(pairs))]
    if rows.duplicated([*by, "distance", "change"]).any():
        raise StatsError(f"per_group: has a pair twice in a group; expected groups by {by}")
    keys = rows.set_index([*by, "distance", "change"])
    z = pd.Series(fisher_z(keys["spearman"], keys["n"]), keys.index)
    return z.unstack(["distance", "change"])[list(pairs)]
