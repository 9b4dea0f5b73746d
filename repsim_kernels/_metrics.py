"""The registry of metrics: their names, the functions that offer them, and what those return.

It imports nothing but the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A measure of how similar two representations are.

    None of the values that `pairwise` returns by default is a metric in the mathematical sense, and
    of the distances of `ablation_distances` only that of mutual kNN is. `procrustes_distance` has
    two others: the forms "angular" and "size-and-shape".

    Attributes
    ----------
    name : str
        Name in arguments and results, and of its public function if it has one.
    label : str
        Name in tables and figures.
    kind : {"similarity", "distance"}
        What `pairwise` returns. `ablation_distances` returns distances for all metrics.
    bounds : (float, float)
        Smallest and largest value of `pairwise` with the metric's default options.
    ablation_bounds : (float, float)
        Smallest and largest distance of `ablation_distances`.
    pairwise, ablation : bool
        Whether `pairwise` and `ablation_distances` offer it.
    has_function : bool
        Whether a public function of that name computes it for a pair. The others are options of
        one: `cka_debiased` is ``cka(debiased=True)``, and `rsa_cosine` ``rsa(distance="cosine")``.
    symmetric : bool
        Whether exchanging the two representations leaves the value unchanged.
    from_gram : bool
        Whether `gram_ablation_distances` offers it too: Gram matrices are enough to compute it.
    cca_ridge : bool
        Whether it is degenerate without a ridge or penalty if there are as many neurons as stimuli.
    calibration, ceiling : bool
        Whether `calibrate` and `ceiling` offer it.
    neighbours : bool
        Whether it compares the k nearest neighbours of stimuli, with an option ``k``.
    from_distances : bool
        Whether `ablation_distances` computes it from distances between stimuli, which it does only
        on request.
    min_stimuli : int
        The fewest stimuli that it is defined for; those of neighbours need more than ``k``.
    """

    name: str
    label: str
    kind: str = "similarity"
    bounds: tuple[float, float] = (0, 1)
    ablation_bounds: tuple[float, float] = (0, 1)
    pairwise: bool = False
    ablation: bool = False
    has_function: bool = True
    symmetric: bool = True
    from_gram: bool = True
    cca_ridge: bool = False
    calibration: bool = False
    ceiling: bool = False
    neighbours: bool = False
    from_distances: bool = False
    min_stimuli: int = 2


def _rsa_of_ablations(distance: str, from_gram: bool = True) -> Metric:
    """Return RSA with one of the distances between stimuli."""
    return Metric(
        f"rsa_{distance}",
        f"RSA, {distance}",
        ablation_bounds=(0, 2),
        ablation=True,
        has_function=False,
        from_gram=from_gram,
        from_distances=True,
        min_stimuli=3,
    )


METRICS = (
    Metric("cka", "CKA", pairwise=True, ablation=True, calibration=True, ceiling=True),
    Metric(
        "procrustes",
        "Procrustes",
        ablation_bounds=(0, 2),
        pairwise=True,
        ablation=True,
        calibration=True,
    ),
    Metric(
        "pwcca",
        "PWCCA",
        pairwise=True,
        ablation=True,
        symmetric=False,
        from_gram=False,
        cca_ridge=True,
    ),
    Metric("cca", "mean CCA", pairwise=True, ablation=True, cca_ridge=True, calibration=True),
    Metric("cca_squared", "mean squared CCA", ablation=True, has_function=False, cca_ridge=True),
    Metric("svcca", "SVCCA", pairwise=True, ablation=True),
    Metric(
        "cka_debiased",
        "debiased CKA",
        bounds=(-1, 1),
        ablation_bounds=(0, 2),
        pairwise=True,
        ablation=True,
        has_function=False,
        calibration=True,
        ceiling=True,
        min_stimuli=4,
    ),
    Metric(
        "procrustes_distance",
        "Procrustes distance",
        kind="distance",
        bounds=(0, 2),
        pairwise=True,
    ),
    Metric(
        "rsa",
        "RSA",
        bounds=(-1, 1),
        pairwise=True,
        calibration=True,
        ceiling=True,
        min_stimuli=3,
    ),
    _rsa_of_ablations("euclidean"),
    _rsa_of_ablations("cosine", from_gram=False),
    _rsa_of_ablations("correlation", from_gram=False),
    Metric("cka_rbf", "RBF CKA", ablation=True, has_function=False, from_distances=True),
    Metric(
        "linear_predictivity",
        "linear predictivity",
        bounds=(-math.inf, 1),
        pairwise=True,
        symmetric=False,
    ),
    Metric(
        "mutual_knn",
        "mutual kNN",
        pairwise=True,
        ablation=True,
        from_gram=False,
        calibration=True,
        neighbours=True,
        from_distances=True,
    ),
    Metric("cknna", "CKNNA", bounds=(-1, 1), pairwise=True, calibration=True, neighbours=True),
    Metric("jaccard_knn", "Jaccard kNN", pairwise=True, calibration=True, neighbours=True),
)


def list_default_ablation() -> tuple[str, ...]:
    """Return the metrics that `ablation_distances` computes by default."""
    return tuple(m.name for m in METRICS if m.ablation and not m.from_distances)


def list_raw_ablation() -> tuple[str, ...]:
    """Return the metrics of ablations that adding a constant to a neuron changes."""
    return tuple(m.name for m in METRICS if m.ablation and m.from_distances and not m.from_gram)
