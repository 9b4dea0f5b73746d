"""ImageNet: its 1,000 classes, its validation images in any layout, and random images."""

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
    is_image,
    list_folder,
    list_image_files,
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
_NOISE_GRID = 8  # squares per side: coarse enough to survive the pooling of the first layers


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids, sorted: the output order of networks trained on ILSVRC2012."""
    return tuple(WNIDS_FILE.read_text(encoding="ascii").split())


@cache
def categories() -> tuple[str, ...]:
    """Torchvision's class names by output, with the wnid appended if two differ only in case."""
    names: list[str] = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    count = Counter(_normalise_name(name) for name in names)
    return tuple(
        name if count[_normalise_name(name)] == 1 else f"{name} {wnid}"
        for name, wnid in zip(names, wnids(), strict=True)
    )


def find_outputs(names: Iterable[str | int]) -> list[int]:
    """Find the networks' outputs for some classes, in the order of the names.

    Names are class names, in any case and with spaces or underscores; wnids; or output numbers.

    Raises
    ------
    DataError
        If a name is unknown or ambiguous, or two names mean the same class.

    Examples
    --------
    >>> from repsim_kernels.experiments.inputs.imagenet import find_outputs
    >>> find_outputs(["n04147183", "siberian_HUSKY", 13])
    [780, 250, 13]
    """
    name_of: dict[int, str | int] = {}
    for name in names:
        output = _resolve_output(str(name))
        if output in name_of:
            raise DataError(
                f"classes: {name_of[output]!r} and {name!r} are one class; expected each once"
            )
        name_of[output] = name
    return list(name_of)


def load_validation(
    path: str | Path,
    classes: Sequence[int],
    transform: Transform,
    *,
    images_per_class: int | None = None,
    labels: str | Path | None = None,
    skip_bad: bool = False,
) -> Stimuli:
    """Load images of some of ImageNet's classes, usually from its validation set.

    Parameters
    ----------
    path : path
        Either a directory with one sub-directory per class, named by wnid, class name or output
        number; other classes may be missing and are not read. Or ILSVRC2012's flat directory of
        ILSVRC2012_val_00000001.JPEG and so on. Skips the same entries as `load_image_folder`.
    classes : sequence of int
        Outputs, as returned by `find_outputs`.
    transform : callable
        The network's preprocessing: `weights.transforms()` of torchvision.
    images_per_class : int, optional
        At most this many images of each class are loaded, the first by file name; all by default.
    labels : path, optional
        The classes of the flat directory's files, in one of three formats. Caffe's val.txt: lines
        of file name and output. Kaggle's LOC_val_solution.csv. The development kit's
        ILSVRC2012_validation_ground_truth.txt: one ILSVRC2012_ID per line, in order of the files,
        with meta.mat in the same folder. By default a file with one of these names, in the
        directory or its parent.
    skip_bad : bool
        Whether to skip, with a warning, files that can't be decoded.

    Returns
    -------
    stimuli : Stimuli
        Sorted by output, then by file name; with all 1,000 class names.

    Raises
    ------
    DataError
        If the directory, a class or the labels are missing; the labels are damaged; a class has
        fewer than two images; an image can't be decoded; or a link is broken.

    Notes
    -----
    Sources: the readme of ILSVRC2012's development kit (ILSVRC2012_IDs are not in the order of
    wnids); torchvision.datasets.ImageNet (the structure of meta.mat).
    """
    root = Path(path)
    chosen = _select_outputs(classes, images_per_class)
    if not root.is_dir():
        raise DataError(f"images: there is no folder {root}; expected ImageNet's validation images")
    skipped = Counter[str]()
    folders, plain_files = list_folder(root, skipped)
    flat_files = [file for file in plain_files if _FLAT_NAME.fullmatch(file.name)]
    if n_others := sum(map(is_image, plain_files)) - len(flat_files):
        reason = "with other names" if flat_files else "outside the classes' folders"
        skipped[reason] += n_others
    if flat_files:
        files = _group_by_output(root, flat_files, None if labels is None else Path(labels))
        classes_files = [
            ClassFiles(o, categories()[o], files[o][:images_per_class], Counter()) for o in chosen
        ]
    elif labels is not None:
        raise DataError(
            f"labels: {labels} is for a flat directory, but {root} has no "
            "ILSVRC2012_val_00000001.JPEG and so on"
        )
    else:
        classes_files = []
        for output, folder in zip(chosen, _find_class_folders(root, folders, chosen), strict=True):
            paths, skipped_here = list_image_files(folder)
            paths = paths[:images_per_class]
            classes_files.append(ClassFiles(output, categories()[output], paths, skipped_here))
    # Torchvision's transforms have a resize_size; other transforms may not.
    side = getattr(transform, "resize_size", None)
    resizing = None if side is None else Resizing(side[0])
    return read_classes(root, classes_files, categories(), transform, skipped, skip_bad, resizing)


