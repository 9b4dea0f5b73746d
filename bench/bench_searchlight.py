"""Searchlights, against the loop of rsatoolbox: time, memory and values.

Each case runs in a new process, since the peak memory is that of a process. The loop is timed on a
sample of the spheres, and its time for all of them extrapolated.

Predictions for 250,000 spheres of 100 voxels and 32 patterns, on two cores that together multiply
100 Gop/s in float64 and gather 8 GB/s:

    distance              gathered   operations   at least
    euclidean             6.4 GB     51 Gop       1.3 s
    crossnobis, 4 folds   26 GB      256 Gop      5.8 s

The passes over products and distances, 250,000 x (1,024 + 5 x 496) float64 numbers that stay in a
cache, should add about a second, and so should rank correlations, which sort 124 million numbers.
Next to x and the neighbours, memory is 496 MB of results, 34 MB of RDMs and indices of spheres that
are computed together, 9 MB of the patterns of their voxels (44 MB for crossnobis), and 15 MB of
batches: 0.6 GB.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.spatial import KDTree  # type: ignore[import-untyped]
from scipy.spatial.distance import pdist  # type: ignore[import-untyped]
from torch import Generator, Tensor

import repsim_kernels as rk
from bench.common import memory
from bench.common.inputs import count_bytes
from bench.common.machine import Json, describe_environment, format_seconds
from bench.common.records import describe_device
from bench.common.tolerances import Tol, assert_close
from bench.conftest import Timer
from bench.peers.tables import format_markdown_table

Array = np.ndarray[Any, Any]
Neighbours = tuple[Array, Array]

N, SIDE, RADIUS = 32, 16, 2.9
SINGLE = Tol(2e-7, 0)  # what rounding to float32 leaves


def make_cube(g: Generator) -> tuple[Tensor, Tensor]:
    """Draw patterns, and list the positions of their voxels."""
    sides = (torch.arange(SIDE, device=g.device),) * 3
    return torch.randn(N, SIDE**3, generator=g, device=g.device), torch.cartesian_prod(*sides)


def test_searchlight(timed: Timer) -> None:
    """Check a few spheres."""
    neighbours = rk.spheres(make_cube(torch.Generator())[1], RADIUS)
    indptr, indices = neighbours
    checked = [0, SIDE**3 // 2]

    def oracle(x: Tensor, _: Tensor) -> Array:
        values = x.cpu().numpy()
        return np.array([pdist(values[:, indices[indptr[c] : indptr[c + 1]]]) for c in checked])

    timed(
        "searchlight",
        make_cube,
        call=lambda x, _: rk.searchlight(x, neighbours),
        oracle=oracle,
        check=lambda got, want: assert_close(got[checked], want, SINGLE),
        shape={"n": N, "p": SIDE**3, "C": SIDE**3},
        bytes=count_bytes(N + N * (N - 1) // 2, SIDE**3, torch.float32) + 4 * len(indices),
        operations={"float64": N * (N + 1) * len(indices)},
    )


def test_spheres(timed: Timer) -> None:
    def oracle(_: Tensor, positions: Tensor) -> Array:
        tree = KDTree(positions.cpu().numpy())
        return np.asarray(tree.query_ball_point(tree.data, RADIUS, return_length=True))

    timed(
        "spheres",
        make_cube,
        call=lambda _, positions: rk.spheres(positions, RADIUS),
        oracle=oracle,
        check=lambda got, want: np.testing.assert_array_equal(np.diff(got[0]), want),
        shape={"p": SIDE**3, "C": SIDE**3},
    )


@dataclass(frozen=True)
class Case:
    """A call of `searchlight`.

    Attributes
    ----------
    name : str
    distance : str
    folds : int
        Patterns are drawn once for each fold.
    ragged : bool
        Whether spheres of a radius end at the border of a ball of voxels; otherwise each has the
        100 nearest offsets of a box, whose ends are joined.
    method : str, optional
        How RDMs are compared with two models; None to keep the RDMs.
    aims : dict
        Seconds, bytes, and how many times as fast as the loop.
    """

    name: str
    distance: str = "euclidean"
    folds: int = 1
    ragged: bool = False
    method: str | None = None
    aims: dict[str, float] = field(default_factory=dict)


_LIMITS = {"seconds": 15, "bytes": 1.2e9}
CASES = (
    Case("euclidean", aims={**_LIMITS, "ratio": 50}),
    Case("crossnobis, 4 folds", "crossnobis", 4, aims={**_LIMITS, "ratio": 100}),
    Case("euclidean, ragged", ragged=True),
    Case("crossnobis, 4 folds, ragged", "crossnobis", 4, ragged=True),
    Case("euclidean, Spearman with 2 models", method="spearman"),
    Case("euclidean, rho-a with 2 models", method="rho-a"),
)
_SIZES: dict[bool, Json] = {  # by `quick`
    False: {"conditions": 32, "box": (60, 60, 70), "spheres": 250_000, "radius": 39, "timed": 400},
    True: {"conditions": 6, "box": (8, 9, 10), "spheres": 600, "radius": 5, "timed": 10},
}
_VOXELS = 100  # of a sphere that is not ragged


def measure_searchlight(quick: bool = False) -> Json:
    """Return the record: seconds, memory, and the differences from rsatoolbox, by case."""
    if importlib.util.find_spec("rsatoolbox") is None:
        raise RuntimeError("rsatoolbox is not installed; it is in the extra `peers`")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        rows = [
            processes.submit(_measure, index, _SIZES[quick]).result() for index in range(len(CASES))
        ]
    return {
        "environment": describe_environment("cpu", ("rsatoolbox", "scipy")),
        **_SIZES[quick],
        "rows": rows,
    }


def _measure(index: int, sizes: Json) -> Json:
    """Measure one of the cases, in a process of its own."""
    case = CASES[index]
    start = time.perf_counter()
    neighbours = _make_ball(sizes) if case.ragged else _make_box(sizes)
    spheres_seconds = time.perf_counter() - start
    n, n_spheres = sizes["conditions"], len(neighbours[0]) - 1
    n_voxels = n_spheres if case.ragged else int(np.prod(sizes["box"]))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((case.folds * n, n_voxels), dtype=np.float32)
    options: Json = {"distance": case.distance}
    if case.folds > 1:
        options["labels"] = np.tile(np.arange(n), case.folds)
    if case.method:
        options |= {"method": case.method, "compare_to": rng.random((2, n * (n - 1) // 2))}
    rk.searchlight(x, [[0, 1]], **options)  # loads what is used
    before = memory.start_peak()
    start = time.perf_counter()
    result = rk.searchlight(x, neighbours, **options)
    seconds = time.perf_counter() - start
    peak = memory.read_peak()
    sample = np.linspace(0, n_spheres - 1, sizes["timed"]).astype(int)
    lists = [neighbours[1][neighbours[0][c] : neighbours[0][c + 1]] for c in sample]
    _run_loop(case, x, lists[:2], options)
    start = time.perf_counter()
    values = _run_loop(case, x, lists, options)
    loop_seconds = time.perf_counter() - start
    return {
        "case": case.name,
        "spheres": n_spheres,
        "voxels": len(neighbours[1]) / n_spheres,
        "spheres_seconds": spheres_seconds if case.ragged else None,
        "seconds": seconds,
        "bytes": peak - before,
        "process_bytes": peak,
        "loop_seconds": loop_seconds / len(sample) * n_spheres,
        "largest_difference": float(np.abs(result[sample] - values).max()),
    }


def _make_box(sizes: Json) -> Neighbours:
    """Return the 100 nearest voxels of each sphere, in a box whose ends are joined."""
    box, n_spheres = sizes["box"], sizes["spheres"]
    n_voxels = int(np.prod(box))
    offsets = np.argwhere(np.ones((7, 7, 7))) - 3
    order = np.argsort((offsets**2).sum(1), kind="stable")[:_VOXELS]
    steps = (offsets[order] @ [box[1] * box[2], box[2], 1]).astype(np.int32)
    indices = np.empty((n_spheres, _VOXELS), np.int32)
    for start in range(0, n_spheres, 10_000):  # without temporary arrays of all spheres
        part = indices[start : start + 10_000]
        centres = np.arange(start, start + len(part), dtype=np.int32)
        part[:] = np.sort((centres[:, None] + steps) % n_voxels, axis=1)
    return np.arange(n_spheres + 1) * _VOXELS, indices.reshape(-1)


def _make_ball(sizes: Json) -> Neighbours:
    """Return spheres of a radius around all voxels of a ball."""
    radius = sizes["radius"]
    positions = np.argwhere(np.ones((2 * radius + 1,) * 3)) - radius
    return rk.spheres(positions[(positions**2).sum(1) <= radius**2], RADIUS)


def _run_loop(case: Case, x: Array, spheres: list[Array], options: Json) -> Array:
    """Return what rsatoolbox computes for each sphere of a sample, in this package's units."""
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import RDMs, calc_rdm, compare
    from rsatoolbox.util.searchlight import get_searchlight_RDMs

    n = len(x) // case.folds
    labels, folds = np.tile(np.arange(n), case.folds), np.repeat(np.arange(case.folds), n)
    sizes = np.array([[len(sphere)] for sphere in spheres])
    if case.folds > 1:
        descriptors = {"events": labels, "run": folds}
        rdms = [
            calc_rdm(
                Dataset(x[:, sphere], obs_descriptors=descriptors),
                case.distance,
                descriptor="events",
                cv_descriptor="run",
            ).dissimilarities[0]
            for sphere in spheres
        ]
        return np.array(rdms)
    rdms = get_searchlight_RDMs(x, np.arange(len(spheres)), spheres, labels, case.distance, False)
    distances: Array = np.sqrt(rdms.dissimilarities * sizes)  # it divides squares by the voxels
    if case.method is None:
        return distances
    similarities: Array = compare(RDMs(distances), RDMs(options["compare_to"]), case.method)
    return similarities


