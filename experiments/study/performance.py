"""What an ablation costs at the network's output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repsim_kernels.experiments.columns import HALVES, NAN_IMAGES, half


def measure_performance_loss(intact: Tensor, ablated: Tensor, label: int) -> dict[str, Tensor]:
    """What a class's images lose when cells are ablated.

    Parameters
    ----------
    intact : tensor, (n, k)
        Logits of the class's images.
    ablated : tensor, (C, n, k)
        Their logits with each cell ablated.
    label : int
        The class's output.

    Returns
    -------
    dict of str to tensor, (C,), float64
        Means over the images, intact minus ablated, so positive where function is lost:
        ``probability`` and ``log_probability`` (nats) of the class, ``top1`` and ``top5``
        (accuracy), and ``rank_deficit``, the mean of max(0, rank ablated − rank intact). With
        ``_odd`` and ``_even`` behind its name, each over every other image, from the first and
        from the second on. ``nan_images`` counts the images without an answer, before or after
        the ablation; a mean over any of them is NaN.

    Notes
    -----
    The rank of a class is the number of outputs strictly above it, so a tie counts for the
    class. With five outputs or fewer ``top5`` is always right and its change always 0.
    Logits that hold a NaN, or are all −inf, are no answer. Logits of +inf share the probability.
    Where it falls to 0, ``log_probability`` loses +inf.
    Source: Hayne, Jung & Carter, TMLR 2024 (the rank).
    """
    log_before, rank_before = _outcome(intact, label)
    log_after, rank_after = _outcome(ablated, label)
    # Differences image by image: a cell without effect changes exactly nothing.
    per_image = {
        "rank_deficit": (rank_after - rank_before).clamp(min=0),
        # −inf less −inf is no change, too.
        "log_probability": (log_before - log_after).masked_fill(log_before == log_after, 0),
        "probability": log_before.exp() - log_after.exp(),
        "top1": _among_first(1, rank_before) - _among_first(1, rank_after),
        "top5": _among_first(5, rank_before) - _among_first(5, rank_after),
    }
    found = {name: change.mean(-1) for name, change in per_image.items()}
    for first, which in enumerate(HALVES):
        for name, change in per_image.items():
            found[half(name, which)] = change[..., first::2].mean(-1)
    found[NAN_IMAGES] = (rank_before.isnan() | rank_after.isnan()).double().sum(-1)
    return found


def _outcome(logits: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """Log-probability and rank of the class, float64; NaN where the logits are no answer."""
    logits = logits.double()
    infinite = logits == math.inf
    # log_softmax would subtract inf from inf: its limit has only the infinite logits left.
    limit = torch.zeros_like(logits).masked_fill(~infinite, -math.inf)
    finite = torch.where(infinite.any(-1, keepdim=True), limit, logits)
    log_probability = finite.log_softmax(-1)[..., label]
    rank = (logits > logits[..., label : label + 1]).double().sum(-1)
    no_answer = logits.isnan().any(-1) | (logits == -math.inf).all(-1)
    return log_probability.masked_fill(no_answer, math.nan), rank.masked_fill(no_answer, math.nan)


def _among_first(k: int, rank: Tensor) -> Tensor:
    """1 where the class is among the first k outputs, 0 where not; NaN stays NaN."""
    return (rank < k).double().masked_fill(rank.isnan(), math.nan)
