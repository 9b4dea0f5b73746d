"""ImageNet: its 1,000 classes, validation images in the forms they come in, and random images."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from scipy.io import loadmat  # type: ignore[import-untyped]
from torchvision.models import AlexNet_Weights

from repsim_kernels.experiments.errors import DataError, one_line
from repsim_kernels.experiments.inputs.folders import (
    ClassFiles,
    image_files,
    is_image,
    list_folder,
)
from repsim_kernels.experiments.inputs.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Resizing,
    Stimuli,
    read_classes,
)
from repsim_kernels.experiments.inputs.pixels import Transform

WNIDS_FILE = Path(__file__).parents[1] / "assets" / "imagenet_wnids.txt"
LABELS_FILES = ("val.txt", "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt")
_FLAT_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.(?i:jpe?g)")
_LISTED = re.compile(r"(?:.*/)?(ILSVRC2012_val_\d{8})\.(?i:jpe?g)\s+(\S+)")
_SOLUTION = re.compile(r"(ILSVRC2012_val_\d{8}),(\S+)(?:\s.*)?")
_NOISE_GRID = 8  # cells a side: coarse enough to outlast the pooling of the first layers


@cache
def wnids() -> tuple[str, ...]:
    """WordNet id by output: 1,000, sorted, as the outputs of networks trained on ILSVRC2012 are."""
    return tuple(WNIDS_FILE.read_text(encoding="ascii").split())


@cache
def categories() -> tuple[str, ...]:
    """Class name by output: torchvision's, with the wnid behind those that differ in case only."""
    names: list[str] = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    count = Counter(_key(name) for name in names)
    return tuple(
        name if count[_key(name)] == 1 else f"{name} {wnid}"
        for name, wnid in zip(names, wnids(), strict=True)
    )


def outputs(names: Iterable[str | int]) -> list[int]:
    """The networks' outputs for some classes, in the order of the names.

    These are class names, in any case and with spaces or underscores; wnids; or outputs.

    Raises
    ------
    DataError
        If a name is unknown or ambiguous, or two are of one class.
    """
    found: dict[int, str | int] = {}
    for name in names:
        output = _output(str(name))
        if output in found:
            raise DataError(
                f"classes: {found[output]!r} and {name!r} are one class; expected each once"
            )
        found[output] = name
    return list(found)


def validation(
    path: str | Path,
    classes: Sequence[int],
    transform: Transform,
    *,
    images_per_class: int | None = None,
    labels: str | Path | None = None,
    skip_bad: bool = False,
) -> Stimuli:
    """Images of some of ImageNet's classes, of its validation set as a rule.

    Parameters
    ----------
    path : path
        Either a directory with a sub-directory for each class, named by wnid, class name or
        output; those of other classes may be missing and are not read. Or ILSVRC2012's flat
        directory of ILSVRC2012_val_00000001.JPEG and so on. What is skipped is as for
        `image_folder`.
    classes : sequence of int
        Outputs, as `outputs` gives them.
    transform : callable
        What the network wants done: `weights.transforms()` of torchvision.
    images_per_class : int, optional
        At most this many images of each class are taken, the first by file name; all by default.
    labels : path, optional
        The flat directory's classes, in one of three forms. Caffe's val.txt: lines of file name
        and output. Kaggle's LOC_val_solution.csv. The development kit's
        ILSVRC2012_validation_ground_truth.txt: one ILSVRC2012_ID a line, by file number, with
        meta.mat beside it. By default a file of one of these names, in the directory or beside
        it.
    skip_bad : bool
        Whether to leave out, with a warning, what can't be decoded.

    Returns
    -------
    stimuli : Stimuli
        Sorted by output, then by file name; all 1,000 class names.

    Raises
    ------
    DataError
        If the directory, a class or the labels are missing, the labels are damaged, a class has
        fewer than two images, one can't be decoded, or a link is broken.

    Notes
    -----
    Sources: the readme of ILSVRC2012's development kit (ILSVRC2012_IDs are not in the order of
    wnids); torchvision.datasets.ImageNet (the structure of meta.mat).
    """
    root = Path(path)
    chosen = _chosen(classes, images_per_class)
    if not root.is_dir():
        raise DataError(f"images: there is no directory {root}")
    skipped = Counter[str]()
    folders, plain = list_folder(root, skipped)
    flat = [file for file in plain if _FLAT_NAME.fullmatch(file.name)]
    if others := sum(map(is_image, plain)) - len(flat):
        skipped["of another name" if flat else "outside the classes' folders"] += others
    if flat:
        files = _files_by_label(root, flat, None if labels is None else Path(labels))
        found = [
            ClassFiles(o, categories()[o], files[o][:images_per_class], Counter()) for o in chosen
        ]
    elif labels is not None:
        raise DataError(
            f"labels: {labels} is of no use, {root} has no ILSVRC2012_val_00000001.JPEG and so on"
        )
    else:
        found = []
        for output, folder in zip(chosen, _folders_of(root, folders, chosen), strict=True):
            read, own = image_files(folder)
            found.append(ClassFiles(output, categories()[output], read[:images_per_class], own))
    # torchvision's transforms know the side that they resize to; of others it isn't known.
    side = getattr(transform, "resize_size", None)
    resizing = None if side is None else Resizing(side[0])
    return read_classes(root, found, categories(), transform, skipped, skip_bad, resizing)


