"""ImageNet's classes, and its validation images in every layout."""

import re
import shutil
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.models import ResNet50_Weights
from torchvision.transforms._presets import ImageClassification

from repsim_kernels.experiments.errors import DataError
from repsim_kernels.experiments.inputs import images as data
from repsim_kernels.experiments.inputs.imagenet import (
    categories,
    find_outputs,
    load_validation,
    make_noise,
    wnids,
)

TRANSFORM = ImageClassification(crop_size=8, resize_size=10)
STUDY = {  # the study's ten classes
    "n04147183": "schooner",
    "n01917289": "brain coral",
    "n01534433": "junco",
    "n01944390": "snail",
    "n02066245": "grey whale",
    "n02110185": "Siberian husky",
    "n03271574": "electric fan",
    "n02870880": "bookcase",
    "n03388183": "fountain pen",
    "n04442312": "toaster",
}
KNOWN = {  # classes whose outputs are widely known
    0: ("n01440764", "tench"),
    207: ("n02099601", "golden retriever"),
    281: ("n02123045", "tabby"),
    386: ("n02504458", "African elephant"),
    954: ("n07753592", "banana"),
    999: ("n15075141", "toilet tissue"),
}
JUNCO, SNAIL, SCHOONER, TENCH = 13, 113, 780, 0
IN_FLAT = (SCHOONER, JUNCO, TENCH, JUNCO, SCHOONER, SNAIL, JUNCO, SNAIL)  # by file number


def write_image(file: Path, seed: int, mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    height, width = rng.integers(9, 30, 2)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)


def load_one_by_one(files: Sequence[Path]) -> torch.Tensor:
    return torch.stack([TRANSFORM(Image.open(file).convert("RGB")) for file in files])


def test_ids_and_names_match_by_output():
    assert len(wnids()) == 1000
    assert sorted(set(wnids())) == list(wnids())
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids())
    assert {wnid: categories()[wnids().index(wnid)] for wnid in STUDY} == STUDY
    for output, pair in KNOWN.items():
        assert (wnids()[output], categories()[output]) == pair


def test_names_match_torchvision_and_are_distinct():
    names = ResNet50_Weights.DEFAULT.meta["categories"]
    assert len({name.lower() for name in categories()}) == 1000
    changed = {ours: name for ours, name in zip(categories(), names, strict=True) if ours != name}
    assert changed == {"Cardigan n02113186": "Cardigan", "cardigan n02963159": "cardigan"}


def test_find_outputs():
    assert find_outputs(["n04147183", "siberian_HUSKY", "13", 999]) == [780, 250, 13, 999]
    assert find_outputs(categories()) == list(range(1000))
    assert find_outputs(wnids()) == list(range(1000))
    assert find_outputs(np.arange(1000)) == list(range(1000))
    assert find_outputs(["cardigan N02963159", "n02113186"]) == [474, 264]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["junco_bird"], "'junco_bird' is unknown; did you mean 'junco'"),
        (["toaster", "tosater"], "'tosater' is unknown; did you mean 'toaster'"),
        (["xyzzy"], "'xyzzy' is unknown; expected a class name, a wnid or an output number from"),
        ([1000], "'1000' is unknown; expected"),
        ([-1], "'-1' is unknown; expected"),
        (["n00000000"], "'n00000000' is unknown"),
        (["CARDIGAN"], "'CARDIGAN' is ambiguous; expected n02113186 or n02963159"),
        (["snail", 5, "n01944390"], "'snail' and 'n01944390' are one class"),
    ],
)
def test_invalid_names_raise(names, message):
    with pytest.raises(DataError, match=f"classes: {message}") as error:
        find_outputs(names)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "directories",
    [
        {JUNCO: "n01534433", SNAIL: "n01944390", SCHOONER: "n04147183"},
        {JUNCO: "Junco", SNAIL: "snail", SCHOONER: "SCHOONER"},
        {JUNCO: "13", SNAIL: "113", SCHOONER: "0780"},
    ],
)
def test_a_directory_for_each_class(tmp_path, directories):
    files = {}
    for output, name in directories.items():
        files[output] = [
            tmp_path / name / f"{letter}.{'png' if output == SNAIL else 'JPEG'}" for letter in "abc"
        ]
        for i, file in enumerate(files[output]):
            write_image(file, 10 * output + i, "L" if i == 0 else "RGB")
    for other in ("toaster", "cardigan", "no class"):  # not requested, so not read
        (tmp_path / other).mkdir()
        (tmp_path / other / "0.JPEG").write_bytes(b"no image")
    shown = load_validation(tmp_path, [SCHOONER, JUNCO, SNAIL], TRANSFORM)
    assert shown.labels.tolist() == [JUNCO] * 3 + [SNAIL] * 3 + [SCHOONER] * 3
    expected = load_one_by_one(files[JUNCO] + files[SNAIL] + files[SCHOONER])
    torch.testing.assert_close(shown.images, expected, rtol=0, atol=0)
    assert shown.classes == categories()
    assert shown.source == f"9 images of 3 classes in {tmp_path}"
    shown = load_validation(str(tmp_path), [SNAIL, JUNCO], TRANSFORM, images_per_class=2)
    assert shown.labels.tolist() == [JUNCO] * 2 + [SNAIL] * 2
    torch.testing.assert_close(
        shown.images, load_one_by_one(files[JUNCO][:2] + files[SNAIL][:2]), rtol=0, atol=0
    )


