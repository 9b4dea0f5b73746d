"""Checks of a study's arguments; the library's own errors become StudyErrors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from repsim_kernels import _arrays, _check, _options, ablation_distances
from repsim_kernels._metrics import list_raw_ablation
from repsim_kernels.errors import LabelError, LayerError, RepsimError
from repsim_kernels.experiments.columns import ALL_METRICS
from repsim_kernels.experiments.errors import StudyError, one_line
from repsim_kernels.forward.trace import first_line

_BATCH = 64  # images that are read from a dataset at a time


@dataclass(frozen=True)
class Draws:
    """How many draws of neurons the probe "paper" makes from a layer, and how.

    Parameters
    ----------
    least : int
        Minimum number of draws.
    every : int, optional
        Draw once for every this many neurons of the layer, if that gives more draws than `least`.
    paired : bool
        Whether the fit after an ablation keeps those neurons of the intact fit that survive. The
        paper draws all of them anew.

    Examples
    --------
    >>> from repsim_kernels.experiments import Draws
    >>> Draws(least=200, every=100).count_for(50_000)
    500
    """

    least: int = 200
    every: int | None = None
    paired: bool = True

    def count_for(self, neurons: int) -> int:
        """The number of draws from a layer with this many neurons."""
        return self.least if self.every is None else max(self.least, neurons // self.every)


@contextmanager
def raise_study_errors() -> Iterator[None]:
    """Re-raise the library's errors about arguments as StudyErrors with the same message.

    A LayerError passes through, because it is about the network.
    """
    try:
        yield
    except LayerError:
        raise
    except RepsimError as error:
        raise StudyError(one_line(error)) from error


def check_string(value: Any, argument: str) -> str:
    """Check that an argument is a string."""
    if not isinstance(value, str):
        raise StudyError(f"{argument}: {_options.short_repr(value)}; expected a string")
    return value


def check_names(values: Any, argument: str, known: Sequence[str] | None = None) -> list[str]:
    """Check a sequence of names, all of them in `known` if it is given."""
    names = None if isinstance(values, str) else _options.to_tuple(values)
    if names is None or not all(isinstance(name, str) for name in names):
        raise StudyError(f"{argument}: {_options.short_repr(values)}; expected a sequence of names")
    if known is not None:
        for name in names:
            _options.check_choice(name, argument, known)
    return [str(name) for name in names]


def check_metrics(values: Any) -> list[str]:
    """Check the names of distances; "all" means all of them."""
    is_all = isinstance(values, str) and values == "all"
    names = check_names(["all"] if is_all else values, "metrics")
    if names == ["all"]:
        return list(ALL_METRICS)
    return check_distinct(check_names(names, "metrics", ALL_METRICS), "metrics")


def check_neighbours(
    metrics: Sequence[str], counts: list[int], metric_images: int | None, others: int | None
) -> None:
    """Check that the images that the metrics see have as many neighbours as "mutual_knn" takes.

    ``counts`` are the numbers of images of the classes, of which a target may have the fewest.
    """
    k = inspect.signature(ablation_distances).parameters["k"].default
    seen = sorted(min(count, metric_images or count) for count in counts)
    n_images = sum(seen if others is None else seen[: others + 1])
    if "mutual_knn" in metrics and n_images <= k:
        raise StudyError(
            f"metrics: 'mutual_knn' compares the {k} nearest images of each, but the "
            f"metrics see {n_images}; expected at least {k + 1}"
        )


def check_distinct(values: list[Any], argument: str) -> list[Any]:
    """Check that values are distinct and there is at least one."""
    if not values or len(set(values)) < len(values):
        raise StudyError(
            f"{argument}: {_options.short_repr(values)} is empty or repeats; "
            "expected distinct values"
        )
    return values


def check_targets(values: Any) -> list[int]:
    """Check a sequence of distinct integer labels."""
    labels = None if isinstance(values, str) else _options.to_tuple(values)
    array = None
    if labels is not None and not any(isinstance(label, str) for label in labels):
        # Arrays are checked as they are; `labels` also holds the items of sets and iterators.
        array = _check.check_integers(
            values if hasattr(values, "dtype") else labels, "targets", LabelError
        )
    if array is None or array.ndim != 1 or array.dtype.kind == "b":
        raise StudyError(
            f"targets: {_options.short_repr(values)}; expected a sequence of integer labels"
        )
    return check_distinct(array.tolist(), "targets")


def read_images(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Check images and their labels, which a Dataset or DataLoader holds both."""
    if not isinstance(images, Dataset | DataLoader):
        if labels is None:
            raise StudyError(
                "labels: None; expected a label for each image, or images that are a Dataset or "
                "DataLoader of pairs (image, label)"
            )
        return check_images(images), check_labels(labels)
    if labels is not None:
        kind = type(images).__name__
        raise StudyError(f"labels: given with a {kind} of images; expected None, as it has labels")
    images, labels = _read_pairs(images)
    return check_images(images), check_labels(labels)


