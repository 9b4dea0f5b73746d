"""Many logistic regressions in one call, compared with a loop over scikit-learn's.

The number of steps of a fit is not known in advance, so no operations are given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor

import repsim_kernels as rk
from bench.common.tolerances import Tol, assert_close
from bench.conftest import Timer

FITS, LOOPED, N, D, P = 2000, 200, 500, 100, 100_352
TARGET = (np.arange(N) % 10 == 0).astype(np.int64)
SEPARATION = {"classes alike": 0.0, "classes apart": 0.7}
LOOP = f"a loop over scikit-learn, {LOOPED} of the fits"


def draw_classes(
    g: Generator, separation: float, p: int = P, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw rectified, neuron-major activations (N, p) of ten classes with separated means."""
    means = separation * torch.randn(p, 10, generator=g, device=g.device)
    noise = torch.randn(p, N, generator=g, device=g.device)
    return noise.add_(means[:, torch.arange(N) % 10]).relu_().to(dtype).mT


def draw_columns() -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([rng.choice(P, D, replace=False) for _ in range(FITS)])


def describe_fits(classes: str, dtype: torch.dtype) -> dict[str, Any]:
    shape = {"n": N, "p": P, "d": D, "fits": FITS}
    return {"label": classes, "shape": shape, "dtype": dtype}


def fit_sklearn(x: Tensor, y: np.ndarray, **options: Any) -> LogisticRegression:
    return LogisticRegression(**options).fit(x.cpu().numpy(), y)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [*((classes, torch.float32) for classes in SEPARATION), ("classes apart", torch.float64)],
    ids=str,
)
def test_logistic_fits(timed: Timer, classes: str, dtype: torch.dtype) -> None:
    """Check five fits: coefficients to 1e-4 of the largest in float32, errors exactly."""
    columns = draw_columns()

    def fit_exactly(x: Tensor) -> list[tuple[np.ndarray, int]]:
        fits = []
        for chosen in columns[:5]:
            v = x[:, chosen].double()
            model = fit_sklearn(v, TARGET, solver="newton-cholesky", tol=1e-12)
            fits.append((model.coef_[0], int((model.predict(v.cpu().numpy()) != TARGET).sum())))
        return fits

    def check(got: dict[str, Tensor], want: list[tuple[np.ndarray, int]]) -> None:
        assert got["converged"].all()
        tol = 1e-4 if dtype == torch.float32 else 1e-8
        for i, (coef, errors) in enumerate(want):
            assert_close(got["coef"][i], coef, Tol(0, tol * np.abs(coef).max()))
            assert got["errors"][i] == errors

    timed(
        "logistic_fits",
        lambda g: (draw_classes(g, SEPARATION[classes], dtype=dtype),),
        options={"y": TARGET, "columns": columns},
        oracle=fit_exactly,
        check=check,
        **describe_fits(classes, dtype),
    )


@pytest.mark.parametrize("classes", SEPARATION)
def test_loop(timed: Timer, classes: str) -> None:
    """scikit-learn with its defaults, as in the study's code; gathering columns is not timed.

    Its fits stop early, so only their classification errors are compared with converged fits.
    """
    columns = draw_columns()[:LOOPED]

    def gather(g: Generator) -> tuple[Tensor, ...]:
        x = draw_classes(g, SEPARATION[classes])
        return tuple(x[:, chosen].contiguous() for chosen in columns)

    def compute_error_rate(values: tuple[Tensor, ...], models: list[LogisticRegression]) -> float:
        pairs = zip(values, models, strict=True)
        return float(np.mean([(m.predict(v.numpy()) != TARGET).mean() for v, m in pairs]))

    def compute_our_error_rate(*values: Tensor) -> float:
        fits = [rk.logistic_fits(v, TARGET, np.arange(D)[None])["errors"] for v in values]
        return float(torch.cat(fits).double().mean()) / N

    timed(
        "logistic_fits",
        gather,
        call=lambda *values: [fit_sklearn(v, TARGET) for v in values],
        oracle=lambda *values: (values, compute_our_error_rate(*values)),
        check=lambda got, want: assert_close(
            compute_error_rate(want[0], got), want[1], Tol(0, 1e-3)
        ),
        name=LOOP,
        device="cpu",
        **describe_fits(classes, torch.float32),
    )
