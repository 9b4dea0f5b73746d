"""The shipped stimuli, and folders of images."""

import gzip
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from repsim_kernels.experiments.errors import DataError
from repsim_kernels.experiments.inputs import images as data
from repsim_kernels.experiments.inputs.images import decode_images, load_demo, load_image_folder

COLOURS = {"ape": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255)}


def test_demo_images_are_prepared_for_the_shipped_networks():
    stimuli = load_demo()
    assert data.DEMO_FILE.stat().st_size < 0.6e6
    assert stimuli.images.shape == (500, 3, 32, 32)
    assert stimuli.images.dtype == torch.float32
    assert torch.equal(stimuli.labels, torch.arange(10).repeat_interleave(50))
    assert stimuli.classes[9] == "Ankle boot"
    assert len(stimuli.classes) == 10
    assert torch.equal(stimuli.images[:, 0], stimuli.images[:, 2])
    black = (0 - data.MEAN) / data.STD
    assert stimuli.images.min().item() == pytest.approx(black)
    assert stimuli.images[:, :, :2].eq(stimuli.images.min()).all()
    assert abs(stimuli.images[:, :, 2:30, 2:30].mean().item()) < 0.1
    assert len(stimuli.images.unique(dim=0)) == 500


@pytest.mark.skipif(not Path(data.FASHION_MNIST).is_dir(), reason="needs dataset-fashion-mnist")
def test_demo_images_come_from_the_test_set():
    images, labels = data.load_fashion_mnist("t10k")
    first = np.concatenate([np.flatnonzero(labels == c)[:50] for c in range(10)])
    with np.load(data.DEMO_FILE) as shipped:
        np.testing.assert_array_equal(shipped["index"], first)
        np.testing.assert_array_equal(shipped["images"], images[first])
        np.testing.assert_array_equal(shipped["labels"], labels[first])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "can't be read"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x02ab", mtime=0), "not an idx file of 3-dimensional"),
        (
            gzip.compress(b"\0\0\x08\x03" + b"\0\0\0\x02" * 3 + b"abc", mtime=0),
            "has 3 bytes; expected 8",
        ),
    ],
)
def test_a_damaged_data_set_raises(tmp_path, content, message):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.load_fashion_mnist("train", tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of two images of 60 x 40; each class has one colour."""
    root = tmp_path / "images"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (60, 40), colour).save(root / name / f"{i}.png")
    return root


def test_image_folder_is_sorted_resized_and_normalised(folder):
    Image.new("L", (30, 50), 0).save(folder / "bee" / "2.JPEG")
    (folder / "bee" / "notes.txt").write_text("no image")
    stimuli = load_image_folder(folder, size=32)
    assert stimuli.images.shape == (7, 3, 32, 32)
    assert stimuli.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert stimuli.classes == ("ape", "bee", "cat")
    assert "\n" not in stimuli.source
    colours = torch.tensor([*COLOURS.values()])[stimuli.labels] / 255
    colours[4] = 0
    expected = (colours - torch.tensor(data.IMAGENET_MEAN)) / torch.tensor(data.IMAGENET_STD)
    torch.testing.assert_close(stimuli.images, expected[..., None, None].expand(7, 3, 32, 32))
    assert load_image_folder(str(folder)).images.shape == (7, 3, 224, 224)


def test_image_folder_crops_the_centre(folder):
    image = Image.new("RGB", (80, 37), (255, 255, 255))  # 37 = round(32 * 256 / 224)
    image.paste((0, 0, 0), (24, 2, 56, 34))
    image.save(folder / "ape" / "0.png")
    black = -torch.tensor(data.IMAGENET_MEAN) / torch.tensor(data.IMAGENET_STD)
    first = load_image_folder(folder, size=32).images[0]
    torch.testing.assert_close(first, black[:, None, None].expand(3, 32, 32))


def test_image_folder_keeps_output_numbers(folder):
    stimuli = load_image_folder(folder, classes=["cat", "ape"], size=8)
    assert stimuli.labels.tolist() == [0, 0, 2, 2]
    assert stimuli.classes == ("ape", "bee", "cat")
    for old, new in zip(COLOURS, ("10", "9", "3"), strict=True):
        (folder / old).rename(folder / new)
    stimuli = load_image_folder(folder, size=8)
    assert stimuli.labels.tolist() == [3, 3, 9, 9, 10, 10]
    assert stimuli.classes == tuple(str(i) for i in range(11))
    assert load_image_folder(folder, classes=["9"], size=8).labels.tolist() == [9, 9]


def test_unreadable_images_raise_or_are_skipped(folder):
    whole = (folder / "ape" / "0.png").read_bytes()
    (folder / "ape" / "2.png").write_bytes(whole[:-30])
    (folder / "bee" / "2.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"ape/2\.png can't be decoded") as error:
        load_image_folder(folder, size=8)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=r"ape/2\.png, .*bee/2\.jpg$") as warned:
        stimuli = load_image_folder(folder, size=8, skip_bad=True)
    assert len(warned) == 1
    assert stimuli.labels.tolist() == [0, 0, 1, 1, 2, 2]
    (folder / "ape" / "0.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"'ape' of .* has 1 images that can be decoded; expected 2"
    ):
        load_image_folder(folder, size=8, skip_bad=True)


@pytest.fixture
def numbered(tmp_path: Path) -> list[Path]:
    """Sixty one-pixel images; image i has red value i."""
    files = [tmp_path / f"{i}.png" for i in range(60)]
    for i, file in enumerate(files):
        Image.new("RGB", (1, 1), (i, 0, 0)).save(file)
    return files


def read_red(image: Image.Image) -> torch.Tensor:
    return torch.tensor([float(image.getpixel((0, 0))[0])])


def test_decode_keeps_the_order(numbered):
    def slow_first(image: Image.Image) -> torch.Tensor:
        time.sleep((60 - read_red(image).item()) * 1e-4)
        finished.append(threading.current_thread())
        return read_red(image)

    finished: list[threading.Thread] = []
    order = np.random.default_rng(0).permutation(60)
    images, good = decode_images([numbered[i] for i in order], slow_first)
    assert images[:, 0].tolist() == order.tolist()
    assert good == list(range(60))
    assert len(set(finished)) > 2  # this thread, for the shape, and at least two more


def test_decode_skips_bad_files(numbered):
    bad = {0, 1, 7, 30, 31, 59}
    for i in bad:
        numbered[i].write_bytes(b"no image")
    images, good = decode_images(numbered, read_red, skip_bad=True)
    assert good == sorted(set(range(60)) - bad)
    assert images[:, 0].tolist() == good
    with pytest.raises(DataError, match=r"images: .*/0\.png can't be decoded") as error:
        decode_images(numbered, read_red)
    assert "\n" not in str(error.value)
    numbered[0].unlink()
    with pytest.raises(DataError, match=r"/0\.png can't be decoded: .*No such file"):
        decode_images(numbered, read_red)


def test_decode_stops_at_a_bad_image(numbered):
    def slow(image: Image.Image) -> torch.Tensor:
        time.sleep(0.01)
        decoded.append(image)
        return read_red(image)

    decoded: list[Image.Image] = []
    numbered[0].write_bytes(b"no image")
    threads = threading.active_count()
    with pytest.raises(DataError, match=r"/0\.png can't be decoded"):
        decode_images(numbered * 10, slow)
    assert threading.active_count() == threads
    assert len(decoded) < 300  # of 590


def test_decode_passes_on_other_errors(numbered):
    def broken(image: Image.Image) -> torch.Tensor:
        if read_red(image).item() == 5:
            raise ZeroDivisionError("the transform's own")
        return read_red(image)

    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="the transform's own"):
        decode_images(numbered, broken, skip_bad=True)
    assert threading.active_count() == threads
    Image.new("RGB", (2, 1)).save(numbered[9])
    with pytest.raises(DataError, match=r"transform: returns \(2,\) for .*9\.png; expected \(1,\)"):
        decode_images(numbered, lambda image: torch.zeros(2 if image.width == 2 else 1))


def test_images_keep_their_size_without_a_size(folder):
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (40, 300, 3), dtype=np.uint8)).save(file)
    stimuli = load_image_folder(folder, size=None)
    assert stimuli.images.shape == (6, 3, 40, 300)
    assert stimuli.enlarged == ""
    with Image.open(folder / "bee" / "1.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    mean, std = torch.tensor([data.IMAGENET_MEAN, data.IMAGENET_STD])[..., None, None].double()
    expected = ((pixels - mean) / std).float()
    torch.testing.assert_close(stimuli.images[3], expected, rtol=1e-5, atol=1e-5)
    (folder / "bee" / "2.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped, .*2.png"):
        assert load_image_folder(folder, size=None, skip_bad=True).images.shape == (6, 3, 40, 300)
    (folder / "bee" / "2.png").unlink()
    Image.new("RGB", (40, 300)).save(folder / "cat" / "0.png")
    with pytest.raises(DataError, match=r"size: .*ape/0\.png has 40 x 300 pixels .*cat/0\.png 300"):
        load_image_folder(folder, size=None)
    assert load_image_folder(folder, ["ape", "bee"], None).images.shape == (4, 3, 40, 300)


@pytest.mark.parametrize("size", [8, 40, 224])
def test_files_of_the_requested_size_are_not_resized(folder, size):
    """Other files in the same folder are resized and cropped."""
    rng = np.random.default_rng(size)
    for name, shape in (("ape", (size, size)), ("bee", (size + 1, size)), ("cat", (size, size))):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(
            folder / name / "0.png"
        )
    deep = rng.integers(0, 2**16, (size, size)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "cat" / "0.png")
    stimuli = load_image_folder(folder, size=size)
    mean, std = torch.tensor([data.IMAGENET_MEAN, data.IMAGENET_STD])[..., None, None].double()
    with Image.open(folder / "ape" / "0.png") as image:
        shallow = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    grey = torch.from_numpy(deep / (2**16 - 1)).repeat(3, 1, 1)
    for shown, pixels in ((stimuli.images[0], shallow), (stimuli.images[4], grey)):
        torch.testing.assert_close(shown, ((pixels - mean) / std).float(), rtol=1e-5, atol=1e-5)
    with Image.open(folder / "bee" / "0.png") as image:
        resized = transforms.Resize(round(size * 256 / 224))(image)
        cropped = transforms.functional.to_tensor(transforms.CenterCrop(size)(resized))
    expected = ((cropped.double() - mean) / std).float()
    torch.testing.assert_close(stimuli.images[2], expected, rtol=1e-5, atol=1e-5)


def test_enlarged_images_are_counted(folder):
    assert load_image_folder(folder, size=35).enlarged == ""  # 40 pixels, before they are cropped
    assert load_image_folder(folder, size=36).enlarged == (
        "6 of 6 images are enlarged, to a shorter side of 41 pixels; "
        "the smallest has 40 x 60 (height x width)"
    )
    Image.new("RGB", (20, 30)).save(folder / "ape" / "0.png")
    Image.new("RGB", (35, 35)).save(folder / "bee" / "0.png")
    assert load_image_folder(folder, size=35).enlarged == (
        "1 of 6 images are enlarged, to a shorter side of 40 pixels; "
        "the smallest has 30 x 20 (height x width)"
    )


def test_incomplete_folders_raise(folder, tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*none"):
        load_image_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no sub-directories"):
        load_image_folder(tmp_path / "empty")
    with pytest.raises(DataError, match="classes: 'dog' is unknown"):
        load_image_folder(folder, classes=["ape", "dog"])
    with pytest.raises(DataError, match="classes: empty"):
        load_image_folder(folder, classes=[])
    with pytest.raises(DataError, match="size: 0"):
        load_image_folder(folder, size=0)
    (folder / "bee" / "1.png").unlink()
    with pytest.raises(DataError, match=r"class 'bee' of .* has 1 images; expected 2 or more"):
        load_image_folder(folder, size=8)
    assert len(load_image_folder(folder, classes=["ape", "cat"], size=8).labels) == 4
    (folder / "bee" / "0.png").unlink()
    with pytest.raises(DataError, match=r"class 'bee' of .* has 0 images"):
        load_image_folder(folder, size=8)
    for old, new in zip(COLOURS, ("7", "07", "3"), strict=True):
        (folder / old).rename(folder / new)
    with pytest.raises(DataError, match="names an output twice"):
        load_image_folder(folder, size=8)
