"""The contents of the wheel and the output of its build, with nvcc and without."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.stem for path in (ROOT / "repsim_kernels" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.slow


def build_wheel(folder: Path, cuda: str, **environment: str) -> tuple[int, str]:
    """Build a wheel of the checkout with REPSIM_CUDA set; return pip's exit code and output."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder)]
    process = subprocess.run(
        [*command, "-C", f"cmake.define.REPSIM_CUDA={cuda}", str(ROOT)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return process.returncode, process.stdout


def hide_nvcc() -> dict[str, str]:
    """Return environment variables that hide nvcc."""
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(f for f in folders if not shutil.which("nvcc", path=f))
    return {"PATH": path, "CUDACXX": ""}


def read_wheel(folder: Path) -> dict[str, bytes]:
    """Return the files of the only wheel in a folder."""
    (path,) = folder.iterdir()
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def assert_contains_only_the_package(files: dict[str, bytes]) -> None:
    roots = {name.split("/")[0] for name in files}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"repsim_kernels"}
    process = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "repsim_kernels", "experiments"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [line for line in process.stdout.splitlines() if (ROOT / line).is_file()]
    assert len(expected) > 100
    for name in expected:
        path_in_wheel = f"repsim_kernels/{name}" if name.startswith("experiments/") else name
        assert files[path_in_wheel] == (ROOT / name).read_bytes()
    assert not any("__pycache__" in name for name in files)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_a_build_with_nvcc_has_fatbins(tmp_path):
    code, output = build_wheel(tmp_path, "AUTO")
    assert code == 0, output
    assert "REPSIM_CUDA=AUTO: fatbins for 80-real;90-real" in output
    files = read_wheel(tmp_path)
    assert_contains_only_the_package(files)
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
def test_a_build_without_nvcc_has_sources_only(tmp_path, cuda):
    code, output = build_wheel(tmp_path, cuda, **(hide_nvcc() if cuda == "AUTO" else {}))
    assert code == 0, output
    assert f"REPSIM_CUDA={cuda}: CUDA sources only, compiled by NVRTC" in output
    files = read_wheel(tmp_path)
    assert_contains_only_the_package(files)
    assert not any(name.endswith((".fatbin", ".json")) for name in files)


def test_options_that_cannot_be_met_fail(tmp_path):
    code, output = build_wheel(tmp_path, "ON", **hide_nvcc())
    assert code != 0
    assert "REPSIM_CUDA=ON needs an nvcc that works" in output
    code, output = build_wheel(tmp_path, "YES")
    assert code != 0
    assert "REPSIM_CUDA=YES: expected AUTO, ON or OFF" in output
    assert list(tmp_path.iterdir()) == []


def test_an_installed_wheel_runs_a_study(tmp_path):
    """One unit of the demo, in a folder with another `experiments`, which must not be imported."""
    code, output = build_wheel(tmp_path / "wheel", "OFF")
    assert code == 0, output
    (wheel,) = (tmp_path / "wheel").iterdir()
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    binaries = tmp_path / "venv" / "bin"
    # The dependencies are those of this environment, after the wheel on the path.
    inherited = [entry for entry in sys.path if entry.endswith("site-packages")]
    (packages,) = (tmp_path / "venv").rglob("site-packages")
    (packages / "inherited.pth").write_text("\n".join(inherited) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(binaries / "python")]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--ignore-installed", str(wheel)], check=True
    )
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("raise AssertionError\n")
    options = ["--model", "alexnet_small", "--layers", "classifier.5", "--out"]
    module = [binaries / "python", "-m", "repsim_kernels.experiments"]
    for command, run in (([binaries / "repsim"], "first"), (module, "second")):
        subprocess.run([*command, "sweep", *options, run], cwd=tmp_path, check=True)
        table = pd.read_parquet(tmp_path / run / "results.parquet")
        assert list(table["layer"].unique()) == ["classifier.5"]
        assert len(table) == 16 * table["class"].nunique() > 0
        assert (tmp_path / run / "report.html").exists()
