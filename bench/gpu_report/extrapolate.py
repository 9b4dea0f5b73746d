"""From a sample of a network's layers and one class, to all layers and classes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from bench.common.machine import Json

# What a layer's seconds follow.
BY = {
    "cells": "neurons",
    "gram": "neurons",
    "spectral": "neurons",
    "pwcca": "neurons",
    "metrics": "neurons",
    "suffix": "tail_flops",
    "paper": "neurons",
    "ridge": "neurons",
}
# "metrics" does them in one call; the paper did without the last.
BESIDE = ("gram", "spectral", "pwcca", "ridge")
RULES = {
    "prefix": "prefix: the pass of a class's stimuli, times all images to these, times the passes.",
    "layers": (
        "cells, gram, spectral, pwcca, metrics, ridge: straight lines between the sampled layers, "
        "by neurons;\n  under the smallest as for it, above the largest in proportion; times the "
        "classes."
    ),
    "suffix": "suffix: the same by the FLOPs that follow a layer.",
    "paper": "paper: the same of the seconds of one draw, times each layer's draws.",
    "pwcca": (
        "gram: the cells' Grams; spectral: from there to all metrics but PWCCA; pwcca: PWCCA "
        "alone, Grams included;\n  metrics: all five in one call, as the study has them."
    ),
    "together": (
        "together: prefix, cells, metrics, suffix, paper; ridge, this package's own probe, is "
        "beside; no start-up, no files."
    ),
}


def extrapolate(network: Json) -> Json:
    """``extrapolated``: the seconds of each stage, None where one was not timed; their sum."""
    found: dict[str, float | None] = {"prefix": None}
    if "prefix" in network:
        prefix = network["prefix"]
        passes = network["passes"] * network["images"] / prefix["images"]
        found["prefix"] = passes * prefix["seconds"]
    for stage, key in BY.items():
        found[stage] = _all_layers(network, stage, key)
    total = [seconds for stage, seconds in found.items() if stage not in BESIDE]
    known = [seconds for seconds in total if seconds is not None]
    together = {"seconds": sum(known)} if len(known) == len(total) else {}
    return {"extrapolated": found, **together}


def _all_layers(network: Json, stage: str, key: str) -> float | None:
    points: dict[float, list[float]] = {}
    for layer in network.get("sample", []):
        timed = layer["stages"].get(stage, {})
        if "seconds" in timed:
            points.setdefault(layer[key], []).append(timed["seconds"] / timed.get("draws", 1))
    if not points:
        return None
    known = sorted((at, sum(seconds) / len(seconds)) for at, seconds in points.items())
    drawn = stage == "paper"
    each = [
        _line(known, layer[key]) * (layer["draws"] if drawn else 1) for layer in network["layers"]
    ]
    return network["targets"] * sum(each)


def _line(known: Sequence[tuple[float, float]], at: float) -> float:
    """On straight lines between known points; level before them, in proportion behind."""
    if at <= known[0][0]:
        return known[0][1]
    for (left, low), (right, high) in pairwise(known):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    last, seconds = known[-1]
    return seconds * at / last