@pytest.mark.parametrize(("side", "count"), [(8, 2), (9, 2), (10, 0)])
def test_images_that_are_enlarged_are_counted(tmp_path, side, count):
    """The network's transform resizes to 10 pixels, even files that already have the final 8."""
    for i, size in enumerate([(side, side), (40, side)]):
        (tmp_path / "13").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "13" / f"{i}.png")
    expected = (
        f"2 of 2 images are enlarged, to a shorter side of 10 pixels; the smallest has {side} "
    )
    enlarged = load_validation(tmp_path, [JUNCO], TRANSFORM).enlarged
    assert enlarged.startswith(expected) if count else enlarged == ""
    assert load_validation(tmp_path, [JUNCO], lambda image: TRANSFORM(image)).enlarged == ""


def test_incomplete_directories_raise(tmp_path):
    for i in range(2):
        write_image(tmp_path / "snail" / f"{i}.png", i)
        write_image(tmp_path / "n04147183" / f"{i}.png", i)
    with pytest.raises(DataError, match=r"no sub-directory for tench \(n01440764\), junco \(n015"):
        load_validation(tmp_path, [JUNCO, SNAIL, TENCH], TRANSFORM)
    with pytest.raises(DataError, match=r"tench \(.* and 988 more; expected"):
        load_validation(tmp_path, range(1000), TRANSFORM)
    with pytest.raises(DataError, match="there is no folder"):
        load_validation(tmp_path / "none", [SNAIL], TRANSFORM)
    with pytest.raises(DataError, match="classes: empty"):
        load_validation(tmp_path, [], TRANSFORM)
    with pytest.raises(DataError, match="classes: 113 and 113 are one class"):
        load_validation(tmp_path, [SNAIL, SNAIL], TRANSFORM)
    with pytest.raises(DataError, match="images_per_class: 1 is too few"):
        load_validation(tmp_path, [SNAIL], TRANSFORM, images_per_class=1)
    with pytest.raises(DataError, match=r"labels: val\.txt is for a flat directory, but"):
        load_validation(tmp_path, [SNAIL], TRANSFORM, labels="val.txt")
    (tmp_path / "780").mkdir()
    with pytest.raises(DataError, match=r"/780 and .*/n04147183 are the same class"):
        load_validation(tmp_path, [SCHOONER], TRANSFORM)
    (tmp_path / "cardigan").mkdir()
    with pytest.raises(DataError, match="images: 'cardigan' is ambiguous; expected n02113186 or"):
        load_validation(tmp_path, [474], TRANSFORM)
    (tmp_path / "snail" / "1.png").unlink()
    with pytest.raises(DataError, match=r"class 'snail' of .* has 1 images; expected 2 or more"):
        load_validation(tmp_path, [SNAIL], TRANSFORM)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """ILSVRC2012's flat directory, with eight images."""
    for number in range(1, len(IN_FLAT) + 1):
        write_image(tmp_path / "data" / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    (tmp_path / "data" / "val" / "notes.JPEG").write_bytes(b"no image of the set")
    return tmp_path / "data" / "val"


def write_list(folder: Path, labels: Sequence[int] = IN_FLAT) -> Path:
    """Write Caffe's val.txt."""
    lines = [f"ILSVRC2012_val_{i:08d}.JPEG {label}\n" for i, label in enumerate(labels, 1)]
    (folder / "val.txt").write_text("".join(lines))
    return folder / "val.txt"


def write_solution(folder: Path, labels: Sequence[int] = IN_FLAT) -> Path:
    """Write Kaggle's LOC_val_solution.csv, which is unsorted and has a box per object."""
    lines = ["ImageId,PredictionString\n"]
    for i, label in sorted(enumerate(labels, 1), key=lambda pair: -pair[0]):
        boxes = " ".join(f"{wnids()[label]} 85 {box} 499 272" for box in range(1 + i % 3))
        lines.append(f"ILSVRC2012_val_{i:08d},{boxes} \n")
    (folder / "LOC_val_solution.csv").write_text("".join(lines))
    return folder / "LOC_val_solution.csv"


@cache
def meta(wnid_by_id: tuple[str, ...]) -> bytes:
    """Make the development kit's meta.mat: the classes, then two of their ancestors."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    synsets = np.zeros((len(wnid_by_id) + 2, 1), dtype=[(field, object) for field in fields])
    for i, wnid in enumerate([*wnid_by_id, "n00001740", "n00001930"]):
        children = np.arange(1.0, 4) if i >= len(wnid_by_id) else np.zeros(0)
        synsets[i, 0] = (float(i + 1), wnid, "a, b", "text", float(len(children)), children)
    file = BytesIO()
    savemat(file, {"synsets": synsets})
    return file.getvalue()


def write_kit(folder: Path, labels: Sequence[int] = IN_FLAT) -> Path:
    """Write the development kit's ground truth and meta.mat; its ids are unsorted."""
    wnid_by_id = tuple(np.random.default_rng(0).permutation(wnids()).tolist())
    (folder / "meta.mat").write_bytes(meta(wnid_by_id))
    file = folder / "ILSVRC2012_validation_ground_truth.txt"
    file.write_text("".join(f"{wnid_by_id.index(wnids()[label]) + 1}\n" for label in labels))
    return file


WRITERS = (write_list, write_solution, write_kit)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("place", ["inside", "parent", "elsewhere"])
def test_flat_directory_with_every_labels_format(flat, tmp_path, write, place, monkeypatch):
    folder = {"inside": flat, "parent": flat.parent, "elsewhere": tmp_path}[place]
    labels = write(folder)
    if place == "elsewhere":
        with pytest.raises(DataError, match=r"there is no val\.txt, LOC_.* or .*--labels FILE"):
            load_validation(flat, [JUNCO, SCHOONER], TRANSFORM)
        labels = labels.rename(tmp_path / "any.name")  # the format is detected by content
    monkeypatch.chdir(flat)
    shown = load_validation(
        ".", [SCHOONER, JUNCO], TRANSFORM, labels=labels if place == "elsewhere" else None
    )
    assert shown.labels.tolist() == [JUNCO] * 3 + [SCHOONER] * 2
    numbers = (2, 4, 7, 1, 5)
    expected = load_one_by_one([flat / f"ILSVRC2012_val_{i:08d}.JPEG" for i in numbers])
    torch.testing.assert_close(shown.images, expected, rtol=0, atol=0)
    assert shown.classes == categories()
    shown = load_validation(flat, [JUNCO], TRANSFORM, labels=labels, images_per_class=2)
    torch.testing.assert_close(shown.images, expected[:2], rtol=0, atol=0)
    with pytest.raises(DataError, match=r"class 'tench' of .* has 1 images; expected 2"):
        load_validation(flat, [JUNCO, TENCH], TRANSFORM, labels=labels)
    with pytest.raises(DataError, match=r"class 'toaster' of .* has 0 images; expected 2"):
        load_validation(flat, [859], TRANSFORM, labels=labels)


@pytest.mark.parametrize("write", WRITERS)
def test_missing_labels_raise_and_missing_files_do_not(flat, write):
    """A file without a label is an error; a label without its file is not."""
    labels = write(flat, IN_FLAT[:-1])
    if write is write_solution:  # its lines are unsorted
        assert "00000008" not in labels.read_text()
    with pytest.raises(DataError, match=r"labels: .* has no label for ILSVRC2012_val_00000008"):
        load_validation(flat, [JUNCO], TRANSFORM)
    (flat / "ILSVRC2012_val_00000008.JPEG").unlink()
    (flat / "ILSVRC2012_val_00000002.JPEG").unlink()
    expected = load_one_by_one([flat / f"ILSVRC2012_val_{i:08d}.JPEG" for i in (4, 7)])
    torch.testing.assert_close(
        load_validation(flat, [JUNCO], TRANSFORM).images, expected, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("write", "old", "new", "message"),
    [
        (write_list, "04.JPEG 13", "04.JPEG 1000", "line 4 of .* is damaged; .* from 0 to 999"),
        (write_list, "04.JPEG 13", "04.JPEG", "line 4 of .* is damaged"),
        (write_list, "00000004", "00000003", "line 4 of .* repeats ILSVRC2012_val_00000003"),
        (write_list, "ILSVRC2012_val", "picture", "line 1 of .* is damaged"),
        (write_solution, "n04147183", "n04147184", r"line 5 of .* is damaged; .* a wnid"),
        (write_solution, "ImageId,", "id,", "line 1 of .* is damaged"),
    ],
)
def test_damaged_labels_raise(flat, write, old, new, message):
    labels = write(flat)
    labels.write_text(labels.read_text().replace(old, new))
    with pytest.raises(DataError, match=message) as error:
        load_validation(flat, [JUNCO], TRANSFORM)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["0", "1001", "", "3 4", "n01440764"])
