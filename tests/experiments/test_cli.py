"""The commands `sweep`, `status`, `compact` and `report` on a user's network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from _cli import fail_at_call, invoke
from _toy import Toy
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from repsim_kernels.experiments.cli import app as cli
from repsim_kernels.experiments.cli import request
from repsim_kernels.experiments.cli.request import SweepOptions
from repsim_kernels.experiments.errors import DataError, StudyError
from repsim_kernels.experiments.inputs import images
from repsim_kernels.experiments.inputs.networks import SMALL
from repsim_kernels.experiments.study import measure

TOY = ["--model", "_toy:Toy", "--layers", "act1,act2", "--size", "8"]


def sweep(*arguments: str | Path) -> tuple[int, str, str]:
    return invoke("sweep", *arguments)


def assert_refused(code: int, stderr: str, message: str) -> None:
    assert code == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
    assert not Path("runs").exists()


def test_a_run_of_a_users_network_writes_a_table_and_a_report(folder: Path) -> None:
    code, out, err = sweep(*TOY, "--images", folder, "--grid", "2x3", "--metrics", "cka,svcca")
    assert (code, err) == (0, "")
    run = Path("runs/_toy.Toy")
    assert out.splitlines()[-2:] == [str(run / "results.parquet"), str(run / "report.html")]
    assert "0/2 _toy:Toy act1 1 started" in out
    assert "debiased" not in out
    table = pd.read_parquet(run / "results.parquet")
    assert list(table["class"].unique()) == ["ant", "bee", "wasp"]
    assert len(table) == 3 * 2 * 6
    code, out, _ = sweep(*TOY, "--images", folder, "--grid", "2x3", "--metrics", "cka,svcca")
    assert code == 0
    assert "All 2 units are already done." in out
    assert "SVCCA" in out
    code, _, err = sweep(*TOY, "--images", folder, "--grid", "2x2", "--metrics", "cka,svcca")
    assert code == 2
    assert "grid: [2, 3] before, [2, 2] now" in err


@pytest.mark.usefixtures("blank_reports")
def test_ctrl_c_keeps_finished_units(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*TOY, "--images", folder, "--metrics", "cka", "--block", "1", "--out", "whole")
    assert sweep(*arguments)[0] == 0
    arguments = (*arguments[:-1], "cut")
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_measure_target", fail_at_call(3, KeyboardInterrupt()))
        code, _, err = sweep(*arguments)
    assert code == 130
    assert err == (
        "interrupted: 2 of 6 units are finished and stored in cut; run the same command to resume\n"
    )
    assert not Path("cut/results.parquet").exists()
    code, out, _ = sweep(*arguments)
    assert code == 0
    assert "2/6 _toy:Toy act1 3 started" in out
    tables = [pd.read_parquet(Path(name, "results.parquet")) for name in ("whole", "cut")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.usefixtures("blank_reports")
def test_a_failed_unit_is_left_out_and_retried(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*TOY, "--images", folder, "--metrics", "cka", "--block", "1", "--out", "run")
    with monkeypatch.context() as patch:
        fluke = RuntimeError("a fluke\nof the device")
        patch.setattr(measure, "_measure_target", fail_at_call(2, fluke))
        code, out, err = sweep(*arguments)
    assert (code, err) == (0, "")
    assert "retrying: _toy:Toy act1 2: RuntimeError: a fluke of the device" in out
    whole = pd.read_parquet("run/results.parquet")

    for quiet in ((), ("--quiet",)):
        Path("run/parts/_toy%3AToy--act1--2.parquet").unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            error = StudyError("it is not finite")
            patch.setattr(measure, "_measure_target", fail_at_call(1, error))
            code, out, err = sweep(*arguments, *quiet)
        assert code == 3
        assert err.count("failed: _toy:Toy act1 2: it is not finite\n") == 1
        assert "1 unit failed and is left out" in err
        assert (out == "") == bool(quiet)
        table = pd.read_parquet("run/results.parquet")
        assert table.attrs["missing"] == "1 of 6"
        missing = (whole["layer"] == "act1") & (whole["class"] == "bee")
        assert table.equals(whole[~missing].reset_index(drop=True))
    code, out, _ = invoke("status", "run")
    assert code == 0
    assert "5 of 6 units done, 0 left, 1 failed" in out
    code, _, err = invoke("compact", "run")
    assert code == 3
    assert "1 of 6 units are missing" in err

    assert sweep(*arguments)[0] == 0
    assert pd.read_parquet("run/results.parquet").equals(whole)
    assert not list(Path("run/failed").iterdir())


@pytest.mark.usefixtures("blank_reports")
def test_log_json_prints_only_json(folder: Path) -> None:
    code, out, err = sweep(*TOY, "--images", folder, "--metrics", "cka", "--log-json")
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    assert [(event["event"], event["layer"], event["done"]) for event in events] == [
        ("started", "act1", 0),
        ("done", "act1", 1),
        ("started", "act2", 1),
        ("done", "act2", 2),
    ]
    assert Path("runs/_toy.Toy/report.html").exists()


def test_a_run_without_a_finished_unit_has_no_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*TOY[:2], "--layers", "act1", *TOY[4:], "--images", folder, "--out", "run")
    monkeypatch.setattr(measure, "_measure_target", fail_at_call(1, StudyError("it is not finite")))
    code, _, err = sweep(*arguments)
    assert code == 3
    assert err.startswith("failed: _toy:Toy act1 1: it is not finite\n")
    assert not Path("run/results.parquet").exists()
    code, _, err = invoke("compact", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "run: run has no finished unit" in err
    code, _, err = invoke("status", "nowhere")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "nowhere"), "nowhere"),
        ((), "images: required for '_toy:Toy'; pass --images FOLDER"),
        (
            ("--images", "images", "--layers", "act9"),
            "layers: _toy:Toy has no module 'act9'; expect",
        ),
        (("--model", "nope"), "model: 'nope' is unknown"),
        (("--images", "images", "--metrics", "ccka"), "metrics: 'ccka'; expected one of 'cka'"),
        (("--images", "images", "--classes", "ant,fly"), "fly"),
        (("--images", "images", "--classes", "ant"), "expected two classes or more"),
        (("--images", "images", "--grid", "4by4"), "grid: '4by4'; expected two numbers"),
        (("--images", "images", "--grid", "40x40"), "grid: 40 x 40 cells for the 256 neurons"),
        (("--images", "images", "--ridge", "-1"), "ridge: -1.0; expected"),
        (("--images", "images", "--size", "0"), "size: 0 is not a number of pixels"),
        (("--images", "images", "--size", "-8"), "size: -8 is not a number of pixels"),
        (("--size", "32", "--model", "alexnet_small"), "size: applies only to your own images"),
        (("--images", "images", "--size", "9"), "can't take one of shape (3, 9, 9)"),
        (("--images", "images", "--device", "cuda:99"), "device: cuda:99 can't be used"),
        (("--images", "images", "--weights", "none.safetensors"), "none.safetensors"),
        (("--images", "images", "--model", "resnet5"), "'resnet5' is unknown"),
        (("--images", "images", "--model", "_toy:Nothing"), "_toy:Nothing"),
        (("--images", "images", "--weights", "a.pt", "--weights", "b.pt"), "weights: 2 for 1"),
        (("--images", "images", "--out", "images"), "holds files but no study.json"),
        (("--images", "images", "--out", "images/ant/0.png"), "is a file; expected a folder"),
        (
            ("--images", "images", "--out", "images/ant/0.png/run"),
            "0.png is a file; expected a fol",
        ),
        (("--images", "images", "--plan", "--out", "images/ant/0.png"), "is a file; expected a"),
        (("--images", "images", "--plan", "--out", "images"), "holds files but no study.json"),
        (("--images", "images", "--out", "/proc/none/run"), "/proc/none"),
        (("--images", "images", "--block", "0"), "block: 0; expected a whole number of at least 1"),
        (("--images", "images", "--threads", "0"), "threads: 0; expected 1 or more"),
        (("--images", "images", "--memory", "much"), "memory: 'much'; expected bytes, or a size"),
        (("--images", "images", "--metric-images", "1"), "metric_images: 1; expected a whole"),
        (("--images", "images", "--labels", "val.txt"), "labels: applies only to presets"),
        (
            ("--images", "images", "--images-per-class", "3"),
            "images_per_class: applies only to presets",
        ),
        (("--images", "random"), "random"),
        (("--images", "images", "--workers", "0"), "workers: 0; expected 1 or more"),
        (("--images", "images", "--shard", "3/2"), "shard: '3/2'; expected I/N"),
        (("--images", "images", "--address", "auto"), "address: applies only to --executor ray"),
    ],
)
def test_invalid_options_give_a_one_line_error(
    folder: Path, options: tuple[str, ...], message: str
) -> None:
    known = {"--model": "_toy:Toy", "--layers": "act1", "--size": "8"}
    base = [part for pair in known.items() if pair[0] not in options for part in pair]
    code, _, err = sweep(*base, *options)
    assert_refused(code, err, message)
    assert sorted(path.name for path in Path().iterdir()) == ["images"]


def test_a_checkpoint_of_another_architecture(folder: Path) -> None:
    state = {name: value for name, value in Toy().state_dict().items() if "conv2" not in name}
    save_file(state, "other.safetensors")
    code, _, err = sweep(*TOY, "--images", folder, "--weights", "other.safetensors")
    assert_refused(code, err, "conv2")


@pytest.mark.usefixtures("blank_reports")
def test_a_checkpoint_is_used(folder: Path) -> None:
    model = Toy()
    with torch.no_grad():
        model.fc.weight *= -1
    torch.save(model.state_dict(), "toy.pt")
    tables = []
    for out, weights in (("a", ()), ("b", ("--weights", "toy.pt"))):
        code, _, err = sweep(*TOY, "--images", folder, "--metrics", "cka", "--out", out, *weights)
        assert (code, err) == (0, "")
        tables.append(pd.read_parquet(Path(out, "results.parquet")))
    assert tables[0]["cka"].equals(tables[1]["cka"])
    assert not tables[0]["log_probability"].equals(tables[1]["log_probability"])


@pytest.mark.usefixtures("blank_reports")
def test_images_and_weights_are_described_before_the_first_unit(folder: Path) -> None:
    torch.manual_seed(0)
    model = Toy()
    nn.init.normal_(model.fc.weight)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, "toy.pt")
    (folder / "@eaDir").mkdir()
    arguments = (*TOY[:4], "--images", folder, "--weights", "toy.pt", "--metrics", "cka")
    stimuli = images.load_image_folder(folder, size=None)
    accuracy = (model.eval()(stimuli.images).argmax(1) == stimuli.labels).double().mean().item()
    assert 0 < accuracy < 1
    lines = [
        f"Images: 12 images of 3 classes in {folder} (skipped: 1 @eaDir)",
        "weights: toy.pt, read from 'state_dict', prefix 'module.' removed",
        "_toy:Toy: 8 x 8 pixels, ImageNet normalisation",
    ]
    code, out, err = sweep(*arguments, "--plan")
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if line in lines] == lines
    lines[2] += f", accuracy {100 * accuracy:.1f} % on 12 images"
    for last in ("0/2 _toy:Toy act1 1 started", "All 2 units are already done."):
        code, out, err = sweep(*arguments)
        assert (code, err) == (0, "")
        before = out[: out.index(last)].splitlines()
        assert [line for line in before if line in lines] == lines


def test_images_of_equal_size_are_not_resized(folder: Path) -> None:
    options = SweepOptions(images=str(folder), layers=["act1"])
    (study,) = request.make_model_studies(["_toy:Toy"], options, False).studies
    assert torch.equal(study.images, images.load_image_folder(folder, size=None).images)
    for file in folder.rglob("*.png"):
        Image.new("RGB", (12, 8)).save(file)
    code, _, err = sweep(*TOY[:4], "--images", folder)
    assert_refused(code, err, "can't take one of shape (3, 8, 12)")


@pytest.mark.parametrize(
    ("names", "size"),
    [
        (["_toy:Toy"], None),
        (["alexnet_small", "resnet50_small"], 32),
        (["alexnet_small", "_toy:Toy"], 32),
        (["resnet18"], 224),
        (["_toy:Toy", "alexnet_small", "resnet18"], 224),
    ],
)
def test_the_default_size_of_images(
    monkeypatch: pytest.MonkeyPatch, names: list[str], size: int | None
) -> None:
    def check_size(path: str, classes: object, side: int | None, skip_bad: bool) -> None:
        assert side == size
        raise DataError("checked")

    monkeypatch.setattr(images, "load_image_folder", check_size)
    with pytest.raises(DataError, match="checked"):
        request.make_model_studies(names, SweepOptions(images="images"), False)


def test_images_of_different_sizes_need_the_size_option(folder: Path) -> None:
    Image.new("RGB", (9, 8)).save(folder / "bee" / "2.png")
    code, _, err = sweep(*TOY[:4], "--images", folder)
    assert_refused(code, err, "ant/0.png has 8 x 8 pixels (height x width), ")
    assert "bee/2.png 8 x 9; expected images of one size, or --size" in err
    code, out, err = sweep(*TOY, "--images", folder, "--plan")
    assert (code, err) == (0, "")
    assert "Warning: 1 of 12 images are enlarged, to a shorter side of 9 pixels; " in out


def test_enlarging_small_images_causes_a_warning(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        Image.new("RGB", (5, 4)).save(file)
    code, out, err = sweep(*TOY, "--images", folder, "--plan")
    assert (code, err) == (0, "")
    assert out.count("Warning") == 1
    assert (
        "Warning: 12 of 12 images are enlarged, to a shorter side of 9 pixels; "
        "the smallest has 4 x 5 (height x width)\n"
    ) in out


def test_a_class_with_a_single_image_is_refused(folder: Path) -> None:
    for path in sorted((folder / "bee").iterdir())[1:]:
        path.unlink()
    code, _, err = sweep(*TOY, "--images", folder)
    assert_refused(code, err, "'bee'")


@pytest.mark.usefixtures("blank_reports")
def test_a_bad_image_is_refused_or_skipped_with_a_warning(folder: Path) -> None:
    (folder / "bee" / "2.png").write_bytes(b"no image")
    code, _, err = sweep(*TOY, "--images", folder)
    assert_refused(code, err, "bee/2.png")
    code, _, err = sweep(*TOY, "--images", folder, "--metrics", "cka", "--skip-bad-images")
    assert code == 0
    assert err.startswith("warning: ")
    assert "bee/2.png" in err
    assert err.count("\n") == 1


def test_the_report_command(folder: Path) -> None:
    assert sweep(*TOY, "--images", folder, "--metrics", "cka", "--out", "run")[0] == 0
    Path("run/report.html").unlink()
    assert invoke("report", "run")[:2] == (0, "run/report.html\n")
    assert Path("run/report.html").exists()
    code, _, err = invoke("report", "images")
    assert code == 2
    assert err.startswith("error: run: images has no study.json")
    Path("notes.txt").write_text("keep")
    code, _, err = invoke("report", "run", "--out", "notes.txt")
    assert (code, err) == (2, "error: out: notes.txt; expected the name of an .html file\n")
    assert Path("notes.txt").read_text() == "keep"


def test_folders_in_place_of_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.csv").mkdir()
    Path("run/study.json").mkdir(parents=True)
    assert invoke("stats", "d.csv") == (
        2,
        "",
        "error: table: d.csv is a folder; expected a .csv or .parquet file\n",
    )
    for command in (("status", "run"), ("sweep", "--model", "alexnet_small", "--out", "run")):
        code, _, err = invoke(*command)
        assert code == 2
        assert err == "error: out: run/study.json is a folder; expected the file that a run wrote\n"


def test_an_unreachable_ray_cluster_leaves_no_run_folder(folder: Path) -> None:
    pytest.importorskip("ray")
    ray = ("--executor", "ray", "--address", "127.0.0.1:1", "--out", "run")
    code, _, err = sweep(*TOY, "--images", folder, *ray)
    assert_refused(code, err, "address: nothing answers at 127.0.0.1:1")
    assert not Path("run").exists()


def test_an_invalid_command_ends_its_process_with_code_2(tmp_path: Path) -> None:
    root = Path(cli.__file__).parents[2]
    arguments = [
        "repsim_kernels.experiments",
        "sweep",
        "--images",
        "nowhere",
        "--out",
        tmp_path / "x",
    ]
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_sample_is_evenly_spaced_and_includes_both_ends() -> None:
    assert request.space_evenly(list(range(7)), 7) == list(range(7))
    assert request.space_evenly(list(range(105)), 3) == [0, 52, 104]
    assert request.space_evenly(["a", "b", "c"], 1) == ["a"]
    assert set(request.SAMPLES) == set(SMALL)
