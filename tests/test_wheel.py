"""What the wheel holds, with nvcc and without, and what its build says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.stem for path in (ROOT / "repsim_kernels" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.slow


def build(folder: Path, cuda: str, **environment: str) -> tuple[int, str]:
    """pip's exit code and output for a wheel of the checkout, with REPSIM_CUDA as asked."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder)]
    done = subprocess.run(
        [*command, "-C", f"cmake.define.REPSIM_CUDA={cuda}", str(ROOT)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def without_nvcc() -> dict[str, str]:
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(f for f in folders if not shutil.which("nvcc", path=f))
    return {"PATH": path, "CUDACXX": ""}


def contents(folder: Path) -> dict[str, bytes]:
    """The files of the one wheel in a folder."""
    (path,) = folder.iterdir()
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def assert_only_the_package(files: dict[str, bytes]) -> None:
    roots = {name.split("/")[0] for name in files}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"repsim_kernels"}
    folder = ROOT / "repsim_kernels"
    wanted = [p for p in folder.rglob("*") if p.suffix in (".py", ".cu", ".typed")]
    assert len(wanted) > 50
    for path in wanted:
        assert files[str(path.relative_to(ROOT))] == path.read_bytes()
    assert not any("__pycache__" in name for name in files)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_with_nvcc(tmp_path):
    code, said = build(tmp_path, "AUTO")
    assert code == 0, said
    assert "REPSIM_CUDA=AUTO: fatbins for 80-real;90-real" in said
    files = contents(tmp_path)
    assert_only_the_package(files)
    record = json.loads(files["repsim_kernels/cuda/fatbin.json"])
    assert record["architectures"][:2] == [80, 90]
    assert sorted(record["sha256"]) == SOURCES
    for source in SOURCES:
        cu = files[f"repsim_kernels/cuda/{source}.cu"]
        assert record["sha256"][source] == hashlib.sha256(cu).hexdigest()
        fatbin = files[f"repsim_kernels/cuda/{source}.fatbin"]
        assert fatbin.startswith(b"\x50\xed\x55\xba")
        assert len(fatbin) < 2**20


@pytest.mark.parametrize("cuda", ["AUTO", "OFF"])
def test_without_fatbins(tmp_path, cuda):
    code, said = build(tmp_path, cuda, **(without_nvcc() if cuda == "AUTO" else {}))
    assert code == 0, said
    assert f"REPSIM_CUDA={cuda}: CUDA sources only, compiled by NVRTC" in said
    files = contents(tmp_path)
    assert_only_the_package(files)
    assert not any(name.endswith((".fatbin", ".json")) for name in files)


def test_what_is_asked_for_but_cannot_be(tmp_path):
    code, said = build(tmp_path, "ON", **without_nvcc())
    assert code != 0
    assert "REPSIM_CUDA=ON needs an nvcc that works" in said
    code, said = build(tmp_path, "YES")
    assert code != 0
    assert "REPSIM_CUDA=YES: expected AUTO, ON or OFF" in said
    assert list(tmp_path.iterdir()) == []
