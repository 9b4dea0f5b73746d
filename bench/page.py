"""The parts of README.md and bench/README.md that are made of committed results."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bench._machine import RESULTS, ROOT, Json, load
from bench.accuracy import summary
from bench.peers import tables
from bench.peers.tables import markdown, seconds

PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md")
_PART = r"(<!-- {}: made by `python -m bench page` -->\n).*?(<!-- end -->)"

# Rows of tables with this package beside another way: what it is called, and its group's start.
_STAGES = {
    "those five metrics, 16 Grams of 500 x 500": "from Grams to distances, five metrics, n=500",
    "Procrustes alone": "from Grams to distances, Procrustes, n=500",
    "ridge CCA alone, mean and mean squared": "from Grams to distances, ridge CCA, n=500",
    "the five, 100 Grams of 50 x 50": "from Grams to distances, five metrics, n=50 ",
}
_CUTS = {
    "ResNet50, layer3.0": "AblatedForward, ResNet layer3.0,",
    "AlexNet, features.7": "AblatedForward, AlexNet features.7, images",
    "the same, 6 of the cells dead": "AblatedForward, AlexNet features.7, 6 cells dead",
    "AlexNet, classifier.2": "AblatedForward, AlexNet classifier.2",
    "MobileNetV2, features.7": "AblatedForward, MobileNetV2 features.7",
}
_FITS = {
    "a logistic regression, of 2,000, the class unrelated to the activations": "classes alike",
    "the same, classes apart": "classes apart",
}


def pages(results: Path = RESULTS) -> dict[Path, str]:
    """Each page as it should be, by its path."""
    return {path: filled(path.read_text(encoding="utf-8"), results) for path in PAGES}


def filled(text: str, results: Path) -> str:
    """A page with its parts made anew; a part that is not known is an error."""
    names = re.findall(r"<!-- (\S+): made by", text)
    for name in names:
        pattern = re.compile(_PART.format(re.escape(name)), re.DOTALL)
        if name not in PARTS:
            raise RuntimeError(f"part {name}: unknown; expected one of {', '.join(PARTS)}")
        part = PARTS[name](results)
        text, count = pattern.subn(lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text)
        if count != 1:
            raise RuntimeError(f"part {name}: {count} times with an end; expected once")
    return text


def draw(results: Path = RESULTS) -> list[Path]:
    """The figures of the comparison with peers."""
    written = []
    for path in sorted(results.glob("peers-*.json")):
        written.append(path.with_suffix(".png"))
        tables.figure(load(path), written[-1])
    return written


def _records(results: Path, kind: str) -> list[tuple[Path, Json]]:
    found = [(path, load(path)) for path in sorted(results.glob(f"{kind}-*.json"))]
    if not found:
        raise RuntimeError(f"{results}: no {kind}-*.json in it; make one first")
    return found


def _each(results: Path, kind: str, part: Callable[[Path, Json], str]) -> str:
    """A part for each device that there is a record of."""
    return "\n\n".join(part(path, record) for path, record in _records(results, kind))


def _on(record: Json) -> str:
    found = record["environment"]
    return f"{found['device']}, torch {found['torch']}, {found['date'][:10]}"


def peers(results: Path) -> str:
    """The three jobs, for the README."""

    def part(path: Path, record: Json) -> str:
        cells, pairs = (tables.find(record, job=job)[0] for job in ("ablations", "pairs"))
        return "\n\n".join(
            [
                f"On {_on(record)}. Medians; in brackets, how many times as long as this package.",
                f"![Time against the number of neurons, and of ablations]"
                f"(bench/results/{path.with_suffix('.png').name})",
                f"**Every ablation of one layer**, debiased CKA, n = {cells['n']}, "
                f"p = {cells['p']:,} (AlexNet's first layer). Others loop over ablated copies; "
                "\\*: estimated from some of them. The error is that of the distances, relative:",
                tables.ablations(record, "cka_debiased"),
                f"**All pairs of {pairs['layers']} layers**, debiased CKA, n = {pairs['n']:,}, "
                f"p = {pairs['p']:,}:",
                tables.pairs(record, "cka_debiased"),
                "**One pair**, CKA. This package is in float64 throughout, the others mostly in "
                "float32; ratio: of its time to theirs:",
                tables.one_pair(record, "cka"),
            ]
        )

    return _each(results, "peers", part)


def peers_whole(results: Path) -> str:
    """Everything that the comparison recorded."""

    def part(path: Path, record: Json) -> str:
        found = record["environment"]
        versions = [f"{k} {v}" for k, v in found.items() if _is_package(k)]
        notes = [[name, note] for name, note in record["packages"].items()]
        return "\n\n".join(
            [
                f"On {_on(record)}; {', '.join(versions)}.",
                "What each does, and what it leaves out:",
                markdown(["package: metric", "how"], notes),
                "What failed, or gives other numbers than the definition:",
                tables.failures(record),
                "Everything:",
                tables.everything(record),
            ]
        )

    return _each(results, "peers", part)


def _is_package(name: str) -> bool:
    return name in ("numpy", "scikit-learn", "repsim") or "cka" in name or "tool" in name


def speed(results: Path) -> str:
    """What this package takes by itself, for the README."""

    def part(path: Path, record: Json) -> str:
        found = record["environment"]
        (five,) = (
            row
            for row in record["benchmarks"]
            if row["group"].startswith("ablation_distances, CKA, Procrustes")
            and "p=100,352" in row["group"]
        )
        done = sum(five["extra_info"]["operations"].values())
        rate = done / five["median_s"] / 1e9
        shape = "16 ablations, n = 500, p = 100,352 (ResNet50's last stage)"
        return "\n\n".join(
            [
                f"On {_on(record)}, {found['threads']} threads; medians:",
                f"CKA, Procrustes, PWCCA, mean and mean squared CCA of {shape}: "
                f"{seconds(five['median_s'])}, {done / 1e12:.2g} · 10¹² operations at "
                f"{rate:.0f} GFLOP/s, most of them PWCCA's weights. This machine's matrix products "
                f"reach {record['ceilings']['ieee'] / 1e9:.0f} GFLOP/s in float32 and "
                f"{record['ceilings']['float64'] / 1e9:.0f} in float64.",
                _beside(record, _STAGES, "from Grams to the distances, all cells",
                        "an eigh and SVDs for each"),
                _beside(record, _CUTS, "ablated passes at 224 x 224, 16 cells x 10 images",
                        "a forward hook, once a cell", "bound"),
                _fits(record),
            ]
        )  # fmt: skip

    return _each(results, "bench", part)


def _beside(
    record: Json, labels: dict[str, str], title: str, other: str, finding: str | None = None
) -> str:
    head = [title, "this package", other, "ratio", *([finding] if finding else [])]
    rows = []
    for label, start in labels.items():
        ours, theirs = (_row(record, start, name) for name in ("repsim_kernels", other))
        line = [label, seconds(ours["median_s"]), seconds(theirs["median_s"])]
        line.append(f"{theirs['median_s'] / ours['median_s']:.1f}")
        if finding:
            value = record["findings"].get(ours["group"], {}).get(finding)
            line.append("" if value is None else f"{value:.1f}")
        rows.append(line)
    return markdown(head, rows)


def _row(record: Json, start: str, name: str) -> Json:
    (found,) = (
        row
        for row in record["benchmarks"]
        if row["group"].startswith(start) and row["name"] == name
    )
    return found


def _fits(record: Json) -> str:
    rows = []
    for label, which in _FITS.items():
        (found,) = (
            values
            for group, values in record["findings"].items()
            if group.startswith(f"logistic_fits, {which}") and "ratio" in values
        )
        times = (seconds(found[key] / 1e3) for key in ("ms_a_fit", "loop_ms_a_fit"))
        rows.append([label, *times, f"{found['ratio']:.1f}"])
    for label, start in (
        ("`probe_paper`, 16 cells, 200 draws: 3,400 regressions", "probe_paper, paired"),
        ("leave-one-out ridge after 16 ablations, from their Grams", "ablation_decodability, leav"),
    ):
        found = next(row for row in record["benchmarks"] if row["group"].startswith(start))
        rows.append([label, seconds(found["median_s"]), "not run", ""])
    title = "linear probes, n = 500, d = 100 of p = 100,352 neurons"
    return markdown([title, "this package", "a loop over scikit-learn", "ratio"], rows)


def operations(results: Path) -> str:
    """Every benchmark of this package's operations."""

    def part(path: Path, record: Json) -> str:
        rates = {k: v for k, v in record["ceilings"].items() if k in ("copy", "ieee", "float64")}
        rows = []
        for row in record["benchmarks"]:
            more = row["extra_info"]
            rows.append(
                [
                    row["group"],
                    row["name"],
                    seconds(row["median_s"]),
                    seconds(row["iqr_s"]),
                    str(row["rounds"]),
                    *(f"{more[k]:.3g}" if k in more else "" for k in ("gb_s", "tflop_s")),
                    f"{more['of_ceiling']:.0%}" if "of_ceiling" in more else "",
                ]
            )
        text = (
            f"On {_on(record)}. Ceilings: a copy {rates['copy'] / 1e9:.0f} GB/s, products "
            f"{rates['ieee'] / 1e9:.0f} GFLOP/s in float32, {rates['float64'] / 1e9:.0f} in "
            "float64."
        )
        head = ["what", "by", "median", "spread", "rounds", "GB/s", "TFLOP/s", "of the ceiling"]
        return f"{text}\n\n{markdown(head, rows)}"

    return _each(results, "bench", part)


def accuracy(results: Path) -> str:
    """Errors of all packages."""

    def part(path: Path, record: Json) -> str:
        head, *rows = summary(record)
        size = record["settings"]["sizes"]
        return "\n\n".join(
            [
                f"On {_on(record)}; float32 input, n = {size['n']}, p = {size['p']}, the worst of "
                f"{size['seeds']} draws; order: of {size['cells']} ablations, how many pairs are "
                "out of order among those whose true distances differ.",
                markdown(head, rows),
            ]
        )

    return _each(results, "accuracy", part)


def runs(results: Path) -> str:
    """What was run on what."""
    rows = []
    for path in sorted(results.glob("*.json")):
        found = load(path)["environment"]
        kind = path.name.partition("-")[0]
        name = f"[`{kind}`](results/{path.name})"
        rows.append([name, found["device"], found["date"][:10], (found["commit"] or "")[:7]])
    return markdown(["record", "device", "date", "commit"], rows)


PARTS: dict[str, Callable[[Path], str]] = {
    "peers": peers,
    "peers-whole": peers_whole,
    "speed": speed,
    "operations": operations,
    "accuracy": accuracy,
    "runs": runs,
}
