"""Decoding of image files, and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from repsim_kernels.experiments.errors import DataError, one_line

Transform = Callable[[Any], torch.Tensor]

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF
DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # Pillow's errors


def decode_images(
    files: Sequence[Path], transform: Transform, skip_bad: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """Image files as a network takes them, decoded in threads.

    Parameters
    ----------
    files : sequence of Path
    transform : callable
        Takes what `read_pixels` gives, a PIL image or a tensor, and gives a tensor of one size
        for all, float32. It is called in several threads at once.
    skip_bad : bool
        Whether to leave out what can't be decoded.

    Returns
    -------
    images : torch.Tensor, (n, 3, H, W), float32
        In the order of the files.
    good : list of int
        Indices of the files that the images are of.

    Raises
    ------
    DataError
        If an image can't be decoded: the first of `files` that can't. The rest is left unread.
    """
    shape = transform(Image.new("RGB", (256, 256))).shape
    # A list, stacked, would take the memory twice.
    images = torch.empty(len(files), *shape, dtype=torch.float32)

    def read(i: int) -> Exception | None:
        try:
            with Image.open(files[i]) as image:
                pixels = transform(read_pixels(image))
        except DECODE_ERRORS as error:
            return error
        if pixels.shape != shape:
            raise DataError(
                f"transform: gives {tuple(pixels.shape)} for {files[i]}; expected {tuple(shape)}"
            )
        images[i] = pixels
        return None

    good: list[int] = []
    pool = ThreadPoolExecutor()  # Pillow frees the interpreter's lock while it decodes
    try:
        for i, error in enumerate(pool.map(read, range(len(files)))):
            if error is None:
                if len(good) < i:  # closes the gap that a bad file left
                    images[len(good)] = images[i]
                good.append(i)
            elif not skip_bad:
                reason = one_line(error)
                if files[i].is_symlink() and not files[i].exists():
                    reason = f"it is a broken link, to {files[i].readlink()}; {reason}"
                raise DataError(f"images: {files[i]} can't be decoded: {reason}") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return images[: len(good)], good


def read_pixels(image: Image.Image) -> Image.Image | torch.Tensor:
    """The pixels of an opened image, in three channels.

    Parameters
    ----------
    image : PIL.Image.Image

    Returns
    -------
    pixels : PIL.Image.Image or torch.Tensor, (3, H, W), float32
        An image of mode "RGB", as Pillow converts it, where a channel has 8 bits. Otherwise, which
        is grey images of 16 bits or of floats, a tensor of 0 to 1: Pillow's conversion would cut
        them at 255. Colour images of 16 bits a channel come from Pillow with 8.

    Raises
    ------
    ValueError
        If floats are outside 0 to 1, or integers have more than 16 bits or a sign.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image.convert("RGB")
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # or NaN
            raise ValueError(f"its floats go from {low:g} to {high:g}; expected 0 to 1")
        top = 1
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # whose integers have 16 bits
        raise ValueError(
            "its integers have a sign or more than 16 bits; expected 8 or 16 bits, or floats of "
            "0 to 1"
        )
    else:
        top = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    if tags.get(PHOTOMETRIC) == 0:  # 0 is white, which Pillow leaves as it is in these modes
        values = top - values
    grey = torch.from_numpy((values / top).astype(np.float32))
    return grey.repeat(3, 1, 1)


def read_image_sizes(files: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Height and width of image files from their headers, in pixels; None for unreadable ones."""

    def read(file: Path) -> tuple[int, int] | None:
        try:
            with Image.open(file) as image:
                return image.height, image.width
        except DECODE_ERRORS:
            return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, files))


def describe_size(size: Iterable[int]) -> str:
    """Say a height and a width, for example "24 x 32 (height x width)"."""
    height, width = size
    return f"{height} x {width}{'' if height == width else ' (height x width)'}"
