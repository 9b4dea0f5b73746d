"""The registry of public operations, from which the exports and the dispatch table are derived.

It imports only the standard library, so that importing the package stays cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("reference", "torch", "triton", "cupy")


@dataclass(frozen=True)
class Operation:
    """A public function. Its name and its file name (the family) are the same in every directory.

    Attributes
    ----------
    name : str
        Name of the public function, and of its kernel on each backend.
    family : str
        Name of the files that define it in `ops`, and its kernels in `reference` and `kernels`.
    backends : tuple of str
        Backends that serve it.
    batched : tuple of str
        Backends whose kernel accepts batches; for the others the dispatcher loops over the items.
    with_precision : tuple of str
        Backends whose kernel takes the argument ``precision``, if the operation has one.
    kernel : str, optional
        For an operation without kernels: the operation whose kernels it runs.
    """

    name: str
    family: str
    backends: tuple[str, ...]
    batched: tuple[str, ...] = ()
    with_precision: tuple[str, ...] = ("triton",)
    kernel: str | None = None

    def target(self, backend: str) -> str:
        """Return the location of a backend's kernel, as "module:function"."""
        folder = "reference" if backend == "reference" else f"kernels.{backend}"
        return f"repsim_kernels.{folder}.{self.family}:{self.name}"


_BASE = ("reference", "torch")
_WITH_TRITON = (*_BASE, "triton")
_WITH_CUPY = (*_BASE, "cupy")

OPERATIONS = (
    Operation("centered_gram", "gram", _WITH_TRITON, batched=("torch", "triton")),
    Operation("cell_grams", "gram", BACKENDS),
    Operation("class_means", "cells", _WITH_TRITON),
    Operation("selectivity_grid", "cells", _WITH_TRITON),
    Operation("cka", "cka", _BASE, batched=("torch",), with_precision=("torch",)),
    Operation("cca", "cca", _BASE, batched=("torch",)),
    Operation("svcca", "cca", _BASE, batched=("torch",)),
    Operation("pwcca", "cca", _BASE, batched=("torch",)),
    Operation("procrustes", "procrustes", _BASE, batched=("torch",)),
    Operation("procrustes_distance", "procrustes", _BASE, batched=("torch",)),
    Operation("rsa", "rsa", _BASE),
    Operation("rdm", "rdm", _BASE),
    Operation("compare_rdms", "rdm_comparison", _BASE, batched=_BASE),
    Operation("linear_predictivity", "predictivity", _BASE),
    Operation("mutual_knn", "neighbours", _BASE),
    Operation("cknna", "neighbours", _BASE),
    Operation("jaccard_knn", "neighbours", _BASE),
    Operation("pairwise", "pairwise", _BASE, with_precision=("torch",)),
    Operation("interval", "interval", _BASE),
    Operation("ceiling", "ceiling", _BASE, kernel="pairwise"),
    Operation("similarities", "similarities", _BASE, kernel="pairwise"),
    Operation("calibrate", "calibration", _BASE, with_precision=("torch",)),
    Operation("ablation_distances", "ablation", _WITH_TRITON),
    Operation("ablation_decodability", "probe", _WITH_TRITON),
    Operation("logistic_fits", "logistic", _WITH_TRITON),
    Operation("probe_paper", "probe_paper", _WITH_TRITON, kernel="logistic_fits"),
    Operation("gram_ablation_distances", "spectral", _WITH_TRITON, batched=_WITH_TRITON),
    Operation("eigh", "spectral", _WITH_CUPY, batched=_WITH_CUPY),
    Operation("svd", "spectral", _WITH_CUPY, batched=_WITH_CUPY),
)
