"""What an ablation costs at the network's output."""

from __future__ import annotations

from torch import Tensor

from .controls import HALVES, half


def performance(intact: Tensor, ablated: Tensor, label: int) -> dict[str, Tensor]:
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
        from the second on.

    Notes
    -----
    The rank of a class is the number of outputs strictly above it, so a tie counts for the
    class. With five outputs or fewer ``top5`` is always right and its change always 0.
    Source: Hayne, Jung & Carter, TMLR 2024 (the rank).
    """

    def outcome(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_probability = logits.double().log_softmax(-1)[..., label]
        return log_probability, (logits > logits[..., label : label + 1]).sum(-1)

    log_before, rank_before = outcome(intact)
    log_after, rank_after = outcome(ablated)
    # Differences image by image: a cell without effect changes exactly nothing.
    per_image = {
        "rank_deficit": (rank_after - rank_before).clamp(min=0),
        "log_probability": log_before - log_after,
        "probability": log_before.exp() - log_after.exp(),
        "top1": (rank_before < 1).double() - (rank_after < 1).double(),
        "top5": (rank_before < 5).double() - (rank_after < 5).double(),
    }
    found = {name: change.double().mean(-1) for name, change in per_image.items()}
    for first, which in enumerate(HALVES):
        for name, change in per_image.items():
            found[half(name, which)] = change[..., first::2].double().mean(-1)
    return found
