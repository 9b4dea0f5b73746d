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
    for name in re.findall(r"<!-- (\S+): made by", text):
        pattern = re.compile(_PART.format(re.escape(name)), re.DOTALL)
        if name not in PARTS:
            raise RuntimeError(f"part {name}: unknown; expected one of {', '.join(PARTS)}")
        part = _made(name, results)
        text, count = pattern.subn(lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text)
        if count != 1:
            raise RuntimeError(f"part {name}: {count} times with an end; expected once")
    return text


def _made(name: str, results: Path) -> str:
    """A part, once for each device that there is a record of."""
    kind, part = PARTS[name]
    if kind == "*":
        return part(results)
    records = [(path, load(path)) for path in sorted(results.glob(f"{kind}-*.json"))]
    if not records:
        raise RuntimeError(f"{results}: no {kind}-*.json in it; make one first")
    return "\n\n".join(part(path, record) for path, record in records)


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


def _on(record: Json) -> str:
    found = record["environment"]
    host = f", host {found['host']}" if "host" in found else ""
    return f"{found['device']}{host}, torch {found['torch']}, {_dates(record)}"


def _measured(record: Json) -> list[tuple[str, str | None]]:
    """Days and commits, newest first: of rows that have their own, as a comparison's, or of all."""
    own = [row for row in record.get("rows", []) if "commit" in row] or [record["environment"]]
    own.sort(key=lambda row: row["date"], reverse=True)
    return [(row["date"][:10], row["commit"]) for row in own]


def _dates(record: Json) -> str:
    days = [day for day, _ in _measured(record)]
    return days[0] if days[0] == days[-1] else f"{days[-1]} to {days[0]}"


def _commits(record: Json) -> str:
    """What was measured, newest first."""
    found = record["environment"]
    changed = {found["commit"]: " + changes"} if found["changed"] else {}
    commits = dict.fromkeys(commit for _, commit in _measured(record))
    return ", ".join((c[:7] if c else "not known") + changed.get(c, "") for c in commits)


def peers(path: Path, record: Json) -> str:
    """The three jobs, for the README."""
    cells, pairs = (tables.find(record, job=job)[0] for job in ("ablations", "pairs"))
    return f"""\
On {_on(record)}. Medians; in brackets, how many times as long as this package. > 30 s: no answer \
by then; of a loop, not to its first two comparisons.

![Time against the number of neurons, and of ablations](bench/results/{path.stem}.png)

**Every ablation of one layer**, debiased CKA, n = {cells["n"]}, p = {cells["p"]:,} (AlexNet's \
first layer). Most others loop over ablated copies; \\*: estimated from some of them. The error is \
that of the distances, relative:

{tables.ablations(record, "cka_debiased")}

**All pairs of {pairs["layers"]} layers**, debiased CKA, n = {pairs["n"]:,}, p = {pairs["p"]:,}:

{tables.pairs(record, "cka_debiased")}

**One pair**, CKA. This package is in float64 throughout, the others mostly in float32; ratio: of \
its time to theirs:

{tables.one_pair(record, "cka")}"""


def peers_whole(_path: Path, record: Json) -> str:
    """Everything that the comparison recorded."""
    names = [name for name in record["environment"] if _is_package(name)]
    return f"""\
On {_on(record)}; {", ".join(f"{name} {record['environment'][name]}" for name in names)}.

What each does, and what it leaves out:

{markdown(["package: metric", "how"], record["packages"].items())}

What failed or was not run, or gives other numbers than the definition:

{tables.failures(record)}

Everything:

{tables.everything(record)}"""


def _is_package(name: str) -> bool:
    return name in ("numpy", "scikit-learn", "repsim") or "cka" in name or "tool" in name


def speed(_path: Path, record: Json) -> str:
    """What this package takes by itself, for the README."""
    five = _row(record, "ablation_distances, CKA, Procrustes", OURS, "p=100,352")
    done = sum(five["extra_info"]["operations"].values())
    rates = {kind: f"{rate / 1e9:.0f}" for kind, rate in record["ceilings"].items()}
    hooked = "ablated passes at 224 x 224, 16 cells x 10 images"
    return f"""\
On {_on(record)}, {record["environment"]["threads"]} threads; medians:

CKA, Procrustes, PWCCA, mean and mean squared CCA of 16 ablations, n = 500, p = 100,352 \
(ResNet50's last stage): {seconds(five["median_s"])}, {done / 1e12:.2g} · 10¹² operations at \
{done / five["median_s"] / 1e9:.0f} GFLOP/s, most of them PWCCA's weights. This machine's matrix \
products reach {rates["ieee"]} GFLOP/s in float32 and {rates["float64"]} in float64.

{_beside(record, _STAGES, "from Grams to the distances, all cells", "an eigh and SVDs for each")}

{_beside(record, _CUTS, hooked, "a forward hook, once a cell", _bound)}

{_fits(record)}"""


def _beside(
    record: Json, labels: dict[str, str], title: str, other: str,
    bound: Callable[[Json, str], str] | None = None,
) -> str:  # fmt: skip
    rows = []
    for label, start in labels.items():
        ours, theirs = (_row(record, start, name) for name in (OURS, other))
        ratio = f"{theirs['median_s'] / ours['median_s']:.1f}"
        rows.append([label, seconds(ours["median_s"]), seconds(theirs["median_s"]), ratio])
        rows[-1] += [bound(record, ours["group"])] if bound else []
    return markdown([title, "this package", other, "ratio", *(["bound"] if bound else [])], rows)


