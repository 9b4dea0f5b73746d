"""Many logistic regressions at once, beside a loop over scikit-learn's.

No operations are given: how many steps a fit takes isn't known beforehand.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor

import repsim_kernels as rk
from bench.common.tolerances import Tol, assert_close

FITS, LOOPED, N, D, P = 2000, 200, 500, 100, 100_352
TARGET = (np.arange(N) % 10 == 0).astype(np.int64)
APART = {"classes alike": 0.0, "classes apart": 0.7}
LOOP = f"a loop over scikit-learn, {LOOPED} of the fits"


def of_classes(g: Generator, apart: float, p: int = P, dtype=torch.float32) -> Tensor:
    """Rectified activations (N, p), neuron by neuron, of ten classes some way apart."""
    means = apart * torch.randn(p, 10, generator=g, device=g.device)
    noise = torch.randn(p, N, generator=g, device=g.device)
    return noise.add_(means[:, torch.arange(N) % 10]).relu_().to(dtype).mT


def drawn() -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([rng.choice(P, D, replace=False) for _ in range(FITS)])


def common(classes: str, dtype: torch.dtype) -> dict[str, object]:
    shape = {"n": N, "p": P, "d": D, "fits": FITS}
    return {"what": classes, "shape": shape, "dtype": dtype}


def fitted(x: Tensor, y: np.ndarray, **options: object) -> LogisticRegression:
    return LogisticRegression(**options).fit(x.cpu().numpy(), y)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [*((which, torch.float32) for which in APART), ("classes apart", torch.float64)],
    ids=str,
)
def test_logistic_fits(timed, classes, dtype):
    """Coefficients to 1e-4 of the largest in float32, and the errors of five fits exactly."""
    columns = drawn()

    def exact(x: Tensor) -> list[tuple[np.ndarray, int]]:
        found = []
        for own in columns[:5]:
            v = x[:, own].double()
            model = fitted(v, TARGET, solver="newton-cholesky", tol=1e-12)
            found.append((model.coef_[0], int((model.predict(v.cpu().numpy()) != TARGET).sum())))
        return found

    def check(got: dict[str, Tensor], want: list[tuple[np.ndarray, int]]) -> None:
        assert got["converged"].all()
        tol = 1e-4 if dtype == torch.float32 else 1e-8
        for i, (coef, errors) in enumerate(want):
            assert_close(got["coef"][i], coef, Tol(0, tol * np.abs(coef).max()))
            assert got["errors"][i] == errors

    timed(
        "logistic_fits",
        lambda g: (of_classes(g, APART[classes], dtype=dtype),),
        options={"y": TARGET, "columns": columns},
        oracle=exact,
        check=check,
        **common(classes, dtype),
    )


@pytest.mark.parametrize("classes", APART)
def test_loop(timed, classes):
    """scikit-learn's defaults, as the study's code has them, on columns gathered at no cost.

    They stop early, so that they are held to the converged fits by the errors they make.
    """
    columns = drawn()[:LOOPED]

    def gathered(g: Generator) -> tuple[Tensor, ...]:
        x = of_classes(g, APART[classes])
        return tuple(x[:, own].contiguous() for own in columns)

    def wrong(values: tuple[Tensor, ...], models: list[LogisticRegression]) -> float:
        pairs = zip(values, models, strict=True)
        return float(np.mean([(m.predict(v.numpy()) != TARGET).mean() for v, m in pairs]))

    def ours(*values: Tensor) -> float:
        fits = [rk.logistic_fits(v, TARGET, np.arange(D)[None])["errors"] for v in values]
        return float(torch.cat(fits).double().mean()) / N

    timed(
        "logistic_fits",
        gathered,
        call=lambda *values: [fitted(v, TARGET) for v in values],
        oracle=lambda *values: (values, ours(*values)),
        check=lambda got, want: assert_close(wrong(want[0], got), want[1], Tol(0, 1e-3)),
        name=LOOP,
        device="cpu",
        **common(classes, torch.float32),
    )