def make_noise(classes: Sequence[int], images_per_class: int, size: int = 224) -> Stimuli:
    """Make random images of ``size`` x ``size`` in place of ImageNet's, to time a study.

    The images are sorted by output. Their 8-bit pixels are the mean of coarse noise and a colour of
    the class, normalised by ImageNet's mean and standard deviation. A class's images depend only
    on its output and on ``size``.

    Raises
    ------
    DataError
        If there are no classes, one is unknown or named twice, or `images_per_class` is too small.

    Examples
    --------
    >>> from repsim_kernels.experiments.inputs.imagenet import make_noise
    >>> stimuli = make_noise([113, 13], images_per_class=2, size=32)
    >>> tuple(stimuli.images.shape), stimuli.labels.tolist()
    ((4, 3, 32, 32), [13, 13, 113, 113])
    """
    chosen = _select_outputs(classes, images_per_class)
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


def _normalise_name(name: str) -> str:
    """Normalise a name for look-ups: no underscores, outer spaces or capitals."""
    return name.replace("_", " ").strip().casefold()


@cache
def _outputs_by_name() -> Mapping[str, list[int]]:
    """Map each class name and wnid to the outputs that it may mean."""
    known = defaultdict(list)
    raw = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    for output, names in enumerate(zip(raw, categories(), wnids(), strict=True)):
        for key in {_normalise_name(name) for name in names}:
            known[key].append(output)
    return dict(known)


def _candidate_outputs(name: str) -> list[int]:
    """List the outputs that a class name, wnid or number may mean."""
    key = _normalise_name(name)
    if key.isascii() and key.isdigit():
        return [int(key)] if int(key) < len(wnids()) else []
    return _outputs_by_name().get(key, [])


