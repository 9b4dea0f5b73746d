"""Other packages behind one interface: what each offers, its method, and where it differs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import repsim_kernels as rk
from bench.peers import calls
from bench.peers.calls import Ablations, Pair, Pairs


@dataclass(frozen=True)
class Package:
    """One package's implementation of one metric.

    ``pair`` takes two representations (n, p), ``all_pairs`` a list of them, ``ablations`` one and
    the cells of its neurons (p,). Without the last two, users write a loop over pairs.
    """

    name: str
    distribution: str  # name on PyPI; "" if nothing has to be installed
    kind: str  # of arrays it accepts: "torch", "numpy", "cupy"
    metric: str  # this package's name for the metric that results are compared with
    centres: bool  # whether it centres the features as its first step
    note: str  # its method, and what it leaves out
    pair: Pair | None
    all_pairs: Pairs | None = None
    ablations: Ablations | None = None
    tolerance: float = 1e-4  # on the relative error; most compute in float32
    differs: str = ""  # why its values differ from the definition's, if they do

    @property
    def key(self) -> str:
        return f"{self.name}: {self.metric}"

    def job_function(self, job: str) -> Pairs | Ablations | None:
        """Return its function for a whole job; None if users write a loop."""
        return {"pairs": self.all_pairs, "ablations": self.ablations}.get(job)


def _make_ours(metric: str, note: str, ablated: str | None = None, **options: Any) -> Package:
    name = metric if metric in ("rsa", "procrustes", "cca") else "cka"

    def ablations(x: Any, cells: np.ndarray) -> Any:
        assert ablated is not None
        return rk.ablation_distances(x, cells, metrics=[ablated])[ablated]

    return Package(
        "repsim_kernels", "", "torch", metric, True, note,
        lambda x, y: getattr(rk, name)(x, y, **options),
        lambda xs: rk.pairwise(xs, metric=name, **options),
        ablations if ablated else None,
        tolerance=1e-7 if name == "cka" else 1e-9,
    )  # fmt: skip


def _make_by_parts(metric: str, ablations: Ablations) -> Package:
    note = "this package's algorithm in float32: the Gram of the original minus that of each cell"
    name = "plain torch, by parts"
    return Package(name, "", "torch", metric, True, note, None, ablations=ablations)


FLOAT64 = "centres the features, float64"
FLOAT32 = "centres the features; products in float32, sums in float64; ablations in float64"
_plain_torch = partial(Package, "plain torch", "", "torch")
_ckatorch = partial(Package, "ckatorch", "ckatorch", "torch")
_repsim = partial(Package, "repsim", "repsim", "numpy")
_shesha = partial(Package, "shesha-geometry", "shesha-geometry", "numpy")
_sklearn = partial(Package, "scikit-learn", "scikit-learn", "numpy")
_rsatoolbox = partial(Package, "rsatoolbox", "rsatoolbox", "numpy")
_torch_cka = partial(Package, "torch-cka", "torch-cka", "torch")

PACKAGES = (
    _make_ours("cka", FLOAT32, "cka"),
    _plain_torch(
        "cka", True, "float32; computes each Gram once; one pair with p < n: feature products",
        calls.plain_cka, calls.plain_cka_pairs, calls.plain_cka_ablations,
    ),
    _make_by_parts("cka", calls.plain_cka_by_parts),
    Package("plain CuPy", "", "cupy", "cka", True, "float32; from Grams", calls.cupy_cka),
    _ckatorch(
        "cka", False, "float64; centres the Grams by multiplying with n x n matrices",
        calls.ckatorch,
    ),
    _repsim(
        "cka", False,
        "float64, C++ on one core; centres the Grams by multiplying with n x n matrices",
        calls.repsim("gretton"), calls.repsim_pairs("gretton"),
    ),
    _shesha("cka", True, "p x p products for any n", calls.shesha("cka_linear")),
    _sklearn("cka", False, "float32; linear_kernel and KernelCenterer", calls.sklearn_cka),
    _rsatoolbox(
        "cka", False, "as whitened cosine similarity of squared distances",
        calls.rsatoolbox("cosine_cov"), calls.rsatoolbox_pairs("cosine_cov"),
    ),
    _make_ours("cka_debiased", FLOAT32, "cka_debiased", debiased=True),
    _plain_torch(
        "cka_debiased", True, "float32; computes each Gram once",
        calls.plain_cka_debiased, calls.plain_cka_debiased_pairs,
        calls.plain_cka_debiased_ablations,
    ),
    _make_by_parts("cka_debiased", calls.plain_cka_debiased_by_parts),
    Package(
        "pytorch-cka", "pytorch-cka", "torch", "cka_debiased", False,
        "float32; does not centre features; cka_from_features computes the Grams of both sides",
        calls.pytorch_cka, lambda xs: calls.pytorch_cka(xs, xs), calls.pytorch_cka_ablations,
    ),
    Package(
        "pytorch-cka, hooks", "pytorch-cka", "torch", "cka_debiased", False,
        "compute_cka on a network that returns the features; float32; does not centre features",
        None, calls.pytorch_cka_hooks,
    ),
    _ckatorch(
        "cka_debiased", False, "float64; does not centre features; products of n x n Grams",
        calls.ckatorch_debiased,
    ),
    _torch_cka(
        "cka_debiased", False,
        "float32; does not centre features; a product of n x n Grams for each HSIC",
        calls.torch_cka, calls.torch_cka_pairs,
    ),
    _repsim(
        "cka_debiased", False, "float64, C++ on one core; does not centre features",
        calls.repsim("song"), calls.repsim_pairs("song"),
        differs="divides Song's estimator of HSIC by Gretton's",
    ),
    _shesha(
        "cka_debiased", True, "from Grams", calls.shesha("cka_debiased"),
        differs="keeps the diagonal in the main term, so that it is neither biased nor debiased",
    ),
    _make_ours("procrustes", FLOAT64),
    _plain_torch("procrustes", True, "float32; svdvals of p x p", calls.plain_procrustes),
    _rsatoolbox(
        "procrustes", False, "as Bures similarity of squared distances",
        calls.rsatoolbox("bures"),
    ),
    _shesha("procrustes", True, "SVD of p x p", calls.shesha("procrustes_similarity")),
    _make_ours("rsa", FLOAT64, distance="sqeuclidean", compare="pearson"),
    _rsatoolbox(
        "rsa", False, "float32; squared distances; does not centre features",
        calls.rsatoolbox("corr"), calls.rsatoolbox_pairs("corr"), tolerance=1e-3,
    ),
    _make_ours("cca", FLOAT64),
    _sklearn("cca", True, "NIPALS, one component after the other", calls.sklearn_cca),
)  # fmt: skip
"""Every package and metric that is compared; for each metric, this package comes first."""
