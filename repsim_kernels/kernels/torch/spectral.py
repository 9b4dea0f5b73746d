"""Distances of ablations from Gram matrices alone, and spectra of batches of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from repsim_kernels._routes import Distances
from repsim_kernels.kernels import cusolver
from repsim_kernels.kernels.torch import gram, panels, representation
from repsim_kernels.kernels.torch.ablation import distances_of_parts
from repsim_kernels.kernels.torch.ablation_parts import GramParts
from repsim_kernels.kernels.torch.spectral_distances import SOLVERS, Original, Solvers
from repsim_kernels.kernels.torch.stimulus_metrics import StimulusMetrics

_EPS = torch.finfo(torch.float64).eps


def gram_ablation_distances(
    k: Tensor,
    parts: Tensor,
    *,
    metrics: tuple[str, ...],
    ridge: float,
    penalty: float,
    neurons: int | None,
    compare: str = "spearman",
    sigma: float = 1.0,
    solvers: Solvers = SOLVERS,
) -> dict[str, Distances]:
    whole, grams = (gram.double_centre(t.to(torch.float64)) for t in (k, parts))
    n = len(whole)

    def make_original(gram: Tensor) -> Original:
        count = n - 1 if neurons is None else neurons
        return Original(representation.spectrum_of_gram(gram), n, count, ridge, penalty, solvers)

    zero = (grams == 0).flatten(1).all(-1)
    traces = grams.diagonal(dim1=1, dim2=2).sum(1)
    numbers = torch.cat([zero.to(torch.float64), traces, whole.trace()[None]]).tolist()
    energy, total = numbers[len(grams) : -1], numbers[-1]
    n_remaining = [n if total - part > n * _EPS * total else 0 for part in energy]
    constant = [flag > 0 for flag in numbers[: len(grams)]]
    gram_parts = GramParts(
        whole, panels.panels_view(grams), constant, n_remaining, energy, total, grams
    )
    stimuli = StimulusMetrics(compare, sigma)
    return distances_of_parts([gram_parts], make_original, metrics, solvers, stimuli)


def eigh(a: Tensor, *, vectors: bool) -> dict[str, Tensor]:
    if cusolver.unsupported(a) is None:  # the solver that PyTorch calls since 2.12, but checked
        return cusolver.eigh(a, vectors=vectors)
    if not vectors:
        return {"values": torch.linalg.eigvalsh(a)}
    w, v = torch.linalg.eigh(a)
    return {"values": w, "vectors": v}


def svd(a: Tensor, *, vectors: bool) -> dict[str, Tensor]:
    if not vectors:
        return {"values": torch.linalg.svdvals(a)}
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return {"left": u, "values": s, "right": vh}
