"""The loss of performance at the network's output when cells are ablated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repsim_kernels.experiments.columns import HALVES, NAN_IMAGES, half_column


def measure_performance_loss(intact: Tensor, ablated: Tensor, label: int) -> dict[str, Tensor]:
    """Measure the loss of performance on a class's images when cells are ablated.

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
        (accuracy), and ``rank_deficit``, the mean of max(0, rank ablated − rank intact). The
        same again with the suffix ``_odd``, over the first, third, fifth … image, and ``_even``,
        over the others. ``nan_images`` counts the images without an answer before or after the
        ablation; a mean that includes one is NaN.

    Notes
    -----
    The rank of a class is the number of outputs strictly above it, so ties favour the class. With
    five outputs or fewer ``top5`` is always right and its change is always 0. Logits that include
    a NaN, or are all −inf, are no answer. Logits of +inf share the probability. If the class's
    probability falls to 0, the loss of ``log_probability`` is +inf.
    Source: Hayne, Jung & Carter, TMLR 2024 (the rank).

    Examples
    --------
    >>> import torch
    >>> from repsim_kernels.experiments.study.performance import measure_performance_loss
    >>> intact = torch.tensor([[2.0, 1.0, 0.0]])
    >>> ablated = torch.tensor([[[2.0, 1.0, 0.0]], [[0.0, 1.0, 2.0]]])
    >>> measure_performance_loss(intact, ablated, label=0)["top1"].tolist()
    [0.0, 1.0]
    """
    log_before, rank_before = _score_class(intact, label)
    log_after, rank_after = _score_class(ablated, label)
    # Differences image by image, so that the change for a cell without effect is exactly zero.
    per_image = {
        "rank_deficit": (rank_after - rank_before).clamp(min=0),
        # −inf minus −inf is no change either.
        "log_probability": (log_before - log_after).masked_fill(log_before == log_after, 0),
        "probability": log_before.exp() - log_after.exp(),
        "top1": _is_in_top(1, rank_before) - _is_in_top(1, rank_after),
        "top5": _is_in_top(5, rank_before) - _is_in_top(5, rank_after),
    }
    means = {name: change.mean(-1) for name, change in per_image.items()}
    for first, which in enumerate(HALVES):
        for name, change in per_image.items():
            means[half_column(name, which)] = change[..., first::2].mean(-1)
    means[NAN_IMAGES] = (rank_before.isnan() | rank_after.isnan()).double().sum(-1)
    return means


def _score_class(logits: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """Log-probability and rank of the class in float64; NaN if the logits are no answer."""
    logits = logits.double()
    infinite = logits == math.inf
    # log_softmax would compute inf - inf; in the limit only the infinite logits matter.
    limit = torch.zeros_like(logits).masked_fill(~infinite, -math.inf)
    finite = torch.where(infinite.any(-1, keepdim=True), limit, logits)
    log_probability = finite.log_softmax(-1)[..., label]
    rank = (logits > logits[..., label : label + 1]).double().sum(-1)
    no_answer = logits.isnan().any(-1) | (logits == -math.inf).all(-1)
    return log_probability.masked_fill(no_answer, math.nan), rank.masked_fill(no_answer, math.nan)


def _is_in_top(k: int, rank: Tensor) -> Tensor:
    """1 if the class is among the first k outputs, otherwise 0; NaN stays NaN."""
    return (rank < k).double().masked_fill(rank.isnan(), math.nan)
