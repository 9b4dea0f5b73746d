"""Calibrated similarities, against a loop that computes the metric again for each permutation."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import repsim_kernels as rk
from bench.bench_pairwise import LAYERS, N, P, make_layers
from bench.common import memory
from bench.common.inputs import count_bytes, make_reference
from bench.common.machine import Json, describe_environment, format_seconds
from bench.common.records import describe_device
from bench.common.tolerances import Tol, assert_close
from bench.conftest import Timer

PERMUTATIONS = 100
METRICS: dict[str, dict[str, Any]] = {
    "cka_debiased": {},
    "rsa": {},
    "cca": {"squared": True, "ridge": 0.1},
    "mutual_knn": {},
}


@pytest.mark.parametrize("metric", METRICS)
def test_calibrate(timed: Timer, metric: str) -> None:
    """Check the null of a few pairs and permutations."""
    options = METRICS[metric]
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(N) for _ in range(PERMUTATIONS)])
    checked = [(0, 0, 1), (1, 2, 0), (PERMUTATIONS - 1, 2, LAYERS - 1)]
    name, own = ("cka", {"debiased": True}) if metric == "cka_debiased" else (metric, options)
    definition = make_reference(name, **own)

    def check(got: rk.Calibrated, want: list[float]) -> None:
        values = torch.stack([got.null[where] for where in checked])
        assert_close(values, want, Tol(0, 1e-6))  # of similarities near 0

    timed(
        "calibrate",
        make_layers,
        call=lambda *xs: rk.calibrate(xs, metric=metric, indices=indices, **options),
        oracle=lambda *xs: [float(definition(xs[i], xs[j][indices[a]])) for a, i, j in checked],
        check=check,
        label=metric,
        shape={"L": LAYERS, "n": N, "p": P, "K": PERMUTATIONS},
        bytes=LAYERS * count_bytes(N, P, torch.float32),
        operations=(
            {"float64": PERMUTATIONS * LAYERS**2 * N * (N + 1)} if metric == "rsa" else None
        ),
    )


_IN_FLOAT64 = 4  # permuted similarities that are also computed in float64
_SIZES: dict[bool, Json] = {  # by `quick`
    False: {"n": 1024, "p": 4096, "xs": 32, "ys": 24, "permutations": 200, "sample": 48},
    True: {"n": 64, "p": 256, "xs": 4, "ys": 3, "permutations": 25, "sample": 12},
}


def measure_calibration(quick: bool = False) -> Json:
    """Return the record: seconds and memory of one call, and seconds of calibrated-similarity.

    Its loop, of a similarity for each pair and permutation and each pair alone, is timed on an
    evenly spread sample, and the values of the sample are compared.
    """
    if importlib.util.find_spec("calibrated_similarity") is None:
        raise RuntimeError("calibrated-similarity is not installed; it is in the extra `peers`")
    sizes = _SIZES[quick]
    g = torch.Generator().manual_seed(0)
    xs, ys = (
        [torch.randn(sizes["n"], sizes["p"], generator=g) for _ in range(sizes[side])]
        for side in ("xs", "ys")
    )
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(sizes["n"]) for _ in range(sizes["permutations"])])
    rk.calibrate(xs[0][:8], ys[0][:8], permutations=25)  # loads what both use
    before = memory.start_peak()
    start = time.perf_counter()
    result = rk.calibrate(xs, ys, indices=indices)
    seconds = time.perf_counter() - start
    peak = memory.read_peak() - before
    times, errors = _time_loop(xs, ys, torch.from_numpy(indices), sizes["sample"], result)
    count = result.score.numel() * (len(indices) + 1)
    return {
        "environment": describe_environment("cpu", ("calibrated-similarity",)),
        **sizes,
        "seconds": seconds,
        "bytes": peak,
        "loop_seconds": float(np.mean(times)) * count,
        "loop_count": count,
        "loop_timed": len(times),
        "largest_difference": errors[0],
        "largest_difference_float64": errors[1],
    }


def compute_linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Return linear CKA as calibrated-similarity's documentation writes it."""
    x, y = x - x.mean(0), y - y.mean(0)
    k, m = x @ x.T, y @ y.T
    return (k * m).sum() / k.norm() / m.norm()


def _time_loop(
    xs: list[Tensor], ys: list[Tensor], indices: Tensor, sample: int, result: rk.Calibrated
) -> tuple[list[float], tuple[float, float]]:
    """Return the seconds of each similarity in the sample, and its largest differences from ours.

    The second difference is of a few that the same function computes in float64.
    """
    from calibrated_similarity import calibrate

    values: list[float] = []
    times: list[float] = []
    errors: list[float] = []
    errors_float64: list[float] = []

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        value = compute_linear_cka(x, y)
        values.append(float(value))
        return value

    for a, i, j in _spread(len(indices), len(xs), len(ys), sample // 2 + 1):
        values.clear()
        start = time.perf_counter()
        # The observed similarity and one of the null.
        calibrate(xs[i], ys[j], similarity, K=1, perm_fn=partial(_get_order, indices[a]))
        times += [(time.perf_counter() - start) / 2] * 2
        ours = result.score[i, j], result.null[a, i, j]
        errors += [abs(float(b) - v) for v, b in zip(values, ours, strict=True)]
        if len(errors_float64) < _IN_FLOAT64:
            exact = compute_linear_cka(xs[i].double(), ys[j][indices[a]].double())
            errors_float64.append(abs(float(ours[1] - exact)))
    # The first one also loads what the others use.
    return times[2:], (max(errors), max(errors_float64))


def _get_order(order: Tensor, n: int, device: torch.device) -> Tensor:
    return order


def _spread(k: int, left: int, right: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Yield permutations and pairs that are evenly spread over the loop of all of them."""
    for place in np.linspace(0, k * left * right - 1, count).astype(int):
        a, pair = divmod(int(place), left * right)
        yield a, *divmod(pair, right)


def describe_calibration(record: Json) -> str:
    """Return the record in words, also for bench/README.md."""
    ratio = record["loop_seconds"] / record["seconds"]
    return (
        f"On {describe_device(record)}: linear CKA of {record['xs']} x {record['ys']} layers, "
        f"n = {record['n']:,}, p = {record['p']:,}, with the same {record['permutations']} "
        f"permutations. `calibrate` needs {format_seconds(record['seconds'])}, and "
        f"{record['bytes'] / 1e6:,.0f} MB in addition to the features. The loop of "
        f"calibrated-similarity, of which {record['loop_timed']} of {record['loop_count']:,} "
        f"similarities were timed, would need {format_seconds(record['loop_seconds'])}: "
        f"{ratio:,.0f} times as long. The values differ by up to "
        f"{record['largest_difference']:.0e} from its float32 ones, and by "
        f"{record['largest_difference_float64']:.0e} from the same similarities in float64."
    )
