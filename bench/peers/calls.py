"""How each package is called, following its own documentation.

A package is imported on its first call, so this module imports without any of them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Pair = Callable[[Any, Any], Any]
Pairs = Callable[[list[Any]], Any]
Ablations = Callable[[Any, Any], Any]


def _centre(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _cosine(k: Tensor, h: Tensor) -> Tensor:
    return (k * h).sum() / (torch.linalg.norm(k) * torch.linalg.norm(h))


def _debiased_cosine(k: Tensor, h: Tensor) -> Tensor:
    n = len(k)
    k, h = (z - z.diagonal().diag() for z in (k, h))

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        sums = a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(0) @ b.sum(0))
        return (a * b).sum() + sums

    return hsic(k, h) / (hsic(k, k).sqrt() * hsic(h, h).sqrt())


def plain_cka(x: Tensor, y: Tensor) -> Tensor:
    x, y = _centre(x), _centre(y)
    if x.shape[1] + y.shape[1] < 2 * len(x):
        xy, xx, yy = (torch.linalg.norm(a.T @ b) for a, b in ((x, y), (x, x), (y, y)))
        return xy**2 / (xx * yy)
    return _cosine(x @ x.T, y @ y.T)


def plain_cka_debiased(x: Tensor, y: Tensor) -> Tensor:
    x, y = _centre(x), _centre(y)
    return _debiased_cosine(x @ x.T, y @ y.T)


def _plain_ablations(similarity: Pair, gram_without: Callable[..., Tensor]) -> Ablations:
    """Return a function of all ablations that computes the original's Gram once."""

    def ablations(x: Tensor, cells: Tensor) -> Tensor:
        c = _centre(x)
        k = c @ c.T
        grams = (gram_without(c, k, cells == cell) for cell in range(int(cells.max()) + 1))
        return torch.stack([1 - similarity(k, h) for h in grams])

    return ablations


def _by_copy(c: Tensor, k: Tensor, cell: Tensor) -> Tensor:
    rest = c * ~cell
    return rest @ rest.T


def _by_parts(c: Tensor, k: Tensor, cell: Tensor) -> Tensor:
    part = c[:, cell]
    return k - part @ part.T


def _plain_pairs(centre: Callable[[Tensor], Tensor]) -> Pairs:
    """Return a function of all pairs: one Gram per layer, one product for all pairs."""

    def pairs(xs: list[Tensor]) -> Tensor:
        grams = torch.stack([centre(c @ c.T).flatten() for c in map(_centre, xs)])
        grams /= torch.linalg.norm(grams, dim=1, keepdim=True)
        return grams @ grams.T

    return pairs


def _u_centre(k: Tensor) -> Tensor:
    n = len(k)
    k.fill_diagonal_(0)
    rows = k.sum(1) / (n - 2)
    return (k - rows - rows[:, None] + rows.sum() / (n - 1)).fill_diagonal_(0)


plain_cka_pairs, plain_cka_debiased_pairs = map(_plain_pairs, (lambda k: k, _u_centre))
plain_cka_ablations = _plain_ablations(_cosine, _by_copy)
plain_cka_debiased_ablations = _plain_ablations(_debiased_cosine, _by_copy)
plain_cka_by_parts = _plain_ablations(_cosine, _by_parts)
plain_cka_debiased_by_parts = _plain_ablations(_debiased_cosine, _by_parts)


def cupy_cka(x: Any, y: Any) -> Any:
    cupy = importlib.import_module("cupy")
    k, h = (z @ z.T for z in (x - x.mean(0), y - y.mean(0)))
    return (k * h).sum() / (cupy.linalg.norm(k) * cupy.linalg.norm(h))


def pytorch_cka(x: Any, y: Any) -> Tensor:
    from cka import cka_from_features

    return cka_from_features(x, y)


def pytorch_cka_ablations(x: Tensor, cells: Tensor) -> Tensor:
    """Pass the ablated copies as a generator: all at once they would not fit in memory."""
    copies: Any = (x * (cells != cell) for cell in range(int(cells.max()) + 1))
    return 1 - pytorch_cka(x, copies)[0]


