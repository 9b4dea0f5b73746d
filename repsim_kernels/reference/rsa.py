"""Representational similarity analysis."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from repsim_kernels.reference.gram import Array, Real, centre, squared_distances

_EPS = np.finfo(np.float64).eps
# How many tolerances must separate tied distances from the next distance; see `rank_distances`.
_MIN_GAP, _PAIR_GAP = 4, 256


def rsa(x: Real, y: Real, *, distance: str = "euclidean", compare: str = "spearman") -> np.float64:
    """Compare the n(n - 1)/2 distances between the rows of x (n, p) with those of y (n, q).

    Distances have the names of SciPy's ``pdist``; neurons are not centred first. They are compared
    by ``"pearson"`` or ``"spearman"`` correlation, or by ``"cosine"`` (Kriegeskorte et al. 2008).
    Distances that differ by no more than rounding are equal; see `rank_distances`.
    """
    u, v = (compute_dissimilarities(z, distance, compare) for z in (x, y))
    return np.float64(np.clip(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)), -1, 1))


def compute_dissimilarities(x: Real, distance: str, compare: str) -> Array:
    """Return the vector that ``compare`` uses for the rows of x, (n(n - 1)/2,).

    NaN if all its entries are equal (or zero, for "cosine"), so that it has no correlation.
    """
    pairs = pair_distances(x, distance)
    values = pairs.values
    if compare == "spearman":
        d = rank_distances(pairs)
        all_equal = np.ptp(d) == 0
    else:
        d = np.sqrt(values) if distance == "euclidean" else values
        low = 0.0 if compare == "cosine" else values.min()
        at = values.argmax() if compare == "cosine" else values.argmin()
        all_equal = values.max() - low <= pairs.tolerances[at]
    if all_equal:
        return np.full_like(d, np.nan)
    return d if compare == "cosine" else d - d.mean()


class PairDistances(NamedTuple):
    """Squared distances of all pairs of rows, (n(n - 1)/2,), in the order of the upper triangle."""

    values: Array
    rounding: Array  # how far float64 arithmetic may separate two equal distances
    tolerances: Array  # the same, including half an ulp of each input entry


def pair_distances(x: Real, distance: str) -> PairDistances:
    """Return squared distances, between rows of unit length for "correlation" and "cosine".

    Equal rows have bit-identical distances, since all rows are summed in the same order.
    """
    half_ulp = np.finfo(x.dtype).eps / 2 if x.dtype.kind == "f" else 0.0
    rows = np.asarray(x, dtype=np.float64)
    input_shift = half_ulp * np.linalg.norm(rows, axis=1)
    scaling_error = 0.0
    if distance in ("correlation", "cosine"):
        rows = centre(rows.T).T if distance == "correlation" else rows
        norms = np.linalg.norm(rows, axis=1)
        norms[norms == 0] = np.nan  # a zero row has no direction
        rows, input_shift, scaling_error = rows / norms[:, None], input_shift / norms, 8 * _EPS
    i, j = np.triu_indices(len(x), 1)
    d2 = squared_distances(rows)[i, j]
    rounding, tolerances = (
        2 * (16 * _EPS * d2 + (2 * np.sqrt(d2) + shift) * shift)
        for shift in (
            np.full_like(d2, 2 * scaling_error),
            2 * scaling_error + input_shift[i] + input_shift[j],
        )
    )
    return PairDistances(d2, rounding, tolerances)


def rank_distances(pairs: PairDistances) -> Array:
    """Rank distances from 1, with ties at their mean rank.

    In ascending order, a group ends where the next distance is more than 4 tolerances away. The m
    different numbers of a group tie if all are within the first one's tolerance of the first, and
    the next distances on either side are more than 256 / (m - 1) tolerances away: a pair can be
    this close by chance, but a large group hardly ever is. Exactly equal distances count as one
    number with the largest of their tolerances.

    The rule is applied twice. First the tolerance is the error of float64 arithmetic, so that
    distances that are equal in the exact input tie however dense the others are; then it includes
    half an ulp of each input entry.
    """
    if np.isnan(pairs.values).any():
        return pairs.values  # an undefined distance has no rank
    order = np.argsort(pairs.values)
    values = pairs.values[order]
    gaps = np.diff(values)
    tied = gaps == 0
    for tolerances in (pairs.rounding[order], pairs.tolerances[order]):
        for group in np.split(np.arange(len(values)), np.flatnonzero(~tied) + 1):
            tolerances[group] = tolerances[group].max()  # their order is arbitrary
        wide = gaps > _MIN_GAP * tolerances[:-1]
        around = np.concatenate([[np.inf], gaps, [np.inf]])
        for group in np.split(np.arange(len(values)), np.flatnonzero(wide) + 1):
            first, last, tolerance = group[0], group[-1], tolerances[group[0]]
            margin = min(around[first], around[last + 1])
            within = values[last] - values[first] <= tolerance
            n_steps = max(1, np.count_nonzero(~tied[first:last]))
            if within and margin * n_steps > _PAIR_GAP * tolerance:
                tied[first:last] = True
    out = np.empty_like(values)
    for group in np.split(np.arange(len(values)), np.flatnonzero(~tied) + 1):
        out[order[group]] = group.mean() + 1
    return out
