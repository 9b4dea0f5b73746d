"""What a report states about a network: correlations, claims, controls and data quality."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]

from repsim_kernels.experiments.analysis.controls import (
    compute_partial_correlations,
    correct_for_noise,
    measure_reliability,
)
from repsim_kernels.experiments.analysis.correlations import (
    change_columns,
    compute_correlations,
    distance_columns,
    summarise,
)
from repsim_kernels.experiments.analysis.inference import (
    Claim,
    MixedModel,
    compare_with_baseline,
    compute_intervals,
    fit_mixed_model,
    judge_claims,
)
from repsim_kernels.experiments.analysis.published import PUBLISHED
from repsim_kernels.experiments.analysis.shuffles import find_threshold
from repsim_kernels.experiments.columns import BASELINE, METRIC_NAMES, NAN_IMAGES
from repsim_kernels.experiments.errors import StatsError

GROUP = ["class", "layer"]
RANK_DEFICIT = "rank_deficit"
# A table's measure of decodability is the first of these that it has. The margin comes before the
# accuracy of the same probe, because accuracies of held-out stimuli tie in most cells.
DECODABILITY = ("decodability_paper", "margin_refit", "decodability_refit")
PLOTTED = ("rank_deficit", "log_probability", *DECODABILITY)
# What the cells of a run are, if not a grid by selectivity and magnitude.
CELL_KINDS = {
    "random": "a control, with neurons drawn at random into cells of the same sizes",
    "channels": "the channels of each layer, the same ones for all target classes",
    "heads": "the attention heads of each layer, the same ones for all target classes",
    "own": "chosen by the user, the same ones for all target classes",
}
_LEVEL = 0.01  # significance level of the test against chance
_MARGIN = 0.1  # accuracy above chance that is sufficient for a network with few classes


@dataclass(frozen=True)
class NetworkFindings:
    """The table of one network of a run, and all statistics that the page shows.

    Attributes
    ----------
    name : str
        Name on the page.
    name_in_run : str
        Name in the run's table and configuration.
    run : str
        Name of the run.
    table : DataFrame
        One row per cell.
    configuration, about : dict
        What the run's ``study.json`` records about the network.
    """

    name: str
    name_in_run: str
    run: str
    table: pd.DataFrame
    configuration: dict[str, Any]
    about: dict[str, Any]

    @cached_property
    def distances(self) -> list[str]:
        return distance_columns(self.table)

    @property
    def metrics(self) -> list[str]:
        """The distances except the baseline."""
        return [name for name in self.distances if name != BASELINE]

    @cached_property
    def changes(self) -> list[str]:
        return change_columns(self.table)

    @cached_property
    def plotted_changes(self) -> list[str]:
        """The changes that have figures: those of the claims and the ones close to them."""
        return [name for name in PLOTTED if name in self.changes] or self.changes[:4]

    @cached_property
    def decodability(self) -> str | None:
        """The change that measures decodability; None if the table has none."""
        return next((name for name in DECODABILITY if name in self.changes), None)

    @property
    def cell_kind(self) -> str:
        """How neurons were grouped into cells: "selectivity", or a key of `CELL_KINDS`."""
        kind = self.configuration.get("cells", "selectivity")
        return kind if isinstance(kind, str) else "own"  # a hash for each layer

    @property
    def fill(self) -> str:
        """What ablated neurons were set to, in words."""
        return "their means" if self.configuration.get("fill") == "mean" else "zero"

    @cached_property
    def cell_counts(self) -> list[int]:
        """The number of cells of each layer that ran."""
        counts = self.table.groupby("layer", observed=True)["cell"].nunique()
        return [int(counts[layer]) for layer in self.layers if layer in counts]

    @cached_property
    def near_chance(self) -> str | None:
        """The accuracy compared with chance, if it is near chance; no claim is judged then."""
        return describe_near_chance(self.about)

    @property
    def functions(self) -> tuple[str, str] | None:
        """The performance and decodability of the claims; None if no claim can be judged."""
        if self.near_chance or RANK_DEFICIT not in self.changes or self.decodability is None:
            return None
        return RANK_DEFICIT, self.decodability

    @cached_property
    def per_group(self) -> pd.DataFrame:
        return compute_correlations(self.table, self.distances, self.changes)

    @cached_property
    def estimates(self) -> pd.DataFrame:
        return compute_intervals(self.per_group)

    @cached_property
    def reliability(self) -> pd.DataFrame:
        return measure_reliability(self.table, self.changes)

    @cached_property
    def layers(self) -> list[str]:
        known = self.configuration.get("layers")
        return list(known or sorted(self.table["layer"].unique(), key=_natural_key))

    @cached_property
    def classes(self) -> list[str]:
        return list(self.configuration.get("classes") or map(str, self.table["class"].unique()))

    @property
    def n_groups(self) -> int:
        return int(self.table.groupby(GROUP, observed=True).ngroups)

    @cached_property
    def estimate_of(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Estimates and intervals, by (distance, change)."""
        return dict(self.estimates.set_index(["distance", "change"]).to_dict("index"))

    @cached_property
    def threshold(self) -> float:
        """The absolute value above which a mean correlation is beyond shuffled cells."""
        return find_threshold(self.table, self.distances, self.changes)

    @property
    def n_beyond(self) -> int:
        """The number of mean correlations beyond shuffled cells."""
        return int((self.estimates["estimate"].abs() > self.threshold).sum())

    @property
    def n_classes(self) -> int:
        """The number of classes that have a correlation."""
        return int(self.estimates["clusters"].max())

    @property
    def nan_images(self) -> str | None:
        return count_nan_images(self.table)

    @property
    def published(self) -> dict[str, tuple[float, float]] | None:
        return PUBLISHED.get(self.name_in_run)

    @property
    def reliable_changes(self) -> list[str]:
        """The changes whose correlations are corrected for noise."""
        return list(dict.fromkeys(change for _, change in self.corrected or ()))

    @cached_property
    def claims(self) -> list[tuple[Claim, list[str]]] | None:
        """The claims and the detail lines of each, with metrics under their names on the page."""
        if self.functions is None:
            return None
        judged = []
        for claim in judge_claims(self.per_group, *self.functions):
            parts = [detail.partition(": ") for detail in claim.details]
            details = [
                f"{METRIC_NAMES.get(name, name)}{colon}{rest}" for name, colon, rest in parts
            ]
            # A single line repeats the numbers of the claim, if it has numbers.
            repeats = len(details) == 1 and not math.isnan(claim.estimate)
            judged.append((claim, [] if repeats else details))
        return judged

    @cached_property
    def mixed(self) -> MixedModel | None:
        """The paper's mixed model; None if the table lacks something that it needs."""
        if self.functions is None:
            return None
        try:
            return fit_mixed_model(self.per_group, *self.functions)
        except StatsError:
            return None

    @cached_property
    def against_baseline(self) -> dict[str, tuple[list[str], list[str]]]:
        """For each change: the metrics that follow it better than the energy does, and worse."""
        if self.near_chance or BASELINE not in self.distances:
            return {}
        names = {}
        for change in filter(None, (RANK_DEFICIT, self.decodability)):
            if change in self.changes:
                tests = compare_with_baseline(self.per_group, change)
                if all(math.isnan(test.estimate) for test in tests):
                    continue  # no cell loses anything, or all lose the same
                better = [METRIC_NAMES[test.name] for test in tests if test.low > 0]
                worse = [METRIC_NAMES[test.name] for test in tests if test.high < 0]
                names[change] = better, worse
        return names

    @cached_property
    def following(self) -> dict[str, str]:
        """For each plotted change: which metrics follow it most and least, in words.

        Correlations count as equal if they agree to the page's two decimals.
        """
        texts = {}
        metrics = self.estimates[self.estimates["distance"] != BASELINE]
        for change, rows in metrics.groupby("change", sort=False):
            rho = rows.set_index("distance")["estimate"].dropna().round(2) + 0.0  # no -0.00
            if change not in self.plotted_changes or rho.empty:
                continue

            def names_at(value: float, rho: pd.Series = rho) -> str:
                names = [METRIC_NAMES[name] for name in rho.index[rho == value]]
                return f"{' and '.join(names)} ({value:.2f})"

            if len(rho) == 1:
                which = "measured" if len(rows) == 1 else "that has a correlation"
                texts[change] = f"by {names_at(rho.max())}, the only metric {which}"
            elif rho.nunique() == 1:
                which = "" if len(rho) == len(rows) else " that have a correlation"
                texts[change] = f"equally by all metrics{which} ({rho.max():.2f})"
            else:
                texts[change] = f"most by {names_at(rho.max())}, least by {names_at(rho.min())}"
        return texts

    @cached_property
    def partial(self) -> dict[tuple[str, str], tuple[float, float]] | None:
        """By (distance, change): the mean correlation, and the mean given size and energy."""
        metrics = self.metrics
        if not metrics or not {"size", BASELINE} <= set(self.table.columns):
            return None
        partial = compute_partial_correlations(self.table, metrics, self.plotted_changes)
        means = partial.groupby(["distance", "change"], sort=False)["spearman"].mean()
        plain = self.estimates.set_index(["distance", "change"])["estimate"]
        return {key: (plain[key], value) for key, value in means.items()}

    @cached_property
    def corrected(self) -> dict[tuple[str, str], tuple[float, float]] | None:
        """By (distance, change): the mean correlation, and the same corrected for noise."""
        if self.reliability.empty:
            return None
        means = correct_for_noise(summarise(self.per_group), self.reliability)
        means = means.dropna(subset=["reliability"])
        keys = zip(means["distance"], means["change"], strict=True)
        return dict(zip(keys, zip(means["spearman"], means["corrected"], strict=True), strict=True))

    @cached_property
    def quality(self) -> dict[str, Any]:
        """Groups without a correlation (by reason), ties, reliability and dead cells."""
        names = [*self.distances, *self.changes]
        groups = self.table.groupby(GROUP, observed=True, dropna=False)
        has_nan = self.table[names].isna().groupby([self.table[key] for key in GROUP]).any()
        constant = (groups[names].nunique() <= 1) & ~has_nan
        known = self.reliability.set_index("change")
        dead = (self.table[self.distances] == 0).any(axis=1)
        return {
            "changes": {
                name: {
                    "constant": int(constant[name].sum()),
                    "nan": int(has_nan[name].sum()),
                    "tied": _measure_ties(self.table, name),
                    "reliability": known["reliability"].get(name, math.nan),
                    "source": known["source"].get(name, ""),
                }
                for name in self.changes
            },
            "distances": {
                METRIC_NAMES[name]: (int(constant[name].sum()), int(has_nan[name].sum()))
                for name in self.distances
                if constant[name].any() or has_nan[name].any()
            },
            "reliable": len(known) > 0,
            "dead": int(dead.sum()),
            "rows": len(self.table),
        }