def _bound(record: Json, group: str) -> str:
    """How much faster than the hook cells can be, one after the other: bench_forward.py."""
    some = [row for row in record["benchmarks"] if row["group"] == group]
    alone = {row["name"]: row["median_s"] for row in some}
    cells = some[0]["extra_info"]["shape"]["C"]
    if "whole" not in alone:
        return ""
    return f"{cells * alone['whole'] / (alone['prefix'] + cells * alone['suffix']):.1f}"


def _row(record: Json, start: str, name: str = OURS, part: str = "") -> Json:
    """The one benchmark of a name whose group begins so and has this part."""
    (found,) = (
        row
        for row in record["benchmarks"]
        if row["group"].startswith(start) and part in row["group"] and row["name"].startswith(name)
    )
    return found


def _fits(record: Json) -> str:
    rows = []
    for label, which in _FITS.items():
        loop = _row(record, f"logistic_fits, {which}, ", "a loop over scikit-learn, ")
        ours = _row(record, loop["group"])
        one = ours["median_s"] / ours["extra_info"]["shape"]["fits"]
        other = loop["median_s"] / int(loop["name"].split()[-4])  # "… 200 of the fits"
        rows.append([label, seconds(one), seconds(other), f"{other / one:.1f}"])
    paper = _row(record, "probe_paper, paired")
    ridge = _row(record, "ablation_decodability, leave-one-out ridge", part="targets=1,")
    shape = ridge["extra_info"]["shape"]
    ridge_label = (
        f"leave-one-out ridge after {shape['C']} ablations, n = {shape['n']}, all of "
        f"p = {shape['p']:,}, its Grams included"
    )
    paper_label = "`probe_paper`, 16 cells, 200 draws: 3,400 regressions"
    for label, found in ((paper_label, paper), (ridge_label, ridge)):
        rows.append([label, seconds(found["median_s"]), "not run", ""])
    title = "linear probes, n = 500, d = 100 of p = 100,352 neurons where not said"
    return markdown([title, "this package", "a loop over scikit-learn", "ratio"], rows)


def operations(_path: Path, record: Json) -> str:
    """Every benchmark of this package's operations."""
    rates = {kind: f"{rate / 1e9:.0f}" for kind, rate in record["ceilings"].items()}
    rows = []
    for row in record["benchmarks"]:
        more = row["extra_info"]
        times = [seconds(row["median_s"]), seconds(row["iqr_s"]), str(row["rounds"])]
        reached = [f"{more[k]:.3g}" if k in more else "" for k in ("gb_s", "tflop_s")]
        share = f"{more['of_ceiling']:.0%}" if "of_ceiling" in more else ""
        rows.append([row["group"], row["name"], *times, *reached, share])
    head = ["what", "by", "median", "spread", "rounds", "GB/s", "TFLOP/s", "of the ceiling"]
    return f"""\
On {_on(record)}. Ceilings: a copy {rates["copy"]} GB/s, products {rates["ieee"]} GFLOP/s in \
float32, {rates["float64"]} in float64.

{markdown(head, rows)}"""


def accuracy(_path: Path, record: Json) -> str:
    """Errors of all packages."""
    head, *rows = summary(record)
    size = record["settings"]["sizes"]
    return f"""\
On {_on(record)}; float32 input, n = {size["n"]}, p = {size["p"]}, the worst of {size["seeds"]} \
draws; order: of {size["cells"]} ablations, how many pairs are out of order among those whose true \
distances differ.

{markdown(head, rows)}"""


def scaling(_path: Path, record: Json) -> str:
    """How long the demo takes by more workers, for the README."""
    one, two = record["runs"]
    units = two["units"]
    rows = [row for row in modelled(units) if row[0] <= 16]
    walls = ["seconds for the demo's units", *(f"{wall:.0f}" for _, wall, _ in rows)]
    shares = ["efficiency", *(f"{share:.0%}" for _, _, share in rows)]
    return f"""\
On {_on(record)}: the demo's {len(units)} units took {sum(one["units"]):.0f} s in one process, \
with start-up and report {one["seconds"]:.0f} s; by two workers the whole command took \
{two["seconds"]:.0f} s. Beyond two it is a model, not measured: units of the seconds that they \
took there, handed out in their order, start-up aside:

{markdown(["workers", *(str(workers) for workers, _, _ in rows)], [walls, shares])}

The longest unit bounds it, here {max(units):.0f} s."""


def runs(results: Path) -> str:
    """What was run on what."""
    rows = []
    for path in sorted(results.glob("*.json")):
        record = load(path)
        name = f"[`{path.name.partition('-')[0]}`](results/{path.name})"
        device = record["environment"]["device"]
        rows.append([name, device, _dates(record), _commits(record)])
    return markdown(["record", "device", "date", "commit"], rows)


PARTS: dict[str, tuple[str, Callable[..., str]]] = {  # and the records that they are made of
    "peers": ("peers", peers),
    "peers-whole": ("peers", peers_whole),
    "speed": ("bench", speed),
    "operations": ("bench", operations),
    "accuracy": ("accuracy", accuracy),
    "scaling": ("scaling", scaling),
    "runs": ("*", runs),
}
