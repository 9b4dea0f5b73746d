"""Accuracy of each package: errors by kind of input, and the order of many ablations."""

from __future__ import annotations

import importlib
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import distributions
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from torch import Tensor

import repsim_kernels as rk
from bench.common import longdouble
from bench.common.machine import Json, describe_environment, to_json_number
from bench.peers.calls import Pair
from bench.peers.packages import PACKAGES, Package

OURS = "repsim_kernels"
METRICS = ("cka", "cka_debiased", "procrustes", "rsa")
ABLATED = METRICS[:3]
WRONG = 1e-2  # a result with a larger relative error counts as wrong, whatever the cause
_FACTS = ("name", "metric", "distribution", "kind", "centres", "note", "differs")
APART = 1e-6  # true distances with a larger relative difference must be ranked correctly


@dataclass(frozen=True)
class FeatureCase:
    """Properties of the features; each sweep changes one of the defaults.

    ``mean`` is in units of the features' standard deviation; ``condition`` is the condition number
    of the centred features.
    """

    mean: float = 0.0
    scale: float = 1.0
    condition: float = 10.0
    dtype: str = "float32"


SWEEPS: dict[str, tuple[Any, ...]] = {
    "mean": (0.0, 1.0, 10.0, 100.0, 1e3, 1e4),
    "scale": (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6),
    "condition": (1.0, 10.0, 1e2, 1e4, 1e6, 1e8),
    "dtype": ("float64", "float32", "float16", "bfloat16"),
}
QUICK: dict[str, tuple[Any, ...]] = {
    "mean": (0.0, 100.0, 1e3),
    "scale": (1e-6, 1.0),
    "condition": (10.0, 1e4),
    "dtype": ("float64", "float32", "bfloat16"),
}


@dataclass(frozen=True)
class Size:
    """Number of stimuli, neurons, cells and draws that are measured."""

    n: int = 200
    p: int = 400
    directions: int = 100  # that the two representations share
    seeds: int = 3
    stimuli: int = 64  # of the layer that is ablated
    neurons: int = 300
    cells: int = 100
    ablated_seeds: int = 2
    ablated_means: tuple[float, ...] = (0.0, 10.0)


SMALL = Size(40, 60, 20, 2, 16, 60, 20, 1)


def measure_accuracy(
    device: str = "cpu", quick: bool = False, packages: Sequence[Package] = PACKAGES
) -> Json:
    """Measure errors and orders of all packages; return the record."""
    if device not in ("cpu", "cuda"):
        raise RuntimeError(f"--device {device}: expected cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: no CUDA device is available")
    size, sweeps = (SMALL, QUICK) if quick else (Size(), SWEEPS)
    present, absent = _find_callable(packages, device)
    present += _list_precisions(device)
    names = tuple(sorted({p.distribution for p in present} - {""}))
    return {
        "environment": describe_environment(device, names),
        "settings": {
            "device": device,
            "quick": quick,
            "base": asdict(FeatureCase()),
            "sizes": asdict(size),
            "wrong": WRONG,
            "apart": APART,
            "oracle": f"NumPy long double, {np.finfo(np.longdouble).precision} digits",
        },
        "packages": [{k: getattr(package, k) for k in _FACTS} for package in present],
        "absent": absent,
        "points": _measure_points(present, sweeps, size, device),
        "order": _measure_orders(present, size, device),
    }


def _find_callable(packages: Sequence[Package], device: str) -> tuple[list[Package], Json]:
    """Return the packages that can be called here, and the reasons for those that can't."""
    present, absent = [], {}
    for package in packages:
        if package.pair is None or package.metric not in METRICS:
            continue
        if package.distribution and not any(distributions(name=package.distribution)):
            absent[package.key] = "not installed"
        elif package.kind == "cupy" and device == "cpu":
            absent[package.key] = "needs a CUDA device"
        else:
            present.append(package)
    return present, absent


def _list_precisions(device: str) -> list[Package]:
    """Return this package's CKA in other precisions than its default."""

    def from_grams(x: Tensor, y: Tensor, precision: str) -> Tensor:
        k, m = (rk.centered_gram(z, precision=precision, backend="triton") for z in (x, y))
        return (k * m).sum() / (torch.linalg.norm(k) * torch.linalg.norm(m))

    def make(precision: str, metric: str, note: str, pair: Pair) -> Package:
        return Package(f"{OURS}, {precision}", "", "torch", metric, True, note, pair)

    packages = [
        make("float64", metric, "float64", partial(rk.cka, precision="float64", debiased=debiased))
        for metric, debiased in (("cka", False), ("cka_debiased", True))
    ]
    if device == "cuda":
        packages += [
            make(p, "cka", f"Triton, {p}", partial(from_grams, precision=p))
            for p in ("tf32x3", "tf32")
        ]
    return packages


