"""The Grams of layers and their products, by backend, and the layers that tests draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from _draw import KINDS, SEEDS, Representation
from hypothesis import strategies as st

from repsim_kernels import _dispatch
from repsim_kernels._arrays import Source


@st.composite
def layers(draw: st.DrawFn, min_n: int, dtypes: tuple[str, ...]) -> list[Any]:
    """Draw layers of the same stimuli, with fewer and with more neurons than these."""
    n, seed = draw(st.integers(min_n, 14)), draw(SEEDS)
    widths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    return [
        Representation(
            n, p, draw(st.sampled_from(KINDS)), draw(st.sampled_from(dtypes)), seed=seed + i
        ).torch()
        for i, p in enumerate(widths)
    ]


def make_grams(
    xs: list[Any], backend: str, debiased: bool, precision: str = "float64"
) -> tuple[Any, Any, Any]:
    """Return the Grams, traces and floors of layers."""
    return _dispatch.call(
        *("layer_grams", backend, Source("torch", str(xs[0].device)), xs),
        **{"debiased": debiased, "precision": precision},
    )


def multiply_grams(h: Any, k: Any, n: int, backend: str, debiased: bool) -> tuple[Any, Any, Any]:
    """Return the products of all pairs of Grams, and of each with itself."""
    source = Source("torch", str(h.device))
    return _dispatch.call("gram_products", backend, source, h, k, n=n, debiased=debiased)


def compare(
    xs: list[Any], ys: list[Any], backend: str, debiased: bool, precision: str = "float64"
) -> tuple[Any, Any, Any]:
    """Return the products of all pairs of layers, and of each with itself."""
    h, k = (make_grams(side, backend, debiased, precision)[0] for side in (xs, ys))
    return multiply_grams(h, k, len(xs[0]), backend, debiased)


def assert_products_close(got: Any, want: Any, norms: Any, tolerance: float) -> None:
    """Assert that products (xy, xx, yy) are within a tolerance, relative to the layers' norms."""
    left, right = (np.sqrt(np.asarray(a)) for a in norms)
    scales = np.outer(left, right), left**2, right**2
    for a, b, scale in zip(got, want, scales, strict=True):
        error = np.abs(a.cpu().numpy() - np.asarray(b))
        assert a.shape == b.shape
        assert (error <= tolerance * scale).all(), f"{np.max(error / scale):.3g}"
