"""What a report says of a network: correlations, claims, controls and the quality of its data."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]

from repsim_kernels.experiments.analysis.controls import (
    corrected,
    partial_correlations,
    reliability,
)
from repsim_kernels.experiments.analysis.correlations import (
    change_columns,
    correlations,
    distance_columns,
    summary,
)
from repsim_kernels.experiments.analysis.inference import (
    Claim,
    MixedModel,
    beyond,
    claims,
    intervals,
    mixed_model,
)
from repsim_kernels.experiments.analysis.published import PUBLISHED
from repsim_kernels.experiments.columns import BASELINE, METRIC_NAMES, NAN_IMAGES
from repsim_kernels.experiments.errors import StatsError

GROUP = ["class", "layer"]
RANK_DEFICIT = "rank_deficit"
# The first that a table has. Accuracies of held-out stimuli tie in most cells: the margin is what
# can be told of the same probe.
DECODABILITY = ("decodability_paper", "margin_refit", "decodability_refit")
DRAWN = ("rank_deficit", "log_probability", *DECODABILITY)
_LEVEL = 0.01  # of the test against chance
_MARGIN = 0.1  # of accuracy above chance that is enough where classes are few


@dataclass(frozen=True)
class Model:
    """A network of a run, under the name that it has on the page."""

    name: str
    own_name: str
    run: str
    table: pd.DataFrame
    configuration: dict[str, Any]
    about: dict[str, Any]

    @cached_property
    def distances(self) -> list[str]:
        return distance_columns(self.table)

    @property
    def metrics(self) -> list[str]:
        """The distances but for the baseline."""
        return [name for name in self.distances if name != BASELINE]

    @cached_property
    def changes(self) -> list[str]:
        return change_columns(self.table)

    @cached_property
    def drawn(self) -> list[str]:
        """The changes that have figures: those of the claims, and what is close to them."""
        return [name for name in DRAWN if name in self.changes] or self.changes[:4]

    @cached_property
    def decodability(self) -> str | None:
        """The change that stands for decodability."""
        return next((name for name in DECODABILITY if name in self.changes), None)

    @property
    def random(self) -> bool:
        """Whether the cells are a control, drawn at random."""
        return bool(self.configuration.get("cells") == "random")

    @cached_property
    def near_chance(self) -> str | None:
        """Its accuracy compared with a guess, if it is near chance; no claim is then judged."""
        return near_chance(self.about)

    @property
    def functions(self) -> tuple[str, str] | None:
        """The two changes that claims are about; None where no claim can be judged."""
        if self.near_chance or RANK_DEFICIT not in self.changes or self.decodability is None:
            return None
        return RANK_DEFICIT, self.decodability

    @cached_property
    def per_group(self) -> pd.DataFrame:
        return correlations(self.table, self.distances, self.changes)

    @cached_property
    def estimates(self) -> pd.DataFrame:
        return intervals(self.per_group)

    @cached_property
    def reliability(self) -> pd.DataFrame:
        return reliability(self.table, self.changes)

    @cached_property
    def layers(self) -> list[str]:
        known = self.configuration.get("layers")
        return list(known or sorted(self.table["layer"].unique(), key=_natural))

    @cached_property
    def classes(self) -> list[str]:
        return list(self.configuration.get("classes") or map(str, self.table["class"].unique()))

    @property
    def groups(self) -> int:
        return int(self.table.groupby(GROUP, observed=True).ngroups)

    @cached_property
    def found(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Estimates and intervals, by distance and change."""
        return dict(self.estimates.set_index(["distance", "change"]).to_dict("index"))

    @property
    def clusters(self) -> int:
        return int(self.estimates["clusters"].max())

    @property
    def nan_images(self) -> str | None:
        return count_nan_images(self.table)

    @property
    def published(self) -> dict[str, tuple[float, float]] | None:
        return PUBLISHED.get(self.own_name)

    @property
    def reliable(self) -> list[str]:
        """The changes whose correlations are corrected for noise."""
        return list(dict.fromkeys(change for _, change in self.corrected or ()))

    @cached_property
    def claims(self) -> list[tuple[Claim, list[str]]] | None:
        """The claims and what is said of each, metrics by the names that the page has for them."""
        if self.functions is None:
            return None
        told = []
        for claim in claims(self.per_group, *self.functions):
            parts = [detail.partition(": ") for detail in claim.details]
            details = [
                f"{METRIC_NAMES.get(name, name)}{colon}{rest}" for name, colon, rest in parts
            ]
            # A lone line repeats the numbers of the claim, where it has any.
            told.append(
                (claim, [] if len(details) == 1 and not math.isnan(claim.estimate) else details)
            )
        return told

    @cached_property
    def mixed(self) -> MixedModel | None:
        """The paper's mixed model, where the table has what it needs."""
        if self.functions is None:
            return None
        try:
            return mixed_model(self.per_group, *self.functions)
        except StatsError:
            return None

    @cached_property
    def beyond(self) -> dict[str, tuple[list[str], list[str]]]:
        """By change, the metrics that follow it more than the removed energy does, and less."""
        if self.near_chance or BASELINE not in self.distances:
            return {}
        found = {}
        for change in filter(None, (RANK_DEFICIT, self.decodability)):
            if change in self.changes:
                tests = beyond(self.per_group, change)
                if all(math.isnan(test.estimate) for test in tests):
                    continue  # nothing is lost, or the same in all cells
                more = [METRIC_NAMES[test.name] for test in tests if test.low > 0]
                less = [METRIC_NAMES[test.name] for test in tests if test.high < 0]
                found[change] = more, less
        return found

    @cached_property
    def following(self) -> dict[str, str]:
        """By change that has figures, say which metrics follow it most and least.

        Correlations count as equal where they are at the page's two decimals.
        """
        found = {}
        metrics = self.estimates[self.estimates["distance"] != BASELINE]
        for change, mine in metrics.groupby("change", sort=False):
            rho = mine.set_index("distance")["estimate"].dropna().round(2) + 0.0  # no -0.00
            if change not in self.drawn or rho.empty:
                continue

            def named(value: float, rho: pd.Series = rho) -> str:
                names = [METRIC_NAMES[name] for name in rho.index[rho == value]]
                return f"{' and '.join(names)} ({value:.2f})"

            if len(rho) == 1:
                why = "measured" if len(mine) == 1 else "that has a correlation"
                found[change] = f"by {named(rho.max())}, the only metric {why}"
            elif rho.nunique() == 1:
                which = "" if len(rho) == len(mine) else " that have a correlation"
                found[change] = f"equally by all metrics{which} ({rho.max():.2f})"
            else:
                found[change] = f"most by {named(rho.max())}, least by {named(rho.min())}"
        return found

    @cached_property
    def partial(self) -> dict[tuple[str, str], tuple[float, float]] | None:
        """Mean correlations, and those given the cells' sizes and energies."""
        metrics = self.metrics
        if not metrics or not {"size", BASELINE} <= set(self.table.columns):
            return None
        given = partial_correlations(self.table, metrics, self.drawn)
        means = given.groupby(["distance", "change"], sort=False)["spearman"].mean()
        plain = self.estimates.set_index(["distance", "change"])["estimate"]
        return {key: (plain[key], value) for key, value in means.items()}

    @cached_property
    def corrected(self) -> dict[tuple[str, str], tuple[float, float]] | None:
        """Mean correlations, and those that a function change without noise would give."""
        if self.reliability.empty:
            return None
        found = corrected(summary(self.per_group), self.reliability).dropna(subset=["reliability"])
        keys = zip(found["distance"], found["change"], strict=True)
        return dict(zip(keys, zip(found["spearman"], found["corrected"], strict=True), strict=True))

    @cached_property
    def quality(self) -> dict[str, Any]:
        """Groups without a correlation by reason, ties, reliability, cells that hold nothing."""
        names = [*self.distances, *self.changes]
        groups = self.table.groupby(GROUP, observed=True, dropna=False)
        holed = self.table[names].isna().groupby([self.table[key] for key in GROUP]).any()
        constant = (groups[names].nunique() <= 1) & ~holed
        known = self.reliability.set_index("change")
        dead = (self.table[self.distances] == 0).any(axis=1)
        return {
            "changes": {
                name: {
                    "constant": int(constant[name].sum()),
                    "nan": int(holed[name].sum()),
                    "tied": _tied(self.table, name),
                    "reliability": known["reliability"].get(name, math.nan),
                    "source": known["source"].get(name, ""),
                }
                for name in self.changes
            },
            "distances": {
                METRIC_NAMES[name]: (int(constant[name].sum()), int(holed[name].sum()))
                for name in self.distances
                if constant[name].any() or holed[name].any()
            },
            "reliable": len(known) > 0,
            "dead": int(dead.sum()),
            "rows": len(self.table),
        }


