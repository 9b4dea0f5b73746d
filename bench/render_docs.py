"""The parts of README.md and bench/README.md that are made of committed results."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bench import roofline
from bench.accuracy import summary
from bench.accuracy_figure import figure
from bench.common.machine import RESULTS, ROOT, Json, load, seconds
from bench.peers import tables
from bench.peers.tables import OURS, markdown
from bench.scaling import modelled

PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md")
_PART = r"(<!-- {}: made by `python -m bench render-docs` -->\n).*?(<!-- end -->)"

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
    """The figures of peers and of accuracy, and the rooflines of the benchmarks."""
    written = []
    for kind, drawn in (("peers", tables.figure), ("accuracy", figure)):
        for path in sorted(results.glob(f"{kind}-*.json")):
            written.append(path.with_suffix(".png"))
            drawn(load(path), written[-1])
    for path in sorted(results.glob("bench-*.json")):
        name = path.stem.replace("bench", "roofline", 1)
        written += roofline.roofline(path, results / f"{name}.png")
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
    host = f", host {found['host']}" if "host" in found else ""
    return f"{found['device']}{host}, torch {found['torch']}, {_dates(record)}"


def _rows(record: Json) -> list[Json]:
    """The rows that have commits of their own, newest first: a comparison's, run job by job."""
    own = [row for row in record.get("rows", []) if "commit" in row]
    return sorted(own, key=lambda row: row["date"], reverse=True)


def _dates(record: Json) -> str:
    days = [row["date"][:10] for row in _rows(record) or [record["environment"]]]
    return days[0] if days[0] == days[-1] else f"{days[-1]} to {days[0]}"


def _commits(record: Json) -> str:
    """What was measured, newest first."""
    found = record["environment"]
    names = []
    for commit in dict.fromkeys(row["commit"] for row in _rows(record) or [found]):
        changed = bool(found["changed"]) and commit == found["commit"]
        names.append((commit[:7] if commit else "not known") + " + changes" * changed)
    return ", ".join(names)


def peers(results: Path) -> str:
    """The three jobs, for the README."""

    def part(path: Path, record: Json) -> str:
        cells, pairs = (tables.find(record, job=job)[0] for job in ("ablations", "pairs"))
        return "\n\n".join(
            [
                f"On {_on(record)}. Medians; in brackets, how many times as long as this package. "
                "> 30 s: no answer by then; of a loop, not to its first two comparisons.",
                f"![Time against the number of neurons, and of ablations]"
                f"(bench/results/{path.with_suffix('.png').name})",
                f"**Every ablation of one layer**, debiased CKA, n = {cells['n']}, "
                f"p = {cells['p']:,} (AlexNet's first layer). Most others loop over ablated "
                "copies; \\*: estimated from some of them. The error is that of the distances, "
                "relative:",
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
                "What failed or was not run, or gives other numbers than the definition:",
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
                        "a forward hook, once a cell", _bound),
                _fits(record),
            ]
        )  # fmt: skip

    return _each(results, "bench", part)


def _beside(
    record: Json,
    labels: dict[str, str],
    title: str,
    other: str,
    bound: Callable[[Json, str], str] | None = None,
) -> str:
    head = [title, "this package", other, "ratio", *(["bound"] if bound else [])]
    rows = []
    for label, start in labels.items():
        ours, theirs = (_row(record, start, name) for name in (OURS, other))
        line = [label, seconds(ours["median_s"]), seconds(theirs["median_s"])]
        line.append(f"{theirs['median_s'] / ours['median_s']:.1f}")
        if bound:
            line.append(bound(record, ours["group"]))
        rows.append(line)
    return markdown(head, rows)


def _bound(record: Json, group: str) -> str:
    """How much faster than the hook cells can be, one after the other: bench_forward.py."""
    some = [row for row in record["benchmarks"] if row["group"] == group]
    alone = {row["name"]: row["median_s"] for row in some}
    cells = some[0]["extra_info"]["shape"]["C"]
    if "whole" not in alone:
        return ""
    return f"{cells * alone['whole'] / (alone['prefix'] + cells * alone['suffix']):.1f}"


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
        loop = _first(record, f"logistic_fits, {which}, ", "a loop over scikit-learn, ")
        ours = _row(record, loop["group"], OURS)
        one = ours["median_s"] / ours["extra_info"]["shape"]["fits"]
        other = loop["median_s"] / int(loop["name"].split()[-4])  # "… 200 of the fits"
        rows.append([label, seconds(one), seconds(other), f"{other / one:.1f}"])
    paper = _first(record, "probe_paper, paired")
    ridge = _first(record, "ablation_decodability, leave-one-out ridge")
    shape = ridge["extra_info"]["shape"]
    for label, found in (
        ("`probe_paper`, 16 cells, 200 draws: 3,400 regressions", paper),
        (
            f"leave-one-out ridge after {shape['C']} ablations, n = {shape['n']}, all of "
            f"p = {shape['p']:,}, its Grams included",
            ridge,
        ),
    ):
        rows.append([label, seconds(found["median_s"]), "not run", ""])
    title = "linear probes, n = 500, d = 100 of p = 100,352 neurons where not said"
    return markdown([title, "this package", "a loop over scikit-learn", "ratio"], rows)


def _first(record: Json, start: str, name: str = OURS) -> Json:
    rows = record["benchmarks"]
    return next(r for r in rows if r["group"].startswith(start) and r["name"].startswith(name))


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


def scaling(results: Path) -> str:
    """How long the demo takes by more workers, for the README."""

    def part(path: Path, record: Json) -> str:
        one, two = record["runs"]
        units = two["units"]
        rows = [row for row in modelled(units) if row[0] <= 16]
        table = markdown(
            ["workers", *(str(workers) for workers, _, _ in rows)],
            [
                ["seconds for the demo's units", *(f"{wall:.0f}" for _, wall, _ in rows)],
                ["efficiency", *(f"{share:.0%}" for _, _, share in rows)],
            ],
        )
        return (
            f"On {_on(record)}: the demo's {len(units)} units took {sum(one['units']):.0f} s in "
            f"one process, with start-up and report {one['seconds']:.0f} s; by two workers the "
            f"whole command took {two['seconds']:.0f} s. Beyond two it is a model, not measured: "
            "units of the seconds that they took there, handed out in their order, start-up "
            f"aside:\n\n{table}\n\n"
            f"The longest unit bounds it, here {max(units):.0f} s."
        )

    return _each(results, "scaling", part)


def runs(results: Path) -> str:
    """What was run on what."""
    rows = []
    for path in sorted(results.glob("*.json")):
        record = load(path)
        name = f"[`{path.name.partition('-')[0]}`](results/{path.name})"
        device = record["environment"]["device"]
        rows.append([name, device, _dates(record), _commits(record)])
    return markdown(["record", "device", "date", "commit"], rows)


PARTS: dict[str, Callable[[Path], str]] = {
    "peers": peers,
    "peers-whole": peers_whole,
    "speed": speed,
    "operations": operations,
    "accuracy": accuracy,
    "scaling": scaling,
    "runs": runs,
}