def _read_pairs(data: Dataset[Any] | DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """Read all images and labels of pairs."""
    images, labels = [], []
    try:
        for x, y in data if isinstance(data, DataLoader) else DataLoader(data, _BATCH):
            images.append(x)
            labels.append(y)
        return torch.cat(images), torch.cat(labels)
    except (RuntimeError, TypeError, ValueError) as error:
        raise StudyError(
            f"images: {type(data).__name__} can't be read ({first_line(error)}); expected one or "
            "more pairs of an image and a label, as tensors of one shape and integers"
        ) from error


def check_images(values: Any) -> Tensor:
    """Check an array of real numbers; returns a tensor, which shares its memory where possible."""
    images, _ = _arrays.convert(values, "images")
    # Python's numbers have no precision, so they get PyTorch's default.
    from_python = isinstance(values, list | tuple) and images.dtype == torch.float64
    return images.to(torch.get_default_dtype()) if from_python else images


def check_labels(values: Any) -> Tensor:
    """Check an array of integers; returns a copy, a tensor on the CPU."""
    labels = _check.check_integers(values, "labels", LabelError)
    return torch.from_numpy(labels.astype("int64"))


def check_pairs(images: Tensor, labels: Tensor) -> None:
    """Check that there is at least one image, and a label for each."""
    if labels.ndim != 1:
        raise StudyError(f"labels: shape {tuple(labels.shape)}; expected integers of shape (n,)")
    if images.ndim < 2:
        raise StudyError(f"images: shape {tuple(images.shape)}; expected (n, ...)")
    if len(images) != len(labels):
        raise StudyError(
            f"labels: {len(labels)} for {len(images)} images; expected one label for each image"
        )
    if not len(images):
        raise StudyError("images: empty; expected two or more of each class")


def check_classes(
    counts: dict[int, int], targets: list[int], names: list[str] | None, others: int | None
) -> None:
    """Check the targets, class names and drawn classes against the images of each label."""
    labels = list(counts)
    if missing := [label for label in targets if label not in counts]:
        raise StudyError(f"targets: {missing[0]} is not among the labels {labels}")
    if min(labels) < 0:
        raise StudyError(f"labels: {min(labels)}; expected output indices, 0 or more")
    if names is not None and len(names) <= max(labels):
        raise StudyError(
            f"classes: {len(names)} names, but labels up to {max(labels)}; "
            "expected a name for each label"
        )
    if names is not None and len({names[label] for label in targets}) < len(targets):
        raise StudyError("classes: two targets share a name; expected distinct names")
    if single := [label for label, count in counts.items() if count < 2]:
        name = single[0] if names is None else names[single[0]]
        raise StudyError(f"images: class {name!r} has one image; expected 2 or more")
    if others is not None and others >= len(counts):
        raise StudyError(
            f"others: {others} of {len(counts)} classes; expected at most {len(counts) - 1}, the "
            "classes other than the target"
        )
    if len(counts) < 2:
        raise StudyError(f"labels: all are {labels[0]}; expected two classes or more")


@contextmanager
def explain_rejection(images: Tensor, model: nn.Module, name: str) -> Iterator[None]:
    """Re-raise an error of a pass as one about the images, which a network can't take.

    It names the dtype of the weights if that differs. A LayerError passes through.
    """
    try:
        yield
    except LayerError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise StudyError(_describe_rejection(images, model, name, error)) from error


def _describe_rejection(images: Tensor, model: nn.Module, name: str, error: Exception) -> str:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    shape, kind = tuple(images.shape[1:]), _arrays.dtype_name(images)
    hint = "" if images.dtype == dtype else f"; its weights are {dtype}: pass images.to({dtype})"
    reason = first_line(error)
    return f"images: {name} can't take one of shape {shape}, dtype {kind} ({reason}){hint}"


def check_logits(logits: Any, model: str, largest: int) -> None:
    """Check that a model's output is logits with an entry for each label."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        output = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise StudyError(f"model: {model} returns {output}; expected logits (n, k), k > 1")
    if logits.shape[1] <= largest:
        raise StudyError(
            f"labels: up to {largest}, but {model} has {logits.shape[1]} outputs; "
            f"expected labels below {logits.shape[1]}"
        )


def check_optional_count(value: Any, argument: str, least: int = 1) -> int | None:
    """Check a whole number of at least `least`, or None."""
    return None if value is None else _options.check_count(value, argument, least)


def check_draws(value: Any) -> Draws:
    """Check the draws of the probe "paper"; None means the default."""
    if value is None:
        return Draws()
    if not isinstance(value, Draws):
        raise StudyError(
            f"draws: {_options.short_repr(value)}; expected a repsim_kernels.experiments.Draws"
        )
    every = check_optional_count(value.every, "draws.every")
    least = _options.check_count(value.least, "draws.least")
    return Draws(least, every, _options.check_flag(value.paired, "draws.paired"))


def check_fill(value: Any, metrics: Sequence[str]) -> str:
    """Check what ablated neurons are set to, and that the metrics are computed for it."""
    fill = _options.check_choice(value, "fill", ("zero", "mean"))
    if fill == "mean" and (raw := [name for name in metrics if name in list_raw_ablation()]):
        raise StudyError(
            f"fill: 'mean' with the metric {raw[0]!r}, which is computed for zeros and differs for "
            "means, as angles between stimuli depend on the origin; expected fill='zero', or "
            "metrics without it"
        )
    return fill


def check_progress(value: Any) -> None:
    """Check that progress is callable."""
    if value is not None and not callable(value):
        raise StudyError(
            f"progress: {_options.short_repr(value)}; expected a function that takes a RunProgress"
        )


def check_folder(value: Any) -> Path:
    """Check that a folder is a path in UTF-8, the only encoding Parquet's library reads."""
    try:
        path = Path(value)
        path.as_posix().encode()
    except (TypeError, UnicodeEncodeError):
        raise StudyError(
            f"out: {_options.short_repr(value)}; expected the path of a folder, in UTF-8"
        ) from None
    return path


def check_model(value: Any) -> nn.Module:
    """Check that a network is an nn.Module."""
    if not isinstance(value, nn.Module):
        raise StudyError(f"model: {_options.short_repr(value)}; expected a torch.nn.Module")
    return value


def check_device(model: nn.Module, device: Any) -> torch.device:
    """The device to compute on, or the model's if it is None; checks that it can be used."""
    if device is None:
        parameter = next(model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device
    try:
        probe = torch.empty(1, device=device)
        probe.cpu()  # fails for "meta", which has no values
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = first_line(error).partition(" device type at start")[0]
        raise StudyError(
            f"device: {device} can't be used here ({reason}); expected cpu, cuda or cuda:N"
        ) from error
    return probe.device  # including its index
