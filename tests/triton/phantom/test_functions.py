"""Every public function on the phantom device: values of the CPU, nothing that a GPU would refuse.

The CPU runs the backend that the device chose: Triton's kernels in the interpreter, or PyTorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from _phantom import PhantomTensor
from _phantom_cuda import phantom_device
from torch import Tensor

import repsim_kernels as rk
from bench.common.tolerances import Tol, assert_close
from repsim_kernels import _arrays, _dispatch
from repsim_kernels._operations import OPERATIONS
from repsim_kernels.ops.rdm_comparison import METHODS

N, P, C = 12, 30, 3
RNG = np.random.default_rng(0)
X, Y, Z = (RNG.standard_normal((N, p)) for p in (P, 17, P))
TALL = RNG.standard_normal((30, 5))  # more stimuli than candidates for their neighbours
CELLS = np.where(np.arange(P) % 4 < C, np.arange(P) % 4, -1)
LABELS = np.arange(N) % 3
MEMBERSHIP = RNG.random((C, P)) < 0.4
SPARSE = tuple(getattr(scipy.sparse.csr_array(MEMBERSHIP), name) for name in ("indptr", "indices"))
PARTITIONS = np.stack([CELLS, CELLS[::-1]])
# Equal stimuli, some that are equal without one of three cells, and one that is 0 without another.
TIED = np.round(X)
TIED[1], TIED[3, 10:], TIED[4:, :10], TIED[11, :20] = TIED[0], TIED[2, 10:], TIED[4, :10], 0
STIMULI = ["rsa_euclidean", "rsa_cosine", "rsa_correlation", "cka_rbf", "mutual_knn"]
FIVE = ["cka", "cca", "pwcca", "svcca", "procrustes"]
COLUMNS = [X[:, np.flatnonzero(c == CELLS)] for c in range(C)]
PARTS = np.stack([x @ x.T for x in COLUMNS])
SYMMETRIC = np.stack([X @ X.T, Z @ Z.T])
NOISE = torch.from_numpy(X.T @ X + np.eye(P))
RDMS = np.random.default_rng(2).integers(0, 9, (5, 28)) * 1.0  # with ties
MODELS = torch.from_numpy(np.random.default_rng(3).integers(0, 9, (2, N * (N - 1) // 2)) * 1.0)
SPHERES = [np.arange(P), np.arange(0), np.array([4]), np.arange(5, 17), np.arange(11, 23)]
Call = tuple[tuple[Any, ...], dict[str, Any]]

# The representations, which move to the device, and the other arguments of each call.
CASES: dict[str, list[Call]] = {
    "centered_gram": [
        ((X,), {}),
        ((X,), {"kernel": "rbf"}),
        ((np.stack([X, Z]),), {"batched": True}),
    ],
    "cell_grams": [
        ((X,), {"cells": CELLS}),
        ((X,), {"cells": MEMBERSHIP}),
        ((X,), {"cells": PARTITIONS}),
        ((X,), {"cells": torch.from_numpy(CELLS)}),
        ((X,), {"cells": SPARSE}),
    ],
    "class_means": [((X,), {"labels": LABELS})],
    "selectivity_grid": [
        ((X,), {"labels": LABELS, "target": 1, "grid": (2, 2)}),
        ((X,), {"labels": LABELS, "target": 1, "grid": (2, 2), "edges": "inclusive"}),
        ((X,), {"labels": torch.from_numpy(LABELS), "target": 2, "grid": (2, 2)}),
    ],
    "cka": [((X, Y), {}), ((X, Y), {"debiased": True}), ((X, Y), {"kernel": "rbf"})],
    "cca": [((X, Y), {"ridge": 0.1}), ((X, Y[:, :5]), {"ridge": 0.0})],
    "svcca": [((X, Y), {})],
    "pwcca": [((X, Y), {"ridge": 0.1})],
    "procrustes": [((X, Y), {})],
    "procrustes_distance": [((X, Y), {}), ((X, Y), {"form": "angular"})],
    "rsa": [((X, Y), {}), ((X, Y), {"compare": "cosine"})],
    "rdm": [
        ((X,), {}),
        ((TIED,), {"distance": "sqeuclidean"}),
        ((X,), {"distance": "mahalanobis", "labels": LABELS, "noise": NOISE}),
        ((X,), {"distance": "mahalanobis", "noise": torch.from_numpy(TALL).mT}),
        ((X,), {"distance": "crossnobis", "labels": LABELS, "noise": LABELS}),
        ((X,), {"distance": "crossnobis", "labels": LABELS}),
    ],
    "compare_rdms": [((RDMS, RDMS[:2]), {"method": method}) for method in METHODS],
    "searchlight": [
        ((X,), {"neighbours": SPARSE}),
        ((TIED,), {"neighbours": SPHERES, "distance": "sqeuclidean"}),
        ((X,), {"neighbours": SPHERES, "distance": "correlation", "labels": LABELS}),
        ((TIED,), {"neighbours": SPHERES, "distance": "cosine"}),
        ((X,), {"neighbours": SPARSE, "distance": "mahalanobis", "noise": NOISE}),
        ((X,), {"neighbours": SPHERES, "distance": "mahalanobis", "noise": LABELS}),
        ((X,), {"neighbours": SPHERES, "distance": "crossnobis", "labels": LABELS}),
        (
            (X,),
            {
                **{"neighbours": SPHERES, "distance": "crossnobis", "labels": LABELS},
                **{"noise": LABELS, "shrinkage": "diagonal", "memory": 1},
            },
        ),
        ((X,), {"neighbours": SPARSE, "compare_to": MODELS, "method": "kendall"}),
    ],
    "linear_predictivity": [((X, Y), {}), ((X, Y), {"ridge": "gcv"})],
    "mutual_knn": [((X, Y), {}), ((TALL, TALL[:, :3]), {"distance": "euclidean"})],
    "cknna": [((TALL, TALL[:, :3]), {"k": 4})],
    "jaccard_knn": [((TALL, TALL[:, :3]), {"k": 4, "distance": "correlation"})],
    "pairwise": [(([X, Y, Z],), {}), (([X, Y], [Z]), {"debiased": True})],
    "similarities": [((X, Y), {"ridge": 0.1})],
    "calibrate": [
        (([X, Y], [Y, Z, X]), {"permutations": 20, "debiased": True}),
        ((X, Y), {"permutations": 20, "strata": LABELS, "metric": "rsa"}),
        ((X, Y), {"permutations": 20, "metric": "procrustes"}),
        ((X, Y), {"permutations": 20, "metric": "cca", "squared": True, "ridge": 0.1}),
        ((X, Y), {"permutations": 20, "metric": "mutual_knn", "k": 3}),
        (([X, Z], [Y, Z]), {"permutations": 20, "aggregate": "max"}),
        ((X, Y), {"null": "moments"}),
    ],
    "interval": [
        ((X, Y), {}),
        (([X, Y], Z), {"kernel": "rbf", "debiased": False}),
        ((X, [Y, Z]), {"metric": "rsa", "compare": "pearson"}),
        ((X, Y), {"metric": "procrustes", "method": "subsampling"}),
    ],
    "ceiling": [((np.stack([X, Z, X - Z]),), {}), (([X, Y, Z],), {"metric": "rsa"})],
    "ablation_distances": [
        ((X,), {"cells": CELLS, "metrics": FIVE}),
        ((X,), {"cells": MEMBERSHIP, "metrics": FIVE}),
        ((X,), {"cells": SPARSE, "metrics": FIVE, "memory": 1}),
        ((X[:, :9],), {"cells": scipy.sparse.csr_array(MEMBERSHIP[:, :9]), "metrics": FIVE}),
        ((X,), {"cells": PARTITIONS, "metrics": ["cka", "svcca", "procrustes"]}),
        ((X[:, :9],), {"cells": CELLS[:9], "metrics": FIVE}),
        ((X,), {"cells": np.arange(P) % 2, "metrics": [*FIVE, "cka_debiased"]}),
        ((X,), {"cells": np.minimum(np.arange(P) // 26, 1), "metrics": FIVE}),
        ((X,), {"cells": CELLS, "metrics": "all", "k": 4}),
        ((X,), {"cells": MEMBERSHIP, "metrics": STIMULI, "k": 4, "compare": "pearson"}),
        ((X,), {"cells": PARTITIONS, "metrics": [*STIMULI, "cka"], "k": 4}),
        ((TIED,), {"cells": np.arange(P) // 10, "metrics": STIMULI, "k": 4}),
    ],
    "ablation_decodability": [
        ((X,), {"cells": CELLS, "labels": LABELS}),
        ((X,), {"cells": MEMBERSHIP, "labels": LABELS, "target": [0, 1]}),
        ((X,), {"cells": SPARSE, "labels": LABELS, "target": 2}),
        ((X,), {"cells": PARTITIONS, "labels": LABELS, "ridge": "gcv", "folds": np.arange(N) % 4}),
        ((X,), {"cells": CELLS, "labels": LABELS, "probe": "logistic", "folds": 3}),
    ],
    "logistic_fits": [((X,), {"y": LABELS % 2, "columns": np.arange(6).reshape(2, 3)})],
    "probe_paper": [
        ((X,), {"cells": CELLS % 2, "labels": LABELS, "target": 1, "draws": 2, "size": 3}),
    ],
    "gram_ablation_distances": [
        ((X @ X.T, PARTS), {}),
        ((X @ X.T, PARTS), {"metrics": ["cka_debiased", "cca_squared"]}),
        ((X @ X.T, PARTS), {"metrics": "all"}),
    ],
    "eigh": [((SYMMETRIC,), {}), ((SYMMETRIC,), {"vectors": False})],
    "svd": [((X,), {}), ((PARTS,), {"vectors": False})],
}
# The other public names, and where they are tested on the device or why they need no test.
ELSEWHERE = {
    "MinibatchCKA": "test_networks.py",
    "compare": "test_networks.py",
    "extract": "test_networks.py",
    "SimilarityMap": "holds NumPy arrays",
    "Calibrated": "what `calibrate` returns",
    "Interval": "the result of interval",
    "Ceiling": "the result of ceiling",
    "show_config": "takes no arrays",
    "spheres": "computed by SciPy",
}
LAYOUTS = {
    "rows": lambda t: t.contiguous(),
    "columns": lambda t: t.mT.contiguous().mT,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CALLS = [(name, i) for name, calls in CASES.items() for i in range(len(calls))]
# The device batches what the CPU computes one by one. The solvers return the input's dtype.
TOLERANCE = Tol(1e-6, 1e-9)
IN_FLOAT32 = Tol(1e-4, 1e-4)


def test_every_public_function_has_a_case():
    errors = {name for name in rk.__all__ if isinstance(getattr(rk, name), type)} - set(ELSEWHERE)
    assert set(rk.__all__) - errors == set(CASES) | set(ELSEWHERE)
    assert set(CASES) == {op.name for op in OPERATIONS}


def convert(values: Any, dtype: torch.dtype, layout: str, device: str) -> Any:
    if isinstance(values, list):
        return [convert(v, dtype, layout, device) for v in values]
    return LAYOUTS[layout](torch.from_numpy(values).to(dtype)).to(device)


def list_arrays(result: Any) -> list[Any]:
    if isinstance(result, dict):
        return list_arrays(list(result.values()))
    if isinstance(result, (list, tuple)):
        return [a for value in result for a in list_arrays(value)]
    return [result]


def run(name: str, index: int, dtype: torch.dtype, layout: str, device: str, **more: Any) -> Any:
    arguments, options = CASES[name][index]
    options = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in options.items()
    }
    inputs = [convert(a, dtype, layout, device) for a in arguments]
    return getattr(rk, name)(*inputs, **options, **more)


def list_combinations() -> Iterator[Any]:
    """List all calls in all dtypes and layouts; each call in one of these is fast."""
    for i, call in enumerate(CALLS):
        for j, (dtype, layout) in enumerate(itertools.product(DTYPES, LAYOUTS)):
            marks = () if j == i % 6 else pytest.mark.slow
            name = f"{call[0]} {call[1]}, {str(dtype)[6:]}, {layout}"
            yield pytest.param(*call, dtype, layout, marks=marks, id=name)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that the dispatcher chooses, in order."""
    chosen: list[str] = []
    choose = _dispatch.choose_backend

    def spy(*arguments: Any) -> str:
        chosen.append(choose(*arguments))
        return chosen[-1]

    monkeypatch.setattr(_dispatch, "choose_backend", spy)
    return chosen


