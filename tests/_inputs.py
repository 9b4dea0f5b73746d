"""Calls of every public function that takes activations or other real numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import repsim_kernels as rk

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((6, 4)), RNG.standard_normal((6, 3))
T = torch.from_numpy(X)
RDMS = RNG.random((2, 6))
CELLS, LABELS = [0, 0, 1, 1], [0, 0, 1, 1, 2, 2]


class Unprintable:
    def __repr__(self):
        raise KeyError("no\nrepr")


class Unreadable:
    """An array-like object that raises when it is read."""

    def __array__(self, dtype=None, copy=None):
        raise KeyError("first line\nsecond line")

    def __iter__(self):
        raise OSError("first line\nsecond line")


ODD = {
    "long array": np.arange(10**4),
    "matrix": np.eye(2),
    "tensor": torch.rand(5, 5),
    "dict": {"a": np.eye(9)},
    "DataFrame": pd.DataFrame(np.eye(5)),
    "long text": "x\n" * 10**4,
    "long integer": -(10**400),
    "longer integer": -(10**5000),
    "unprintable": Unprintable(),
    "unreadable": Unreadable(),
}

PAIRS = {
    "cka": {},
    "cca": {"ridge": 0.1},
    "svcca": {},
    "pwcca": {"ridge": 0.1},
    "procrustes": {},
    "procrustes_distance": {},
    "rsa": {},
    "linear_predictivity": {},
    "mutual_knn": {"k": 2},
    "cknna": {"k": 2},
    "jaccard_knn": {"k": 2},
}
SINGLES = {
    "centered_gram": (),
    "cell_grams": (CELLS,),
    "class_means": (LABELS,),
    "selectivity_grid": (LABELS, 1),
    "ablation_distances": (CELLS,),
    "ablation_decodability": (CELLS, LABELS),
}
UNBATCHED = {
    "logistic_fits": (LABELS, [[0, 1]]),
    "probe_paper": (CELLS, LABELS, 1),
    "rdm": (),
    "searchlight": ([[0, 1], [2]],),
}


def convert_like(x, values):
    """Return NumPy values as an array of x's library."""
    return torch.from_numpy(values) if isinstance(x, torch.Tensor) else values


def list_calls(x):
    """List calls that pass x (6, 4) as each argument, with the name that errors show."""
    y = convert_like(x, Y)
    calls = [("x", lambda f=f, a=a: getattr(rk, f)(x, *a)) for f, a in SINGLES.items()]
    calls += [("x", lambda f=f, a=a: getattr(rk, f)(x, *a)) for f, a in UNBATCHED.items()]
    for f, options in PAIRS.items():
        metric = getattr(rk, f)
        calls.append(("x", lambda metric=metric, o=options: metric(x, y, **o)))
        calls.append(("y", lambda metric=metric, o=options: metric(y, x, **o)))
    gram, rdms = convert_like(x, X @ X.T), convert_like(x, RDMS)
    return [
        *calls,
        ("xs[1]", lambda: rk.pairwise([y, x])),
        ("ys[0]", lambda: rk.pairwise([y], [x])),
        ("xs[0]", lambda: rk.pairwise([x], kernel="precomputed")),
        ("y", lambda: rk.cka(gram, x, kernel="precomputed")),
        ("xs[1]", lambda: rk.calibrate([y, x])),
        ("ys[0]", lambda: rk.calibrate(y, [x])),
        ("x", lambda: rk.similarities(x, y)),
        ("y", lambda: rk.similarities(y, x)),
        ("x[1]", lambda: rk.interval([y, x], y)),
        ("y[0]", lambda: rk.interval(y, [x])),
        ("repeats[1]", lambda: rk.ceiling([y, x])),
        ("gram", lambda: rk.gram_ablation_distances(x, x)),
        ("parts", lambda: rk.gram_ablation_distances(gram, x)),
        ("a", lambda: rk.compare_rdms(x, rdms)),
        ("b", lambda: rk.compare_rdms(rdms, x)),
        ("a", lambda: rk.eigh(x)),
        ("a", lambda: rk.svd(x)),
        ("start[0]", lambda: rk.logistic_fits(y, LABELS, [[0, 1]], start=(x, [0]))),
        ("start[1]", lambda: rk.logistic_fits(y, LABELS, [[0, 1]], start=([[0]], x))),
    ]


def assert_refused(x, match):
    """Assert that every function refuses x with one line that names the argument."""
    for name, call in list_calls(x):
        with pytest.raises(rk.DtypeError) as caught:
            call()
        line = str(caught.value)
        assert line.startswith(name), line
        assert match in line
        assert "; expected" in line
        assert len(line.splitlines()) == 1
