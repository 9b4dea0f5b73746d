"""The speed that this package aims at, next to what the records show."""

from __future__ import annotations

from typing import Any

from bench.common.machine import Json
from bench.peers import tables
from bench.peers.tables import OURS, compute_job_seconds, format_markdown_table

_SMALL = 1e-3  # seconds, below which overheads outweigh arithmetic


def tabulate_aims(peers: Json, fits: dict[str, tuple[float, float]]) -> str:
    """Tabulate each aim and what was reached, for one pair in the slowest case.

    ``fits`` are the seconds of a logistic regression by this package and by scikit-learn, by the
    kind of classes.
    """
    debiased = {"metric": "cka_debiased", "package": "pytorch-cka"}
    jobs: list[tuple[str, int, dict[str, Any]]] = [
        ("all pairs, debiased CKA: pytorch-cka / time", 2, debiased | {"job": "pairs"}),
        (
            "all pairs, RSA: rsatoolbox / time",
            1,
            {"metric": "rsa", "package": "rsatoolbox", "job": "pairs"},
        ),
        (
            "100 ablations, debiased CKA: pytorch-cka's loop / time",
            100,
            debiased | {"job": "ablations", "cells": 100},
        ),
    ]
    rows = [
        [
            "one pair, CKA, from 1 ms on: time / the fastest package that centres",
            "at most 1",
            _find_slowest_pair(peers, "cka", is_small=False, centres=True),
        ],
        [
            "the same, below 1 ms",
            "at most 2",
            _find_slowest_pair(peers, "cka", is_small=True, centres=True),
        ],
        [
            "one pair, debiased CKA, from 1 ms on: time / pytorch-cka",
            "at most 1",
            _find_slowest_pair(peers, "cka_debiased", is_small=False, package="pytorch-cka"),
        ],
        *([label, f"at least {aim}", _compare_job(peers, **facts)] for label, aim, facts in jobs),
        *(
            [
                f"logistic regressions, {kind}: scikit-learn's loop / time",
                "at least 6",
                _format(theirs / ours),
            ]
            for kind, (ours, theirs) in fits.items()
        ),
    ]
    return format_markdown_table(["quantity", "aim", "reached"], rows)


def _format(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}"


def _compare_job(record: Json, package: str, **facts: Any) -> str:
    """Return the time of another package's job, by its fastest way, divided by this package's."""
    times: dict[str, list[float]] = {OURS: [], package: []}
    for row in tables.select_rows(record, **facts):
        if seconds := compute_job_seconds(row):
            times.get(row["package"].partition(",")[0], []).append(seconds)
    return _format(min(times[package]) / min(times[OURS])) if all(times.values()) else "failed"


def _find_slowest_pair(record: Json, metric: str, is_small: bool, **facts: Any) -> str:
    """Return the largest ratio of this package's time to that of the fastest peer, and its size.

    Peers are the other packages whose rows have these facts.
    """
    ratios = []
    for row in tables.select_rows(record, job="pair", metric=metric, package=OURS):
        others = tables.rank_others(record, metric, job="pair", n=row["n"], p=row["p"], **facts)
        ours = compute_job_seconds(row)
        theirs = compute_job_seconds(others[0]) if others else None
        if ours and theirs and (ours < _SMALL) == is_small:
            ratios.append((ours / theirs, f"{row['n']:,} x {row['p']:,}"))
    if not ratios:
        return "no pair"
    ratio, size = max(ratios)
    return f"{_format(ratio)} ({size})"