def noise(classes: Sequence[int], images_per_class: int, size: int = 224) -> Stimuli:
    """Random images of ``size`` x ``size`` in ImageNet's place, to see how long a study takes.

    Sorted by output. Pixels of 8 bits, coarse noise mixed half and half with a colour of the class,
    normalised by ImageNet's mean and deviation. A class's images depend on its output and on
    ``size`` alone.

    Raises
    ------
    DataError
        If there are no classes, one is unknown or named twice, or `images_per_class` is too small.
    """
    chosen = _chosen(classes, images_per_class)
    images = torch.empty(len(chosen) * images_per_class, 3, size, size, dtype=torch.float32)
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD])[..., None, None]
    for i, output in enumerate(chosen):
        generator = torch.Generator().manual_seed(output)
        colour = torch.randint(256, (3, 1, 1), generator=generator)
        for image in images[i * images_per_class : (i + 1) * images_per_class]:
            grid = torch.randint(256, (1, 3, _NOISE_GRID, _NOISE_GRID), generator=generator)
            smooth = torch.nn.functional.interpolate(grid.float(), (size, size), mode="bilinear")
            pixels = smooth[0].add_(colour).div_(2).floor_()
            image.copy_(pixels.div_(255).sub_(mean).div_(std))
    return Stimuli(
        images,
        torch.tensor(chosen).repeat_interleave(images_per_class),
        categories(),
        "random images, seed 0: not evidence",
    )


