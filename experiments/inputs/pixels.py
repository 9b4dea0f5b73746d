"""Decode image files, and read their sizes."""

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

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # raised by Pillow


def decode_images(
    files: Sequence[Path], transform: Transform, skip_bad: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """Decode image files in threads and transform them for a network.

    Parameters
    ----------
    files : sequence of Path
    transform : callable
        Maps the result of `read_pixels`, a PIL image or a tensor, to a float32 tensor of a fixed
        shape. It is called from several threads at once.
    skip_bad : bool
        Whether to skip files that can't be decoded.

    Returns
    -------
    images : torch.Tensor, (n, 3, H, W), float32
        In the order of the files.
    good : list of int
        Indices of the files that were decoded.

    Raises
    ------
    DataError
        If an image can't be decoded; names the first such file. The rest are not read.
    """
    shape = transform(Image.new("RGB", (256, 256))).shape
    # Stacking a list would need twice the memory.
    images = torch.empty(len(files), *shape, dtype=torch.float32)

    def read(i: int) -> Exception | None:
        try:
            with Image.open(files[i]) as image:
                pixels = transform(read_pixels(image))
        except DECODE_ERRORS as error:
            return error
        if pixels.shape != shape:
            raise DataError(
                f"transform: returns {tuple(pixels.shape)} for {files[i]}; expected {tuple(shape)}"
            )
        images[i] = pixels
        return None

    good: list[int] = []
    pool = ThreadPoolExecutor()  # Pillow releases the GIL while it decodes
    try:
        for i, error in enumerate(pool.map(read, range(len(files)))):
            if error is None:
                if len(good) < i:  # close the gap of an earlier bad file
                    images[len(good)] = images[i]
                good.append(i)
            elif not skip_bad:
                reason = one_line(error)
                if files[i].is_symlink() and not files[i].exists():
                    reason = f"it is a broken link to {files[i].readlink()}; {reason}"
                raise DataError(f"images: {files[i]} can't be decoded: {reason}") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return images[: len(good)], good


def read_pixels(image: Image.Image) -> Image.Image | torch.Tensor:
    """Read the pixels of an opened image as three channels.

    Parameters
    ----------
    image : PIL.Image.Image

    Returns
    -------
    pixels : PIL.Image.Image or torch.Tensor, (3, H, W), float32
        An "RGB" image, converted by Pillow, if a channel has 8 bits. Grey images with 16 bits or
        floats become a tensor with values from 0 to 1, because Pillow's conversion would clip them
        at 255. Pillow itself reads colour images with 16 bits per channel as 8 bits.

    Raises
    ------
    ValueError
        If floats are outside [0, 1], or integers are signed or have more than 16 bits.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image.convert("RGB")
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # or NaN
            raise ValueError(f"its floats range from {low:g} to {high:g}; expected 0 to 1")
        top = 1
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two have 16 bits
        raise ValueError(
            "its integers are signed or have more than 16 bits; expected 8 or 16 bits, or floats "
            "from 0 to 1"
        )
    else:
        top = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    if tags.get(PHOTOMETRIC) == 0:  # 0 is white, and Pillow doesn't invert these modes
        values = top - values
    grey = torch.from_numpy((values / top).astype(np.float32))
    return grey.repeat(3, 1, 1)


def read_image_sizes(files: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Read the height and width of image files from their headers; None for unreadable files."""

    def read(file: Path) -> tuple[int, int] | None:
        try:
            with Image.open(file) as image:
                return image.height, image.width
        except DECODE_ERRORS:
            return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, files))


def describe_size(size: Iterable[int]) -> str:
    """Format a height and width, as in "24 x 32 (height x width)"; only "24 x 24" if equal."""
    height, width = size
    return f"{height} x {width}{'' if height == width else ' (height x width)'}"
