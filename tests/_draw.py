"""Hypothesis strategies for representations, cells and labels; and layers without it.

Hypothesis draws sizes, kinds and a seed, and NumPy's Generator the numbers, so that a failing
example shrinks to small sizes and prints as one line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

KINDS = ("gaussian", "relu", "low rank", "large mean", "constant columns", "duplicate rows")
NUMPY_DTYPES = ("float64", "float32", "float16")
TORCH_DTYPES = (*NUMPY_DTYPES, "bfloat16")
TORCH_LAYOUTS = ("C", "F", "steps")
NUMPY_LAYOUTS = (*TORCH_LAYOUTS, "reversed")

SEEDS = st.integers(0, 2**16)
STIMULI = st.integers(2, 12)
NEURONS = st.integers(1, 30)


@dataclass(frozen=True)
class Representation:
    """Parameters of a reproducible (n, p) array that is not constant."""

    n: int
    p: int
    kind: str = "gaussian"
    dtype: str = "float64"
    layout: str = "C"
    seed: int = 0

    def values(self) -> np.ndarray:
        """Return the values as float64, rounded to the dtype."""
        rng = np.random.default_rng(self.seed)
        x = rng.standard_normal((self.n, self.p))
        if self.kind == "relu":
            x = np.maximum(x, 0)
        elif self.kind == "low rank":  # small integers: the rank is exact in every dtype
            r = max(min(self.n - 1, self.p) // 2, 1)
            x = rng.integers(-3, 4, (self.n, r)) @ rng.integers(-3, 4, (r, self.p)) * 1.0
        elif self.kind == "large mean":
            x += 1000
        elif self.kind == "constant columns":
            x[:, : (self.p + 1) // 2] = x[0, : (self.p + 1) // 2]
        elif self.kind == "duplicate rows":
            x[: self.n // 2] = x[0]
        x = self._round(x)
        if (x == x[0]).all():
            x[-1, 0] = x[0, 0] == 0
        return x

    def _round(self, x: np.ndarray) -> np.ndarray:
        if self.dtype == "bfloat16":
            import torch

            return torch.from_numpy(x).to(torch.bfloat16).double().numpy()
        return x.astype(self.dtype).astype(np.float64)

    def numpy(self) -> np.ndarray:
        """Return the values as a NumPy array of the dtype and layout."""
        return _with_layout(np.zeros, self.values().astype(self.dtype), self.layout)

    def torch(self) -> Any:
        """Return the values as a CPU tensor of the dtype and layout."""
        import torch

        def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
            return torch.zeros(shape, dtype=dtype)

        tensor = torch.from_numpy(self.values()).to(getattr(torch, self.dtype))
        return _with_layout(zeros, tensor, self.layout)


def _with_layout(zeros: Any, x: Any, layout: str) -> Any:
    """Return a view with the same numbers and another memory layout."""
    n, p = x.shape
    if layout == "F":
        view = zeros((p, n), dtype=x.dtype).T
    elif layout == "steps":
        view = zeros((2 * n, 3 * p), dtype=x.dtype)[::2, 1::3]
    elif layout == "reversed":
        view = zeros((n, p), dtype=x.dtype)[::-1, ::-1]
    else:
        return x
    view[:] = x
    return view


@st.composite
def representations(
    draw: st.DrawFn,
    n: st.SearchStrategy[int] = STIMULI,
    p: st.SearchStrategy[int] = NEURONS,
    kinds: tuple[str, ...] = KINDS,
    dtypes: tuple[str, ...] = ("float64",),
    layouts: tuple[str, ...] = ("C",),
) -> Representation:
    """Draw a representation of the given sizes, kinds, dtypes and layouts."""
    return Representation(
        draw(n),
        draw(p),
        draw(st.sampled_from(kinds)),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(layouts)),
        draw(SEEDS),
    )


@st.composite
def pairs(draw: st.DrawFn, **options: Any) -> tuple[Representation, Representation]:
    """Draw two representations of the same stimuli; options as for ``representations``."""
    x, y = draw(representations(**options)), draw(representations(**options))
    return x, replace(y, n=x.n)


@st.composite
def labels(draw: st.DrawFn, p: int, max_cells: int = 5) -> tuple[np.ndarray, int]:
    """Draw a label for each of p neurons, -1 for no cell, and the number of cells (some empty)."""
    n_cells = draw(st.integers(1, max_cells))
    return np.random.default_rng(draw(SEEDS)).integers(-1, n_cells, p), n_cells


@st.composite
def memberships(draw: st.DrawFn, p: int, max_cells: int = 5) -> np.ndarray:
    """Draw a boolean membership (C, p): cells overlap, and some have no neuron or all."""
    n_cells = draw(st.integers(1, max_cells))
    rng = np.random.default_rng(draw(SEEDS))
    return rng.random((n_cells, p)) < rng.choice([0, 0.2, 0.5, 1], (n_cells, 1))


@st.composite
def cells_and_ids(
    draw: st.DrawFn, p: int, min_size: int = 1, max_size: int = 10
) -> tuple[Any, Any]:
    """Draw labels or a membership of up to 4 cells, and a list of cells, in any order."""
    import torch

    if draw(st.booleans()):
        cells = draw(memberships(p, max_cells=4))
        n_cells = len(cells)
    else:
        cells, n_cells = draw(labels(p, max_cells=4))
    ids = draw(st.lists(st.integers(0, n_cells - 1), min_size=min_size, max_size=max_size))
    return torch.from_numpy(cells), torch.tensor(ids, dtype=torch.int64)


@st.composite
def classes(draw: st.DrawFn, n: int, max_classes: int = 4) -> np.ndarray:
    """Draw the class of each of n stimuli, 0 to k - 1, with k at least 2 and no class empty."""
    k = draw(st.integers(2, min(max_classes, n)))
    return np.random.default_rng(draw(SEEDS)).permutation(np.arange(n) % k)


def make_layers(n: int, seed: int = 0, widths: tuple[int, ...] = (5, 30, 8)) -> list[np.ndarray]:
    """Make layers that share some of their variance with the first."""
    rng = np.random.default_rng(seed)
    layers = [rng.standard_normal((n, p)) for p in widths]
    return [x + layers[0][:, :1] * (i > 0) for i, x in enumerate(layers)]
