"""Load stimuli: the shipped images, a user's folder, or the shipped networks' data set."""

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
MEAN, STD = 0.286, 0.353  # of Fashion-MNIST's training pixels, scaled to [0, 1]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGENET_NORMALISATION = "ImageNet normalisation"


class Resizing(NamedTuple):
    """How a transform resizes image files.

    Attributes
    ----------
    side : int
        Length in pixels to which the shorter side is resized.
    exact_size : tuple of int, optional
        Height and width of files that are not resized.
    """

    side: int
    exact_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Stimuli:
    """Images for a network, with their labels and provenance.

    Attributes
    ----------
    images : torch.Tensor, (n, 3, H, W), float32
        Normalised for the network.
    labels : torch.Tensor, (n,), int64
        Index of the network's output for each image's class.
    classes : tuple of str
        Class names, indexed by output.
    source : str
        One line: what the images are, and what was skipped in their folder.
    normalisation : str
        Description of the normalisation.
    enlarged : str
        How many of the files were enlarged; empty if none were.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    source: str
    normalisation: str = IMAGENET_NORMALISATION
    enlarged: str = ""


def load_demo() -> Stimuli:
    """Load the shipped stimuli: 50 test images of each of Fashion-MNIST's ten classes.

    Returns
    -------
    stimuli : Stimuli
        500 images of 3 x 32 x 32, sorted by class. The shipped networks were not trained on them.

    Notes
    -----
    Source: Xiao, Rasul & Vollgraf 2017; the first 50 of each class in the test set.

    Examples
    --------
    >>> from repsim_kernels.experiments.inputs.images import load_demo
    >>> stimuli = load_demo()
    >>> tuple(stimuli.images.shape), stimuli.classes[9]
    ((500, 3, 32, 32), 'Ankle boot')
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
    """Convert Fashion-MNIST images, (n, 28, 28) uint8, to the shipped networks' input.

    The input is (n, 3, 32, 32) float32: padded by two black pixels on each side, three equal
    channels, normalised by `MEAN` and `STD`.
    """
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    return padded.float().div_(255).sub_(MEAN).div_(STD).unsqueeze(1).repeat(1, 3, 1, 1)


