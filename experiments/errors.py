"""What goes wrong with what was asked for; every message is one line."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())


class ExperimentError(ValueError):
    """What was asked for can't be done; the message is one line."""


class OptionsError(ExperimentError):
    """Options of the command line that can't be read, or don't go together."""


class DataError(ExperimentError):
    """Images that can't be had."""


class ModelError(ExperimentError):
    """A network that can't be built or loaded."""


class StudyError(ExperimentError):
    """A study can't be made of what was given."""


class RunError(ExperimentError):
    """Studies can't be run together."""


class ExecutorError(ExperimentError):
    """Units can't be measured this way."""


class ShardError(ExperimentError):
    """What is said of a shard makes no sense."""


class StoreError(ExperimentError):
    """A run folder can't be used: another configuration's, somebody else's, or damaged."""


class DamagedError(StoreError):
    """A part can't be read: cut off, or its bytes are not those that were written."""


class StatsError(ExperimentError):
    """A table lacks a column, has a row twice, or holds nothing to correlate."""


class ReportError(ExperimentError):
    """A report can't be made of these runs, or its figures can't be put where they belong."""
