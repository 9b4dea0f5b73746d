"""The generated blocks of the documentation: tables made from committed records."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import aims, bench_compare, maps
from bench.accuracy import OURS, summarize, tabulate_by_package
from bench.bench_calibrate import describe_calibration
from bench.bench_patching import describe_patching
from bench.bench_searchlight import describe_searchlight
from bench.common.machine import Json, format_seconds, load
from bench.common.records import describe_device, format_commits, format_dates
from bench.peers import tables
from bench.peers.packages import PACKAGES
from bench.peers.tables import compute_job_seconds, format_markdown_table, format_ratio
from bench.scaling import model_workers

BY_PARTS = "plain torch, by parts"  # this package's algorithm in plain PyTorch
EIGH = "an eigh and SVDs for each"
HOOK = "a forward hook, once a cell"
SKLEARN = "a loop over scikit-learn, "

# Label of a row, and the start of its benchmarks' group.
_STAGES = {
    "those five metrics, 16 Grams of 500 x 500": "from Grams to distances, five metrics, n=500",
    "Procrustes only": "from Grams to distances, Procrustes, n=500",
    "ridge CCA only, mean and mean squared": "from Grams to distances, ridge CCA, n=500",
    "the five metrics, 100 Grams of 50 x 50": "from Grams to distances, five metrics, n=50 ",
}
_CUTS = {
    "ResNet50, layer3.0": "AblatedForward, ResNet layer3.0,",
    "AlexNet, features.7": "AblatedForward, AlexNet features.7, images",
    "AlexNet, features.7, 6 of the cells dead": "AblatedForward, AlexNet features.7, 6 cells dead",
    "AlexNet, classifier.2": "AblatedForward, AlexNet classifier.2",
    "MobileNetV2, features.7": "AblatedForward, MobileNetV2 features.7",
}
_FITS = {
    "one of 2,000 logistic regressions, class unrelated to the activations": "classes alike",
    "the same, classes separated": "classes apart",
}


def render_speed(results: Path) -> str:
    """README: this package against the fastest alternative, a few jobs per device."""
    return "\n\n".join(_compare_jobs(*records) for records in _pair_records(results))


def render_aims(results: Path) -> str:
    """bench/README.md: the aims for the speed on a CPU, and what was reached."""
    return "\n\n".join(_compare_with_aims(*records) for records in _pair_records(results))


def _pair_records(results: Path) -> list[tuple[Json, Json]]:
    """Return the record of the peers and that of the benchmarks, for each device."""
    records = []
    for path in sorted(results.glob("peers-*.json")):
        bench = results / path.name.replace("peers", "bench", 1)
        if not bench.exists():
            raise RuntimeError(f"{bench}: not found; run `make bench` on the device of {path.name}")
        records.append((load(path), load(bench)))
    if not records:
        raise RuntimeError(f"{results}: no peers-*.json in it; run `python -m bench peers` first")
    return records


def _compare_with_aims(peers: Json, bench: Json) -> str:
    fits = {classes: _get_fit_seconds(bench, classes) for classes in _FITS.values()}
    return f"""\
On {describe_device(peers)}; ratios of median times. If an aim covers several \
pairs, the slowest one counts.

{aims.tabulate_aims(peers, fits)}"""


def _compare_jobs(peers: Json, bench: Json) -> str:
    (ablations,) = tables.select_rows(
        peers, job="ablations", package=BY_PARTS, metric="cka_debiased", cells=100
    )
    rows = [
        _compare_job(peers, "{cells} ablations of one layer, n = {n}, p = {p}", cells=100),
        _compare_job(peers, "{cells} ablations", cells=1000),
        _compare_job(peers, "all pairs of {layers} layers, n = {n}, p = {p}", job="pairs"),
        *(
            _compare_job(peers, "one pair of layers, {n} x {p}", metric="cka", job="pair", **size)
            for size in ({"n": 256, "p": 16_384}, {"n": 256, "p": 64})
        ),
    ]
    stage = "CKA, Procrustes, PWCCA and CCA from the Grams of 16 ablations, n = 500"
    cut = "forward passes of ResNet50 with 16 ablations of layer3.0, 10 images"
    fit = "one logistic regression, 500 stimuli x 100 neurons"
    groups = _STAGES["those five metrics, 16 Grams of 500 x 500"], _CUTS["ResNet50, layer3.0"]
    rows += [
        _compare_benchmarks(bench, stage, groups[0], EIGH, "eigh and SVDs"),
        _compare_benchmarks(bench, cut, groups[1], HOOK, "a forward hook"),
        _compare(fit, *_get_fit_seconds(bench, "classes alike"), "scikit-learn"),
    ]
    by_parts = format_seconds(compute_job_seconds(ablations) or 0.0)
    return f"""\