def near_chance(about: dict[str, Any]) -> str | None:
    """Describe the accuracy of a network near chance; None for any other.

    Parameters
    ----------
    about : dict
        What ``study.json`` says of the network: ``accuracy``, ``images`` and ``largest_class``
        (images of the class that has most), or ``image_classes`` in a run that does not record
        the largest yet, whose classes are then taken to be equal.

    Returns
    -------
    str or None
        Its accuracy compared with chance. Also None where the accuracy is not recorded.

    Notes
    -----
    Chance is the accuracy of a network that answers every image with the largest class; guesses
    among the outputs are never better. A network is near chance if the exact one-sided binomial
    test does not reject that accuracy at 1 %. However many images show that it does better, it is
    near chance as well if its accuracy is below twice chance, below chance plus ten points, or
    below halfway from chance to 100 %, whichever is least.
    """
    if "accuracy" not in about:
        return None
    accuracy, images = about["accuracy"], about["images"]
    largest = about.get("largest_class", images / about["image_classes"])
    chance = largest / images
    right = round(accuracy * images)
    p = scipy.stats.binomtest(right, images, chance, alternative="greater").pvalue
    enough = chance + min(chance, _MARGIN, (1 - chance) / 2)
    if p <= _LEVEL and accuracy > enough - 1e-9:  # as much is enough, also after rounding
        return None
    return (
        f"{100 * accuracy:.1f} % of its answers to {images} images are right, and "
        f"{100 * chance:.3g} % would be if all named the largest class"
    )


