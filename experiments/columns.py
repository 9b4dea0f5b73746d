"""The columns of a run's table: names, and labels for tables and figures."""

from __future__ import annotations

from repsim_kernels import _metrics

#: The distances of a run's table, by name: those that a study measures by default, and all.
METRICS = _metrics.list_default_ablation()
ALL_METRICS = tuple(metric.name for metric in _metrics.METRICS if metric.ablation)
GROUP_KEYS = ["model", "class", "layer"]  # correlations are over the cells of one group
KEYS = [*GROUP_KEYS, "cell"]
#: The cell's share of the representation's energy: a distance that ignores directions.
BASELINE = "energy"
#: The number of images without an answer: logits with a NaN, or all -inf.
NAN_IMAGES = "nan_images"
#: Changes of network performance and, by probe, of linear decodability. A table has some of them.
PERFORMANCE = ("rank_deficit", "log_probability", "probability", "top1", "top5")
PROBES = {
    "ridge": ("decodability_refit", "decodability_frozen", "margin_refit", "margin_frozen"),
    "paper": ("decodability_paper",),
}
CHANGES = (*PERFORMANCE, *(name for names in PROBES.values() for name in names))

METRIC_NAMES = {metric.name: metric.label for metric in _metrics.METRICS if metric.ablation} | {
    BASELINE: "energy removed"
}

CHANGE_NAMES = {
    "rank_deficit": "rank of the true class",
    "log_probability": "log-probability",
    "probability": "probability",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "decodability_refit": "decodability (refitted)",
    "decodability_frozen": "decodability (frozen)",
    "margin_refit": "linear margin (refitted)",
    "margin_frozen": "linear margin (frozen)",
    "decodability_paper": "decodability (paper's probe)",
}

HALVES = ("odd", "even")  # every other image, from the first and from the second on


def half_column(change: str, half: str) -> str:
    """The column of a function change that is measured on one half of the images."""
    return f"{change}_{half}"