On {describe_device(peers)}; median times. Ratio: the other's time divided by this package's \
(below 1, the other is faster). The first three rows compute debiased CKA, the next two linear \
CKA. This package computes ablations in float64, and pairs from float32 products that it sums in \
float64; pytorch-cka and plain PyTorch compute in float32. \
Left out: this package's own ablation algorithm in plain PyTorch, which needs {by_parts} for the \
first row.

{format_markdown_table(["job", "this package", "fastest other", "ratio"], rows)}"""


def _compare_job(
    record: Json, label: str, metric: str = "cka_debiased", job: str = "ablations", **facts: int
) -> list[str]:
    (ours,) = tables.select_rows(record, job=job, metric=metric, package=OURS, **facts)
    others = tables.rank_others(record, metric, job=job, **facts)
    first = next(row for row in others if row["package"] != BY_PARTS)
    own_time, other_time = compute_job_seconds(ours) or 0.0, compute_job_seconds(first) or 0.0
    sizes = {key: f"{ours[key]:,}" for key in ("cells", "layers", "n", "p")}
    return _compare(label.format(**sizes), own_time, other_time, first["package"])


def _compare_benchmarks(record: Json, label: str, group: str, name: str, title: str) -> list[str]:
    ours, theirs = (_find_benchmark(record, group, each)["median_s"] for each in (OURS, name))
    return _compare(label, ours, theirs, title)


def _compare(label: str, ours: float, other: float, name: str) -> list[str]:
    name = name.replace("plain torch", "plain PyTorch")
    times = [format_seconds(ours), f"{name}, {format_seconds(other)}"]
    return [label, *times, format_ratio(other / ours)]


def render_accuracy(_path: Path, record: Json) -> str:
    """README: errors of each package in a few conditions."""
    head, *rows = tabulate_by_package(record)
    size = record["settings"]["sizes"]
    return f"""\
On {describe_device(record)}; errors relative to long-double arithmetic, float32 input, worst of \
{size["seeds"]} draws. The mean is in units of the features' standard deviation. Distances and \
order: {size["cells"]} ablations of one layer; a pair of ablations is out of order if it is ranked \
the wrong way round, or ties.

{format_markdown_table(head, rows, left=2)}"""


def render_accuracy_details(path: Path, record: Json) -> str:
    """docs/accuracy.md: the figure, and errors of every package and metric."""
    head, *rows = summarize(record)
    size = record["settings"]["sizes"]
    return f"""\
On {describe_device(record)}.

![Relative errors by mean, scale, condition number and dtype, and the order of ablations]\
(../../bench/results/{path.stem}.png)

Relative errors for float32 input, n = {size["n"]}, p = {size["p"]}, worst of {size["seeds"]} \
draws. Out of order: the share of pairs of {size["cells"]} ablations, among pairs whose true \
distances differ, that are ranked the wrong way round or tie.

{format_markdown_table(head, rows, left=2)}"""


def render_peers(path: Path, record: Json) -> str:
    """bench/README.md: the three jobs of the comparison with other packages."""
    cells, pairs = (tables.select_rows(record, job=job)[0] for job in ("ablations", "pairs"))
    packages = ", ".join(
        f"{name} {version}"
        for name, version in record["environment"].items()
        if name in {"numpy", *(package.distribution for package in PACKAGES)}
    )
    return f"""\
On {describe_device(record)}; {packages}. Times are medians. In brackets: the time divided by this \
package's. > 15 s: no answer within 15 s or, for a loop, not even two comparisons.

![Time against the number of neurons, and of ablations](results/{path.stem}.png)

