"""Rows of the sheet for what follows the Gram matrices, n x n in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from bench._case import Case, function

_DEFICITS = 1e-9  # what the end of the iterations promises
_STEPS = 8  # that these parts take, in fours


def cases(quick: bool) -> list[Case]:
    return [_riccati(*s) for s in ([(4, 11)] if quick else [(16, 499), (100, 49)])]


def _riccati(batch: int, m: int) -> Case:
    """The sums of square roots that Procrustes and CCA of all ablations need."""

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        """Parts with a sixteenth of the whole each, and up to a quarter of a direction."""
        v = torch.linspace(1, 0.05, m, dtype=torch.float64, device=g.device)
        a = torch.randn(batch, m, m, generator=g, dtype=torch.float64, device=g.device)
        a *= v[:, None] / (16 * m) ** 0.5
        return v, a @ a.mT

    def eigenvalues(v: Tensor, f: Tensor) -> Tensor:
        return v.sum() - torch.linalg.eigvalsh(torch.diag(v * v) - f).sqrt().sum(-1)

    def deficit(v: Tensor, f: Tensor, advance: str) -> Tensor:
        return function("torch.riccati:deficit")(v, f, function(advance))[0]

    return Case(
        "riccati",
        f"n={m + 1} C={batch}",
        torch.float64,
        "ieee",
        _DEFICITS,
        bytes=_STEPS * 24 * batch * m**2,
        operations=_STEPS * 2 * batch * m**3,
        inputs=inputs,
        kernel=lambda v, f: deficit(v, f, "triton.riccati:advance"),
        reference=eigenvalues,
        routes={
            "backend": lambda v, f: deficit(v, f, "torch.riccati:advance"),
            "eigenvalues": eigenvalues,
        },
        parts=batch,
    )
