"""Who takes part in a run: the studies that begin or open one, and those that join it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repsim_kernels.experiments.errors import RunError
from repsim_kernels.experiments.runs.store import Store
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
    """Make a run's folder, or open one to go on with.

    The memory of studies that were not given any is settled here, once for all that work on the
    run: what runs together decides the last bits.

    Parameters
    ----------
    studies : sequence of Study
        Of different names.
    out : path
        A new or empty folder, or one of an earlier run of the same studies.
    about : dict, optional
        JSON-able things that the report is to say about the run.
    workers : int
        Processes of this machine that share what memory of it is free.

    Raises
    ------
    RunError
        Two studies have one name.
    StudyError
        ``out`` is no path, or a network has changed since its study was made.
    StoreError
        ``out`` holds another run or other files.
    OSError
        ``out`` can't be written.
    """
    check_names(studies)
    folder = check_folder(out)

    def facts() -> dict[str, Any]:
        for study in studies:
            if not study.own_memory and study.device.type == "cpu":
                study.memory //= workers
        return {
            "memory": {study.name: study.memory for study in studies},
            "about": {**(about or {}), "models": {s.name: measure.describe(s) for s in studies}},
        }

    store = Store.create(folder, _configuration(studies), facts)
    _settle(studies, store)
    return store


def join_run(studies: Sequence[Study], store: Store) -> None:
    """Take part in a run with studies that were made anew.

    Raises
    ------
    RunError
        They are not those of the run.
    """
    if digest(_configuration(studies)) != store.hash:
        raise RunError(
            f"studies: those made anew for {store.folder} are not the run's; expected the same "
            "images, network and versions as when it began"
        )
    _settle(studies, store)


def _settle(studies: Sequence[Study], store: Store) -> None:
    for study in studies:
        if not study.own_memory:
            study.memory = store.study["memory"][study.name]


def _configuration(studies: Sequence[Study]) -> dict[str, Any]:
    return {
        "models": {study.name: study.configuration() for study in studies},
        "versions": {name: version_of(name) for name in ("repsim-kernels", "torch")},
    }


def check_names(studies: Sequence[Study]) -> None:
    if len({study.name for study in studies}) < len(studies):
        raise RunError("studies: two have the same name; expected distinct names")