def count_nan_images(table: pd.DataFrame) -> str | None:
    """Count the images that a network gave no answer for; None if there are none, or no counts."""
    if NAN_IMAGES not in table or not (table[NAN_IMAGES] > 0).any():
        return None
    counts = table[NAN_IMAGES][table[NAN_IMAGES] > 0]
    return (
        f"the network gives no answer (NaN, or all -inf) for images in {len(counts):,} of "
        f"{len(table):,} cells, up to {int(counts.max())} in one and {int(counts.sum()):,} in all; "
        "the loss of performance of these cells is not known"
    )


def costliest_layer(table: pd.DataFrame, change: str) -> tuple[str, str]:
    """The layer where ablation costs most on average, and what to say of it.

    Of layers that cost the same it is the first by name.
    """
    costs = table.groupby("layer", observed=True)[change].mean().dropna()
    most = int((costs == costs.max()).sum())
    if len(costs) == 1:
        said = "the only one with a value"
    elif most == len(costs):
        said = "ablation costs the same in all layers"
    else:
        one = "the one" if most == 1 else f"one of {most}"
        said = f"of those that ran, {one} where ablation costs most"
    return costs.idxmax(), said


def _tied(table: pd.DataFrame, change: str) -> float:
    """The share of a change's values that another cell of the same class and layer has too."""
    known = table[table[change].notna()]
    same = known.groupby([*GROUP, change], observed=True)[change].transform("size")
    return float((same > 1).mean())


def _natural(name: Any) -> list[tuple[int, str]]:
    """Sort key that puts features.10 after features.4."""
    parts = re.split(r"(\d+)", str(name))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