def draw_features(case: FeatureCase, size: Size, seed: int) -> tuple[Tensor, Tensor]:
    """Draw two representations (n, p) that share some directions."""
    rng = np.random.default_rng(seed)
    n, k = size.n, size.directions
    a = _orthonormal(rng.standard_normal((n, k)))
    b = _orthonormal(np.sqrt(n) * a + rng.standard_normal((n, k)))
    spectrum = np.geomspace(1, 1 / case.condition, k)
    features = []
    for side in (a, b):
        x = (side * spectrum) @ np.linalg.qr(rng.standard_normal((size.p, k)))[0].T
        x = case.scale * (x / x.std() + case.mean)
        features.append(torch.from_numpy(x).to(getattr(torch, case.dtype)))
    return features[0], features[1]


def _orthonormal(x: np.ndarray) -> np.ndarray:
    return np.linalg.qr(x - x.mean(0))[0]


def draw_with_cells(
    size: Size, mean: float, seed: int, dtype: str = "float32"
) -> tuple[Tensor, Any]:
    """Draw a representation (n, p) and cells (p,) whose distances span eight decades."""
    rng = np.random.default_rng(seed)
    n, p = size.stimuli, size.neurons
    cells = rng.permutation(np.arange(p) % size.cells)
    x = rng.standard_normal((n, p)) + rng.standard_normal((n, 5)) @ rng.standard_normal((5, p)) / 3
    x = x * np.geomspace(3, 0.05, size.cells)[cells] + mean
    return torch.from_numpy(x).to(getattr(torch, dtype)), cells


def _measure_points(
    packages: Sequence[Package], sweeps: dict[str, tuple[Any, ...]], size: Size, device: str
) -> list[Json]:
    """Measure every package in every case; each sweep includes the default case."""
    known: dict[FeatureCase, list[Json]] = {}
    rows = []
    for vary, values in sweeps.items():
        for value in values:
            case = replace(FeatureCase(), **{vary: value})
            if case not in known:
                known[case] = _measure_errors(packages, case, size, device)
            rows += [{"vary": vary, "value": value, **point} for point in known[case]]
    return rows


def _measure_errors(
    packages: Sequence[Package], case: FeatureCase, size: Size, device: str
) -> list[Json]:
    """Return one point per package: its errors over the seeds, or why it has none."""
    inputs = [draw_features(case, size, seed) for seed in range(size.seeds)]
    expected = [
        longdouble.compute_similarities(*(z.double().numpy() for z in pair)) for pair in inputs
    ]
    points = []
    for package in packages:
        point: Json = {"package": package.name, "metric": package.metric}
        errors = []
        for pair, want in zip(inputs, expected, strict=True):
            try:
                got = _call(package, device, *pair)
            except Exception as error:  # other packages raise errors of any kind
                point["status"] = "failed" if case.dtype == FeatureCase().dtype else "refused"
                point["why"] = _describe(error)
            else:
                errors.append(abs(got - want[package.metric]) / abs(want[package.metric]))
        finite = [error for error in errors if np.isfinite(error)]
        worst = max(finite, default=None)
        if worst is None or len(finite) < len(errors):
            point.setdefault("status", "nan")
        point.setdefault("status", "wrong" if worst is not None and worst > WRONG else "ok")
        point["median"] = statistics.median(finite) if finite else None
        points.append(
            point | {"worst": worst, "errors": [to_json_number(error) for error in errors]}
        )
    return points


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _call(package: Package, device: str, x: Tensor, y: Tensor) -> float:
    """Return a package's similarity of two CPU tensors, converted to the arrays it accepts."""
    assert package.pair is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(package.pair(*(_convert(package.kind, device, z) for z in (x, y))))


def _convert(kind: str, device: str, x: Tensor) -> Any:
    if kind == "torch":
        return x.to(device)
    if kind == "cupy":
        return importlib.import_module("cupy").asarray(x.to(device))
    if x.dtype == torch.bfloat16:
        raise TypeError("NumPy has no bfloat16")
    return x.numpy()


def _measure_orders(packages: Sequence[Package], size: Size, device: str) -> list[Json]:
    """Measure the distances of all ablations, and their order, per feature mean and package.

    This package's distances come from ``ablation_distances``, the others' are 1 - similarity to an
    ablated copy.
    """
    precisions = {OURS: "tf32x3"} | ({f"{OURS}, tf32": "tf32"} if device == "cuda" else {})
    methods: list[tuple[str, str, Callable[[Tensor, Any], Any]]] = [
        (name, metric, partial(_call_ours, metric, precision, device))
        for name, precision in precisions.items()
        for metric in ABLATED
    ]
    methods += [
        (package.name, package.metric, partial(_loop_over_copies, package, device))
        for package in packages
        if package.metric in ABLATED and not package.name.startswith(OURS)
    ]
    rows = []
    for mean in size.ablated_means:
        inputs = [draw_with_cells(size, mean, seed) for seed in range(size.ablated_seeds)]
        expected = [longdouble.compute_distances(x.double().numpy(), cells) for x, cells in inputs]
        for name, metric, method in methods:
            row: Json = {"package": name, "metric": metric, "mean": mean, "dtype": "float32"}
            try:
                results = [method(x, cells) for x, cells in inputs]
            except Exception as error:
                row |= {"status": "failed", "why": _describe(error)}
            else:
                row |= _summarize_order(results, [want[metric] for want in expected])
            rows.append(row)
    return rows


