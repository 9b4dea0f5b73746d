"""Compare this package with others on the GPU: one job of each kind, at sizes that fill it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from bench.common.machine import Json, load
from bench.gpu_report.processes import run_command
from bench.peers.jobs import CKA, Workload


def list_workloads(quick: bool) -> list[Workload]:
    if quick:
        return [Workload("ablations", 20, 2000, ("cka",), cells=8)]
    return [
        Workload("ablations", 50, 193_600, cells=100),
        Workload("pair", 1000, 100_000),
        Workload("pairs", 1000, 4096, CKA, layers=10),
    ]


def measure_peers(device: str, quick: bool, limit: float) -> Json:
    """Compare the packages that are installed; keep the jobs that end within ``limit`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peers.json"
        command = [sys.executable, "-m", __name__, device, str(int(quick)), str(out)]
        result = run_command(command, limit)
        output = result.pop("output")
        rows = load(out)["rows"] if out.exists() else []
    tail = {} if result["exit_code"] == 0 else {"tail": output.splitlines()[-40:]}
    return {**result, "rows": rows, **tail}


def main(device: str, quick: str, out: str) -> None:
    from bench.peers.run import compare_packages

    workloads = list_workloads(quick == "1")
    compare_packages(Path(out), device, quick=True, workloads=workloads)


if __name__ == "__main__":
    main(*sys.argv[1:])
