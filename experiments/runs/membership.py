"""The studies of a run: start or reopen a run with them, or join one from a worker process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repsim_kernels.experiments.errors import RunError
from repsim_kernels.experiments.runs.store import Store, check_compatible
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.checks import check_folder
from repsim_kernels.experiments.study.configuration import digest, version_of

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study


def open_run(
    studies: Sequence[Study],
    out: str | os.PathLike[str],
    about: dict[str, Any] | None = None,
    workers: int = 1,
) -> Store:
    """Make a run's folder, or open an existing one to resume the run.

    Studies without an explicit memory budget get theirs here, once for all processes of the run:
    the budget determines the batches, which can change the last bits of the results.

    Parameters
    ----------
    studies : sequence of Study
        With different names.
    out : path
        A new or empty folder, or the folder of an earlier run of the same studies.
    about : dict, optional
        Facts about the run for the report, serializable as JSON.
    workers : int
        Number of processes on this machine that share its free memory.

    Raises
    ------
    RunError
        Two studies have the same name.
    StudyError
        ``out`` is not a path, or a network has changed since its study was made.
    StoreError
        ``out`` holds another run or other files.
    OSError
        ``out`` can't be written.
    """
    folder, configuration = _folder_and_configuration(studies, out)

    def facts() -> dict[str, Any]:
        for study in studies:
            if not study.memory_is_explicit and study.device.type == "cpu":
                study.memory //= workers
        return {
            "memory": {study.name: study.memory for study in studies},
            "about": {**(about or {}), "models": {s.name: measure.describe(s) for s in studies}},
        }

    store = Store.create(folder, configuration, facts)
    _set_memory(studies, store)
    return store


def check_run(studies: Sequence[Study], out: str | os.PathLike[str]) -> None:
    """Check that `open_run` can use a folder, without writing; raises the errors of `open_run`."""
    check_compatible(*_folder_and_configuration(studies, out))


def join_run(studies: Sequence[Study], store: Store) -> None:
    """Let studies that a worker process has made take part in a run.

    Raises
    ------
    RunError
        They differ from those of the run.
    """
    if digest(_collect_configuration(studies)) != store.hash:
        raise RunError(
            f"studies: those made by a worker differ from the ones in {store.folder}; expected the "
            "same images, network and versions as at the start of the run"
        )
    _set_memory(studies, store)


def _folder_and_configuration(
    studies: Sequence[Study], out: str | os.PathLike[str]
) -> tuple[Path, dict[str, Any]]:
    check_names(studies)
    return check_folder(out), _collect_configuration(studies)


def _set_memory(studies: Sequence[Study], store: Store) -> None:
    for study in studies:
        if not study.memory_is_explicit:
            study.memory = store.study["memory"][study.name]


def _collect_configuration(studies: Sequence[Study]) -> dict[str, Any]:
    return {
        "models": {study.name: study.configuration() for study in studies},
        "versions": {name: version_of(name) for name in ("repsim-kernels", "torch")},
    }


def check_names(studies: Sequence[Study]) -> None:
    """Check that no two studies have the same name."""
    if len({study.name for study in studies}) < len(studies):
        raise RunError("studies: two have the same name; expected distinct names")