@pytest.mark.filterwarnings("ignore::repsim_kernels.DegenerateWarning")
@pytest.mark.parametrize(("name", "index", "dtype", "layout"), tuple(list_combinations()))
def test_values_are_those_of_the_cpu(backends, name, index, dtype, layout):
    with phantom_device():
        got = list_arrays(run(name, index, dtype, layout, "cuda"))
        assert all(isinstance(a, (PhantomTensor, float)) for a in got)
        got = [a.cpu() if isinstance(a, PhantomTensor) else a for a in got]
    backend = backends[0]
    want = list_arrays(run(name, index, dtype, layout, "cpu", backend=backend))
    assert len(got) == len(want) > 0
    is_solver = name in ("eigh", "svd")
    if is_solver:  # vectors are unique up to their sign
        got, want = ([a.abs() for a in each] for each in (got, want))
    tolerance = IN_FLOAT32 if is_solver and dtype != torch.float64 else TOLERANCE
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, tolerance, nan=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cka", {"debiased": False, "kernel": "linear", "sigma": None}),
        ("cka", {"debiased": True, "kernel": "rbf", "sigma": 0.5}),
        ("procrustes", {}),
        ("rsa", {"distance": "euclidean", "compare": "pearson"}),
        ("rsa", {"distance": "correlation", "compare": "cosine"}),
    ],
)
@pytest.mark.parametrize("arguments", [(X, Y), (TALL, TALL[:, :3])])
def test_gradients_are_those_of_the_cpu(name, options, arguments):
    """Those that `backward` computes; autograd itself does not know the device."""
    results = []
    with phantom_device():
        for device in ("cuda", "cpu"):
            x, y, upstream = (
                torch.from_numpy(a).to(device) for a in (*arguments, np.full((1, 1), 0.5))
            )
            source = _arrays.Source("torch", str(x.device))
            got = _dispatch.call(
                f"{name}_gradients", "torch", source, x, y, upstream, sides=(0, 1), **options
            )
            assert all(g.device == x.device for g in got)
            results.append([g.cpu() for g in got])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, TOLERANCE)


@pytest.mark.parametrize("name", ["calibrate", "searchlight"])
def test_parts_of_a_function_run_in_triton(backends, name):
    with phantom_device():
        run(name, 0, torch.float64, "rows", "cuda")
    assert backends[0] == "torch"
    assert "triton" in backends