def test_a_damaged_ground_truth_raises(flat, line):
    labels = write_kit(flat)
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(DataError, match=r"line 3 of .* is damaged; expected an ILSVRC2012_ID"):
        load_validation(flat, [JUNCO], TRANSFORM)


def test_unreadable_labels_raise(flat, tmp_path):
    with pytest.raises(DataError, match=r"labels: .*none\.txt can't be read: .*No such file"):
        load_validation(flat, [JUNCO], TRANSFORM, labels=tmp_path / "none.txt")
    (tmp_path / "other").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"labels: .*other can't be read: .*utf-8"):
        load_validation(flat, [JUNCO], TRANSFORM, labels=tmp_path / "other")
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match=r"labels: .*empty has no label for ILSVRC2012_val_"):
        load_validation(flat, [JUNCO], TRANSFORM, labels=tmp_path / "empty")


def test_a_damaged_or_foreign_meta_mat_raises(flat):
    write_kit(flat)
    file = flat / "meta.mat"
    whole = file.read_bytes()
    for damaged in (b"", b"no matrix" * 30, whole[:300], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"meta\.mat can't be read") as error:
            load_validation(flat, [JUNCO], TRANSFORM)
        assert "\n" not in str(error.value)
    savemat(file, {"other": np.arange(3)})
    with pytest.raises(DataError, match=r"meta\.mat can't be read"):
        load_validation(flat, [JUNCO], TRANSFORM)
    file.write_bytes(meta(wnids()[:20]))
    with pytest.raises(DataError, match=r"meta\.mat is not ILSVRC2012's; expected its 1,000"):
        load_validation(flat, [JUNCO], TRANSFORM)
    file.unlink()
    with pytest.raises(DataError, match=r"not outputs; expected .* meta\.mat in the same folder"):
        load_validation(flat, [JUNCO], TRANSFORM)


