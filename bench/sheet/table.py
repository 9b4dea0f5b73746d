"""The short table at the end of a sheet."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

_LEFT = ("kernel", "shape", "dtype", "products")
_RIGHT = ("error", "call ms", "ms", "floor ms", "%", "torch ms", "ratio")
_NOTE = """\
call ms: with what the host adds; ms: on the device; floor ms: what the ceilings allow; %: of it;
ratio: the call of the faster torch route to this one's."""


def line(row: Json) -> tuple[str, ...]:
    """A row of the table."""

    def number(value: Any, form: str = ".4g") -> str:
        return "" if value is None else value if isinstance(value, str) else format(value, form)

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
    )


def show(record: Json) -> None:
    """Print the ceilings, the tests, the rows, and why some rows have no numbers."""
    rates, tests, rows = record["ceilings"], record["tests"], record["rows"]
    print(
        f"\n{record['environment']['device']}: copy {rates['copy'] / 1e9:.4g} GB/s; TFLOP/s: "
        f"TF32 {rates['tf32'] / 1e12:.4g}, FP32 {rates['ieee'] / 1e12:.4g}, "
        f"BF16 {rates['bfloat16'] / 1e12:.4g}"
    )
    counted = [f"{number} {what}" for what, number in tests.get("counts", {}).items()]
    print("pytest -m gpu:", ", ".join(counted) or "no counts", tests.get("why", ""))
    table = [(*_LEFT, *_RIGHT), *(line(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for texts in table:
        padded = zip(texts, widths, strict=True)
        aligned = [t.ljust(w) if i < len(_LEFT) else t.rjust(w) for i, (t, w) in enumerate(padded)]
        print("  ".join(aligned).rstrip())
    for why in dict.fromkeys(row["why"] for row in rows if "why" in row):
        named = [f"{row['name']} {row['shape']}" for row in rows if row.get("why") == why]
        print(named[0], f"and {len(named) - 1} more:" if len(named) > 1 else ":", why)
    print(_NOTE)
