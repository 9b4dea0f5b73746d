"""Find the image files in folders, and count the files and folders that are skipped."""

from __future__ import annotations

import os
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from repsim_kernels.experiments.errors import DataError

IMAGE_SUFFIXES = ", ".join(IMG_EXTENSIONS)
# Names, in lower case, that operating systems, NAS boxes and archivers leave among images. Names
# with a leading dot are skipped too: .ipynb_checkpoints, .DS_Store, macOS's ._0.png.
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
_MAX_REASONS = 8  # reasons listed in a line
_MAX_OUTPUTS = 10**6  # more outputs than any network has; every output gets a name


class ClassFiles(NamedTuple):
    """The image files of one class.

    Attributes
    ----------
    output : int
        Index of the network's output for the class.
    name : str
    files : list of Path
    skipped : Counter
        Number of skipped files and folders of the class, by reason.
    """

    output: int
    name: str
    files: list[Path]
    skipped: Counter[str]


def is_image(path: Path) -> bool:
    """Whether a file's suffix belongs to an image format that is read."""
    return path.suffix.lower() in IMG_EXTENSIONS


def escape_name(name: str) -> str:
    """Escape the bytes of a file name that are not UTF-8, as in "caf\\xe9"."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def list_folder(folder: Path, skipped: Counter[str]) -> tuple[list[Path], list[Path]]:
    """List the folders and the files directly in a folder, sorted by name.

    Hidden entries and `SYSTEM_ENTRIES` are counted in ``skipped``, by reason. Links count as what
    they point to. A broken link with an image's suffix is listed as a file; decoding reports it.

    Raises
    ------
    DataError
        If any other link is broken.
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
                "expected a link to a file or folder"
            )
        else:
            skipped["not regular files"] += 1
    return folders, files


def find_class_outputs(root: Path, skipped: Counter[str]) -> dict[str, int]:
    """Map the name of each class's sub-directory to the index of the network's output.

    If the names are numbers, they are the indices; otherwise the index is the position among the
    sorted names. Skipped entries are counted in ``skipped``, by reason.

    Raises
    ------
    DataError
        If there are no sub-directories or a name is not UTF-8; or if most names are numbers and
        one is not, two are equal, or one is larger than any network's number of outputs.
    """
    if not root.is_dir():
        raise DataError(
            f"images: there is no folder {root}; expected one with a sub-folder for each class"
        )
    folders, files = list_folder(root, skipped)
    if n_outside := sum(map(is_image, files)):
        skipped["outside the classes' folders"] += n_outside
    names = [folder.name for folder in folders]
    if not names:
        raise DataError(f"images: {root} has no sub-directories; expected one for each class")
    if garbled := [name for name in names if name != escape_name(name)]:
        where = escape_name(str(root / garbled[0]))
        raise DataError(f"images: the name of {where} is not UTF-8; rename it")
    strays = [name for name in names if not (name.isascii() and name.isdigit())]
    if 2 * len(strays) >= len(names):
        return {name: output for output, name in enumerate(names)}
    if strays:
        raise DataError(
            f"images: {root} has {len(names) - len(strays)} folders named by output numbers, and "
            f"{strays[0]!r}; expected only numbers, so move it away"
        )
    numbers = {name: int(name) for name in names}
    if len(set(numbers.values())) < len(names):
        raise DataError(
            f"images: {root} names an output twice, as in 7 and 07; expected each output once"
        )
    largest = max(names, key=int)
    if numbers[largest] >= _MAX_OUTPUTS:
        raise DataError(
            f"images: {root / largest}: the number is too large for a network's output; "
            "expected output numbers, 0, 1, …"
        )
    return numbers


def list_image_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """List the image files in a folder and its subfolders, sorted; count the skipped, by reason.

    Links to folders are followed, except to a parent folder. A folder that can be reached twice is
    read once, by its own path rather than through a link.

    Raises
    ------
    DataError
        If a link is broken, unless it has an image's suffix.
    OSError
        If a folder can't be listed.
    """
    here, above = folder.resolve(), folder.absolute().parent.resolve()
    visited = {*here.parents, above, *above.parents}
    images, skipped = list[Path](), Counter[str]()
    pending = deque([folder])
    while pending:
        current = pending.pop()
        if (real := current.resolve()) in visited:
            skipped["links to folders read already"] += 1
            continue
        visited.add(real)
        folders, files = list_folder(current, skipped)
        for file in files:
            if is_image(file):
                images.append(file)
            else:
                skipped[f"*{file.suffix.lower()}" if file.suffix else "without a suffix"] += 1
        # Links are followed after all other folders.
        pending.extend(path for path in folders if not path.is_symlink())
        pending.extendleft(path for path in folders if path.is_symlink())
    return sorted(images), skipped


def describe_skipped(skipped: Counter[str]) -> str:
    """Describe what was skipped, as in " (skipped: 3 hidden, 1 *.gif)"; "" if nothing was."""
    if not skipped:
        return ""
    counts = [f"{count:,} {reason}" for reason, count in skipped.most_common()]
    if len(counts) > _MAX_REASONS:
        rest = skipped.total() - sum(count for _, count in skipped.most_common(_MAX_REASONS - 1))
        counts = [*counts[: _MAX_REASONS - 1], f"{rest:,} others"]
    return f" (skipped: {', '.join(counts)})"
