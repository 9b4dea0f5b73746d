"""The sheet in one line."""

from __future__ import annotations

from bench.common.machine import Json


def verdict(record: Json) -> str:
    """What of the record is right, wrong and not known."""
    parts = (
        _kernels(record["rows"], record["interpreted"]),
        _tests(record["tests"] or {}),
        _sanitizer(record["sanitizer"] or {}),
        _study(record["study"] or {}),
    )
    return "; ".join(parts)


def _kernels(rows: list[Json], interpreted: bool) -> str:
    by_status: dict[str, list[str]] = {}
    for row in rows:
        by_status.setdefault(row["status"], []).append(f"{row['name']} {row['shape']}")
    ran = len(rows) - len(by_status.get("not run", []))
    if not ran:
        return f"kernels NOT RUN: {rows[0]['why']}" if rows else "no kernels"
    said = f"{len(by_status.pop('ok', []))} of {len(rows)} kernels right"
    said += " in Triton's interpreter, on no GPU" if interpreted else ""
    for status in ("WRONG", "error", "skipped", "not run", "waiting", "running"):
        if names := by_status.get(status):
            some = ", ".join(dict.fromkeys(names[:4])) + (", …" if len(names) > 4 else "")
            said += f", {len(names)} {status} ({some})"
    return said


def _tests(tests: Json) -> str:
    counts = tests.get("counts")
    if not counts:
        why = tests.get("why", "no counts")
        return f"tests {why}" if why.startswith("not run") else f"tests FAILED: {why}"
    said = f"{counts.get('passed', 0)} tests passed, {counts.get('failed', 0)} failed"
    said += f", {counts['error']} in error" if "error" in counts else ""
    said += f", {counts['skipped']} skipped" if "skipped" in counts else ""
    return f"{said}, {tests['why']}" if "why" in tests else said


def _sanitizer(found: Json) -> str:
    said = []
    for tool in found.get("tools", []):
        if tool["tool"] == "alone":
            continue
        if tool["errors"]:
            said.append(f"{tool['tool']} {tool['errors']} ERRORS")
        elif tool["exit_code"] != 0 or tool["errors"] is None:
            said.append(f"{tool['tool']} {tool.get('why') or 'without a count'}")
    if not found.get("tools") or "why" in found:
        said.append(found.get("why", "no record"))
    return f"sanitizer {', '.join(said)}" if said else "sanitizer clean"


def _study(study: Json) -> str:
    networks = study.get("networks", [])
    failed = sum(len(network.get("failed", [])) for network in networks)
    if "seconds" in study:
        what = "study" if study.get("preset") else "rehearsed study"
        missing = f", {failed} of its stages NOT TIMED" if failed else ""
        return f"{what} {study['seconds']:.3g} s extrapolated{missing}"
    whole = [network for network in networks if "seconds" in network]
    some = [f"{network['name']} {network['seconds']:.3g} s" for network in whole]
    said = f"study of {len(whole)} of {len(networks)} networks" if networks else "study FAILED"
    return f"{said} ({', '.join([*some, *filter(None, [study.get('why')])])})"
