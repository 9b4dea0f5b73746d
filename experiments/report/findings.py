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
    changes_of,
    correlations,
    distances_of,
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
        return distances_of(self.table)

    @cached_property
    def changes(self) -> list[str]:
        return changes_of(self.table)

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


def judged(model: Model) -> list[tuple[Claim, list[str]]] | None:
    """The claims and what is said of each, metrics by the names that the page has for them."""
    if model.near_chance or RANK_DEFICIT not in model.changes or model.decodability is None:
        return None
    told = []
    for claim in claims(model.per_group, RANK_DEFICIT, model.decodability):
        parts = [detail.partition(": ") for detail in claim.details]
        details = [f"{METRIC_NAMES.get(name, name)}{colon}{rest}" for name, colon, rest in parts]
        # A lone line repeats the numbers of the claim, where it has any.
        told.append(
            (claim, [] if len(details) == 1 and not math.isnan(claim.estimate) else details)
        )
    return told


def fitted(model: Model) -> MixedModel | None:
    """The paper's mixed model, where the table has what it needs."""
    if model.near_chance or RANK_DEFICIT not in model.changes or model.decodability is None:
        return None
    try:
        return mixed_model(model.per_group, RANK_DEFICIT, model.decodability)
    except StatsError:
        return None


def against_baseline(model: Model) -> dict[str, tuple[list[str], list[str]]]:
    """By change, the metrics that follow it more than the energy removed does, and those less."""
    if model.near_chance or BASELINE not in model.distances:
        return {}
    found = {}
    for change in filter(None, (RANK_DEFICIT, model.decodability)):
        if change in model.changes:
            tests = beyond(model.per_group, change)
            if all(math.isnan(test.estimate) for test in tests):
                continue  # nothing is lost, or the same in all cells
            more = [METRIC_NAMES[test.name] for test in tests if test.low > 0]
            less = [METRIC_NAMES[test.name] for test in tests if test.high < 0]
            found[change] = more, less
    return found


def describe_following(model: Model) -> dict[str, str]:
    """By change that has figures, say which metrics follow it most and least.

    Correlations count as equal where they are at the page's two decimals.
    """
    found = {}
    metrics = model.estimates[model.estimates["distance"] != BASELINE]
    for change, mine in metrics.groupby("change", sort=False):
        rho = mine.set_index("distance")["estimate"].dropna().round(2) + 0.0  # no -0.00
        if change not in model.drawn or rho.empty:
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


def partial(model: Model) -> dict[tuple[str, str], tuple[float, float]] | None:
    """Mean correlations, and those given the cells' sizes and energies."""
    metrics = [name for name in model.distances if name != BASELINE]
    if not metrics or not {"size", BASELINE} <= set(model.table.columns):
        return None
    given = _means(partial_correlations(model.table, metrics, model.drawn))
    plain = model.estimates.set_index(["distance", "change"])["estimate"]
    return {key: (plain[key], value) for key, value in given.items()}


def _means(per_group: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Mean correlation by distance and change, over the groups that have one."""
    means = per_group.groupby(["distance", "change"], sort=False)["spearman"].mean()
    return dict(means.items())


def without_noise(model: Model) -> dict[tuple[str, str], tuple[float, float]] | None:
    """Mean correlations, and those that a function change without noise would give."""
    if model.reliability.empty:
        return None
    found = corrected(summary(model.per_group), model.reliability).dropna(subset=["reliability"])
    keys = zip(found["distance"], found["change"], strict=True)
    return dict(zip(keys, zip(found["spearman"], found["corrected"], strict=True), strict=True))


def quality(model: Model) -> dict[str, Any]:
    """Groups without a correlation by reason, ties, reliability, cells that hold nothing."""
    names = [*model.distances, *model.changes]
    groups = model.table.groupby(GROUP, observed=True, dropna=False)
    holed = model.table[names].isna().groupby([model.table[key] for key in GROUP]).any()
    constant = (groups[names].nunique() <= 1) & ~holed
    known = model.reliability.set_index("change")
    dead = (model.table[model.distances] == 0).any(axis=1)
    return {
        "changes": {
            name: {
                "constant": int(constant[name].sum()),
                "nan": int(holed[name].sum()),
                "tied": _tied(model.table, name),
                "reliability": known["reliability"].get(name, math.nan),
                "source": known["source"].get(name, ""),
            }
            for name in model.changes
        },
        "distances": {
            METRIC_NAMES[name]: (int(constant[name].sum()), int(holed[name].sum()))
            for name in model.distances
            if constant[name].any() or holed[name].any()
        },
        "reliable": len(known) > 0,
        "dead": int(dead.sum()),
        "rows": len(model.table),
    }


def _tied(table: pd.DataFrame, change: str) -> float:
    """The share of a change's values that another cell of the same class and layer has too."""
    known = table[table[change].notna()]
    same = known.groupby([*GROUP, change], observed=True)[change].transform("size")
    return float((same > 1).mean())


def _natural(name: Any) -> list[tuple[int, str]]:
    """Sort key that puts features.10 after features.4."""
    parts = re.split(r"(\d+)", str(name))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
