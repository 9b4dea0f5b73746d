"""Counts of what the phantom device does: launches and host synchronisations, by line.

What counts as a launch
    Each library call, which is one ATen operation on the device, unless it returns a view or
    memory without values; each Triton kernel; each replay of a CUDA graph, whatever it contains.
    (An operation may start several kernels; the host pays for most of it once.)
What counts as a host synchronisation
    `item`, `tolist`, printing; each copy between host and device that the host waits for; each
    operation in `SYNCS`; `synchronize` of a stream, an event or the device. A copy that the host
    does not wait for is a launch instead.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

ROOTS = tuple(
    str(Path(__file__).parents[1] / folder) for folder in ("repsim_kernels", "experiments", "bench")
)
# An asynchronous copy of up to 64 KiB to the device does not block the host (CUDA Programming
# Guide, "Asynchronous Concurrent Execution"); a larger one may, unless its memory is pinned.
STAGED_BYTES = 64 * 1024
# Operations that make the host wait, and what for.
SYNCS = {
    "nonzero": "the number of results",
    "masked_select": "the number of results",
    "_unique2": "the number of results",
    "unique_dim": "the number of results",
    "unique_consecutive": "the number of results",
    "bincount": "the smallest and the largest value",
    "isin": "the distinct values (`unique`), if there are many",
    "equal": "the answer, a Python bool",
    "linalg_matrix_exp": "the norms, which choose the polynomial",
    "_linalg_check_errors": "the status of solve, inv, cholesky, lu_factor; the *_ex forms skip it",
    "_linalg_eigh": "the status of every matrix; there is no *_ex form",
    "_linalg_svd": "the convergence of every matrix",
    "linalg_eig": "the status of every matrix",
    "linalg_lstsq": "the status of every matrix",
}


class Counts:
    """Launches, host synchronisations and captured calls, each with the line that made it."""

    def __init__(self) -> None:
        self.events: dict[str, collections.Counter[tuple[str, str]]] = {
            kind: collections.Counter() for kind in ("launch", "sync", "captured")
        }

    def record(self, kind: str, what: str) -> None:
        self.events[kind][_find_line(), what] += 1

    @property
    def launches(self) -> int:
        return self.events["launch"].total()

    @property
    def syncs(self) -> int:
        return self.events["sync"].total()

    def count(self, kind: str, text: str) -> int:
        """Count the events whose name contains a text."""
        return sum(n for (_, what), n in self.events[kind].items() if text in what)

    def explain(self) -> str:
        """List the events by line, most frequent first."""
        lines = []
        for kind, events in self.events.items():
            lines.append(f"{events.total()} x {kind}")
            by_line: dict[str, collections.Counter[str]] = collections.defaultdict(
                collections.Counter
            )
            for (line, what), n in events.items():
                by_line[line][what] += n
            for line, found in sorted(by_line.items(), key=lambda item: -item[1].total()):
                names = ", ".join(f"{n} {what}" for what, n in found.most_common())
                lines.append(f"{found.total():5d}  {line}  {names}")
        return "\n".join(lines)


def _find_line() -> str:
    """Return the two innermost lines of the project that are being run."""
    frame, lines = sys._getframe(2), []
    while frame is not None and len(lines) < 2:
        path = frame.f_code.co_filename
        if path.startswith(ROOTS):
            lines.append(f"{path.removeprefix(str(Path(ROOTS[0]).parent))[1:]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "the caller"
