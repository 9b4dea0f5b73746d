"""The distances of ablations, collected in pieces and put together at the end."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repsim_kernels._routes import Distances, Route


class DistanceTable:
    """Distances (C,) by metric, and how they were computed; zeros until they are recorded.

    Values stay where they were computed until `join`, so that recording starts no kernel. How they
    were computed is known to the host and stays there.
    """

    def __init__(self, metrics: tuple[str, ...], n_cells: int) -> None:
        self.metrics, self.n_cells = metrics, n_cells
        self.pieces: dict[str, list[tuple[list[int], Tensor | float]]] = {m: [] for m in metrics}
        self.route = {name: np.zeros(n_cells, dtype=np.int64) for name in metrics}
        self.steps = {name: np.zeros(n_cells, dtype=np.int64) for name in metrics}

    def record(
        self,
        metric: str,
        cells: list[int],
        values: Tensor | float,
        route: np.ndarray | int = Route.NOTHING,
        steps: np.ndarray | int = 0,
    ) -> None:
        """Set the distances of a metric for some cells, to values (B,) or one value (1,)."""
        if cells:
            self.pieces[metric].append((cells, values))
            self.route[metric][cells], self.steps[metric][cells] = route, steps


def join(tables: list[DistanceTable], device: torch.device) -> dict[str, Distances]:
    """Return the distances (T C,) of T tables by metric; rounding must not make one negative."""
    metrics = tables[0].metrics
    if not metrics:
        return {}
    pieces: list[Tensor] = []
    numbers = [0.0]
    places = []  # of each distance: its index in the pieces, or -1 - its index in the numbers
    end = 0
    for metric in metrics:
        for table in tables:
            place = np.full(table.n_cells, -1)
            for cells, values in table.pieces[metric]:
                if isinstance(values, Tensor):
                    place[cells] = np.arange(end, end + len(values))
                    pieces.append(values)
                    end += len(values)
                else:
                    numbers.append(values)
                    place[cells] = -len(numbers)
            places.append(place)
    index = np.concatenate(places)
    if pieces and np.array_equal(index, np.arange(end)):
        values = torch.cat(pieces)
    else:
        index = np.where(index < 0, end - 1 - index, index)
        pieces.append(torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True))
        order = torch.from_numpy(index).to(device, non_blocking=True)
        values = torch.cat(pieces).index_select(0, order)
    rows = values.clamp_(min=0).view(len(metrics), -1)
    return {
        name: Distances(row, *(np.concatenate(parts) for parts in zip(*how, strict=True)))
        for name, row, how in zip(
            metrics,
            rows,
            ([(t.route[name], t.steps[name]) for t in tables] for name in metrics),
            strict=True,
        )
    }
