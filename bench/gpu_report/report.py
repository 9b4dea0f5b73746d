"""Print a report: the table of its rows, its other parts, and the verdict."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.common.machine import Json

_LEFT = ("kernel", "shape", "dtype", "products")
_RIGHT = ("error", "call ms", "ms", "floor ms", "%", "torch ms", "vs torch", "vs CuPy")
_NOTE = """\
call ms: including the host; ms: on the device; floor ms: minimum by the ceilings; %: floor of ms;
vs torch, vs CuPy: time of the faster torch route, or of plain CuPy, divided by this call's."""


def format_number(value: Any, form: str = ".4g") -> str:
    return "" if value is None else value if isinstance(value, str) else format(value, form)


def format_row(row: Json) -> tuple[str, ...]:
    """Return the entries of a row of the table."""
    share, error = row.get("of_floor"), format_number(row.get("error"), ".1e")
    return (
        *(row["name"], row["shape"], row["dtype"], row["precision"]),
        error if row["status"] == "ok" else f"{row['status']} {error}".strip(),
        *map(format_number, (row.get("call", {}).get("ms"), row.get("ms"), row.get("floor_ms"))),
        format_number(None if share is None else 100 * share, ".0f"),
        format_number(row.get("torch_ms")),
        *(format_number(row.get(ratio), ".2f") for ratio in ("ratio", "cupy_ratio")),
    )


def print_report(record: Json) -> None:
    """Print the ceilings, the rows, the study and, last, the verdict on all parts."""
    rates, device = record["ceilings"] or {}, record["environment"]["device"]
    if "copy" in rates:
        kinds = {"tf32": "TF32", "ieee": "FP32", "bfloat16": "BF16", "float64": "FP64"}
        products = ", ".join(f"{name} {rates[key] / 1e12:.4g}" for key, name in kinds.items())
        print(f"\n{device}: copy {rates['copy'] / 1e9:.4g} GB/s; TFLOP/s: {products}\n")
    else:
        print(f"\n{device}: no ceilings: {rates.get('why')}\n")
    _print_columns([(*_LEFT, *_RIGHT), *map(format_row, record["rows"])], len(_LEFT))
    for why, names in _group_names(record["rows"], "why").items():
        print(names[0], f"and {len(names) - 1} more:" if len(names) > 1 else ":", why)
    routes = [row.get("routes", {}).get("cupy", {}) for row in record["rows"]]
    for why, count in Counter(route["why"] for route in routes if "why" in route).items():
        print(f"CuPy's route, of {count} rows:", why)
    print(_NOTE)
    _print_study(record["study"] or {})
    _print_peers(record["peers"] or {})
    print("\n" + describe_cache(record["cache"] or {}))
    print(f"\nverdict: {record['verdict']}")


def _print_study(study: Json) -> None:
    preset = study.get("preset")
    what = f"study ({preset}, random weights)" if preset else "rehearsed study of a small network"
    print(f"\nThe {what}: seconds on this device, extrapolated from a sample")
    networks = study.get("networks", [])
    stages = [*networks[0].get("extrapolated", {})] if networks else []
    table = [("network", "layers", "classes", *stages, "together")]
    for network in networks:
        seconds = [network.get("extrapolated", {}).get(stage) for stage in stages]
        facts = network["name"], str(len(network.get("layers", []))), str(network.get("targets"))
        parts = (format_number(part, ".3g") or "—" for part in seconds)
        table.append((*facts, *parts, format_number(network.get("seconds"), ".4g") or "—"))
    _print_columns(table, 1)
    for network in networks:
        sample = (
            f"{one['layer']} ({one['neurons']:,} neurons)" for one in network.get("sample", [])
        )
        print(f"{network['name']}: timed for one class and", ", ".join(sample) or "nothing")
        print(*(f"  not timed: {why}\n" for why in network.get("failed", [])), sep="", end="")
    print(*filter(None, [study.get("rules"), *_list_reasons("why: ", study)]), sep="\n")


def _print_peers(peers: Json) -> None:
    print("\nOther packages: median seconds of a job")
    table = [("job", "n", "p", "metric", "package", "seconds", "")]
    for row in peers.get("rows", []):
        seconds = statistics.median(row["seconds"]) if row.get("seconds") else None
        if seconds is not None:
            seconds *= row["of"] / row["calls"]
        status = "" if row["status"] == "ok" else f"{row['status']}: {row['why']}"
        facts = row["job"], f"{row['n']:,}", f"{row['p']:,}", row["metric"], row["package"]
        table.append((*facts, format_number(seconds, ".3g"), status))
    _print_columns(table, 5)
    print(*_list_reasons("why: ", peers), sep="\n")


