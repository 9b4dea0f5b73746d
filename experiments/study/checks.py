"""The arguments of a study, checked by the library's own checks; its errors become StudyErrors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repsim_kernels import _arrays, _check, _options
from repsim_kernels.errors import LabelError, LayerError, RepsimError
from repsim_kernels.experiments.errors import StudyError, one_line
from repsim_kernels.forward.trace import first_line


@dataclass(frozen=True)
class Draws:
    """How often the paper's probe draws neurons of a layer, and how.

    Parameters
    ----------
    least : int
        As often at least.
    every : int, optional
        Neurons of the layer per draw, where that gives more draws than `least`.
    paired : bool
        Whether an ablated fit keeps the neurons of the intact one as far as they survive; the
        paper draws all anew.
    """

    least: int = 200
    every: int | None = None
    paired: bool = True

    def count_for(self, neurons: int) -> int:
        """How many draws a layer of that many neurons gets."""
        return self.least if self.every is None else max(self.least, neurons // self.every)


@contextmanager
def raise_study_errors() -> Iterator[None]:
    """Raise the library's errors about arguments as StudyErrors of the same line.

    A LayerError stays what it is: it is about the network.
    """
    try:
        yield
    except LayerError:
        raise
    except RepsimError as error:
        raise StudyError(one_line(error)) from error


def check_text(value: Any, argument: str) -> str:
    """Check that an argument is a text."""
    if not isinstance(value, str):
        raise StudyError(f"{argument}: {_options.shown(value)}; expected a text")
    return value


def check_names(values: Any, argument: str, known: Sequence[str] | None = None) -> list[str]:
    """Check a sequence of names, of which each is known, if it is given what is known."""
    names = None if isinstance(values, str) else _options.items(values)
    if names is None or not all(isinstance(name, str) for name in names):
        raise StudyError(f"{argument}: {_options.shown(values)}; expected a sequence of names")
    if known is not None:
        for name in names:
            _options.option(name, argument, known)
    return [str(name) for name in names]


def check_distinct(values: list[Any], argument: str) -> list[Any]:
    """Check that there is a value, and none twice."""
    if not values or len(set(values)) < len(values):
        raise StudyError(
            f"{argument}: {_options.shown(values)} is empty or repeats; expected distinct values"
        )
    return values


def check_targets(values: Any) -> list[int]:
    """Check a sequence of distinct integer labels."""
    labels = None if isinstance(values, str) else _options.items(values)
    found = None
    if labels is not None and not any(isinstance(label, str) for label in labels):
        # Sets and iterators are taken as well, and an array as it is.
        array = values if hasattr(values, "dtype") else labels
        found = _check.integers(array, "targets", LabelError)
    if found is None or found.ndim != 1 or found.dtype.kind == "b":
        raise StudyError(
            f"targets: {_options.shown(values)}; expected a sequence of integer labels"
        )
    return check_distinct(found.tolist(), "targets")


def check_images(values: Any) -> Tensor:
    """Check an array of real numbers, as a tensor that shares its memory where it can."""
    images, _ = _arrays.convert(values, "images")
    # Python's numbers have no precision of their own: they get PyTorch's.
    python = isinstance(values, list | tuple) and images.dtype == torch.float64
    return images.to(torch.get_default_dtype()) if python else images


def check_labels(values: Any) -> Tensor:
    """Check an array of integers, as a tensor of its own on the CPU."""
    labels = _check.integers(values, "labels", LabelError)
    return torch.from_numpy(labels.astype("int64"))


def check_pairs(images: Tensor, labels: Tensor) -> None:
    """Check that there are images, and a label for each."""
    if labels.ndim != 1:
        raise StudyError(f"labels: shape {tuple(labels.shape)}; expected integers of shape (n,)")
    if images.ndim < 2 or len(images) != len(labels):
        raise StudyError(
            f"images: shape {tuple(images.shape)} for {len(labels)} labels; "
            "expected (n, ...), an image for each label"
        )
    if not len(images):
        raise StudyError("images: there are none; expected two or more of each class")


def check_optional_count(value: Any, argument: str, least: int = 1) -> int | None:
    """Check a whole number of at least `least`, or None."""
    return None if value is None else _options.count(value, argument, least)


def check_draws(value: Any) -> Draws:
    """Check how often the paper's probe draws; None is for the default."""
    if value is None:
        return Draws()
    if not isinstance(value, Draws):
        raise StudyError(
            f"draws: {_options.shown(value)}; expected a repsim_kernels.experiments.Draws"
        )
    every = check_optional_count(value.every, "draws.every")
    least = _options.count(value.least, "draws.least")
    return Draws(least, every, _options.flag(value.paired, "draws.paired"))


def check_progress(value: Any) -> None:
    """Check that progress can be called."""
    if value is not None and not callable(value):
        raise StudyError(f"progress: {_options.shown(value)}; expected a function of a Step")


def check_folder(value: Any) -> Path:
    """Check that a folder is a path, whose name is UTF-8: Parquet's library has no others."""
    try:
        path = Path(value)
        path.as_posix().encode()
    except (TypeError, UnicodeEncodeError):
        raise StudyError(
            f"out: {_options.shown(value)}; expected the path of a folder, in UTF-8"
        ) from None
    return path


def check_model(value: Any) -> nn.Module:
    """Check that a network is a module of PyTorch's."""
    if not isinstance(value, nn.Module):
        raise StudyError(f"model: {_options.shown(value)}; expected a torch.nn.Module")
    return value


def check_device(model: nn.Module, device: Any) -> torch.device:
    """A device that can be used: the one that was asked for, or the model's."""
    if device is None:
        parameter = next(model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device
    try:
        probe = torch.empty(1, device=device)
        probe.cpu()  # "meta" has no values to give
    except (RuntimeError, AssertionError, TypeError) as error:
        raise StudyError(f"device: {device} can't be used here ({first_line(error)})") from error
    return probe.device  # with its number
