"""Stimuli: the shipped images, a user's folder, and the data set of the shipped networks."""

import gzip
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

DEMO_FILE = Path(__file__).parent / "assets" / "fashion_mnist_500.npz"
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

Transform = Callable[[Image.Image], torch.Tensor]


class DataError(ValueError):
    """Images that can't be had; the message is one line."""


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
        What the images are, in a line.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    source: str


def demo() -> Stimuli:
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
        prepare(torch.from_numpy(images)),
        torch.from_numpy(labels).long(),
        CLASSES,
        "Fashion-MNIST test set, the first 50 images of each of 10 classes",
    )


def prepare(images: torch.Tensor) -> torch.Tensor:
    """Fashion-MNIST images as the shipped networks take them.

    Parameters
    ----------
    images : torch.Tensor, (n, 28, 28), uint8

    Returns
    -------
    images : torch.Tensor, (n, 3, 32, 32), float32
        Two pixels of black on each side, three equal channels, normalised by `MEAN` and `STD`.
    """
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    return padded.float().div_(255).sub_(MEAN).div_(STD).unsqueeze(1).repeat(1, 3, 1, 1)


def fashion_mnist(
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
    images = _idx(Path(dataset) / f"{split}-images-idx3-ubyte.gz", 3)
    labels = _idx(Path(dataset) / f"{split}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise DataError(f"dataset: {dataset} has {len(images)} images, {len(labels)} labels")
    return images, labels


def write_demo(dataset: str | Path = FASHION_MNIST, out: str | Path = DEMO_FILE) -> None:
    """Make the file that `demo` reads: the first 50 test images of each class.

    Parameters
    ----------
    dataset : path
        Directory of Fashion-MNIST's gzipped idx files.
    out : path
        The .npz to write.

    Raises
    ------
    DataError
        If a file of the data set is missing or damaged.
    """
    images, labels = fashion_mnist("t10k", dataset)
    index = np.concatenate([np.flatnonzero(labels == c)[:50] for c in range(len(CLASSES))])
    np.savez_compressed(
        out, images=images[index], labels=labels[index], index=index.astype(np.int16)
    )


def image_folder(
    path: str | Path,
    classes: Sequence[str] | None = None,
    size: int = 224,
    skip_bad: bool = False,
) -> Stimuli:
    """Images of a directory with a sub-directory for each class, for an ImageNet network.

    Parameters
    ----------
    path : path
        If all sub-directories are named by integers, these are the network's outputs. Otherwise
        the sub-directories, sorted by name, are outputs 0, 1, …: all the network's classes are
        to be there, though only those of `classes` need images.
    classes : sequence of str, optional
        Names of the sub-directories to take; all by default.
    size : int
        Height and width in pixels. The shorter side is resized to 256/224 of it, bilinearly,
        and the centre is cut out; RGB, normalised by ImageNet's mean and deviation.
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
        or one can't be decoded.
    """
    root = Path(path)
    if size < 1:
        raise DataError(f"size: {size} is not a number of pixels; expected 1 or more")
    outputs = _outputs(root)
    chosen = list(outputs if classes is None else classes)
    if not chosen:
        raise DataError("classes: none are given; expected names of sub-directories, or None")
    if unknown := [name for name in chosen if name not in outputs]:
        raise DataError(f"classes: {unknown[0]!r} is unknown; expected a sub-directory of {root}")
    kept = sorted((outputs[name], name) for name in set(chosen))
    transform = transforms.Compose(
        [
            transforms.Resize(round(size * 256 / 224)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    found = [(output, name, image_files(root / name)) for output, name in kept]
    images, labels = read_classes(root, found, transform, skip_bad)
    names = {output: name for name, output in outputs.items()}
    return Stimuli(
        images,
        labels,
        tuple(names.get(output, str(output)) for output in range(max(names) + 1)),
        f"{len(images)} images of {len(kept)} classes in {root}",
    )


def image_files(directory: Path) -> list[Path]:
    """The image files in a directory and below it, sorted; told by their suffixes.

    Parameters
    ----------
    directory : Path

    Returns
    -------
    files : list of Path
    """
    files = sorted(directory.rglob("*"))
    return [file for file in files if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()]


def read_classes(
    root: Path,
    found: Sequence[tuple[int, str, Sequence[Path]]],
    transform: Transform,
    skip_bad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of some classes and their labels.

    Parameters
    ----------
    root : Path
        Where they are, for messages.
    found : sequence of (int, str, sequence of Path)
        Of each class the network's output, the name and the files.
    transform : callable
        As in `decode`.
    skip_bad : bool
        Whether to leave out, with a warning, what can't be decoded.

    Returns
    -------
    images : torch.Tensor, (n, 3, H, W), float32
    labels : torch.Tensor, (n,), int64

    Raises
    ------
    DataError
        If a class has fewer than two images, or one can't be decoded.
    """

    def expect_two(count: int, name: str, left: str = "") -> None:
        if count < 2:
            raise DataError(
                f"images: class {name!r} of {root} has {count} images{left}; expected 2 or more"
            )

    for _, name, files in found:
        expect_two(len(files), name)
    files = [file for _, _, files in found for file in files]
    labels = torch.tensor([output for output, _, files in found for _ in files])
    images, good = decode(files, transform, skip_bad)
    if len(good) < len(files):
        labels = labels[good]
        for output, name, _ in found:
            expect_two(int((labels == output).sum()), name, " that can be decoded")
        bad = ", ".join(str(files[i]) for i in sorted(set(range(len(files))) - set(good)))
        warnings.warn(f"left out, can't be decoded: {bad}", stacklevel=3)
    return images, labels


def decode(
    files: Sequence[Path], transform: Transform, skip_bad: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """Image files as a network takes them, decoded in threads.

    Parameters
    ----------
    files : sequence of Path
    transform : callable
        Takes a PIL image, RGB, and gives a tensor of one size for all, float32. It is called in
        several threads at once.
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
                pixels = transform(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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
                reason = " ".join(str(error).split())
                raise DataError(f"images: {files[i]} can't be decoded: {reason}") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return images[: len(good)], good


def _outputs(root: Path) -> dict[str, int]:
    """The network's output for each sub-directory."""
    if not root.is_dir():
        raise DataError(f"images: there is no directory {root}")
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"images: {root} has no sub-directories; expected one for each class")
    if not all(name.isascii() and name.isdigit() for name in names):
        return {name: output for output, name in enumerate(names)}
    if len({int(name) for name in names}) < len(names):
        raise DataError(f"images: {root} names an output twice, as in 7 and 07")
    return {name: int(name) for name in names}


def _idx(path: Path, ndim: int) -> NDArray[np.uint8]:
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
