"""Stimuli: the shipped images, a user's folder, and the data set of the shipped networks."""

import gzip
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

from repsim_kernels.experiments.errors import DataError
from repsim_kernels.experiments.inputs.folders import (
    IMAGE_SUFFIXES,
    ClassFiles,
    describe_skipped,
    escape_name,
    find_class_outputs,
    list_image_files,
)
from repsim_kernels.experiments.inputs.pixels import (
    Transform,
    decode_images,
    describe_size,
    read_image_sizes,
)

DEMO_FILE = Path(__file__).parents[1] / "assets" / "fashion_mnist_500.npz"
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MEAN, STD = 0.286, 0.353  # of Fashion-MNIST's training pixels, of 0 to 1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGENET_NORMALISATION = "ImageNet normalisation"


class Resizing(NamedTuple):
    """What a transform does to the size of an image file.

    Attributes
    ----------
    side : int
        The shorter side in pixels to which files are resized.
    kept : tuple of int, optional
        Height and width of the files that are not resized.
    """

    side: int
    kept: tuple[int, int] | None = None


@dataclass(frozen=True)
class Stimuli:
    """Images that a network is shown.

    Attributes
    ----------
    images : torch.Tensor, (n, 3, H, W), float32
        Normalised as the network expects.
    labels : torch.Tensor, (n,), int64
        The network's output for each image's class.
    classes : tuple of str
        Name by output.
    source : str
        What the images are, and what of their folder was skipped, in a line.
    normalisation : str
        What the pixels are normalised by, for people.
    enlarged : str
        How many of the files are enlarged to be shown; empty if none are.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    source: str
    normalisation: str = IMAGENET_NORMALISATION
    enlarged: str = ""


def load_demo() -> Stimuli:
    """The shipped stimuli: 50 test images of each of Fashion-MNIST's ten classes.

    Returns
    -------
    stimuli : Stimuli
        500 images of 3 x 32 x 32, sorted by class, that the shipped networks were not trained on.

    Notes
    -----
    Source: Xiao, Rasul & Vollgraf 2017; the first 50 of each class in the test set.
    """
    with np.load(DEMO_FILE, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    return Stimuli(
        prepare_fashion_mnist(torch.from_numpy(images)),
        torch.from_numpy(labels).long(),
        CLASSES,
        "Fashion-MNIST test set, the first 50 images of each of 10 classes",
        "Fashion-MNIST normalisation",
    )


def prepare_fashion_mnist(images: torch.Tensor) -> torch.Tensor:
    """Fashion-MNIST images, (n, 28, 28) of uint8, as the shipped networks take them.

    That is (n, 3, 32, 32) of float32: two pixels of black on each side, three equal channels,
    normalised by `MEAN` and `STD`.
    """
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    return padded.float().div_(255).sub_(MEAN).div_(STD).unsqueeze(1).repeat(1, 3, 1, 1)


def load_fashion_mnist(
    split: str, dataset: str | Path = FASHION_MNIST
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Fashion-MNIST as it is distributed.

    Parameters
    ----------
    split : {"train", "t10k"}
        60,000 training or 10,000 test images.
    dataset : path
        Directory of the gzipped idx files.

    Returns
    -------
    images : array, (n, 28, 28), uint8
    labels : array, (n,), uint8, 0 to 9

    Raises
    ------
    DataError
        If a file is missing or damaged.
    """
    images = _read_idx(Path(dataset) / f"{split}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(Path(dataset) / f"{split}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise DataError(f"dataset: {dataset} has {len(images)} images, {len(labels)} labels")
    return images, labels


def load_image_folder(
    path: str | Path,
    classes: Sequence[str] | None = None,
    size: int | None = 224,
    skip_bad: bool = False,
) -> Stimuli:
    """Images of a directory with a sub-directory for each class, for an ImageNet network.

    Parameters
    ----------
    path : path
        If all sub-directories are named by integers, these are the network's outputs; if more than
        half of them are, the others are refused. Otherwise the sub-directories, sorted by name, are
        outputs 0, 1, …: all the network's classes must be there, though only those of `classes`
        need images. Links to folders are followed; hidden files and folders, and those that other
        programs leave behind, are skipped.
    classes : sequence of str, optional
        Names of the sub-directories to take; all by default.
    size : int or None
        Height and width in pixels. The shorter side is resized to 256/224 of it, bilinearly,
        and the centre is cut out; files that have this size are taken as they are. RGB, normalised
        by ImageNet's mean and deviation. None leaves the images as they are, which must all be of
        one size.
    skip_bad : bool
        Whether to leave out, with a warning, what can't be decoded.

    Returns
    -------
    stimuli : Stimuli
        Sorted by output, then by file name.

    Raises
    ------
    DataError
        If the directory, a class or its images are missing, a class has fewer than two images,
        one can't be decoded, a link is broken, images differ in size where ``size`` is None, or
        a sub-directory is named neither as the others are nor in UTF-8, or beyond all outputs.
    """
    root = Path(path)
    if size is not None and size < 1:
        raise DataError(f"size: {size} is not a number of pixels; expected 1 or more")
    skipped = Counter[str]()
    outputs = find_class_outputs(root, skipped)
    chosen = list(outputs if classes is None else classes)
    if not chosen:
        raise DataError("classes: none are given; expected names of sub-directories, or None")
    if unknown := [name for name in chosen if name not in outputs]:
        raise DataError(f"classes: {unknown[0]!r} is unknown; expected a sub-directory of {root}")
    kept = sorted((outputs[name], name) for name in set(chosen))
    found = [ClassFiles(output, name, *list_image_files(root / name)) for output, name in kept]
    if size is None:
        cut, resizing = transforms.CenterCrop(_find_common_size(found)), None
    else:
        resizing = Resizing(round(size * 256 / 224), kept=(size, size))
        cut = _center_crop_to(size, resizing.side)
    transform = transforms.Compose(
        [cut, _to_tensor, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    names = {output: name for name, output in outputs.items()}
    known = tuple(names.get(output, str(output)) for output in range(max(names) + 1))
    return read_classes(root, found, known, transform, skipped, skip_bad, resizing)


def _center_crop_to(size: int, side: int) -> Callable[[Any], Any]:
    """Resize an image's shorter side and cut out the centre, unless it has the size already."""
    resized = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(size)])

    def cut(pixels: Image.Image | torch.Tensor) -> Any:
        exact = transforms.functional.get_dimensions(pixels)[1:] == [size, size]
        return pixels if exact else resized(pixels)

    return cut


def _to_tensor(pixels: Image.Image | torch.Tensor) -> torch.Tensor:
    if isinstance(pixels, torch.Tensor):
        return pixels
    tensor: torch.Tensor = transforms.functional.to_tensor(pixels)
    return tensor


def _find_common_size(found: Sequence[ClassFiles]) -> tuple[int, int]:
    """The height and width that all images share."""
    files = [file for one in found for file in one.files]
    first: dict[tuple[int, int], Path] = {}
    for file, size in zip(files, read_image_sizes(files), strict=True):
        if size is not None:  # what can't be read is named, or left out, when it is decoded
            first.setdefault(size, file)
    if len(first) > 1:
        (one, here), (other, there) = list(first.items())[:2]
        raise DataError(
            f"size: {here} has {one[0]} x {one[1]} pixels (height x width), {there} {other[0]} x "
            f"{other[1]}; expected images of one size, or --size"
        )
    return next(iter(first), (1, 1))


def read_classes(
    root: Path,
    found: Sequence[ClassFiles],
    classes: tuple[str, ...],
    transform: Transform,
    skipped: Counter[str],
    skip_bad: bool,
    resizing: Resizing | None,
) -> Stimuli:
    """The images of some classes in `root`, normalised as ImageNet's.

    Parameters
    ----------
    root : Path
    found : sequence of ClassFiles
    classes : tuple of str
        Name by output.
    transform : callable
        As in `decode_images`.
    skipped : Counter
        What was skipped outside the classes' folders, by reason.
    skip_bad : bool
        Whether to leave out, with a warning, what can't be decoded.
    resizing : Resizing, optional
        What the transform does to the size of a file; None where it leaves it, or isn't known.

    Raises
    ------
    DataError
        If a class has fewer than two images, or one can't be decoded.
    """

    def expect_two(count: int, one: ClassFiles, left: str = "") -> None:
        if count < 2:
            raise DataError(
                f"images: class {one.name!r} of {root} has {count} images{left}"
                f"{describe_skipped(one.skipped)}; expected 2 or more"
                f"{f' of {IMAGE_SUFFIXES}' if one.skipped else ''}"
            )

    for one in found:
        expect_two(len(one.files), one)
    files = [file for one in found for file in one.files]
    labels = torch.tensor([one.output for one in found for _ in one.files])
    images, good = decode_images(files, transform, skip_bad)
    if len(good) < len(files):
        labels = labels[good]
        for one in found:
            expect_two(int((labels == one.output).sum()), one, " that can be decoded")
        bad = ", ".join(str(files[i]) for i in sorted(set(range(len(files))) - set(good)))
        warnings.warn(f"left out, can't be decoded: {bad}", stacklevel=3)
    enlarged = "" if resizing is None else _count_enlarged([files[i] for i in good], resizing)
    whole = sum((one.skipped for one in found), skipped)
    source = f"{len(images)} images of {len(found)} classes in {root}{describe_skipped(whole)}"
    return Stimuli(images, labels, classes, escape_name(source), enlarged=enlarged)


def _count_enlarged(files: Sequence[Path], resizing: Resizing) -> str:
    """Say how many files are enlarged when they are resized."""
    sizes = [size for size in read_image_sizes(files) if size not in (None, resizing.kept)]
    small = [size for size in sizes if size is not None and min(size) < resizing.side]
    if not small:
        return ""
    return (
        f"{len(small)} of {len(files)} images are enlarged, to a shorter side of {resizing.side} "
        f"pixels; the smallest has {describe_size(min(small, key=min))}"
    )


def _read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """An array of an idx file: magic number, lengths (big-endian int32), then the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"dataset: there is no {path}; expected the Debian package dataset-fashion-mnist"
        ) from error
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"dataset: {path} can't be read: {error}") from error
    start = 4 + 4 * ndim
    if raw[:4] != bytes((0, 0, 8, ndim)) or len(raw) < start:
        raise DataError(f"dataset: {path} is no idx file of unsigned bytes in {ndim} dimensions")
    shape = np.frombuffer(raw, ">i4", ndim, 4)
    if len(raw) - start != np.prod(shape):
        raise DataError(f"dataset: {path} has {len(raw) - start} bytes; expected {np.prod(shape)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()  # writable, for torch
