"""Decoding: grey images with more than 8 bits, and modes that Pillow converts."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms._presets import ImageClassification

from repsim_kernels.experiments.errors import DataError
from repsim_kernels.experiments.inputs import images as data
from repsim_kernels.experiments.inputs.imagenet import load_validation
from repsim_kernels.experiments.inputs.images import load_image_folder

WHITE, DEEP = 262, 258  # TIFF tags: whether 0 is white, and bits per sample


def retag(file: Path, tag: int, value: int) -> None:
    """Change a number in the header of a little-endian TIFF."""
    raw = bytearray(file.read_bytes())
    (start,) = struct.unpack_from("<I", raw, 4)
    (count,) = struct.unpack_from("<H", raw, start)
    places = [start + 2 + 12 * i for i in range(count)]
    (place,) = (p for p in places if struct.unpack_from("<H", raw, p) == (tag,))
    struct.pack_into("<H", raw, place + 8, value)
    file.write_bytes(raw)


def write_twelve_bits(values: np.ndarray, file: Path) -> None:
    """Write a TIFF of 12-bit values, two of them in three bytes."""
    a, b = values[:, ::2], values[:, 1::2]
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).reshape(len(values), -1)
    Image.fromarray(packed.astype(np.uint8)).save(file)
    retag(file, DEEP, 12)
    retag(file, 256, values.shape[1])


def write_png(values: np.ndarray, file: Path, colours: int) -> None:
    """Write a PNG with 16 bits per channel, which Pillow can't do for colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    height, width = values.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_deep(kind: str, values: np.ndarray, file: Path) -> np.ndarray:
    """Write 16-bit values as an image of some kind; returns its grey values from 0 to 1."""
    if kind == "floats":
        Image.fromarray((values / 65535).astype(np.float32)).save(file)
    elif kind == "twelve bits":
        values = values >> 4
        write_twelve_bits(values, file)
        return values / 4095
    else:
        stored = values.astype(">u2") if kind == "big-endian" else values
        Image.fromarray(65535 - values if kind == "white is 0" else stored).save(file)
    if kind == "white is 0":
        retag(file, WHITE, 0)
    return values / 65535


KINDS = {
    "png": "png",
    "pgm": "pgm",
    "little-endian": "tif",
    "big-endian": "tiff",
    "white is 0": "tif",
    "twelve bits": "tif",
    "floats": "tif",
}


def normalised(pixels: np.ndarray) -> torch.Tensor:
    mean, std = np.array([data.IMAGENET_MEAN, data.IMAGENET_STD])[..., None, None]
    return torch.from_numpy(((pixels - mean) / std).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", [65536, 3000])  # 3000: like many 16-bit cameras
def test_deep_images_keep_their_range(tmp_path, kind, top):
    rng = np.random.default_rng(top)
    expected = []
    for i in range(3):
        values = rng.integers(0, top, (10, 14), dtype=np.uint16)
        (tmp_path / "a").mkdir(exist_ok=True)
        expected.append(write_deep(kind, values, tmp_path / "a" / f"{i}.{KINDS[kind]}"))
    images = load_image_folder(tmp_path, size=None).images
    assert images.shape == (3, 3, 10, 14)
    assert images.dtype == torch.float32
    for image, pixels in zip(images, expected, strict=True):
        torch.testing.assert_close(image, normalised(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [None, 32])
def test_deep_images_match_8_bit_ones(tmp_path, size):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6), dtype=np.uint8))
    picture = np.asarray(coarse.resize((60, 50), Image.Resampling.BICUBIC))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(tmp_path / name / "0.png")
    Image.fromarray(picture.astype(np.uint16) * 257).save(tmp_path / "a" / "1.png")
    Image.fromarray(picture.astype(np.float32) / 255).save(tmp_path / "b" / "1.tif")
    images = load_image_folder(tmp_path, size=size).images
    for deep in (1, 3):
        if size is None:
            assert torch.equal(images[deep], images[0])
        else:  # resizing rounds 8-bit images, once by columns and once by rows
            assert (images[deep] - images[0]).abs().max() <= 1 / 255 / min(data.IMAGENET_STD)


def test_deep_colours_keep_their_high_bytes(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    values = rng.integers(0, 65536, (2, 9, 7, 4), dtype=np.uint16)
    write_png(values[0, ..., :3], tmp_path / "a" / "0.png", 2)
    write_png(values[1], tmp_path / "a" / "1.png", 6)
    expected = (values[..., :3] >> 8).transpose(0, 3, 1, 2) / 255
    images = load_image_folder(tmp_path, size=None).images
    torch.testing.assert_close(images, normalised(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_8_bit_images_are_converted_by_pillow(tmp_path, mode):
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    alpha = Image.fromarray(rng.integers(0, 256, (8, 9, 4), dtype=np.uint8), "RGBA")
    image = (alpha if mode in ("RGBA", "LA") else alpha.convert("RGB")).convert(mode)
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    for i in range(2):
        image.save(tmp_path / "a" / f"{i}.{suffix}")
    with Image.open(tmp_path / "a" / f"0.{suffix}") as stored:
        pixels = np.asarray(stored.convert("RGB")).transpose(2, 0, 1) / 255
    images = load_image_folder(tmp_path, size=None).images
    torch.testing.assert_close(images[1], normalised(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), -0.25, np.float32), "its floats range from -0.25 to -0.25; expected 0"),
        (np.float32([[0, 255]]), "its floats range from 0 to 255; expected 0 to 1"),
        (np.float32([[0.5, np.nan]]), "its floats range from nan to nan; expected 0 to 1"),
        (np.int32([[0, 300]]), "its integers are signed or have more than 16 bits; expected 8 or"),
    ],
)
def test_values_outside_the_known_ranges_raise(tmp_path, values, message):
    for name in ("0.png", "1.png"):
        (tmp_path / "bee").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "bee" / name)
    Image.fromarray(values).save(tmp_path / "bee" / "2.tif")
    with pytest.raises(DataError, match=rf"bee/2\.tif can't be decoded: {message}"):
        load_image_folder(tmp_path, size=8)
    with pytest.warns(UserWarning, match=r"skipped, can't be decoded: .*bee/2\.tif$"):
        assert len(load_image_folder(tmp_path, size=8, skip_bad=True).images) == 2


def test_deep_images_work_with_a_presets_transform(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "snail").mkdir()
    transform, expected = ImageClassification(crop_size=8, resize_size=10), []
    for i in range(2):
        values = rng.integers(0, 65536, (20, 30), dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / "snail" / f"{i}.png")
        grey = torch.from_numpy(values / 65535).float()
        expected.append(transform(grey.expand(3, 20, 30)))
    images = load_validation(tmp_path, [113], transform).images
    torch.testing.assert_close(images, torch.stack(expected))
