"""Errors of the experiments; every message is one line."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())


class ExperimentError(ValueError):
    """Base class: the request can't be carried out."""


class OptionsError(ExperimentError):
    """Command-line options are invalid or don't go together."""


class DataError(ExperimentError):
    """Images can't be found or read."""


class ModelError(ExperimentError):
    """A network can't be built or loaded."""


class StudyError(ExperimentError):
    """A study's arguments are invalid, or its network has changed."""


class RunError(ExperimentError):
    """Studies can't be run together, or don't belong to the run."""


class ExecutorError(ExperimentError):
    """Units can't be measured by this executor."""


class ShardError(ExperimentError):
    """A shard's specification is invalid."""


class StoreError(ExperimentError):
    """A run folder can't be used: another configuration, other files, in use, or damaged."""


class DamagedError(StoreError):
    """A stored part is truncated or corrupt."""


class StatsError(ExperimentError):
    """A table lacks a column, has duplicate rows, or has nothing to correlate."""


class ReportError(ExperimentError):
    """A report can't be made from these runs, or can't be written."""
