"""The stimuli that networks are shown: the batches of a loader, and their ids."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from repsim_kernels import _arrays, _options
from repsim_kernels.comparison import batches
from repsim_kernels.errors import LabelError, OptionError, ShapeError

Ids = Callable[[Any], Iterable[Any]]
"""Returns the ids of the stimuli of a batch."""


def iterate(loader: Any, name: str = "loader") -> Iterator[Any]:
    """Iterate over a loader; ShapeError if it has no batches."""
    is_map = isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)
    if is_map or isinstance(loader, Mapping) or _arrays.detect_library(loader) is not None:
        # Each item would be taken for a batch, and channels for stimuli.
        raise OptionError(
            f"{name}: {type(loader).__name__}; expected an iterable of batches, such as a "
            "DataLoader or [x]"
        )
    try:
        iterator = iter(loader)
    except TypeError:
        raise OptionError(
            f"{name}: {_options.short_repr(loader)}; expected an iterable of batches, such as a "
            "DataLoader"
        ) from None
    count = 0
    for count, batch in enumerate(iterator, 1):  # noqa: B007
        yield batch
    if not count:
        raise ShapeError(f"{name}: no batches; expected at least one (has it been used up?)")


class Stimuli:
    """The batches of a loader, which may be read several times.

    The first pass counts them, and holds them in memory if they fit. If a later pass differs from
    the first, for example because the loader shuffles, an error is raised.

    Parameters
    ----------
    loader : iterable of batches
    memory : int
        Bytes of batches to hold at most.
    ids : function, optional
        Returns the ids of the stimuli of a batch.
    name : str
        What errors call the loader.

    Attributes
    ----------
    n : int
        Number of stimuli that the first pass has seen.
    ids : list
        Ids of these, or an empty list.
    seconds : float
        Time that the loader took for the first pass; 0 if its batches are held.
    sample : batch
        The first batch.
    """

    def __init__(
        self, loader: Iterable[Any], memory: int, ids: Ids | None = None, name: str = "loader"
    ) -> None:
        self._loader, self._memory, self._get_ids, self.name = loader, memory, ids, name
        self._held: list[Any] | None = []
        self._fingerprints: list[int] = []
        self._is_read = False
        self.n, self.ids, self.seconds = 0, list[Any](), 0.0
        self._batches = iterate(loader, name)
        self.sample = next(self._batches)

    def estimate_count(self) -> int:
        """Return about how many stimuli there are; 0 if the loader does not know its length."""
        try:
            length = len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            return 0
        return length * batches.count_stimuli(self.sample)

    def __iter__(self) -> Iterator[Any]:
        return self._read_again() if self._is_read else self._read_first()

    def _read_first(self) -> Iterator[Any]:
        size, seconds, start = 0, 0.0, time.perf_counter()
        for batch in itertools.chain([self.sample], self._batches):
            seconds += time.perf_counter() - start
            count = batches.count_stimuli(batch)
            self.n += count
            if self._get_ids is not None:
                self.ids += _list_ids(self._get_ids, batch, count)
            self._fingerprints.append(batches.compute_fingerprint(batch))
            if self._held is not None:
                self._held.append(batch)
                size += sum(a.nbytes for a in batches.list_tensors(batch))
                if size > self._memory:
                    self._held = None
            yield batch
            start = time.perf_counter()
        self._is_read = True
        self.seconds = 0.0 if self._held is not None else seconds

    def _read_again(self) -> Iterator[Any]:
        if self._held is not None:
            expected = "a loader that does not reuse the memory of its batches"
        elif isinstance(self._loader, Iterator):
            raise OptionError(
                f"{self.name}: {_options.short_repr(self._loader)} can be read only once, and its "
                f"batches exceed {self._memory:,} bytes; expected a loader that can be "
                "read again, such as a DataLoader, or a larger `memory`"
            )
        else:
            expected = (
                "the same batches in each pass: no shuffling and no random augmentation, or a "
                "larger `memory`, so that one pass is enough"
            )
        count = 0
        for batch in self._held or iterate(self._loader, self.name):
            fingerprint = batches.compute_fingerprint(batch)
            if count >= len(self._fingerprints) or fingerprint != self._fingerprints[count]:
                raise OptionError(
                    f"{self.name}: batch {count} differs from that of the first pass; expected "
                    f"{expected}"
                )
            count += 1
            yield batch
        if count < len(self._fingerprints):
            raise OptionError(
                f"{self.name}: {count} batches, but {len(self._fingerprints)} in the first pass; "
                "expected the same batches in each pass"
            )

    @functools.cached_property
    def joined(self) -> Any | None:
        """All stimuli as one batch; None if the batches are not held, or can't be joined."""
        return None if self._held is None else batches.join_batches(list(self))

    def release(self) -> None:
        """Stop holding batches, which are not read again; `joined` is kept."""
        self._held = None


def _list_ids(get_ids: Ids, batch: Any, count: int) -> list[Any]:
    """Return the ids of a batch as a list of hashable values."""
    values = get_ids(batch)
    try:
        ids = values.tolist() if hasattr(values, "tolist") else list(values)
        hash(tuple(ids))
    except TypeError:
        raise LabelError(
            f"ids: returned {_options.short_repr(values)}; expected a hashable id for each stimulus"
        ) from None
    if len(ids) != count:
        raise LabelError(f"ids: {len(ids)} for a batch of {count} stimuli; expected one for each")
    return ids


def align(first: Stimuli, second: Stimuli) -> np.ndarray[Any, Any]:
    """Return the position in the first stimuli of each of the second ones, by their ids."""
    positions = {key: i for i, key in enumerate(first.ids)}
    for stimuli in (first, second):
        ids = stimuli.ids
        if len(set(ids)) < len(ids):
            repeated = next(key for i, key in enumerate(ids) if key in ids[:i])
            raise LabelError(
                f"ids: {_options.short_repr(repeated)} occurs twice in {stimuli.name}; expected "
                "distinct ids"
            )
    missing = [key for key in second.ids if key not in positions]
    if missing or len(first.ids) != len(second.ids):
        known = set(second.ids)
        example = missing[0] if missing else next(key for key in first.ids if key not in known)
        raise LabelError(
            f"ids: {_options.short_repr(example)} is in only one of the two loaders; expected the "
            "same stimuli in both"
        )
    return np.array([positions[key] for key in second.ids])
