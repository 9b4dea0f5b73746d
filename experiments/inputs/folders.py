"""Which files of a folder are images, and which files and folders are skipped."""

from __future__ import annotations

import os
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from repsim_kernels.experiments.errors import DataError

IMAGE_SUFFIXES = ", ".join(IMG_EXTENSIONS)
# Folders and files that operating systems, storage boxes and archivers leave among the images. A
# name with a leading dot is skipped as well: .ipynb_checkpoints, .DS_Store, macOS's ._0.png.
SYSTEM_ENTRIES = frozenset(
    {
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "@eadir",
        "@recycle",
        "__macosx",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)
_MAX_REASONS = 8  # at most, in a line
_MAX_OUTPUTS = 10**6  # of a network, at most: more than any has, and each gets a name


class ClassFiles(NamedTuple):
    """The image files of one class.

    Attributes
    ----------
    output : int
        The network's output for the class.
    name : str
    files : list of Path
    skipped : Counter
        How many files and folders of the class were skipped, by reason.
    """

    output: int
    name: str
    files: list[Path]
    skipped: Counter[str]


def is_image(path: Path) -> bool:
    """Whether a file's suffix is one of an image format that is read."""
    return path.suffix.lower() in IMG_EXTENSIONS


def escape_name(name: str) -> str:
    """Write the bytes of a file's name that are not UTF-8 as escapes, as in "caf\\xe9"."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def list_folder(folder: Path, skipped: Counter[str]) -> tuple[list[Path], list[Path]]:
    """List the folders and the files directly in a folder, sorted by name.

    Each hidden entry, and each that another program left behind, is added to ``skipped`` by reason.
    Links count as what they point to; a broken link that has an image's suffix is among the files,
    where decoding reports it.

    Raises
    ------
    DataError
        If another link is broken.
    OSError
        If the folder can't be listed.
    """
    folders, files = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            skipped["hidden"] += 1
        elif path.name.lower() in SYSTEM_ENTRIES:
            skipped[path.name] += 1
        elif path.is_dir():
            folders.append(path)
        elif path.is_file() or (path.is_symlink() and is_image(path)):
            files.append(path)
        elif path.is_symlink():
            raise DataError(
                f"images: {path} is a link to {os.readlink(path)}, which is missing; "
                "expected a file or a folder there, or no link"
            )
        else:
            skipped["not regular files"] += 1
    return folders, files


def find_class_outputs(root: Path, skipped: Counter[str]) -> dict[str, int]:
    """Find the network's output for each class's sub-directory, by its name.

    It is the number that is the name, or the position among the sorted names. What is left out is
    added to ``skipped`` by reason.

    Raises
    ------
    DataError
        If there are no sub-directories, one is not named in UTF-8, or most are named by outputs and
        one by something else, by an output that another one has, or by a number beyond all outputs.
    """
    if not root.is_dir():
        raise DataError(f"images: there is no directory {root}")
    folders, files = list_folder(root, skipped)
    if outside := sum(map(is_image, files)):
        skipped["outside the classes' folders"] += outside
    names = [folder.name for folder in folders]
    if not names:
        raise DataError(f"images: {root} has no sub-directories; expected one for each class")
    if garbled := [name for name in names if name != escape_name(name)]:
        where = escape_name(str(root / garbled[0]))
        raise DataError(f"images: the name of {where} is not UTF-8; expected one that is")
    strays = [name for name in names if not (name.isascii() and name.isdigit())]
    if 2 * len(strays) >= len(names):
        return {name: output for output, name in enumerate(names)}
    if strays:
        raise DataError(
            f"images: {root} has {len(names) - len(strays)} folders named by outputs, and "
            f"{strays[0]!r}; expected outputs alone: move it away"
        )
    numbers = {name: int(name) for name in names}
    if len(set(numbers.values())) < len(names):
        raise DataError(f"images: {root} names an output twice, as in 7 and 07")
    largest = max(names, key=int)
    if numbers[largest] >= _MAX_OUTPUTS:
        raise DataError(
            f"images: {root / largest} is named by a number beyond the outputs of any network; "
            "expected the network's outputs, 0, 1, …"
        )
    return numbers


def list_image_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """List the image files in a folder and below it, by path, and count by reason what is skipped.

    Links to folders are followed, but not to one above. A folder that can be reached twice is read
    once, by its own path rather than by a link to it.

    Raises
    ------
    DataError
        If a link other than to an image is broken.
    OSError
        If a folder can't be listed.
    """
    here, above = folder.resolve(), folder.absolute().parent.resolve()
    read = {*here.parents, above, *above.parents}
    images, skipped = list[Path](), Counter[str]()
    todo = deque([folder])
    while todo:
        current = todo.pop()
        if (real := current.resolve()) in read:
            skipped["links to folders read already"] += 1
            continue
        read.add(real)
        folders, files = list_folder(current, skipped)
        for file in files:
            if is_image(file):
                images.append(file)
            else:
                skipped[f"*{file.suffix.lower()}" if file.suffix else "without a suffix"] += 1
        # Links wait until all other folders are read.
        todo.extend(path for path in folders if not path.is_symlink())
        todo.extendleft(path for path in folders if path.is_symlink())
    return sorted(images), skipped


def describe_skipped(skipped: Counter[str]) -> str:
    """Say what was skipped, for example " (skipped: 3 hidden, 1 *.gif)"; "" for nothing."""
    if not skipped:
        return ""
    counts = [f"{count:,} {reason}" for reason, count in skipped.most_common()]
    if len(counts) > _MAX_REASONS:
        rest = skipped.total() - sum(count for _, count in skipped.most_common(_MAX_REASONS - 1))
        counts = [*counts[: _MAX_REASONS - 1], f"{rest:,} others"]
    return f" (skipped: {', '.join(counts)})"
