"""The columns of a run's table: their names, and what people call them."""

from __future__ import annotations

from repsim_kernels import _metrics

#: The distances of a run's table, by name.
METRICS = tuple(metric.name for metric in _metrics.METRICS if metric.ablation)
GROUP_KEYS = ["model", "class", "layer"]  # cells of one group are compared with each other
KEYS = [*GROUP_KEYS, "cell"]
#: What a cell holds of the representation's energy: a distance that knows nothing of directions.
BASELINE = "energy"
#: How many of the images have no answer: logits with a NaN, or all -inf.
NAN_IMAGES = "nan_images"
#: Changes of network performance, and of linear decodability by probe; of a table those it has.
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
    "decodability_refit": "decodability, refitted",
    "decodability_frozen": "decodability, frozen",
    "margin_refit": "linear margin, refitted",
    "margin_frozen": "linear margin, frozen",
    "decodability_paper": "decodability, the paper's",
}

HALVES = ("odd", "even")


def half_column(change: str, which: str) -> str:
    """The column of a function change measured on every other image."""
    return f"{change}_{which}"