def _key(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


@cache
def _known() -> Mapping[str, list[int]]:
    """The outputs that a class name or wnid may mean."""
    known = defaultdict(list)
    raw = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    for output, names in enumerate(zip(raw, categories(), wnids(), strict=True)):
        for key in {_key(name) for name in names}:
            known[key].append(output)
    return dict(known)


def _meant(name: str) -> list[int]:
    """The outputs that a class name, wnid or number may mean."""
    key = _key(name)
    if key.isascii() and key.isdigit():
        return [int(key)] if int(key) < len(wnids()) else []
    return _known().get(key, [])


def _output(name: str, argument: str = "classes") -> int:
    """The output that a class name, wnid or number means."""
    meant = _meant(name)
    if len(meant) == 1:
        return meant[0]
    if meant:
        choice = " or ".join(wnids()[output] for output in meant)
        raise DataError(f"{argument}: {name!r} is ambiguous; expected {choice}")
    close = difflib.get_close_matches(_key(name), _known(), n=1)
    hint = f"; is {close[0]!r} meant?" if close and not name.isdigit() else ""
    raise DataError(
        f"{argument}: {name!r} is unknown{hint}; "
        "expected a class name, a wnid or an output, 0 to 999"
    )


def _chosen(classes: Sequence[int], images_per_class: int | None) -> list[int]:
    chosen = sorted(outputs(classes))
    if not chosen:
        raise DataError("classes: none are given; expected one or more")
    if images_per_class is not None and images_per_class < 2:
        raise DataError(f"images_per_class: {images_per_class} is too few; expected 2 or more")
    return chosen


def _folders_of(root: Path, folders: Sequence[Path], chosen: Sequence[int]) -> list[Path]:
    """Each chosen class's sub-directory."""
    found: dict[int, Path] = {}
    for directory in folders:
        if set(_meant(directory.name)).intersection(chosen):
            output = _output(directory.name, "images")
            if output in found:
                raise DataError(
                    f"images: {found[output]} and {directory} are of one class; expected one"
                )
            found[output] = directory
    if missing := [output for output in chosen if output not in found]:
        named = ", ".join(f"{categories()[o]} ({wnids()[o]})" for o in missing[:10])
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise DataError(
            f"images: {root} has no sub-directory for {named}{more}; "
            "expected wnids, class names or outputs, or ILSVRC2012_val_00000001.JPEG and so on"
        )
    return [found[output] for output in chosen]


def _files_by_label(
    root: Path, flat: Sequence[Path], labels: Path | None
) -> Mapping[int, list[Path]]:
    """The files of ILSVRC2012's flat directory by output."""
    if labels is None:
        places = [place / name for name in LABELS_FILES for place in (root, root.absolute().parent)]
        labels = next((place for place in places if place.is_file()), None)
        if labels is None:
            raise DataError(
                f"labels: there is no {', '.join(LABELS_FILES[:-1])} or {LABELS_FILES[-1]} in "
                f"{root} or beside it; expected one of them, or --labels FILE"
            )
    truth = _truth(labels)
    files: defaultdict[int, list[Path]] = defaultdict(list)
    for file in flat:
        if file.stem not in truth:
            raise DataError(f"labels: {labels} has none for {file.name}; expected one for each")
        files[truth[file.stem]].append(file)
    return files


def _truth(file: Path) -> dict[str, int]:
    """The output for each image that a file of labels names, without its suffix."""
    try:
        lines = file.read_text(encoding="utf-8").strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"labels: {file} can't be read: {error}") from error
    first, pattern = 1, _LISTED
    output_of = {str(output): output for output in range(len(wnids()))}
    expected = "'ILSVRC2012_val_00000001.JPEG 65', an output from 0 to 999"
    if lines and lines[0].startswith("ImageId,"):
        first, pattern = 2, _SOLUTION
        output_of = {wnid: output for output, wnid in enumerate(wnids())}
        expected = "'ILSVRC2012_val_00000001,n01751748 …', a wnid of ILSVRC2012"
    elif lines and lines[0].strip().isdecimal():
        lines = [f"ILSVRC2012_val_{i:08d}.JPEG {line}" for i, line in enumerate(lines, 1)]
        output_of = _output_of_id(file)
        expected = "an ILSVRC2012_ID from 1 to 1000"
    truth: dict[str, int] = {}
    for number, line in enumerate(lines[first - 1 :], first):
        match = pattern.fullmatch(line.strip())
        if match is None or match[2] not in output_of:
            raise DataError(f"labels: line {number} of {file} is damaged; expected {expected}")
        if match[1] in truth:
            raise DataError(f"labels: line {number} of {file} names {match[1]} again")
        truth[match[1]] = output_of[match[2]]
    return truth


def _output_of_id(labels: Path) -> dict[str, int]:
    """The output for each ILSVRC2012_ID, which is not in the order of wnids."""
    meta = labels.parent / "meta.mat"
    if not meta.is_file():
        raise DataError(
            f"labels: {labels} has ILSVRC2012_IDs, which are not outputs; "
            "expected the development kit's meta.mat beside it"
        )
    try:
        synsets = loadmat(meta, squeeze_me=True, variable_names=["synsets"])["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        wnid_of = {int(number): str(wnid) for number, wnid in pairs}
    except Exception as error:  # loadmat's and zlib's have no nearer class in common
        raise DataError(f"labels: {meta} can't be read: {one_line(error)}") from error
    leaves = {number: wnid for number, wnid in wnid_of.items() if number <= len(wnids())}
    if sorted(leaves.values()) != list(wnids()):
        raise DataError(
            f"labels: {meta} is not ILSVRC2012's; expected its 1,000 wnids as 1 to 1000"
        )
    return {str(number): wnids().index(wnid) for number, wnid in leaves.items()}
