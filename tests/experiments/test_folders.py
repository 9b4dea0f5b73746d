"""Which entries of a folder are classes or stimuli, and which are skipped or reported."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from repsim_kernels.experiments.errors import DataError
from repsim_kernels.experiments.inputs.imagenet import load_validation, wnids
from repsim_kernels.experiments.inputs.images import load_image_folder

CLASSES = ("ape", "bee", "cat")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of two images, each of a different colour."""
    root = tmp_path / "images"
    for i, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (60, 40), (80 * i, 200 * j, 50)).save(root / name / f"{j}.png")
    return root


JUNK_FOLDERS = [
    *(".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "lost+found", "$RECYCLE.BIN"),
    *("#recycle", "System Volume Information"),
]
JUNK_FILES = ["Thumbs.db", "desktop.ini", ".DS_Store", "._0.png", ".0.png"]


def add_junk(folder: Path, image: Path) -> None:
    """Add entries that other programs leave in a folder, with copies of an image."""
    for name in JUNK_FOLDERS:
        (folder / name / "0.png").mkdir(parents=True)
        shutil.copy(image, folder / name / "0.png" / "thumb.jpg")
        shutil.copy(image, folder / name / "copy.png")
    for name in JUNK_FILES:
        shutil.copy(image, folder / name)


@pytest.mark.parametrize("names", [("ape", "bee", "cat"), ("1", "2", "10")])
def test_entries_of_other_programs_are_skipped(folder, names):
    for old, new in zip(CLASSES, names, strict=True):
        (folder / old).rename(folder / new)
    clean = load_image_folder(folder, size=8)
    assert clean.source == f"6 images of 3 classes in {folder}"
    (folder / names[0] / "more").mkdir()
    os.link(folder / names[0] / "1.png", folder / names[0] / "more" / "1.png")
    (folder / names[0] / "1.png").unlink()
    for place in (folder, folder / names[0], folder / names[0] / "more"):
        add_junk(place, folder / names[1] / "0.png")
    littered = load_image_folder(folder, size=8)
    assert torch.equal(littered.images, clean.images)
    assert torch.equal(littered.labels, clean.labels)
    assert littered.classes == clean.classes
    counts = "15 hidden, 3 #recycle, 3 $RECYCLE.BIN, 3 @eaDir, 3 System Volume Information, "
    assert littered.source == f"{clean.source} (skipped: {counts}3 Thumbs.db, 3 __MACOSX, 6 others)"
    assert load_image_folder(folder, [names[1]], size=8).labels.tolist() == [clean.labels[2]] * 2


@pytest.mark.parametrize("stray", ["notes", "10 old", "-1", "1.5", "٣"])
def test_a_stray_folder_among_numbered_ones_raises(folder, stray):
    for old, new in zip(CLASSES, ("0", "1", "10"), strict=True):
        (folder / old).rename(folder / new)
    assert load_image_folder(folder, size=8).labels.tolist() == [0, 0, 1, 1, 10, 10]
    (folder / stray).mkdir()
    message = rf"has 3 folders named by output numbers, and {stray!r}; expected only numbers"
    for classes in (None, ["0", "1"]):
        with pytest.raises(DataError, match=message):
            load_image_folder(folder, classes, size=8)


def test_a_single_number_among_names_is_a_name(folder):
    (folder / "bee").rename(folder / "747")
    assert load_image_folder(folder, size=8).classes == ("747", "ape", "cat")


@pytest.mark.parametrize("number", ["1000000", "20240101", "1000000000", "9" * 20, "9" * 200])
def test_numbers_too_large_for_an_output_raise(folder, number):
    for old, new in zip(CLASSES, ("0", "1", number), strict=True):
        (folder / old).rename(folder / new)
    message = rf"^images: .*/{number}: the number is too large for a network's output; expected"
    with pytest.raises(DataError, match=message):
        load_image_folder(folder, size=8)
    (folder / number).rename(folder / "999999")
    stimuli = load_image_folder(folder, size=8)
    assert stimuli.labels.tolist() == [0, 0, 1, 1, 999999, 999999]
    assert len(stimuli.classes) == 10**6


def test_names_that_are_not_utf_8_are_escaped_or_raise(folder):
    garbled = os.fsdecode(b"caf\xe9")
    (folder / "ape" / f"{garbled}.png{garbled}").touch()
    root = folder.rename(folder.with_name(garbled))
    source = load_image_folder(root, size=8).source
    assert source.endswith(r"/caf\xe9 (skipped: 1 *.pngcaf\xe9)")
    (root / "bee").rename(root / garbled)
    message = r"^images: the name of .*/caf\\xe9/caf\\xe9 is not UTF-8; rename it$"
    with pytest.raises(DataError, match=message) as caught:
        load_image_folder(root, size=8)
    str(caught.value).encode()


def test_skipped_files_are_counted(folder):
    Image.new("L", (5, 5)).save(folder / "bee" / "a.GIF")
    (folder / "bee" / "notes").touch()
    shutil.copy(folder / "bee" / "0.png", folder / "0.png")
    (folder / "labels.csv").touch()
    skipped = r"\(skipped: 1 outside the classes' folders, 1 \*\.gif, 1 without a suffix\)"
    assert re.search(f" in {re.escape(str(folder))} {skipped}$", load_image_folder(folder).source)
    for file in (folder / "bee").glob("*.png"):
        file.unlink()
    message = (
        r"class 'bee' of .* has 0 images \(skipped: 1 \*\.gif, 1 .*; expected 2 or more of \.jp"
    )
    with pytest.raises(DataError, match=message):
        load_image_folder(folder, size=8)


def test_links_to_folders_are_followed_once(folder, tmp_path):
    clean = load_image_folder(folder, size=8)
    shutil.move(folder / "cat", tmp_path / "cats")
    (folder / "cat").symlink_to(tmp_path / "cats")  # a class
    shutil.move(folder / "bee", tmp_path / "hive")
    (folder / "bee" / "sub").mkdir(parents=True)
    (folder / "bee" / "sub" / "link").symlink_to(tmp_path / "hive")
    (folder / "bee" / "a").symlink_to(tmp_path / "hive")
    (folder / "bee" / "sub" / "up").symlink_to(folder / "bee")
    (folder / "bee" / "top").symlink_to("../..")
    (tmp_path / "cats" / "classes").symlink_to(folder)
    (folder / "ape" / "one.png").symlink_to("1.png")
    linked = load_image_folder(folder, size=8)
    assert linked.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert torch.equal(linked.images[[0, 1, 3, 4, 5, 6]], clean.images)
    assert linked.source.endswith(" (skipped: 4 links to folders read already)")


def test_broken_links_raise_or_are_skipped(folder):
    for place in (folder / "dog", folder / "bee" / "more"):
        place.symlink_to("nowhere")
        with pytest.raises(DataError, match=rf"{place} is a link to nowhere, which is missing"):
            load_image_folder(folder, ["ape", "bee"], size=8)
        place.unlink()
    (folder / "bee" / "2.png").symlink_to("nowhere.png")
    (folder / "bee" / ".lock").symlink_to("nobody@nowhere:1")
    with pytest.raises(DataError, match=r"2\.png can't be decoded: it is a broken link to nowh"):
        load_image_folder(folder, size=8)
    with pytest.warns(UserWarning, match=r"skipped, can't be decoded: .*bee/2\.png$"):
        assert len(load_image_folder(folder, size=8, skip_bad=True).images) == 6
    os.mkfifo(folder / "ape" / "pipe.png")
    (folder / "bee" / "2.png").unlink()
    assert "1 not regular files" in load_image_folder(folder, size=8).source


@pytest.mark.parametrize("flat", [True, False])
def test_entries_of_other_programs_among_imagenet_are_skipped(folder, tmp_path, flat):
    root = tmp_path / "val"
    for i in range(2):
        place = root if flat else root / wnids()[113]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "ape" / f"{i}.png", place / f"ILSVRC2012_val_0000000{i + 1}.JPEG")
    if flat:
        (root / "val.txt").write_text(
            "ILSVRC2012_val_00000001.JPEG 113\nILSVRC2012_val_00000002.JPEG 113\n"
        )
    clean = load_validation(root, [113], torchvision_transform)
    assert clean.source == f"2 images of 1 classes in {root}"
    for junk in {root, place}:
        add_junk(junk, folder / "cat" / "0.png")
        shutil.copy(folder / "cat" / "0.png", junk / "._ILSVRC2012_val_00000001.JPEG")
    shutil.copy(folder / "cat" / "0.png", root / "montage.png")
    littered = load_validation(root, [113], torchvision_transform)
    assert torch.equal(littered.images, clean.images)
    times = 1 if flat else 2
    assert littered.source.startswith(f"{clean.source} (skipped: {6 * times} hidden, {times} ")
    (root / "new").symlink_to("nowhere")
    with pytest.raises(DataError, match="new is a link to nowhere, which is missing"):
        load_validation(root, [113], torchvision_transform)


def torchvision_transform(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.getpixel((0, 0))).float()[:, None, None]
