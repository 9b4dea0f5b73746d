"""The registry of metrics: what each is called, and which functions offer it.

It imports nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A measure of how alike two representations are.

    Attributes
    ----------
    name : str
        Name in arguments and results; that of the public function where `pairwise` offers it.
    label : str
        Name in tables and figures.
    kind : {"similarity", "distance"}
        What the public function returns. `ablation_distances` returns distances of all metrics.
    pairwise, ablation : bool
        Whether `pairwise` and `ablation_distances` offer it.
    symmetric : bool
        Whether the two representations may change places.
    from_gram : bool
        Of those that `ablation_distances` offers: whether Gram matrices are enough to compute it.
    cca_ridge : bool
        Whether it needs a ridge or a penalty unless neurons are fewer than stimuli, as CCA does.
    """

    name: str
    label: str
    kind: str = "similarity"
    pairwise: bool = False
    ablation: bool = False
    symmetric: bool = True
    from_gram: bool = True
    cca_ridge: bool = False


METRICS = (
    Metric("cka", "CKA", pairwise=True, ablation=True),
    Metric("procrustes", "Procrustes", pairwise=True, ablation=True),
    Metric(
        "pwcca",
        "PWCCA",
        pairwise=True,
        ablation=True,
        symmetric=False,
        from_gram=False,
        cca_ridge=True,
    ),
    Metric("cca", "mean CCA", pairwise=True, ablation=True, cca_ridge=True),
    Metric("cca_squared", "mean squared CCA", ablation=True, cca_ridge=True),
    Metric("svcca", "SVCCA", pairwise=True, ablation=True),
    Metric("cka_debiased", "debiased CKA", ablation=True),
    Metric("procrustes_distance", "Procrustes distance", kind="distance", pairwise=True),
    Metric("rsa", "RSA", pairwise=True),
    Metric("linear_predictivity", "linear predictivity", pairwise=True, symmetric=False),
)