class _Layers(nn.Module):
    """A network that splits its input into features of equal width, one identity layer each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer, features in zip(self.layers, x.chunk(len(self.layers), 1), strict=True):
            layer(features)
        return x

    @property
    def names(self) -> list[str]:
        return [f"layers.{i}" for i in range(len(self.layers))]


class _Batch:
    """A data loader with one batch."""

    dataset = "features"

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        return iter([(self.x,)])


def pytorch_cka_hooks(xs: list[Tensor]) -> Tensor:
    from cka import compute_cka

    model, device = _Layers(len(xs)), xs[0].device
    loader: Any = _Batch(torch.cat(xs, 1))
    return compute_cka(model, model, loader, layers=model.names, device=device, progress=False)[0]


def torch_cka(x: Tensor, y: Tensor) -> Tensor:
    return _compare(_Layers(1), _Layers(1), x, y)[0, 0]


def _compare(first: _Layers, second: _Layers, x: Tensor, y: Tensor) -> Tensor:
    from torch_cka import CKA

    names = {"model1_layers": first.names, "model2_layers": second.names}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        warnings.simplefilter("ignore")
        cka = CKA(first, second, "a", "b", **names, device=str(x.device))
        cka.compare(_Batch(x), _Batch(y))
    matrix: Tensor = cka.export()["CKA"]
    return matrix


def torch_cka_pairs(xs: list[Tensor]) -> Tensor:
    x = torch.cat(xs, 1)
    return _compare(_Layers(len(xs)), _Layers(len(xs)), x, x)


def ckatorch(x: Tensor, y: Tensor) -> Tensor:
    from ckatorch import cka_base

    return cka_base(x, y)


def ckatorch_debiased(x: Tensor, y: Tensor) -> Tensor:
    from ckatorch import cka_batch

    return cka_batch(x[None], y[None])


def _rdms(*xs: np.ndarray) -> list[Any]:
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm

    return [calc_rdm(Dataset(x), method="euclidean") for x in xs]


def rsatoolbox(method: str) -> Pair:
    def pair(x: np.ndarray, y: np.ndarray) -> Any:
        from rsatoolbox.rdm import compare

        return compare(*_rdms(x, y), method=method)[0, 0]

    return pair


def rsatoolbox_pairs(method: str) -> Pairs:
    def pairs(xs: list[Any]) -> Any:
        from rsatoolbox.rdm import compare, concat

        rdms = concat(_rdms(*xs))
        return compare(rdms, rdms, method=method)

    return pairs


def repsim_pairs(estimator: str) -> Callable[[Sequence[Any]], Any]:
    def pairs(xs: Sequence[Any]) -> Any:
        import repsim

        return repsim.cka(list(xs), kernel_type="linear", estimator=estimator)

    return pairs


def repsim(estimator: str) -> Pair:
    return lambda x, y: repsim_pairs(estimator)([x, y])[0, 1]


def shesha(name: str) -> Pair:
    return lambda x, y: getattr(importlib.import_module("shesha.sim"), name)(x, y)


def sklearn_cka(x: np.ndarray, y: np.ndarray) -> Any:
    from sklearn.metrics.pairwise import linear_kernel
    from sklearn.preprocessing import KernelCenterer

    k, h = (KernelCenterer().fit_transform(linear_kernel(z)) for z in (x, y))
    return (k * h).sum() / (np.linalg.norm(k) * np.linalg.norm(h))


def sklearn_cca(x: np.ndarray, y: np.ndarray) -> Any:
    from sklearn.cross_decomposition import CCA

    k = min(x.shape[1], y.shape[1])
    u, v = CCA(n_components=k, scale=False, max_iter=2000).fit_transform(x, y)
    return np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(u.T, v.T, strict=True)])


def plain_procrustes(x: Tensor, y: Tensor) -> Tensor:
    x, y = _centre(x), _centre(y)
    return torch.linalg.svdvals(x.T @ y).sum() / (torch.linalg.norm(x) * torch.linalg.norm(y))
