"""Prepare the report on a machine without a GPU: compile its kernels, rehearse, print the command.

Triton 3.6, which comes with PyTorch 2.11, compiles the kernels; the launches are recorded with the
Triton of the environment, whose interpreter runs the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.common.machine import ROOT, load
from bench.gpu_report import cache
from bench.gpu_report.pytest_plugin import FOLDER
from bench.gpu_report.report import describe_cache
from bench.gpu_report.rows import describe_error
from bench.gpu_report.variants import (
    Compiled,
    Variant,
    compile_variant,
    load_variants,
    save_variants,
)

BUILD = ROOT / "build" / "gpu_report"
ARCHIVE = BUILD / "kernels.tar.xz"
TRITON = ROOT / ".venv" / "triton-3.6"
ARCH = 90
# Distributions and modules that a GPU machine may lack; the rehearsal hides them.
HIDDEN = (
    *("ray", "statsmodels", "cka", "pytorch-cka", "ckatorch", "torch-cka", "torch_cka", "repsim"),
    *("rsatoolbox", "shesha", "shesha-geometry", "repsim-kernels", "pytest_benchmark"),
)
_LONGEST = 20  # seconds of a call; its kernels start early, and each has a row of its own
_COMMAND = "-m bench gpu-report --out gpu-report.json --cache {}"


def prepare() -> None:
    """Compile, rehearse and print; kernels that an earlier call compiled are reused."""
    if not TRITON.is_dir():
        raise RuntimeError(f"{TRITON}: not found; `make gpu-report` installs it")
    BUILD.mkdir(parents=True, exist_ok=True)
    recorded = BUILD / f"launches-{hash_recording()[:16]}.json"
    if not recorded.exists():
        _report_step("recording launches: the tests in the interpreter, the report's calls")
        variants = dict.fromkeys([*record_tests(), *record_report()])
        save_variants(recorded, variants)
    _report_step(f"compiling {len(load_variants(recorded))} variants for sm_{ARCH}")
    environment = {"PYTHONPATH": str(TRITON), "TRITON_CACHE_DIR": str(BUILD / "triton")}
    _run([sys.executable, "-m", __name__, str(recorded)], environment)
    _report_step("rehearsing the command in a plain checkout")
    print(rehearse(ARCHIVE, BUILD))
    size = ARCHIVE.stat().st_size / 2**20
    archive = ARCHIVE.relative_to(ROOT)
    print(
        f"\nCopy the checkout, with {archive} ({size:.1f} MiB), to the GPU machine and run "
        f"in its root, with the Python that has PyTorch:\n\n  python3 {_COMMAND.format(archive)}\n"
    )


def _report_step(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def hash_recording() -> str:
    """Return a hash of the code that decides which kernels are launched."""
    digest = hashlib.sha256()
    for folder in ("repsim_kernels", "bench/gpu_report", "tests/triton"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def record_tests(paths: Sequence[str] = ("tests/triton",)) -> list[Variant]:
    """Return the variants that the tests of the Triton kernels launch."""
    with tempfile.TemporaryDirectory() as folder:
        plugin = ("-p", "bench.gpu_report.pytest_plugin", "-p", "no:cacheprovider")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", *plugin, *paths]
        variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", FOLDER: folder}
        try:
            _run(command, variables)
        except RuntimeError as error:  # a failed test has launched its kernels
            print(f"  {error}".splitlines()[-1])
        files = sorted(Path(folder).glob("*.json"))
        return [*dict.fromkeys(v for file in files for v in load_variants(file))]


def record_report() -> list[Variant]:
    """Return the variants that the rows, the sanitizer and the study's kernels launch."""
    from bench.gpu_report.cases import list_cases
    from bench.gpu_report.stand_ins import record_at_full_size
    from bench.predict.compile import list_cases as list_study_cases

    def stop(*_: object) -> None:
        raise TimeoutError(f"{_LONGEST} s")

    variants: dict[Variant, None] = {}
    cpu = torch.device("cpu")

    def add(call: Callable[[], object], name: str) -> None:
        """Record what a call launches on stand-ins until it ends, fails or takes `_LONGEST` s."""
        signal.alarm(_LONGEST)
        try:
            with record_at_full_size(variants):
                call()
        except Exception as error:
            print(f"  {name}: recorded up to {describe_error(error)}", flush=True)
        finally:
            signal.alarm(0)

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        for case in (*list_cases(True), *list_cases(False)):
            if not case.name.startswith(("eigh", "svd")) and "CUDA C++" not in case.name:
                inputs = case.inputs(torch.Generator().manual_seed(0))
                add(partial(case.kernel, *inputs), f"{case.name} {case.shape}")
        for name, study_case in list_study_cases():
            if ARCH in study_case.archs:
                add(partial(study_case.call, cpu), f"{name} {study_case.name}")
    finally:
        signal.signal(signal.SIGALRM, previous)
    return [*variants]


def compile_all(recorded: Path) -> None:
    """Compile the recorded variants on all cores and pack them; needs Triton 3.6."""
    import triton

    variants = load_variants(recorded)
    compiled: list[Compiled] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(compile_variant, v, ARCH) for v in variants]
        for variant, future in zip(variants, futures, strict=True):
            try:
                compiled.append(future.result())
            except Exception as error:
                print(f"  {variant.kernel}: not compiled: {describe_error(error)[-200:]}")
    print(cache.pack(ARCHIVE, compiled, triton.__version__))


def rehearse(archive: Path, folder: Path | None = None) -> str:
    """Run the command on the CPU in a fresh clone with packages hidden; return a summary.

    Also runs the GPU tests there; all are skipped. Uncommitted changes are not in the clone.
    """
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        clone, hide = Path(temporary) / "checkout", Path(temporary) / "hide"
        _run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)])
        hide.mkdir()
        (hide / "sitecustomize.py").write_text(_HIDE.format(hidden=HIDDEN, root=str(ROOT)))
        path = os.pathsep.join(map(str, filter(Path.is_dir, (hide, TRITON))))
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        out = Path(temporary) / "gpu-report.json" if folder is None else folder / "rehearsal.json"
        options = ("--device", "cpu", "--quick", "--out", str(out), "--cache", str(archive))
        command = [sys.executable, "-m", "bench", "gpu-report", *options]
        _run(command, environment, clone)
        record = load(out)
        code = (
            "import json; from bench.gpu_report import checks;"
            "print(json.dumps(checks.run_gpu_tests(600)))"
        )
        tests = json.loads(_run([sys.executable, "-c", code], environment, clone).splitlines()[-1])
    if {*tests["counts"]} - {"skipped"} or "why" in tests:
        raise RuntimeError("\n".join([tests["command"], *tests.get("tail", [])]))
    collected = f"{tests['counts'].get('skipped', 0)} skipped, since there is no GPU"
    summary = [record["verdict"], describe_cache(record["cache"]), f"GPU tests: {collected}"]
    return "\n".join(f"  {line}" for line in summary)


# Hides modules, and distributions' metadata; the installed package must not be found either.
_HIDE = """\
import importlib.metadata, sys

HIDDEN = {hidden!r}


class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


find_by_name = importlib.metadata.Distribution.from_name


def from_name(name):
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return find_by_name(name)


sys.meta_path.insert(0, Hide)
importlib.metadata.Distribution.from_name = staticmethod(from_name)
# An editable install adds the original checkout by a finder or a path.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path[:] = [p for p in sys.path if p != {root!r}]
"""


def _run(
    command: Sequence[str], environment: dict[str, str] | None = None, folder: Path = ROOT
) -> str:
    """Run a command and return its output; show it if the command fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))
