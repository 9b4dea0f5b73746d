"""Ablation distances: each backend against the reference, and against 60-digit arithmetic."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from _draw import TORCH_LAYOUTS, labels, memberships, representations
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import DISTANCE, Tol, assert_close, assert_rank_fidelity
from repsim_kernels.kernels.torch import gram
from repsim_kernels.ops.ablation import METRICS

SELF_ZERO = ("cka", "procrustes", "svcca", "cka_debiased")


def compute_distances(x, cells, backend=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        return rk.ablation_distances(x, cells, backend=backend, **options)


def assert_agree(got, want, tol, nan=True):
    assert set(got) == set(want)
    for name in want:
        try:
            assert_close(got[name], want[name], tol, nan=nan)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# Few stimuli, or enough for a matrix to have several panels.
STIMULI = st.one_of(st.integers(4, 12), st.integers(25, 60))
# The oracle computes 1 minus a similarity, which leaves it no digits at 1e-14.
FLOAT64 = Tol(1e-9, 1e-13)


@pytest.mark.parametrize("regular", [{"ridge": 0.1}, {"penalty": 2.0}, {"ridge": 1e-4}])
@given(st.data())
def test_labels_match_the_reference(regular, data):
    x = data.draw(
        representations(n=st.integers(4, 12), kinds=("gaussian", "relu"), layouts=TORCH_LAYOUTS)
    )
    cells, _ = data.draw(labels(x.p))
    got = compute_distances(x.torch(), cells, **regular)
    assert_agree(got, compute_distances(x.values(), cells, "reference", **regular), FLOAT64)


@given(st.data())
def test_memberships_match_the_reference(data):
    x = data.draw(representations(n=STIMULI, kinds=("gaussian", "constant columns")))
    cells = data.draw(memberships(x.p))
    assert_agree(
        compute_distances(x.values(), cells),
        compute_distances(x.values(), cells, "reference"),
        FLOAT64,
    )


@given(st.data())
def test_float32_matches_the_reference(data):
    x = data.draw(representations(n=STIMULI, kinds=("gaussian", "relu"), dtypes=("float32",)))
    cells, _ = data.draw(labels(x.p))
    assert_agree(
        compute_distances(x.numpy(), cells),
        compute_distances(x.values(), cells, "reference"),
        DISTANCE["float32"],
    )


@pytest.mark.parametrize("p", [6, 25, 40, 400])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.9999])
def test_cells_of_any_energy_match_the_reference(p, share):
    """Cells with little or nearly all of the energy, for p below n and far above."""
    rng = np.random.default_rng(p)
    x = rng.standard_normal((24, p))
    cells = np.arange(p) % 3
    x[:, cells == 1] *= np.sqrt(share / (1 - share) * 2)
    got, want = compute_distances(x, cells), compute_distances(x, cells, "reference")
    assert_agree(got, want, FLOAT64, nan=False)
    for name in METRICS:
        assert_rank_fidelity(got[name], want[name], DISTANCE["float64"])


@given(
    st.sampled_from([6, 25, 60]),
    st.floats(0, 30),
    st.sampled_from(["labels", "membership"]),
    st.integers(0, 2**32 - 1),
)
def test_a_cell_that_hides_the_rest_matches_the_reference(p, exponent, kind, seed):
    """Two neurons with almost all of the variance, without which only small ones remain."""
    x = np.random.default_rng(seed).standard_normal((20, p))
    x[:, :2] *= 10**exponent
    inside = np.arange(p) < 2
    cells = np.where(inside, 0, -1) if kind == "labels" else inside
    got = compute_distances(x, cells, "torch", metrics="all")
    want = compute_distances(x, cells, "reference", metrics="all")
    assert_agree(got, want, Tol(1e-8, 1e-12))
    a, b = x - x.mean(0), x[:, 2:] - x[:, 2:].mean(0)
    nuclear = np.linalg.svd(a.T @ b, compute_uv=False).sum()
    expected = 2 - 2 * nuclear / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(got["procrustes"], expected, rtol=1e-8)


@pytest.mark.parametrize("form", ["sparse", "partitions", "known Grams"])
def test_every_form_of_cells_finds_what_a_cell_hides(form):
    x = np.random.default_rng(1).standard_normal((12, 40))
    x[:, :3] *= 1e9
    member = np.stack([np.arange(40) < 3, np.arange(40) % 2 == 0])
    cells, options = member, {}
    if form == "sparse":
        cells = np.array([0, 3, 23]), np.concatenate([np.flatnonzero(m) for m in member])
    elif form == "partitions":
        cells = np.where(member, 0, -1)
    else:
        options["grams"] = rk.cell_grams(x, member)
    got, info = compute_distances(x, cells, "torch", info=True, **options)
    want = compute_distances(x, cells, "reference")
    assert_agree(got, want, Tol(1e-8, 1e-12))
    for name in {"procrustes", "svcca", "cca", "cca_squared", "pwcca"}:
        assert (info[name].route.flatten() == "definition").tolist() == [True, False]


def test_distances_match_the_pair_metrics():
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((20, 60)), 0)
    cells = rng.integers(0, 4, 60)
    got = rk.ablation_distances(x, cells, ridge=0.2)
    for c in range(4):
        y = np.where(cells == c, 0, x)
        for name, want in {
            "cka": 1 - rk.cka(x, y),
            "cka_debiased": 1 - rk.cka(x, y, debiased=True),
            "procrustes": rk.procrustes_distance(x, y),
            "svcca": 1 - rk.svcca(x, y),
            "cca": 1 - rk.cca(x, y, ridge=0.2),
            "cca_squared": 1 - rk.cca(x, y, ridge=0.2, squared=True),
            "pwcca": 1 - rk.pwcca(x, y, ridge=0.2),
        }.items():
            assert got[name][c] == pytest.approx(want, rel=1e-9), name


@pytest.mark.parametrize("options", [{"ridge": 0.1}, {"penalty": 5.0}, {"ridge": 0.0}])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_cells_give_the_self_distance_and_complete_ones_nan(options, backend):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((7, 12))
    x[:, 4:6] = 0.1
    x[:, 6] = 0
    cells = np.zeros((4, 12), bool)
    cells[1, 4:7] = True  # constant neurons
    cells[2, :] = True  # all neurons
    cells[3, :4] = cells[3, 7:] = True  # all neurons that vary
    got = compute_distances(x, cells, backend, **options)
    for name in METRICS:
        assert got[name][0] == got[name][1], name
        assert np.isnan(got[name][2:]).all(), name
        if name in SELF_ZERO or options == {"ridge": 0.0}:
            assert got[name][0] == pytest.approx(0, abs=1e-12 if backend == "reference" else 0)
    if options != {"ridge": 0.0}:
        for name, squared in (("cca", False), ("cca_squared", True)):
            self_distance = 1 - rk.cca(x, x, squared=squared, **options)
            assert got[name][0] == pytest.approx(self_distance, rel=1e-12)
        assert got["pwcca"][0] == pytest.approx(1 - rk.pwcca(x, x, **options), rel=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_neuron_whose_mean_is_its_first_value_is_not_constant(transposed):
    rng = np.random.default_rng(4)
    x = rng.integers(-9, 9, (7, 12)).astype(float)
    x[0, :6] = x[1:, :6].sum(0)
    x[1:, :6] *= 6
    x[:, 6] = 3
    cells = np.arange(12) // 2
    got = compute_distances(x.T.copy().T if transposed else x, cells)
    assert_agree(got, compute_distances(x, cells, "reference"), FLOAT64)


def test_equidistant_stimuli_have_no_debiased_distance():
    rng = np.random.default_rng(5)
    x = np.concatenate([np.linalg.qr(rng.standard_normal((6, 6)))[0], np.full((6, 1), 0.1)], 1)
    for backend in ("torch", "reference"):
        got = compute_distances(
            x, np.array([0, 0, 1, 1, 1, 2, 3]), backend, metrics=["cka_debiased"]
        )
        np.testing.assert_array_equal(got["cka_debiased"], [np.nan, np.nan, np.nan, 0])


def test_neurons_in_no_cell_belong_to_the_original():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((10, 30))
    labels_ = rng.integers(-1, 3, 30)
    membership = labels_ == np.arange(3)[:, None]
    assert_agree(
        compute_distances(x, labels_),
        compute_distances(x, membership),
        Tol(1e-10, 1e-15),
        nan=False,
    )


@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4])
def test_small_distances_keep_their_digits(scale):
    """Down to 1e-17, where 1 minus a similarity has no digits."""
    import _oracle

    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, 9))
    x[:, 7:] *= scale
    cells = np.where(np.arange(9) >= 7, 0, -1)
    got = rk.ablation_distances(x, cells, metrics=("cka", "procrustes", "cka_debiased"))
    y = x.copy()
    y[:, 7:] = 0
    for name, want in {
        "cka": 1 - _oracle.cka(x, y),
        "cka_debiased": 1 - _oracle.cka_debiased(x, y),
        "procrustes": _oracle.procrustes_distance(x, y),
    }.items():
        assert 0 < got[name][0] < scale**2
        assert float(got[name][0]) == pytest.approx(float(want), rel=1e-6, abs=1e-21), name


def test_batches_of_cells_do_not_change_distances(monkeypatch):
    rng = np.random.default_rng(4)
    x, cells = rng.standard_normal((8, 50)), rng.integers(-1, 20, 50)
    want = compute_distances(x, cells)
    monkeypatch.setattr(gram, "_BATCH", 3 * 64)
    assert_agree(compute_distances(x, cells, memory=1), want, Tol(1e-12, 1e-15))


def find_routes(x, cells, metric, **options):
    """Return the route of each distance and its number of steps."""
    _, info = rk.ablation_distances(x, cells, metrics=[metric], info=True, **options)
    return info[metric].route.tolist(), info[metric].steps


def test_info_reports_routes_and_steps():
    """Procrustes takes eigenvalues unless the distance is tiny, otherwise iterations or factors.

    CCA takes iterations if they converge soon, and otherwise eigenvectors.
    """
    rng = np.random.default_rng(5)
    x = rng.standard_normal((12, 100))
    cells = np.where(np.arange(100) < 12, np.arange(100) // 2, -1)
    assert find_routes(x, cells, "procrustes")[0] == ["eigenvalues"] * 6
    for scaled, metric in ((np.where(cells < 0, 1, 1e-3) * x, "procrustes"), (x, "cca")):
        route, steps = find_routes(scaled, cells, metric)
        assert route == ["iterations"] * 6
        assert ((steps > 0) & (steps < 16)).all()
    few = x[:, :13]  # without 5, fewer neurons than directions remain
    for count, route in ((2, "eigenvalues"), (5, "factors")):
        assert find_routes(few, np.where(np.arange(13) < count, 0, -1), "procrustes")[0] == [route]
    assert find_routes(few, np.arange(13) // 4, "cca")[0][:3] == ["eigenvectors"] * 3
    assert find_routes(x, np.zeros(100, int), "procrustes")[0] == ["nothing"]
    assert find_routes(x, [np.arange(100) < 0], "pwcca")[0] == ["nothing"]
    assert find_routes(x, np.arange(100) // 50, "pwcca")[0] == ["eigenvectors"] * 2
    assert find_routes(x, np.arange(100) // 50, "cka")[0] == ["sums"] * 2
    assert find_routes(x, np.arange(100) // 50, "cka", backend="reference")[0] == ["definition"] * 2
    _, info = rk.ablation_distances(
        np.stack([x, few[:, np.arange(100) % 13]]), np.arange(100) // 50, batched=True, info=True
    )
    assert info["pwcca"].route.tolist() == [["eigenvectors"] * 2] * 2
    assert info["procrustes"].steps.shape == (2, 2)
    with pytest.raises(rk.OptionError, match="info: 1; expected True or False"):
        rk.ablation_distances(x, np.arange(100) // 50, info=1)


def test_batches_of_any_kind_match_single_calls():
    rng = np.random.default_rng(6)
    x, cells = rng.standard_normal((2, 6, 14)), rng.integers(0, 3, 14)
    got = rk.ablation_distances(x, cells.tolist(), batched=True)
    tensors = rk.ablation_distances(
        torch.from_numpy(x), torch.from_numpy(cells.astype(np.uint8)), batched=True
    )
    for name in METRICS:
        assert isinstance(got[name], np.ndarray)
        assert isinstance(tensors[name], torch.Tensor)
        assert got[name].shape == (2, 3)
        np.testing.assert_array_equal(tensors[name].numpy(), got[name])
        for i in range(2):
            np.testing.assert_allclose(got[name][i], rk.ablation_distances(x[i], cells)[name])


def test_only_the_requested_metrics_are_returned():
    x = np.random.default_rng(7).standard_normal((5, 6))
    assert list(rk.ablation_distances(x, [0, 0, 1, 1, 2, 2], metrics=["svcca", "cka"])) == [
        "svcca",
        "cka",
    ]
    assert set(rk.ablation_distances(x[:2], [0, 0, 1, 1, 2, 2], metrics=["cka"])) == {"cka"}


def test_cca_without_a_ridge_warns():
    x = np.random.default_rng(8).standard_normal((9, 4))
    with pytest.warns(rk.DegenerateWarning, match="ridge"):
        got = rk.ablation_distances(x, [0, 0, 1, 1], ridge=0, metrics=["cca", "pwcca"])
    assert (got["cca"] == 0).all()
    assert (got["pwcca"] == 0).all()


def test_tiny_distances_are_not_factored_in_vain(monkeypatch):
    """No Cholesky factor would make their singular values accurate enough."""
    x = np.random.default_rng(7).standard_normal((20, 5000))
    cells = np.where(np.arange(5000) < 3, np.arange(5000), -1)
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    distances, info = rk.ablation_distances(x, cells, metrics=["procrustes"], info=True)
    assert (distances["procrustes"] < 4e-7).all()
    assert info["procrustes"].route.tolist() == ["iterations"] * 3
