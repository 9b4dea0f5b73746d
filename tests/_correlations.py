"""Tables of correlations with what was built into them."""

from __future__ import annotations

import numpy as np
import pandas as pd

METRICS = ("cka", "procrustes", "pwcca", "cca", "cca_squared")
BOTH = ("perf", "dec")


def table(z, metrics=METRICS, changes=BOTH, n=16):
    """A table of correlations from Fisher z (class, layer, metric, change)."""
    index = pd.MultiIndex.from_product(
        [range(z.shape[0]), range(z.shape[1]), metrics, changes],
        names=["class", "layer", "distance", "change"],
    )
    rho = np.tanh(z).ravel()
    return index.to_frame(index=False).assign(model="net", spearman=rho, kendall=rho / 2, n=n)


def drawn(classes=10, layers=4, seed=0, spread=0.2, noise=0.1, dec=0.0, lead=0.0, shrink=0.0):
    """Fisher z with what decodability gains, CKA and Procrustes lead by, and how it shrinks."""
    rng = np.random.default_rng(seed)
    z = 0.3 + spread * rng.standard_normal((classes, 1, 1, 1))
    z = z + noise * rng.standard_normal((classes, layers, 5, 2))
    z[..., 1] += dec
    z[..., :2, :] += lead
    z[..., :2, 0] -= shrink / 2
    z[..., :2, 1] += shrink / 2
    return z
