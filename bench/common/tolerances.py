"""All tolerances, and the assertions that use them.

The oracle is the float64 reference on the same rounded inputs. NaN fails, unless a test allows it
explicitly and both sides have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tol:
    """Allows errors up to ``relative`` times the oracle's value or ``absolute``, if larger."""

    relative: float
    absolute: float = 0.0

    def get_bounds(self, want: np.ndarray) -> np.ndarray:
        return np.maximum(self.relative * np.abs(want), self.absolute)


# Grams, by the precision of the products.
GRAM = {"float64": 1e-12, "ieee": 1e-5, "tf32x3": 1e-5, "tf32": 1e-3}
# Added for the dtype of the output: half a unit in its last place.
OUTPUT = {"float64": 0.0, "float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Distances, by the precision of the Grams they are computed from.
DISTANCE = {"float64": Tol(1e-6, 1e-14), "float32": Tol(1e-4, 1e-14)}
# Smaller distances are compared with the 60-digit oracle, because 1 - s loses too many digits.
SMALL_DISTANCE = 1e-9
# Two float64 computations of the same well-conditioned number.
SAME = Tol(1e-10, 1e-13)


def as_numpy(a: Any) -> np.ndarray:
    """Convert any array or number to float64 NumPy."""
    if hasattr(a, "detach"):
        a = a.detach().cpu().double().numpy()
    elif hasattr(a, "get"):
        a = a.get()
    return np.asarray(a, dtype=np.float64)


def assert_close(got: Any, want: Any, tol: Tol, *, nan: bool = False) -> None:
    """Assert that got is elementwise within tol of want; ``nan`` allows NaN where want has it."""
    got, want = as_numpy(got), as_numpy(want)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    missing = np.isnan(want)
    assert nan or not missing.any(), "the oracle itself is NaN"
    np.testing.assert_array_equal(np.isnan(got), missing, err_msg="NaN")
    error, allowed = np.abs(got - want)[~missing], tol.get_bounds(want[~missing])
    worst = np.max(error / np.where(allowed > 0, allowed, np.finfo(np.float64).tiny), initial=0)
    assert (error <= allowed).all(), f"{worst:.3g} times the tolerance {tol}:\n{got}\n{want}"


def assert_gram_close(got: Any, want: Any, tol: float, *, scale: Any = None) -> None:
    """Assert that each matrix of (..., n, n) is within tol of want, in two ways.

    The error's Frobenius norm is relative to the matrix's; the largest error is relative to the
    largest squared row norm of the centred input, which is want's largest diagonal entry unless
    ``scale`` (...) is given.
    """
    got, want = as_numpy(got), as_numpy(want)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    error = got - want
    frobenius = np.linalg.norm(want, axis=(-2, -1))
    largest = np.diagonal(want, axis1=-2, axis2=-1).max(-1) if scale is None else as_numpy(scale)
    assert np.isfinite(error).all(), "NaN or infinity"
    assert (np.linalg.norm(error, axis=(-2, -1)) <= tol * frobenius).all(), (
        f"relative Frobenius error {np.linalg.norm(error, axis=(-2, -1))} of {frobenius}"
    )
    assert (np.abs(error).max((-2, -1)) <= tol * largest).all(), (
        f"largest error {np.abs(error).max((-2, -1))} of squared row norm {largest}"
    )


def assert_rank_fidelity(got: Any, want: Any, tol: Tol) -> None:
    """Assert that no pair is out of order among those that differ by more than tol in want."""
    got, want = as_numpy(got), as_numpy(want)
    assert np.isfinite(got).all(), "NaN or infinity"
    assert np.isfinite(want).all(), "the oracle itself is NaN or infinite"
    allowed = tol.get_bounds(want)
    distinct = want[:, None] - want > np.maximum(allowed[:, None], allowed)
    wrong = np.argwhere(distinct & (got[:, None] <= got))
    assert not len(wrong), f"{len(wrong)} of {distinct.sum()} pairs out of order, first {wrong[:5]}"