def describe_near_chance(about: dict[str, Any]) -> str | None:
    """Describe the accuracy of a network near chance; None for any other.

    Parameters
    ----------
    about : dict
        What ``study.json`` records about the network: ``accuracy``, ``images`` and
        ``largest_class``, the number of images of the most frequent class. Older runs record
        ``image_classes`` in its place; their classes are assumed to be of equal size.

    Returns
    -------
    str or None
        The accuracy compared with chance. None also if the accuracy is not recorded.

    Notes
    -----
    Chance is the accuracy of a network that answers every image with the most frequent class;
    random guesses are never better. A network is near chance if an exact one-sided binomial test
    at 1 % does not tell its accuracy from chance. It is also near chance, whatever the number of
    images, if its accuracy is below the smallest of: twice chance, chance plus ten points, and
    halfway from chance to 100 %.
    """
    if "accuracy" not in about:
        return None
    accuracy, images = about["accuracy"], about["images"]
    largest = about.get("largest_class", images / about["image_classes"])
    chance = largest / images
    right = round(accuracy * images)
    p = scipy.stats.binomtest(right, images, chance, alternative="greater").pvalue
    enough = chance + min(chance, _MARGIN, (1 - chance) / 2)
    if p <= _LEVEL and accuracy > enough - 1e-9:  # equality is sufficient, despite rounding
        return None
    return (
        f"it is right for {100 * accuracy:.1f} % of {images} images, and would be for "
        f"{100 * chance:.3g} % if it always named the largest class"
    )


