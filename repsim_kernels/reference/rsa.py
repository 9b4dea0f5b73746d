"""Representational similarity analysis."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from repsim_kernels.reference.gram import Array, Real, centered, squared_distances

_EPS = np.finfo(np.float64).eps
_APART, _PAIR = 4, 256  # tolerances between a group of equal distances and the next; see `ranks`


def rsa(x: Real, y: Real, *, distance: str = "euclidean", compare: str = "spearman") -> np.float64:
    """Correlation of the n(n - 1)/2 distances between the rows of x (n, p) and of y (n, q).

    Distances as SciPy's ``pdist`` names them, between the rows as given; compared by their
    ``"pearson"`` or ``"spearman"`` correlation, or their ``"cosine"`` (Kriegeskorte et al. 2008).
    Distances that differ by no more than rounding are equal; see `ranks`.
    """
    u, v = (dissimilarities(z, distance, compare) for z in (x, y))
    return np.float64(np.clip(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)), -1, 1))


def dissimilarities(x: Real, distance: str, compare: str) -> Array:
    """What is compared of the rows of x: (n(n - 1)/2,), NaN where it says nothing."""
    found = distances(x, distance)
    values = found.values
    if compare == "spearman":
        d = ranks(found)
        equal = np.ptp(d) == 0
    else:
        d = np.sqrt(values) if distance == "euclidean" else values
        least = 0.0 if compare == "cosine" else values.min()
        at = values.argmax() if compare == "cosine" else values.argmin()
        equal = values.max() - least <= found.tolerances[at]
    if equal:
        return np.full_like(d, np.nan)
    return d if compare == "cosine" else d - d.mean()


class Distances(NamedTuple):
    """Squared distances of all pairs of rows, (n(n - 1)/2,), in the order of the upper triangle."""

    values: Array
    rounding: Array  # how far apart float64 arithmetic may leave two that are equal in truth
    tolerances: Array  # the same, and half an ulp of each entry of the input


def distances(x: Real, distance: str) -> Distances:
    """Squared distances; for "correlation" and "cosine" of rows of unit length.

    Equal rows have distances that are equal to the bit: all rows are summed in the same order.
    """
    half_ulp = np.finfo(x.dtype).eps / 2 if x.dtype.kind == "f" else 0.0
    rows = np.asarray(x, dtype=np.float64)
    moved = half_ulp * np.linalg.norm(rows, axis=1)
    scaled = 0.0
    if distance in ("correlation", "cosine"):
        rows = centered(rows.T).T if distance == "correlation" else rows
        norms = np.linalg.norm(rows, axis=1)
        norms[norms == 0] = np.nan  # no direction
        rows, moved, scaled = rows / norms[:, None], moved / norms, 8 * _EPS
    i, j = np.triu_indices(len(x), 1)
    d2 = squared_distances(rows)[i, j]
    rounding, tolerances = (
        2 * (16 * _EPS * d2 + (2 * np.sqrt(d2) + shift) * shift)
        for shift in (np.full_like(d2, 2 * scaled), 2 * scaled + moved[i] + moved[j])
    )
    return Distances(d2, rounding, tolerances)


def ranks(found: Distances) -> Array:
    """Ranks of distances from 1, equal ones at the mean of theirs.

    In order of size, a group ends where the next distance is more than 4 tolerances away. The
    distances of a group, m different numbers, are equal if none is further from the first than the
    first's tolerance (of numbers that are equal already, the largest), and the next ones on either
    side are more than 256 / (m - 1) of them away: pairs come as close by chance as rounding brings
    them, but large groups don't. The tolerance is
    once what float64 arithmetic may change, so that ties of what the input has exactly hold among
    distances however dense, and once that and what half an ulp of each input entry may change.
    """
    if np.isnan(found.values).any():
        return found.values  # a distance that is not defined has no rank
    order = np.argsort(found.values)
    values = found.values[order]
    gaps = np.diff(values)
    tied = gaps == 0
    for tolerances in (found.rounding[order], found.tolerances[order]):
        for group in np.split(np.arange(len(values)), np.flatnonzero(~tied) + 1):
            tolerances[group] = tolerances[group].max()  # equal distances come in any order
        wide = gaps > _APART * tolerances[:-1]
        around = np.concatenate([[np.inf], gaps, [np.inf]])
        for group in np.split(np.arange(len(values)), np.flatnonzero(wide) + 1):
            first, last, tolerance = group[0], group[-1], tolerances[group[0]]
            apart = min(around[first], around[last + 1])
            within = values[last] - values[first] <= tolerance
            others = max(1, np.count_nonzero(~tied[first:last]))
            if within and apart * others > _PAIR * tolerance:
                tied[first:last] = True
    out = np.empty_like(values)
    for group in np.split(np.arange(len(values)), np.flatnonzero(~tied) + 1):
        out[order[group]] = group.mean() + 1
    return out
