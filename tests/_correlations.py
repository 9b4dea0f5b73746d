"""Random tables of correlations with known effects."""

from __future__ import annotations

import numpy as np
import pandas as pd

METRICS = ("cka", "procrustes", "pwcca", "cca", "cca_squared")
BOTH = ("perf", "dec")


def make_table(z, metrics=METRICS, changes=BOTH, n=16):
    """Make a table of correlations from Fisher z, (class, layer, metric, change)."""
    index = pd.MultiIndex.from_product(
        [range(z.shape[0]), range(z.shape[1]), metrics, changes],
        names=["class", "layer", "distance", "change"],
    )
    rho = np.tanh(z).ravel()
    return index.to_frame(index=False).assign(model="net", spearman=rho, kendall=rho / 2, n=n)


def random_z(classes=10, layers=4, seed=0, spread=0.2, noise=0.1, dec=0.0, lead=0.0, shrink=0.0):
    """Random Fisher z in which decodability is higher by ``dec``, CKA and Procrustes by ``lead``.

    ``shrink`` is how much smaller that lead is for performance than for decodability.
    """
    rng = np.random.default_rng(seed)
    z = 0.3 + spread * rng.standard_normal((classes, 1, 1, 1))
    z = z + noise * rng.standard_normal((classes, layers, 5, 2))
    z[..., 1] += dec
    z[..., :2, :] += lead
    z[..., :2, 0] -= shrink / 2
    z[..., :2, 1] += shrink / 2
    return z
