"""Linear decodability: the reference's brute force, and scikit-learn fold by fold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import TORCH_LAYOUTS, classes, labels, memberships
from _draw import representations as drawn
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

import repsim_kernels as rk


@given(st.data(), st.booleans(), st.sampled_from([0.01, 1.0, 10.0]))
def test_against_brute_force(data, one_class, ridge):
    x = data.draw(drawn(n=st.integers(4, 12), kinds=("gaussian", "relu"), layouts=TORCH_LAYOUTS))
    cells = data.draw(st.one_of(labels(x.p).map(lambda c: c[0]), memberships(x.p)))
    y = data.draw(classes(x.n))
    options = {"target": int(y[0]) if one_class else None, "ridge": ridge}
    got = rk.ablation_decodability(x.torch(), cells, y, **options)
    want = rk.ablation_decodability(x.values(), cells, y, backend="reference", **options)
    assert got["intact"] == pytest.approx(want["intact"], abs=1e-12)
    for name in ("refit", "frozen"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-12, err_msg=name)


def readers(x, y, cell, ridge):
    """Held-out outputs of scikit-learn's Ridge, refitted on the rest and frozen: (n, k) each."""
    onehot = np.eye(y.max() + 1)[y]
    out = []
    ablated = np.where(cell, 0, x)
    for fitted, applied in ((ablated, ablated), (x, ablated)):
        centred = fitted - fitted.mean(0)
        alpha = ridge * (centred**2).sum() / len(x)
        rows = []
        for i in range(len(x)):
            keep = np.arange(len(x)) != i
            model = Ridge(alpha=alpha).fit(fitted[keep], onehot[keep])
            rows.append(model.predict(applied[i : i + 1])[0])
        out.append(np.array(rows))
    return out


@pytest.mark.parametrize("p", [5, 60])
@pytest.mark.parametrize("mean", [0, 50])
def test_against_scikit_learn(p, mean):
    rng = np.random.default_rng(p)
    y = np.arange(30) % 3
    x = np.maximum(rng.standard_normal((30, p)) + rng.standard_normal((3, p))[y], 0) + mean
    cells = rng.integers(0, 4, p)
    got = rk.ablation_decodability(x, cells, y, ridge=0.5)
    one = rk.ablation_decodability(x, cells, y, target=1, ridge=0.5)
    for c in range(4):
        for name, outputs in zip(("refit", "frozen"), readers(x, y, cells == c, 0.5), strict=True):
            assert got[name][c] == (outputs.argmax(1) == y).mean()
            said = outputs[:, 1] > 0.5
            want = (said[y == 1].mean() + (~said[y != 1]).mean()) / 2
            assert one[name][c] == pytest.approx(want, abs=1e-12)


def test_what_is_written_in_one_cell_is_lost_with_it():
    """Class 1 against the rest stands in cell 2 alone."""
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = rng.standard_normal((40, 30)) * 0.1
    x[:, 20:] += 3 * y[:, None]
    for kind in (x, torch.from_numpy(x).float()):
        got = rk.ablation_decodability(kind, np.arange(30) // 10, y, target=1)
        assert got["intact"] == 1
        assert isinstance(got["intact"], float)
        for name in ("refit", "frozen"):
            assert (got[name][:2] == 1).all()
            assert got[name][2] < 0.8


def test_extreme_cells_and_batches():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 9, 6)), np.arange(9) % 3
    cells = np.zeros((3, 6), bool)
    cells[1] = True
    got = rk.ablation_decodability(x, cells, y)
    assert got["refit"].shape == (2, 3)
    assert got["intact"].shape == (2,)
    np.testing.assert_array_equal(got["refit"][:, 0], got["intact"])
    np.testing.assert_array_equal(got["frozen"][:, 0], got["intact"])
    assert np.isnan(got["refit"][:, 1]).all()
    assert np.isfinite(got["frozen"]).all()