def count_nan_images(table: pd.DataFrame) -> str | None:
    """Describe how many images got no answer; None if all did or the table has no counts."""
    if NAN_IMAGES not in table or not (table[NAN_IMAGES] > 0).any():
        return None
    counts = table[NAN_IMAGES][table[NAN_IMAGES] > 0]
    return (
        f"the network gives no answer (NaN, or all -inf) for images in {len(counts):,} of "
        f"{len(table):,} cells, up to {int(counts.max())} in one and {int(counts.sum()):,} in all; "
        "the loss of performance of these cells is not known"
    )


def format_range(counts: Collection[int]) -> str:
    """Write a number if all are equal, otherwise the smallest and the largest."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def costliest_layer(table: pd.DataFrame, change: str) -> tuple[str, str]:
    """Find the layer where ablation costs most on average, and describe it for a caption.

    If several layers cost the same, the first by name is returned.
    """
    costs = table.groupby("layer", observed=True)[change].mean().dropna()
    n_costliest = int((costs == costs.max()).sum())
    if len(costs) == 1:
        text = "the only one with a value"
    elif n_costliest == len(costs):
        text = "ablation costs the same in all layers"
    else:
        one = "the one" if n_costliest == 1 else f"one of {n_costliest}"
        text = f"of those that ran, {one} where ablation costs most"
    return costs.idxmax(), text


def _measure_ties(table: pd.DataFrame, change: str) -> float:
    """Measure the share of values that another cell of the same class and layer also has."""
    known = table[table[change].notna()]
    same = known.groupby([*GROUP, change], observed=True)[change].transform("size")
    return float((same > 1).mean())


def _natural_key(name: Any) -> list[tuple[int, str]]:
    """Sort key that puts features.10 after features.4."""
    parts = re.split(r"(\d+)", str(name))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
