"""`repsim compare`: from two networks and a folder of images to a file."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _cli import invoke
from PIL import Image
from rich.console import Console

import repsim_kernels as rk
from repsim_kernels.experiments.cli import compare as command
from repsim_kernels.experiments.inputs.images import load_images
from repsim_kernels.experiments.inputs.networks import load

NETS = r"""
import os, signal, time
import torch
from torch import nn

def raise_error(*_):
    raise RuntimeError("bad\nluck")

def interrupt(*_):
    os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    time.sleep(60)

def run_out(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

small = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
fails, stops, exhausts = (nn.Sequential(nn.Conv2d(3, 4, 3)) for _ in range(3))
fails.register_forward_hook(raise_error)
stops.register_forward_hook(interrupt)
exhausts.register_forward_hook(run_out)

def makes():
    raise ValueError("no network")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with images, some of them in a sub-folder; the current folder is its parent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    (tmp_path / "nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    (tmp_path / "images/more").mkdir(parents=True)
    for i in range(12):
        path = tmp_path / "images" / ("more" if i % 2 else ".") / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images/notes.txt").write_text("not an image")
    return tmp_path / "images"


def compare(*arguments: object) -> tuple[int, str, str]:
    layers = () if "--layers" in arguments else ("--layers", "conv")
    return invoke("compare", "--size", 32, "--batch", 5, *layers, *arguments)


def test_the_table_is_that_of_the_function(folder: Path) -> None:
    networks = "--model-a", "alexnet_small", "--model-b", "resnet50_small"
    code, out, err = compare(*networks, "--images", folder, "--out", "map.csv")
    assert (code, err) == (0, "")
    assert "debiased CKA of 5 x 53 layers" in out
    table = pd.read_csv("map.csv", index_col=0)
    batches = load_images(folder, 32).split(5)
    want = rk.compare(load("alexnet_small"), load("resnet50_small"), batches, layers="conv")
    assert (tuple(table.index), tuple(table.columns)) == (want.rows, want.columns)
    np.testing.assert_allclose(table.to_numpy(), want.values, rtol=0, atol=1e-6)


def test_pairs_that_are_not_above_chance_are_counted(folder: Path) -> None:
    options = "--model-a", "alexnet_small", "--images", folder, "--calibrate", 40
    code, out, err = compare(*options, "--out", "map.html")
    assert (code, err) == (0, "")
    batches = load_images(folder, 32).split(5)
    want = rk.compare(load("alexnet_small"), None, batches, layers="conv", calibrate=40)
    assert re.search(rf"\d+ of 10 pairs not above the threshold {want.threshold:.3g}\n", out)


@pytest.mark.parametrize("name", ["map.html", "map.png"])
def test_a_network_is_compared_with_itself(folder: Path, name: str) -> None:
    options = "--model-a", "alexnet_small", "--images", folder, "--estimator", "minibatch"
    code, out, _ = compare(*options, "--out", name)
    assert code == 0
    assert out.endswith(f"{name}\n")
    assert Path(name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "features.0,feature.3"], "layers: model_a has no module 'feature.3'; "),
        (["--model-a", "alexnet_smal"], "model_a: 'alexnet_smal' is unknown; expected one of"),
        (["--model-a", "torchvision:resnet18"], "weights_a: required for 'resnet18'"),
        (["--model-a", "no.such:thing"], "model_a: 'no.such:thing' can't be imported"),
        (["--weights-b", "x.pt"], "model_b: missing with --weights-b"),
        (
            ["--model-b", "nets:fails"],
            "model_b: fails on images 5 x 3 x 32 x 32: RuntimeError: bad",
        ),
        (["--model-b", "nets:makes"], "model_b: 'nets:makes' fails: ValueError: no network"),
        (["--model-b", "nets:small"], "layers: 'conv' selects no module of Sequential (model_b)"),
        (["--model-b", "alexnet_small", "--weights-b", "x.pt"], "weights_b: there is no file x.pt"),
        (["--model-b", "alexnet_small", "--layers-b", "conv1"], "layers: model_b has no module"),
        (["--size", "4"], "model_a: fails on images 5 x 3 x 4 x 4: RuntimeError: "),
        (["--images", "nowhere"], "images: nowhere is not a folder"),
        (["--images", "images/.empty"], "images: none in images/.empty; expected image files"),
        (["--size", "0"], "size: 0 is not a number of pixels"),
        (["--batch", "0"], "batch: 0; expected 1 or more"),
        (["--metric", "ckaa"], "metric: 'ckaa'"),
        (["--pool", "cls"], "pool: 'cls' at layer 'features.0' of model_a, whose output has"),
        (["--device", "abacus"], "device: 'abacus' can't be used"),
        (["--memory", "lots"], "memory: 'lots'"),
        (["--out", "map.xyz"], "path: "),
    ],
)
def test_wrong_arguments_exit_with_code_2_and_one_line(
    folder: Path, arguments: list[str], message: str
) -> None:
    (folder / ".empty").mkdir()
    code, _out, err = compare("--model-a", "alexnet_small", "--images", folder, *arguments)
    assert code == 2
    assert err.startswith(f"error: {message}"), err
    assert err.count("\n") == 1
    assert not Path("map.html").exists()


