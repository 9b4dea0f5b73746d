"""The registry of public operations, from which the exports and the dispatch table derive.

It imports nothing but the standard library, so that importing the package stays cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("reference", "torch", "triton", "cupy")


@dataclass(frozen=True)
class Operation:
    """A public function with one name and one file name (its family) in every directory.

    Attributes
    ----------
    name : str
        Name of the public function, and of its kernel on each backend if it has its own.
    family : str
        File that holds it in ops, and its own kernels in reference and kernels.
    backends : tuple of str
        Backends that serve it.
    batched : tuple of str
        Backends whose kernel takes leading dimensions itself; for the others the dispatcher loops.
    kernel : str, optional
        Operation whose kernels it runs, if it has none of its own.
    """

    name: str
    family: str
    backends: tuple[str, ...]
    batched: tuple[str, ...] = ()
    kernel: str | None = None

    def target(self, backend: str) -> str:
        """Return where the kernel of a backend is, as "module:function"."""
        folder = "reference" if backend == "reference" else f"kernels.{backend}"
        return f"repsim_kernels.{folder}.{self.family}:{self.name}"


_PLAIN = ("reference", "torch")
_TRITON = (*_PLAIN, "triton")
_CUPY = (*_PLAIN, "cupy")

OPERATIONS = (
    Operation("centered_gram", "gram", _TRITON, batched=("torch", "triton")),
    Operation("cell_grams", "gram", BACKENDS),
    Operation("class_means", "cells", _TRITON),
    Operation("selectivity_grid", "cells", _TRITON),
    Operation("cka", "cka", _PLAIN, batched=("torch",)),
    Operation("cca", "cca", _PLAIN, batched=("torch",)),
    Operation("svcca", "cca", _PLAIN, batched=("torch",)),
    Operation("pwcca", "cca", _PLAIN, batched=("torch",)),
    Operation("procrustes", "procrustes", _PLAIN, batched=("torch",)),
    Operation("procrustes_distance", "procrustes", _PLAIN, batched=("torch",)),
    Operation("rsa", "rsa", _PLAIN),
    Operation("linear_predictivity", "predictivity", _PLAIN),
    Operation("pairwise", "pairwise", _PLAIN),
    Operation("ablation_distances", "ablation", _TRITON),
    Operation("ablation_decodability", "probe", _TRITON),
    Operation("logistic_fits", "logistic", _TRITON),
    Operation("probe_paper", "probe_paper", _TRITON, kernel="logistic_fits"),
    Operation("gram_ablation_distances", "spectral", _TRITON, batched=_TRITON),
    Operation("eigh", "spectral", _CUPY, batched=_CUPY),
    Operation("svd", "spectral", _CUPY, batched=_CUPY),
)
