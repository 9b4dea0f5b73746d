"""A portable cache of compiled kernels: packed on one machine, installed and counted on another.

Triton finds a binary by a key that hashes its own files too, and these differ between versions of
Python. So the archive holds the parts of each key, and the machine that installs it adds the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.common.machine import ROOT, Json
from bench.gpu_report.variants import Compiled

_MANIFEST = "manifest.json"
_LOG = "loads.txt"  # in the cache's folder; one line for each kernel that a process loads


def hash_sources() -> str:
    """Return a hash of the files that define the Triton kernels."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "repsim_kernels" / "kernels" / "triton").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def pack(out: Path, kernels: Sequence[Compiled], triton_version: str) -> Json:
    """Write the binaries and launchers of compiled kernels to ``out``, a tar.xz; return a summary.

    Triton's intermediate texts are left out, since nothing reads them when a kernel is launched.
    """
    launchers = sorted({kernel.launcher for kernel in kernels} - {""})
    entries = [
        asdict(kernel)
        | {"files": [Path(f).name for f in kernel.files], "launcher": ""}
        | {"content": [_hash(f) for f in kernel.files]}
        for kernel in kernels
    ]
    manifest = {"triton": triton_version, "sources": hash_sources(), "kernels": entries}
    with tarfile.open(out, "w:xz") as archive:
        _add(archive, _MANIFEST, json.dumps(manifest).encode())
        for path in {_hash(f): f for kernel in kernels for f in kernel.files}.values():
            _add(archive, f"files/{_hash(path)}", Path(path).read_bytes())
        for i, source in enumerate(launchers):
            _add(archive, f"launchers/{i}.c", source.encode())
    return {"kernels": len(kernels), "launchers": len(launchers), "bytes": out.stat().st_size}


def _hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def install(archive: Path, folder: Path) -> Json:
    """Unpack an archive into ``folder``, make it Triton's cache in this process and its children.

    Returns
    -------
    dict
        ``packed``: the number of kernels; ``launchers``: those that were built, since they depend
        on Python and the driver; ``stale``: why some or all kernels will be compiled.
    """
    import triton

    with tarfile.open(archive) as tar:
        contents = {m.name: _read(tar, m) for m in tar.getmembers() if m.isfile()}
    manifest = json.loads(contents[_MANIFEST])
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    facts: Json = {"packed": len(manifest["kernels"]), "stale": None}
    if manifest["triton"] != triton.__version__:
        built, here = manifest["triton"], triton.__version__
        return facts | {"stale": f"built with Triton {built}, but {here} is installed: not used"}
    if manifest["sources"] != hash_sources():
        facts["stale"] = "kernels changed after it was built, and those are compiled"
    for kernel in manifest["kernels"]:
        _install_kernel(kernel, contents)
    sources = [text.decode() for name, text in contents.items() if name.startswith("launchers/")]
    return facts | _build_launchers(sources)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _install_kernel(kernel: Json, contents: dict[str, bytes]) -> None:
    """Store a kernel's files where Triton looks for them, by Triton's own functions."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.runtime import cache

    parts = (
        SimpleNamespace(hash=lambda part=kernel[name]: part)
        for name in ("source", "compiler", "options")
    )
    key = cache.get_cache_key(*parts, env_vars=get_cache_invalidating_env_vars())
    manager = cache.get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    group = {
        name: manager.put(contents[f"files/{content}"], name)
        for name, content in zip(kernel["files"], kernel["content"], strict=True)
    }
    (metadata,) = (name for name in group if name.endswith(".json"))
    manager.put_group(metadata, group)


def _build_launchers(sources: Sequence[str]) -> Json:
    """Compile the C functions that start kernels, on all cores; Triton does it one at a time."""
    if not sources:
        return {"launchers": 0}
    try:
        from triton.backends.nvidia import driver

        def build(source: str) -> None:
            driver.compile_module_from_src(
                src=source,
                name="__triton_launcher",
                library_dirs=driver.library_dirs(),
                include_dirs=driver.include_dirs,
                libraries=driver.libraries,
            )

        driver.library_dirs()  # cached, so that the threads don't each ask for it
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return {"launchers": len([*pool.map(build, sources)])}
    except Exception as error:  # Triton will build each when it needs it, or give the reason
        return {"launchers": 0, "why": f"launchers: {type(error).__name__}: {error}"[:500]}


def log_loads() -> None:
    """Let this process write down which kernels it loads from an installed cache or compiles."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    log = Path(folder) / _LOG if folder else None
    if log is None or not log.exists():
        return
    from triton import knobs

    def write(*, src: Any, metadata: Json, cache_hit: bool, **_: Any) -> None:
        how = "served" if cache_hit else "compiled"
        with log.open("a") as file:  # a short line is appended in one piece
            file.write(f"{how} {metadata['hash']} {src.name}\n")

    knobs.compilation.listener = write


NO_LOADS: Json = {"served": 0, "compiled": 0, "names": {}}


@dataclass
class Counts:
    """Counts the kernels that were loaded, part by part."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / _LOG).touch()
        self._seen: set[str] = set()

    def count_new(self) -> Json:
        """Return what was loaded since the last call: kernels served and compiled, with names."""
        lines = (self.folder / _LOG).read_text().splitlines()
        known = {line.split()[1] for line in self._seen}
        self._seen.update(lines)
        how: dict[str, tuple[str, str]] = {}
        for line in lines:
            outcome, key, name = line.split(maxsplit=2)
            if key not in known:
                how.setdefault(key, (outcome, name))  # a second process finds it in the cache
        compiled = Counter(name for outcome, name in how.values() if outcome == "compiled")
        served = sum(outcome == "served" for outcome, _ in how.values())
        return {"served": served, "compiled": compiled.total(), "names": dict(compiled)}


def run_logged(send: Callable[[Any], None], work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work``, counting the kernels that this process loads."""
    log_loads()
    work(send, *arguments)