def list_aims(record: Json) -> list[tuple[str, str, bool]]:
    """Return what each aim is about, the measured value next to it, and whether it is reached."""
    aims = []
    for case, row in zip(CASES, record["rows"], strict=True):
        ratio = row["loop_seconds"] / row["seconds"]
        for name, value, text in (
            ("seconds", row["seconds"], format_seconds),
            ("bytes", row["bytes"], lambda value: f"{value / 1e9:.2f} GB"),
            ("ratio", ratio, lambda value: f"{value:,.0f} times as fast"),
        ):
            if name in case.aims:
                aim = case.aims[name]
                reached = value >= aim if name == "ratio" else value <= aim
                aims.append((case.name, f"{text(value)}, aim {text(aim)}", reached))
    return aims


def describe_searchlight(record: Json) -> str:
    """Return the record in words and a table, also for bench/README.md."""
    table = []
    for row in record["rows"]:
        times = [format_seconds(row[key]) for key in ("seconds", "loop_seconds")]
        ratio = f"{row['loop_seconds'] / row['seconds']:,.0f}"
        sizes = [f"{row['bytes'] / 1e6:,.0f} MB", f"{row['process_bytes'] / 1e9:.2f} GB"]
        spheres = f"{row['spheres']:,} of {row['voxels']:.0f}"
        difference = f"{row['largest_difference']:.0e}"
        table.append([row["case"], spheres, *times, ratio, *sizes, difference])
    head = ["distance", "spheres of voxels", "this package", "rsatoolbox", "ratio", "memory"]
    head += ["whole process", "difference"]
    missed = [f"{name}: {text}" for name, text, reached in list_aims(record) if not reached]
    aims = "All aims are reached" if not missed else f"Not reached: {'; '.join(missed)}"
    return f"""\
On {describe_device(record)}: {record["conditions"]} patterns of float32. rsatoolbox's loop was \
timed on {record["timed"]:,} spheres and extrapolated. Memory is the most in use beyond x, the \
neighbours and the imported packages, and includes the result; the whole process includes these \
too. The difference is the largest from rsatoolbox's values. Aims: less than 15 s and 1.2 GB, and \
50 and 100 times as fast as the loop, for the first two rows. {aims}.

{format_markdown_table(head, table)}"""
