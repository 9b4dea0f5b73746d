"""Every metric for a pair of layers.

Operations are given only for CKA: spectra, nuclear norms and ranks have no fixed number.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.common.inputs import DTYPES, count_bytes, get_cka_precision, make_pair
from bench.conftest import Timer

# Operation, label, options, stimuli, dtypes.
MetricCase = tuple[str, str, dict[str, Any], int, tuple[torch.dtype, ...]]

P = 10_000
FULL = (torch.float32, torch.float64)
# RBF kernels and RSA get fewer stimuli: their definitions pass over the neurons for each stimulus.
METRICS: tuple[MetricCase, ...] = (
    ("cka", "linear", {"debiased": False}, 500, DTYPES),
    ("cka", "debiased", {"debiased": True}, 500, DTYPES),
    ("cka", "RBF", {"kernel": "rbf"}, 200, (torch.float32,)),
    ("cca", "mean, ridge 0.1", {"ridge": 0.1}, 500, FULL),
    ("cca", "mean squared, ridge 0.1", {"ridge": 0.1, "squared": True}, 500, FULL),
    ("svcca", "", {}, 500, FULL),
    ("pwcca", "ridge 0.1", {"ridge": 0.1}, 500, FULL),
    ("procrustes", "", {}, 500, FULL),
    ("procrustes_distance", "size-and-shape", {"form": "size-and-shape"}, 500, FULL),
    ("rsa", "euclidean, spearman", {"distance": "euclidean", "compare": "spearman"}, 200, DTYPES),
    ("rsa", "correlation, pearson", {"distance": "correlation", "compare": "pearson"}, 200, DTYPES),
    ("similarities", "ridge 0.1", {"ridge": 0.1}, 200, (torch.float32,)),
)


@pytest.mark.parametrize(
    ("operation", "label", "options", "n", "dtype"),
    [(*case, dtype) for *case, dtypes in METRICS for dtype in dtypes],
    ids=str,
)
def test_metric(
    timed: Timer, operation: str, label: str, options: dict[str, Any], n: int, dtype: torch.dtype
) -> None:
    # PWCCA's weights need another pass over the first layer.
    reads = 3 if operation in ("pwcca", "similarities") else 2
    grams = {get_cka_precision(dtype, options.get("kernel", "linear")): 2 * n * (n + 1) * P}
    timed(
        operation,
        make_pair(n, P, dtype),
        options=options,
        label=label,
        shape={"n": n, "p": P},
        dtype=dtype,
        bytes=reads * count_bytes(n, P, dtype),
        operations=grams if operation == "cka" else None,
    )