def describe_cache(cache: Json) -> str:
    """Say how many kernels were served from the packed cache, and which were compiled."""
    if "packed" not in cache:
        return f"compiled kernels: {cache.get('why', 'no record')}"
    parts = cache.get("parts", {}).values()
    served, compiled = (sum(part[how] for part in parts) for how in ("served", "compiled"))
    names = Counter[str]()
    for part in parts:
        names.update(part["names"])
    text = f"kernels: {cache['packed']} packed, {served} of them served, {compiled} compiled here"
    text += f" ({', '.join(f'{name} {count}' for name, count in names.items())})" if names else ""
    return "; ".join([text, *filter(None, (cache.get("stale"), cache.get("why")))])


def _print_columns(table: Sequence[Sequence[str]], left: int) -> None:
    """Print a table whose first ``left`` columns are aligned left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for texts in table:
        padded = zip(texts, widths, strict=True)
        aligned = [t.ljust(w) if i < left else t.rjust(w) for i, (t, w) in enumerate(padded)]
        print("  ".join(aligned).rstrip())


def _group_names(rows: Sequence[Json], key: str) -> dict[str, list[str]]:
    """Return the names of the rows that have a key, grouped by its value."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if key in row:
            groups.setdefault(row[key], []).append(f"{row['name']} {row['shape']}")
    return groups


def _list_reasons(prefix: str, part: Json) -> list[str]:
    """Return a list with the reason why a part has no result, or an empty list."""
    return [f"{prefix}{part['why']}"] if "why" in part else []


def judge(record: Json) -> str:
    """Summarise in one line what in the record is right, wrong or unknown."""
    parts = (
        _judge_kernels(record["rows"], record["interpreted"]),
        _judge_study(record["study"] or {}),
        _judge_peers(record["peers"] or {}),
        _judge_tests(record["tests"] or {}),
        _judge_sanitizer(record["sanitizer"] or {}),
    )
    return "; ".join(parts)


def _judge_kernels(rows: list[Json], interpreted: bool) -> str:
    names = _group_names(rows, "status")
    if not rows:
        return "no kernels"
    if [*names] == ["not run"]:
        return f"kernels NOT RUN: {rows[0]['why']}"
    text = f"{len(names.get('ok', []))} of {len(rows)} kernels right"
    text += " in Triton's interpreter, on no GPU" if interpreted else ""
    for status in ("WRONG", "error", "skipped", "not run", "waiting", "running"):
        if labels := names.get(status):
            examples = ", ".join(dict.fromkeys(labels[:4])) + (", …" if len(labels) > 4 else "")
            text += f", {len(labels)} {status} ({examples})"
    return text


def _judge_peers(peers: Json) -> str:
    counts = Counter(row["status"] for row in peers.get("rows", []))
    if not counts:
        return f"peers FAILED: {peers.get('why', 'no rows')}"
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    return ", ".join([f"peers {text}", *_list_reasons("", peers)])


def _judge_tests(tests: Json) -> str:
    counts, why = tests.get("counts"), tests.get("why", "no counts")
    if not counts:
        return f"tests {why}" if why.startswith("not run") else f"tests FAILED: {why}"
    text = f"{counts.get('passed', 0)} tests passed, {counts.get('failed', 0)} failed"
    for what, name in (("error", "in error"), ("skipped", "skipped")):
        text += f", {counts[what]} {name}" if what in counts else ""
    return ", ".join([text, *_list_reasons("", tests)])


def _judge_sanitizer(sanitizer: Json) -> str:
    tools = [tool for tool in sanitizer.get("tools", []) if tool["tool"] != "alone"]
    text = [f"{tool['tool']} {tool['errors']} ERRORS" for tool in tools if tool["errors"]]
    for tool in tools:
        if not tool["errors"] and (tool["exit_code"] != 0 or tool["errors"] is None):
            text.append(f"{tool['tool']} {tool.get('why') or 'without a count'}")
    text += _list_reasons("", sanitizer) or ([] if sanitizer.get("tools") else ["no record"])
    return f"sanitizer {', '.join(text) or 'clean'}"


def _judge_study(study: Json) -> str:
    networks = study.get("networks", [])
    if "seconds" in study:
        failed = sum(len(network.get("failed", [])) for network in networks)
        what = "study" if study.get("preset") else "rehearsed study"
        missing = f", {failed} of its stages NOT TIMED" if failed else ""
        return f"{what} {study['seconds']:.3g} s extrapolated{missing}"
    complete = [n for n in networks if "seconds" in n]
    text = f"study of {len(complete)} of {len(networks)} networks" if networks else "study FAILED"
    times = [f"{network['name']} {network['seconds']:.3g} s" for network in complete]
    return f"{text} ({', '.join([*times, *_list_reasons('', study)])})"
