"""The portable cache: recorded variants, and kernels that another machine need not compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.common.machine import ROOT

triton = pytest.importorskip("triton")

from bench.gpu_report import cache, prepare, variants  # noqa: E402
from bench.gpu_report.stand_ins import record_at_full_size  # noqa: E402
from repsim_kernels.kernels.triton import cells, cka  # noqa: E402


def launch_two_kernels(n=12, p=48):
    """Return the variants of two launchers, the first on n stimuli and p neurons."""
    recorded = {}
    x = torch.randn(p, n).mT
    with record_at_full_size(recorded):
        cells.class_means(x, labels=np.arange(n) % 3, n_classes=3)
        vectors = torch.randn(4, p, dtype=torch.float64)
        cka.cosine_distance(vectors, vectors[0], False, 0.5, 0.5)
    return [*recorded]


# Runs in a process of its own, as on another machine, with an assembler that only has a version.
LOAD = """
import json, os, sys
from pathlib import Path
from bench.gpu_report import cache, variants
archive, folder, recorded = map(Path, sys.argv[1:])
folder.mkdir()
facts = cache.install(archive, folder)
counts = cache.Counts(folder)
cache.log_loads()
errors = []
for variant in variants.load_variants(recorded):
    try:
        variants.compile_variant(variant, 90)
    except Exception as error:
        errors.append(str(error))
print(json.dumps({"facts": facts, "counts": counts.count_new(), "errors": errors}))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Compile, pack and delete the cache; return the folder with the archive."""
    folder = tmp_path_factory.mktemp("packed")
    recorded = launch_two_kernels()
    variants.save_variants(folder / "variants.json", recorded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        kernels = [variants.compile_variant(v, 90) for v in recorded]
        cache.pack(folder / "kernels.tar.xz", kernels, triton.__version__)
    (folder / "cache").rename(folder / "moved")
    return folder


def load_elsewhere(packed, tmp_path, recorded=None):
    ptxas = tmp_path / "ptxas"
    real = triton.knobs.nvidia.ptxas.path
    ptxas.write_text(f'#!/bin/sh\ntest "$1" = --version && exec "{real}" --version\nexit 1\n')
    ptxas.chmod(0o755)
    paths = [packed / "kernels.tar.xz", tmp_path / "installed", packed / "variants.json"]
    if recorded is not None:
        paths[-1] = tmp_path / "variants.json"
        variants.save_variants(paths[-1], recorded)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, paths)],
        cwd=ROOT,
        env={**os.environ, "TRITON_PTXAS_PATH": str(ptxas)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_packed_kernels_are_not_compiled_again(packed, tmp_path):
    result = load_elsewhere(packed, tmp_path)
    assert result["facts"]["packed"] == 2
    assert result["facts"]["stale"] is None
    assert result["errors"] == []
    assert result["counts"] == {"served": 2, "compiled": 0, "names": {}}


def test_a_variant_that_was_not_packed_is_compiled(packed, tmp_path):
    """Other numbers of stimuli are treated alike, unless they are multiples of 16."""
    result = load_elsewhere(packed, tmp_path, launch_two_kernels(n=13, p=64))
    assert result["counts"]["served"] == 2
    (tmp_path / "installed").rename(tmp_path / "first")
    result = load_elsewhere(packed, tmp_path, launch_two_kernels(n=32))
    assert result["counts"]["served"] < 2
    assert any("ptxas" in error for error in result["errors"])


def test_a_stale_cache_is_recognised(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # restored, since `install` sets it
    monkeypatch.setattr(cache, "_build_launchers", lambda sources: {"launchers": len(sources)})
    monkeypatch.setattr(cache, "hash_sources", lambda: "another")
    facts = cache.install(packed / "kernels.tar.xz", tmp_path)
    assert facts["stale"].startswith("kernels changed")
    monkeypatch.setattr(triton, "__version__", "3.5.0")
    facts = cache.install(packed / "kernels.tar.xz", tmp_path)
    assert "3.5.0 is installed: not used" in facts["stale"]
    assert "launchers" not in facts


def test_counts_of_each_part(tmp_path):
    """A kernel that one process compiled and another loaded counts once, as compiled."""
    counts = cache.Counts(tmp_path)
    log = tmp_path / "loads.txt"
    log.write_text("compiled a gram\nserved b cca\nserved a gram\nserved b cca\n")
    assert counts.count_new() == {"served": 1, "compiled": 1, "names": {"gram": 1}}
    log.write_text(log.read_text() + "served a gram\ncompiled c gram\n")
    assert counts.count_new() == {"served": 0, "compiled": 1, "names": {"gram": 1}}


def test_recorded_variants_survive_a_file(tmp_path):
    recorded = launch_two_kernels()
    variants.save_variants(tmp_path / "variants.json", recorded)
    assert variants.load_variants(tmp_path / "variants.json") == recorded


@pytest.mark.parametrize("value", [1, 16, 17, 0, -3, 2**31, 2**31 + 1, True, 0.25, None])
def test_triton_treats_a_representative_like_the_value(value):
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend

    def specialize(v):
        return native_specialize_impl(BaseBackend, v, False, True, True)

    argument = variants._describe("x", value, False)
    assert specialize(variants.restore_argument(argument)) == specialize(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("start", [0, 1])
def test_triton_treats_a_pointer_like_the_recorded_one(dtype, start):
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    def specialize(v):
        return native_specialize_impl(CUDABackend, v, False, True, True)

    tensor = torch.zeros(64, dtype=dtype)[start:]
    argument = variants._describe("x", tensor, False)
    assert specialize(variants.restore_argument(argument)) == specialize(tensor)


def test_every_packed_file_is_stored_once(packed):
    with tarfile.open(packed / "kernels.tar.xz") as archive:
        names = archive.getnames()
    assert len(names) == len(set(names))
    assert all(Path(name).parts[0] in ("manifest.json", "files", "launchers") for name in names)


@pytest.mark.slow
def test_the_report_runs_in_a_plain_checkout_without_the_packages_that_may_be_missing(
    packed, tmp_path
):
    """The kernels don't run, but they are unpacked; no package of the comparison is installed."""
    summary = prepare.rehearse(packed / "kernels.tar.xz", tmp_path)
    record = json.loads((tmp_path / "rehearsal.json").read_text())
    assert record["finished"]
    assert {row["status"] for row in record["rows"]} == {"not run"}
    assert record["study"]["seconds"] > 0
    assert record["cache"]["packed"] == 2
    missing = [row for row in record["peers"]["rows"] if row["status"] == "not run"]
    assert {row["package"] for row in missing} >= {"ckatorch", "rsatoolbox"}
    assert "skipped, since there is no GPU" in summary


@pytest.mark.slow
def test_the_launches_of_tests_are_recorded():
    recorded = prepare.record_tests(["tests/triton/test_cka.py"])
    assert {variant.kernel for variant in recorded} == {"_cosine_distance_kernel"}
    assert {a.value for v in recorded for a in v.arguments if a.kind == "pointer"} == {"float64"}