def _call_ours(metric: str, precision: str, device: str, x: Tensor, cells: Any) -> Any:
    call = partial(rk.ablation_distances, metrics=[metric], precision=precision)
    return call(x.to(device), cells)[metric].cpu().numpy()


def _loop_over_copies(package: Package, device: str, x: Tensor, cells: Any) -> Any:
    scale = 2 if package.metric == "procrustes" else 1
    copies = (x.masked_fill(torch.from_numpy(cells == c), 0) for c in range(cells.max() + 1))
    return np.array([scale * (1 - _call(package, device, x, y)) for y in copies])


def _summarize_order(results: list[Any], expected: list[Any]) -> Json:
    """Return, over all seeds, the pairs out of order and the errors by decade of distance."""
    counts = [count_out_of_order(got, want) for got, want in zip(results, expected, strict=True)]
    wrong, pairs = map(sum, zip(*counts, strict=True))
    got, want = np.concatenate(results), np.concatenate(expected)
    errors = pd.Series(np.abs(got - want) / want)
    decades = errors.groupby(np.floor(np.log10(want)).astype(int))
    return {
        "status": "ok" if np.isfinite(got).all() else "nan",
        "pairs": pairs,
        "out_of_order": wrong,
        "share": wrong / pairs,
        "decades": [
            {
                "distance": f"1e{decade}",
                "cells": len(values),
                "median": to_json_number(float(np.median(values))),
                "worst": to_json_number(float(np.max(values.to_numpy()))),
            }
            for decade, values in decades
        ],
    }


def count_out_of_order(got: Any, want: Any) -> tuple[int, int]:
    """Count the pairs that are ranked wrongly or tie, and the pairs whose true distances differ."""
    apart = want[:, None] - want > APART * want[:, None]
    right = got[:, None] > got  # false where one is NaN
    return int((apart & ~right).sum()), int(apart.sum())


def summarize(record: Json) -> list[tuple[str, ...]]:
    """Return a table, head first: worst errors for float32 input, and pairs out of order."""
    means = sorted({row["mean"] for row in record["order"]})
    points = {
        (p["package"], p["metric"], p["value"]): p for p in record["points"] if p["vary"] == "mean"
    }
    orders = {(o["package"], o["metric"], o["mean"]): o for o in record["order"]}
    head = ("package", "metric", "error at mean 0", "error at mean 100")
    rows = [(*head, *(f"out of order, mean {mean:g}" for mean in means))]
    for package in record["packages"]:
        key = (package["name"], package["metric"])
        errors = [_format_error(points[*key, mean]) for mean in (0, 100)]
        rows.append((*key, *errors, *(_format_share(orders.get((*key, mean))) for mean in means)))
    return rows


def tabulate_by_package(record: Json) -> list[tuple[str, ...]]:
    """Return a short table, head first: CKA of each other package, debiased if it has no other."""
    means = sorted({row["mean"] for row in record["order"]})
    head = ("package", "CKA", "error, mean 0", "error, mean 1,000")
    rows: list[tuple[str, ...]] = [(*head, "error, distances near 1e-9", "pairs out of order")]
    metrics: dict[str, str] = {}
    for package in record["packages"]:
        if package["metric"] in METRICS[:2]:
            metrics.setdefault(package["name"], package["metric"])
    for name, metric in metrics.items():
        if name == "plain torch" or name.startswith(f"{OURS},"):
            continue
        key = {"package": name, "metric": metric}
        errors = [
            _format_error(_find(record["points"], vary="mean", value=mean, **key))
            for mean in (0, 1000)
        ]
        orders = [_find(record["order"], mean=mean, **key) for mean in means]
        kind = "debiased" if metric == "cka_debiased" else "biased"
        rows.append((name, kind, *errors, _format_smallest(orders), _format_worst_share(orders)))
    return rows


def _find(rows: list[Json], **facts: Any) -> Json:
    (match,) = (row for row in rows if all(row[k] == v for k, v in facts.items()))
    return match


def _format_smallest(orders: list[Json]) -> str:
    """Format the worst relative error of the distances of 1e-9 to 1e-8 over the feature means."""
    worst = [d["worst"] for o in orders for d in o.get("decades", []) if d["distance"] == "1e-9"]
    return f"{max(worst):.0e}" if worst and not any(isinstance(w, str) for w in worst) else "nan"


def _format_worst_share(orders: list[Json]) -> str:
    return _format_share(max(orders, key=lambda order: order.get("share", 2)))


def _format_error(point: Json) -> str:
    known = point["status"] in ("ok", "wrong")
    return f"{point['worst']:.0e}" if known else str(point["status"])


def _format_share(order: Json | None) -> str:
    if order is None or order["status"] != "ok":
        return str(order["status"]) if order else ""
    share = order["share"]
    return "none" if share == 0 else f"{share:.2%}" if share < 0.1 else f"{share:.0%}"