def test_a_broken_image_is_named(folder: Path) -> None:
    (folder / "3.png").write_bytes(b"no image")
    code, _, err = compare("--model-a", "alexnet_small", "--images", folder)
    assert code == 2
    assert "3.png can't be decoded" in err


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.png", "matplotlib")])
def test_a_missing_package_is_named_before_anything_is_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = compare("--model-a", "nets:fails", "--images", folder, "--out", name)
    assert (code, out) == (2, "")
    assert err == (
        f"error: out: {name} needs {package}, which is not installed; run: pip install {package}\n"
    )


def test_lack_of_memory_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = compare("--model-a", "nets:exhausts", "--images", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(
        "error: model_a: fails on images 5 x 3 x 32 x 32: OutOfMemoryError: CUDA "
    )

    def run_out(*_: object, **__: object) -> None:
        torch.empty(2**60)  # an error of PyTorch's CPU allocator

    monkeypatch.setattr(rk, "compare", run_out)
    code, _, err = compare("--model-a", "alexnet_small", "--images", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: memory: not enough: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    before = sorted(folder.parent.rglob("*"))
    temporary = folder.parent / "tmp"
    temporary.mkdir()
    arguments = ["--model-a", "alexnet_small", "--model-b", "nets:stops", "--images", str(folder)]
    options = ["--size", "32", "--memory", "1MiB", "--metric", "rsa", "--layers", "conv"]
    run = subprocess.run(
        [sys.executable, "-m", "repsim_kernels.experiments", "compare", *arguments, *options],
        env=os.environ | {"SIGNAL": str(int(number)), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 128 + number
    assert (run.stdout, run.stderr) == ("", "interrupted: no map was written\n")
    assert list(temporary.iterdir()) == []
    assert [path for path in before if not path.exists()] == []
    assert not (folder.parent / "map.html").exists()


@pytest.mark.parametrize(
    ("options", "count", "size", "passes"),
    [
        ({"memory": "1GiB"}, 14, 5, 1),
        ({"memory": "1GiB"}, 14, 2, 1),
        ({"memory": "2MiB"}, 14, 5, 2),
        ({"memory": "2MiB"}, 15, 5, 2),
        ({"memory": "2MiB"}, 14, 2, 2),
        ({"memory": "2MiB", "pool": "mean"}, 14, 5, 1),
        ({"estimator": "minibatch"}, 15, 5, 1),
    ],
)
def test_a_terminal_shows_the_progress_of_each_pass(
    options: dict[str, Any], count: int, size: int, passes: int
) -> None:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    networks, loader = [load("alexnet_small"), load("alexnet_small")], images.split(size)
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    with command.show_passes(console, loader) as calls:
        rk.compare(*networks, loader, layers="conv", call=calls, **options)
    lines = console.file.getvalue().splitlines()
    for side in ("model_a", "model_b"):
        shown = [line for line in lines if side in line]
        assert f"{side}, pass 1 " in shown[0]
        assert f"{side}, pass {passes} " in shown[-1]
        assert shown[-1].endswith(f"{count}/{count} 0:00:00")


@pytest.mark.parametrize(("count", "size"), [(14, 5), (15, 5), (14, 2), (15, 2), (3, 5)])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("is_joined", [False, True])
def test_progress_counts_only_runs_of_a_pass(
    count: int, size: int, passes: int, is_joined: bool
) -> None:
    images = torch.zeros(count, 3)
    loader = images.split(size)
    first = loader[0]
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    with command.show_passes(console, loader) as (call, _):
        # To find the layers, and to measure the time.
        for batch in (first[:2], first[: len(first) // 2]):
            call(torch.nn.Identity(), batch)
        for batch in ([images] if is_joined else loader) * passes:
            call(torch.nn.Identity(), batch)
    lines = [line for line in console.file.getvalue().splitlines() if "model_a" in line]
    assert f"model_a, pass {passes} " in lines[-1]
    assert lines[-1].endswith(f"{count}/{count} 0:00:00")