def _resolve_output(name: str, argument: str = "classes") -> int:
    """Find the one output that a class name, wnid or number means, or raise DataError."""
    candidates = _candidate_outputs(name)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        choice = " or ".join(wnids()[output] for output in candidates)
        raise DataError(f"{argument}: {name!r} is ambiguous; expected {choice}")
    close = difflib.get_close_matches(_normalise_name(name), _outputs_by_name(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close and not name.isdigit() else ""
    raise DataError(
        f"{argument}: {name!r} is unknown{hint}; "
        "expected a class name, a wnid or an output number from 0 to 999"
    )


def _select_outputs(classes: Sequence[int], images_per_class: int | None) -> list[int]:
    """Check the arguments and return the classes' outputs, sorted."""
    chosen = sorted(find_outputs(classes))
    if not chosen:
        raise DataError("classes: empty; expected one or more")
    if images_per_class is not None and images_per_class < 2:
        raise DataError(f"images_per_class: {images_per_class} is too few; expected 2 or more")
    return chosen


def _find_class_folders(root: Path, folders: Sequence[Path], chosen: Sequence[int]) -> list[Path]:
    """Find each chosen class's sub-directory."""
    by_output: dict[int, Path] = {}
    for directory in folders:
        if set(_candidate_outputs(directory.name)).intersection(chosen):
            output = _resolve_output(directory.name, "images")
            if output in by_output:
                raise DataError(
                    f"images: {by_output[output]} and {directory} are the same class; expected "
                    "one folder per class"
                )
            by_output[output] = directory
    if missing := [output for output in chosen if output not in by_output]:
        named = ", ".join(f"{categories()[o]} ({wnids()[o]})" for o in missing[:10])
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise DataError(
            f"images: {root} has no sub-directory for {named}{more}; "
            "expected folders named by wnid, class name or output number, or a flat directory of "
            "ILSVRC2012_val_00000001.JPEG and so on"
        )
    return [by_output[output] for output in chosen]


def _group_by_output(
    root: Path, flat: Sequence[Path], labels: Path | None
) -> Mapping[int, list[Path]]:
    """Group the files of ILSVRC2012's flat directory by output."""
    if labels is None:
        places = [place / name for name in LABELS_FILES for place in (root, root.absolute().parent)]
        labels = next((place for place in places if place.is_file()), None)
        if labels is None:
            raise DataError(
                f"labels: there is no {', '.join(LABELS_FILES[:-1])} or {LABELS_FILES[-1]} in "
                f"{root} or its parent; expected one of them, or --labels FILE"
            )
    output_by_stem = _read_labels(labels)
    files: defaultdict[int, list[Path]] = defaultdict(list)
    for file in flat:
        if file.stem not in output_by_stem:
            raise DataError(
                f"labels: {labels} has no label for {file.name}; expected one for each file"
            )
        files[output_by_stem[file.stem]].append(file)
    return files


def _read_labels(file: Path) -> dict[str, int]:
    """Read a file of labels: the output for each image name, without its suffix."""
    try:
        lines = file.read_text(encoding="utf-8").strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"labels: {file} can't be read: {error}") from error
    first, pattern = 1, _LISTED
    output_of = {str(output): output for output in range(len(wnids()))}
    expected = "'ILSVRC2012_val_00000001.JPEG 65', with an output from 0 to 999"
    if lines and lines[0].startswith("ImageId,"):
        first, pattern = 2, _SOLUTION
        output_of = {wnid: output for output, wnid in enumerate(wnids())}
        expected = "'ILSVRC2012_val_00000001,n01751748 …', with a wnid of ILSVRC2012"
    elif lines and lines[0].strip().isdecimal():
        lines = [f"ILSVRC2012_val_{i:08d}.JPEG {line}" for i, line in enumerate(lines, 1)]
        output_of = _read_meta(file)
        expected = "an ILSVRC2012_ID from 1 to 1000"
    outputs: dict[str, int] = {}
    for number, line in enumerate(lines[first - 1 :], first):
        match = pattern.fullmatch(line.strip())
        if match is None or match[2] not in output_of:
            raise DataError(f"labels: line {number} of {file} is damaged; expected {expected}")
        if match[1] in outputs:
            raise DataError(f"labels: line {number} of {file} repeats {match[1]}")
        outputs[match[1]] = output_of[match[2]]
    return outputs


def _read_meta(labels: Path) -> dict[str, int]:
    """Map each ILSVRC2012_ID to its output; the ids are not in the order of wnids."""
    meta = labels.parent / "meta.mat"
    if not meta.is_file():
        raise DataError(
            f"labels: {labels} has ILSVRC2012_IDs, which are not outputs; "
            "expected the development kit's meta.mat in the same folder"
        )
    try:
        synsets = loadmat(meta, squeeze_me=True, variable_names=["synsets"])["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        wnid_of = {int(number): str(wnid) for number, wnid in pairs}
    except Exception as error:  # loadmat's and zlib's errors have no closer common class
        raise DataError(f"labels: {meta} can't be read: {one_line(error)}") from error
    leaves = {number: wnid for number, wnid in wnid_of.items() if number <= len(wnids())}
    if sorted(leaves.values()) != list(wnids()):
        raise DataError(
            f"labels: {meta} is not ILSVRC2012's; expected its 1,000 wnids as 1 to 1000"
        )
    return {str(number): wnids().index(wnid) for number, wnid in leaves.items()}