**All ablations of one layer**, debiased CKA, n = {cells["n"]}, p = {cells["p"]:,} (AlexNet's \
first layer). Most others loop over ablated copies; \\*: estimated from a sample of the ablations. \
The error is the relative error of the distances:

{tables.tabulate_ablations(record, "cka_debiased")}

**All pairs of {pairs["layers"]} layers**, debiased CKA, n = {pairs["n"]:,}, p = {pairs["p"]:,}:

{tables.tabulate_pairs(record, "cka_debiased")}

**One pair**, CKA. This package sums float32 products in float64; most others compute in float32. \
Ratio: the other's time divided by this package's; below 1, the other is faster:

{tables.tabulate_one_pair(record, "cka")}"""


def render_peers_details(_path: Path, record: Json) -> str:
    """bench/README.md: methods, failures and all rows of the comparison."""
    return f"""\
How each package computes each metric, and what it leaves out:

{tables.tabulate_methods(record)}

What failed, was not run, or gives values other than the definition's:

{tables.tabulate_failures(record)}

<details>
<summary>All rows</summary>

{tables.tabulate_all_rows(record)}

</details>"""


def render_baselines(_path: Path, record: Json) -> str:
    """bench/README.md: this package against simple code with PyTorch or scikit-learn."""
    five = _find_benchmark(record, "ablation_distances, CKA, Procrustes", part="p=100,352")
    operations = sum(five["extra_info"]["operations"].values())
    rate = operations / five["median_s"] / 1e9
    ceilings = {kind: f"{value / 1e9:.0f}" for kind, value in record["ceilings"].items()}
    passes = "ablated passes at 224 x 224, 16 cells x 10 images"
    return f"""\
On {describe_device(record)}, {record["environment"]["threads"]} threads; medians. Ratio: the \
other's time divided by this package's.

CKA, Procrustes, PWCCA, mean and mean squared CCA of 16 ablations, n = 500, p = 100,352 \
(ResNet50's last stage): {format_seconds(five["median_s"])}, {operations / 1e12:.2g} · 10¹² \
operations at {rate:.0f} GFLOP/s, most of them for PWCCA's weights. Matrix products on this \
machine reach \
{ceilings["ieee"]} GFLOP/s in float32 and {ceilings["float64"]} in float64.

{_tabulate_benchmarks(record, _STAGES, "from Grams to distances, all cells", EIGH)}

{_tabulate_benchmarks(record, _CUTS, passes, HOOK, _format_sequential_bound)}

{_tabulate_fits(record)}"""


def _tabulate_benchmarks(
    record: Json, labels: dict[str, str], title: str, other: str,
    bound: Callable[[Json, str], str] | None = None,
) -> str:  # fmt: skip
    rows = []
    for label, group in labels.items():
        ours, theirs = (_find_benchmark(record, group, name) for name in (OURS, other))
        times = ours["median_s"], theirs["median_s"]
        rows.append([label, *map(format_seconds, times), f"{times[1] / times[0]:.1f}"])
        rows[-1] += [bound(record, ours["group"])] if bound else []
    return format_markdown_table(
        [title, "this package", other, "ratio", *["bound"] * bool(bound)], rows
    )


def _format_sequential_bound(record: Json, group: str) -> str:
    """Return how much faster than the hook cells can be when run one after the other."""
    rows = [row for row in record["benchmarks"] if row["group"] == group]
    medians = {row["name"]: row["median_s"] for row in rows}
    cells = rows[0]["extra_info"]["shape"]["C"]
    if "whole" not in medians:
        return ""
    return f"{cells * medians['whole'] / (medians['prefix'] + cells * medians['suffix']):.1f}"


def _find_benchmark(record: Json, group: str, name: str = OURS, part: str = "") -> Json:
    """Return the one benchmark with this start of group and name, and this part in its group."""
    (match,) = (
        row
        for row in record["benchmarks"]
        if row["group"].startswith(group) and part in row["group"] and row["name"].startswith(name)
    )
    return match


def _get_fit_seconds(record: Json, classes: str) -> tuple[float, float]:
    """Return the seconds per logistic regression of this package and of scikit-learn."""
    loop = _find_benchmark(record, f"logistic_fits, {classes}, ", SKLEARN)
    ours = _find_benchmark(record, loop["group"])
    other = loop["median_s"] / int(loop["name"].split()[-4])  # "… 200 of the fits"
    return ours["median_s"] / ours["extra_info"]["shape"]["fits"], other


def _tabulate_fits(record: Json) -> str:
    rows = []
    for label, classes in _FITS.items():
        ours, other = _get_fit_seconds(record, classes)
        rows.append([label, format_seconds(ours), format_seconds(other), f"{other / ours:.1f}"])
    paper = _find_benchmark(record, "probe_paper, paired")
    ridge = _find_benchmark(record, "ablation_decodability, leave-one-out ridge", part="targets=1,")
    shape = ridge["extra_info"]["shape"]
    ridge_label = (
        f"leave-one-out ridge after {shape['C']} ablations, n = {shape['n']}, all of "
        f"p = {shape['p']:,}, including the Grams"
    )
    paper_label = "`probe_paper`, 16 cells, 200 draws: 3,400 regressions"
    for label, row in ((paper_label, paper), (ridge_label, ridge)):
        rows.append([label, format_seconds(row["median_s"]), "not run", ""])
    title = "linear probes, n = 500, d = 100 of p = 100,352 neurons unless stated otherwise"
    return format_markdown_table([title, "this package", "a loop over scikit-learn", "ratio"], rows)


def render_operations(_path: Path, record: Json) -> str:
    """bench/README.md: every benchmark of this package's operations."""
    rates = {kind: f"{rate / 1e9:.0f}" for kind, rate in record["ceilings"].items()}
    rows = []
    for row in record["benchmarks"]:
        info = row["extra_info"]
        times = [format_seconds(row["median_s"]), format_seconds(row["iqr_s"]), str(row["rounds"])]
        reached = [f"{info[k]:.3g}" if k in info else "" for k in ("gb_s", "tflop_s")]
        share = f"{info['of_ceiling']:.0%}" if "of_ceiling" in info else ""
        rows.append([row["group"], row["name"], *times, *reached, share])
    head = ["operation", "method", "median", "IQR", "rounds", "GB/s", "TFLOP/s", "of ceiling"]
    return f"""\
On {describe_device(record)}. Ceilings: {rates["copy"]} GB/s for a copy, products at \
{rates["ieee"]} GFLOP/s in float32 and {rates["float64"]} in float64.

<details>
<summary>All {len(rows)} benchmarks</summary>

{format_markdown_table(head, rows, left=2)}

</details>"""


def render_scaling(_path: Path, record: Json) -> str:
    """experiments/README.md: how long the demo takes with more workers."""
    one, two = record["runs"]
    units = two["units"]
    rows = [row for row in model_workers(units) if row[0] <= 16]
    walls = ["seconds for the demo's units", *(f"{wall:.0f}" for _, wall, _ in rows)]
    shares = ["efficiency", *(f"{share:.0%}" for _, _, share in rows)]
    return f"""\
On {describe_device(record)}: the demo's {len(units)} units took {sum(one["units"]):.0f} s in one \
process, {one["seconds"]:.0f} s with start-up and report; with two workers the whole command took \
{two["seconds"]:.0f} s. The table is a model: it hands out units in order, with the seconds they \
took with two workers, and leaves out start-up. More than two workers were not measured.

{format_markdown_table(["workers", *(str(workers) for workers, _, _ in rows)], [walls, shares])}

No number of workers is faster than the longest unit, here {max(units):.0f} s."""


def render_networks(results: Path) -> str:
    """bench/README.md: maps of two networks by this package, another and hooks."""
    records = [load(path) for path in sorted(results.glob("networks-*.json"))]
    # Small sizes say nothing about speed.
    parts = [_describe_networks(record) for record in records if not record["quick"]]
    return "\n\n".join(parts) or "Not measured yet."


def _describe_networks(record: Json) -> str:
    return f"""\
On {describe_device(record)}; medians. The difference is the largest of all pairs of layers from \
debiased CKA over all stimuli in float64.

{bench_compare.tabulate_aims(record)}

{bench_compare.tabulate(record)}"""


def _render_all(kind: str, describe: Callable[[Json], str], results: Path) -> str:
    """bench/README.md: all records of a kind, as its own benchmark describes them."""
    paths = sorted(results.glob(f"{kind}-*.json"))
    return "\n\n".join(describe(load(path)) for path in paths) or "Not measured yet."


def render_unrelated(_path: Path, record: Json) -> str:
    """docs/compare.md: CKA of representations that have nothing in common."""
    return maps.describe_unrelated(record)


def render_runs(results: Path) -> str:
    """bench/README.md: the committed records with device, date and commit."""
    rows = []
    for path in sorted(results.glob("*.json")):
        record = load(path)
        name = f"[`{path.name.partition('-')[0]}`](results/{path.name})"
        device = record["environment"]["device"]
        rows.append([name, device, format_dates(record), format_commits(record)])
    return format_markdown_table(["record", "device", "date", "commit"], rows, left=4)


# By name: the kind of record that a block is made from, and the function that makes it. For "*" the
# function gets the folder of all records.
BLOCKS: dict[str, tuple[str, Callable[..., str]]] = {
    "speed": ("*", render_speed),
    "aims": ("*", render_aims),
    "accuracy": ("accuracy", render_accuracy),
    "accuracy-details": ("accuracy", render_accuracy_details),
    "peers": ("peers", render_peers),
    "peers-details": ("peers", render_peers_details),
    "baselines": ("bench", render_baselines),
    "operations": ("bench", render_operations),
    "scaling": ("scaling", render_scaling),
    "networks": ("*", render_networks),
    "unrelated": ("maps", render_unrelated),
    "calibrate": ("calibrate", lambda _path, record: describe_calibration(record)),
    "patching": ("*", partial(_render_all, "patching", describe_patching)),
    "searchlight": ("*", partial(_render_all, "searchlight", describe_searchlight)),
    "runs": ("*", render_runs),
}