def load_fashion_mnist(
    split: str, dataset: str | Path = FASHION_MNIST
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Load Fashion-MNIST from its distributed files.

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
    """Load a directory with one sub-directory per class, for an ImageNet network.

    Parameters
    ----------
    path : path
        If all sub-directories are named by integers, these are the indices of the network's
        outputs; if more than half are, the others are an error. Otherwise the sub-directories,
        sorted by name, are outputs 0, 1, …: then all of the network's classes must have one, but
        only those in ``classes`` need images. Links to folders are followed. Hidden files and
        folders, and those that other programs leave behind, are skipped.
    classes : sequence of str, optional
        Names of the sub-directories to load; all by default.
    size : int or None
        Height and width in pixels. The shorter side is resized to 256/224 of it, bilinearly, and
        the centre is cropped; files that have this size already are not resized. None resizes
        nothing; the images must then have one size. Either way they become RGB and are normalised
        by ImageNet's mean and standard deviation.
    skip_bad : bool
        Whether to skip, with a warning, files that can't be decoded.

    Returns
    -------
    stimuli : Stimuli
        Sorted by output, then by file name.

    Raises
    ------
    DataError
        If the directory, a class or its images are missing; a class has fewer than two images;
        a file can't be decoded; a link is broken; images differ in size and ``size`` is None; or
        the sub-directories' names are not UTF-8, or neither all numbers nor all names.
    """
    root = Path(path)
    if size is not None and size < 1:
        raise DataError(f"size: {size} is not a number of pixels; expected 1 or more")
    skipped = Counter[str]()
    outputs = find_class_outputs(root, skipped)
    chosen = list(outputs if classes is None else classes)
    if not chosen:
        raise DataError("classes: empty; expected names of sub-directories, or None")
    if unknown := [name for name in chosen if name not in outputs]:
        raise DataError(f"classes: {unknown[0]!r} is unknown; expected a sub-directory of {root}")
    pairs = sorted((outputs[name], name) for name in set(chosen))
    classes_files = [ClassFiles(o, name, *list_image_files(root / name)) for o, name in pairs]
    if size is None:
        crop, resizing = transforms.CenterCrop(_find_common_size(classes_files)), None
    else:
        resizing = Resizing(round(size * 256 / 224), exact_size=(size, size))
        crop = _center_crop_to(size, resizing.side)
    transform = _normalise_after(crop)
    names = {output: name for name, output in outputs.items()}
    known = tuple(names.get(output, str(output)) for output in range(max(names) + 1))
    return read_classes(root, classes_files, known, transform, skipped, skip_bad, resizing)


def load_images(folder: str | Path, size: int) -> torch.Tensor:
    """Load all images in a folder and its sub-folders, for an ImageNet network.

    Parameters
    ----------
    folder : path
    size : int
        Height and width in pixels, as in `load_image_folder`.

    Returns
    -------
    images : tensor, (n, 3, size, size), float32
        Sorted by path.

    Raises
    ------
    DataError
        If the folder is missing or has no images, or a file can't be decoded.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"images: {root} is not a folder; expected one with images")
    if size < 1:
        raise DataError(f"size: {size} is not a number of pixels; expected 1 or more")
    files, skipped = list_image_files(root)
    if not files:
        raise DataError(f"images: none in {root}{describe_skipped(skipped)}; expected image files")
    transform = _normalise_after(_center_crop_to(size, round(size * 256 / 224)))
    return decode_images(files, transform)[0]


def _normalise_after(crop: Callable[[Any], Any]) -> Callable[[Any], torch.Tensor]:
    normalise = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return transforms.Compose([crop, _to_tensor, normalise])


def _center_crop_to(size: int, side: int) -> Callable[[Any], Any]:
    """Make a transform that resizes the shorter side to `side` and crops the centre, if needed."""
    resized = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(size)])

    def crop(pixels: Image.Image | torch.Tensor) -> Any:
        exact = transforms.functional.get_dimensions(pixels)[1:] == [size, size]
        return pixels if exact else resized(pixels)

    return crop


def _to_tensor(pixels: Image.Image | torch.Tensor) -> torch.Tensor:
    if isinstance(pixels, torch.Tensor):
        return pixels
    tensor: torch.Tensor = transforms.functional.to_tensor(pixels)
    return tensor


def _find_common_size(classes: Sequence[ClassFiles]) -> tuple[int, int]:
    """Find the height and width that all images share, or raise DataError."""
    files = [file for one in classes for file in one.files]
    first: dict[tuple[int, int], Path] = {}
    for file, size in zip(files, read_image_sizes(files), strict=True):
        if size is not None:  # decoding reports or skips unreadable files
            first.setdefault(size, file)
    if len(first) > 1:
        (size, file), (other_size, other_file) = list(first.items())[:2]
        raise DataError(
            f"size: {file} has {size[0]} x {size[1]} pixels (height x width), {other_file} "
            f"{other_size[0]} x {other_size[1]}; expected images of one size, or --size"
        )
    return next(iter(first), (1, 1))


def read_classes(
    root: Path,
    files_by_class: Sequence[ClassFiles],
    names: tuple[str, ...],
    transform: Transform,
    skipped: Counter[str],
    skip_bad: bool,
    resizing: Resizing | None,
) -> Stimuli:
    """Decode the images of some classes in `root`; the transform normalises them as ImageNet's.

    Parameters
    ----------
    root : Path
        The folder that messages name.
    files_by_class : sequence of ClassFiles
    names : tuple of str
        Class names, indexed by output.
    transform : callable
        As in `decode_images`.
    skipped : Counter
        Number of entries skipped outside the classes' folders, by reason.
    skip_bad : bool
        Whether to skip, with a warning, files that can't be decoded.
    resizing : Resizing, optional
        How the transform resizes files; None if it doesn't, or if that isn't known.

    Raises
    ------
    DataError
        If a class has fewer than two images, or a file can't be decoded.
    """

    def expect_two(count: int, one: ClassFiles, which: str = "") -> None:
        if count < 2:
            raise DataError(
                f"images: class {one.name!r} of {root} has {count} images{which}"
                f"{describe_skipped(one.skipped)}; expected 2 or more"
                f"{f' of {IMAGE_SUFFIXES}' if one.skipped else ''}"
            )

    for one in files_by_class:
        expect_two(len(one.files), one)
    files = [file for one in files_by_class for file in one.files]
    labels = torch.tensor([one.output for one in files_by_class for _ in one.files])
    images, good = decode_images(files, transform, skip_bad)
    if len(good) < len(files):
        labels = labels[good]
        for one in files_by_class:
            expect_two(int((labels == one.output).sum()), one, " that can be decoded")
        bad = ", ".join(str(files[i]) for i in sorted(set(range(len(files))) - set(good)))
        warnings.warn(f"skipped, can't be decoded: {bad}", stacklevel=3)
    enlarged = "" if resizing is None else _count_enlarged([files[i] for i in good], resizing)
    all_skipped = sum((one.skipped for one in files_by_class), skipped)
    source = f"{len(images)} images of {len(files_by_class)} classes in {root}"
    source += describe_skipped(all_skipped)
    return Stimuli(images, labels, names, escape_name(source), enlarged=enlarged)


def _count_enlarged(files: Sequence[Path], resizing: Resizing) -> str:
    """Describe how many files are enlarged by resizing; "" if none are."""
    sizes = [size for size in read_image_sizes(files) if size not in (None, resizing.exact_size)]
    small = [size for size in sizes if size is not None and min(size) < resizing.side]
    if not small:
        return ""
    return (
        f"{len(small)} of {len(files)} images are enlarged, to a shorter side of {resizing.side} "
        f"pixels; the smallest has {describe_size(min(small, key=min))}"
    )


def _read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """Read an idx file: a magic number, the lengths (big-endian int32), then the bytes."""
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
        raise DataError(f"dataset: {path} is not an idx file of {ndim}-dimensional unsigned bytes")
    shape = np.frombuffer(raw, ">i4", ndim, 4)
    if len(raw) - start != np.prod(shape):
        raise DataError(f"dataset: {path} has {len(raw) - start} bytes; expected {np.prod(shape)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()  # torch: writable
