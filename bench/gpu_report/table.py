"""What a sheet prints: the table of its rows, and the other parts in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.common.machine import Json

_LEFT = ("kernel", "shape", "dtype", "products")
_RIGHT = ("error", "call ms", "ms", "floor ms", "%", "torch ms", "vs torch", "vs CuPy")
_NOTE = """\
call ms: with what the host adds; ms: on the device; floor ms: what the ceilings allow; %: of it;
vs torch, vs CuPy: a call of the faster torch route, and of plain CuPy, to one of this."""


def number(value: Any, form: str = ".4g") -> str:
    return "" if value is None else value if isinstance(value, str) else format(value, form)


def line(row: Json) -> tuple[str, ...]:
    """A row of the table."""
    share, error = row.get("of_floor"), number(row.get("error"), ".1e")
    return (
        row["name"],
        row["shape"],
        row["dtype"],
        row["precision"],
        error if row["status"] == "ok" else f"{row['status']} {error}".strip(),
        number(row.get("call", {}).get("ms")),
        number(row.get("ms")),
        number(row.get("floor_ms")),
        number(None if share is None else 100 * share, ".0f"),
        number(row.get("torch_ms")),
        number(row.get("ratio"), ".2f"),
        number(row.get("cupy_ratio"), ".2f"),
    )


def columns(table: Sequence[Sequence[str]], left: int) -> None:
    """Print a table whose first columns are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for texts in table:
        padded = zip(texts, widths, strict=True)
        aligned = [t.ljust(w) if i < left else t.rjust(w) for i, (t, w) in enumerate(padded)]
        print("  ".join(aligned).rstrip())


def show(record: Json) -> None:
    """Print all parts; the verdict is the last line."""
    _ceilings(record)
    print()
    columns([(*_LEFT, *_RIGHT), *map(line, record["rows"])], len(_LEFT))
    _reasons(record["rows"])
    print(_NOTE)
    _tests(record["tests"] or {})
    _sanitizer(record["sanitizer"] or {})
    _study(record["study"] or {})
    print(f"\nverdict: {record['verdict']}")


def _ceilings(record: Json) -> None:
    rates, device = record["ceilings"] or {}, record["environment"]["device"]
    if "copy" not in rates:
        print(f"\n{device}: no ceilings:", rates.get("why"))
        return
    print(
        f"\n{device}: copy {rates['copy'] / 1e9:.4g} GB/s; TFLOP/s: "
        f"TF32 {rates['tf32'] / 1e12:.4g}, FP32 {rates['ieee'] / 1e12:.4g}, "
        f"BF16 {rates['bfloat16'] / 1e12:.4g}, FP64 {rates['float64'] / 1e12:.4g}"
    )


def _reasons(rows: list[Json]) -> None:
    """Why some rows have no numbers."""
    for why in dict.fromkeys(row["why"] for row in rows if "why" in row):
        named = [f"{row['name']} {row['shape']}" for row in rows if row.get("why") == why]
        print(named[0], f"and {len(named) - 1} more:" if len(named) > 1 else ":", why)
    routes = [row.get("routes", {}).get("cupy", {}) for row in rows]
    for why in dict.fromkeys(route["why"] for route in routes if "why" in route):
        print(f"CuPy's route, of {sum(route.get('why') == why for route in routes)} rows:", why)


def _tests(tests: Json) -> None:
    counted = [f"{count} {what}" for what, count in tests.get("counts", {}).items()]
    said = ", ".join([*counted, *filter(None, [tests.get("why")])])
    print("\npytest -m gpu:", said or "no counts")


def _sanitizer(found: Json) -> None:
    tools = [
        f"{tool['tool']} {number(tool['errors'], 'd') or 'no'} errors, exit {tool['exit_code']}"
        for tool in found.get("tools", [])
        if tool["tool"] != "alone"
    ]
    print("compute-sanitizer:", "; ".join([*tools, *filter(None, [found.get("why")])]))


def _study(study: Json) -> None:
    networks = study.get("networks", [])
    preset = study.get("preset")
    what = f"study ({preset}, random weights)" if preset else "rehearsed study, of a small network"
    print(f"\nThe {what}: seconds on this device, from a sample")
    if networks:
        heads = [*networks[0].get("extrapolated", {})]
        parts = [("network", "layers", "classes", *heads, "together")]
        for network in networks:
            found = network.get("extrapolated", {})
            parts.append(
                (
                    network["name"],
                    str(len(network.get("layers", []))),
                    str(network.get("targets", "")),
                    *(number(found.get(stage), ".3g") or "—" for stage in heads),
                    number(network.get("seconds"), ".4g") or "—",
                )
            )
        columns(parts, 1)
    for network in networks:
        timed = network.get("sample", [])
        sample = [f"{layer['layer']} ({layer['neurons']:,} neurons)" for layer in timed]
        print(f"{network['name']}: timed for one class and", ", ".join(sample) or "nothing")
        failed = [text.partition(": ")[::2] for text in network.get("failed", [])]
        for why in dict.fromkeys(why for _, why in failed):
            print(f"  not timed ({why}):", "; ".join(where for where, own in failed if own == why))
    for rule in study.get("rules", {}).values():
        print(rule)
    if "why" in study:
        print("why:", study["why"])
