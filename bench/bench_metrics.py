"""CKA of a pair of layers."""

from __future__ import annotations

import pytest
import torch

import repsim_kernels as rk
from bench.common.inputs import DTYPES, as_distances, pair, products, reference, size

P = 10_000


def cka(timed, n, dtype, what, **options):
    timed(
        "cka",
        lambda x, y: rk.cka(x, y, **options),
        pair(n, P, dtype),
        oracle=reference("cka", **options),
        check=as_distances("cka", dtype),
        what=what,
        shape={"n": n, "p": P},
        dtype=dtype,
        bytes=2 * size(n, P, dtype),
        operations={products("cka", dtype): 2 * n * (n + 1) * P},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("debiased", [False, True], ids=["linear", "debiased"])
def test_cka(timed, debiased, dtype):
    cka(timed, 500, dtype, "debiased" if debiased else "linear", debiased=debiased)


def test_rbf(timed):
    """Fewer stimuli: the definition takes a pass over the neurons for each of them."""
    cka(timed, 200, torch.float32, "RBF", kernel="rbf")