def test_bad_images_raise_or_are_skipped(flat):
    write_list(flat)
    bad = flat / "ILSVRC2012_val_00000004.JPEG"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(DataError, match=r"val_00000004\.JPEG can't be decoded") as error:
        load_validation(flat, [JUNCO, SCHOONER], TRANSFORM)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=r"skipped, can't be decoded: .*val_00000004\.JPEG$"):
        shown = load_validation(flat, [JUNCO, SCHOONER], TRANSFORM, skip_bad=True)
    assert shown.labels.tolist() == [JUNCO, JUNCO, SCHOONER, SCHOONER]
    expected = load_one_by_one([flat / f"ILSVRC2012_val_{i:08d}.JPEG" for i in (2, 7, 1, 5)])
    torch.testing.assert_close(shown.images, expected, rtol=0, atol=0)
    shutil.copy(bad, flat / "ILSVRC2012_val_00000002.JPEG")
    with pytest.raises(DataError, match=r"'junco' .* has 1 images that can be decoded; expected 2"):
        load_validation(flat, [JUNCO], TRANSFORM, skip_bad=True)
    assert (
        load_validation(flat, [SCHOONER], TRANSFORM).labels.tolist() == [SCHOONER] * 2
    )  # not read


def test_noise_is_smooth_coloured_by_class_and_distinct():
    shown = make_noise([SCHOONER, JUNCO], images_per_class=5, size=64)
    assert shown.labels.tolist() == [JUNCO] * 5 + [SCHOONER] * 5
    assert shown.images.dtype == torch.float32
    assert shown.classes == categories()
    assert shown.source == "random images, seed 0: not evidence"
    mean, std = torch.tensor([data.IMAGENET_MEAN, data.IMAGENET_STD])[..., None, None]
    pixels = (shown.images * std + mean) * 255
    torch.testing.assert_close(pixels, pixels.round().clamp(0, 255), rtol=0, atol=1e-3)
    assert pixels.std() > 30
    assert pixels.diff(dim=-1).abs().max() < 20  # smooth: at most 127 over 8 pixels
    distances = torch.pdist(pixels.flatten(1)) / (3 * 64 * 64) ** 0.5
    assert distances.min() > 10  # no two images are similar
    colours = pixels.mean((2, 3)).reshape(2, 5, 3)
    assert (colours[0].mean(0) - colours[1].mean(0)).norm() > 3 * colours.std(1).max()


def test_noise_depends_only_on_class_and_size():
    shown = make_noise([SCHOONER, JUNCO], images_per_class=5, size=16)
    fewer = make_noise([SCHOONER], images_per_class=2, size=16)
    assert torch.equal(fewer.images, shown.images[5:7])
    for arguments, message in [
        (([], 2, 16), "classes: empty"),
        (([1000], 2, 16), "classes: '1000' is unknown"),
        (([5], 1, 16), "images_per_class: 1 is too few; expected 2 or more"),
    ]:
        with pytest.raises(DataError, match=message):
            make_noise(*arguments)
