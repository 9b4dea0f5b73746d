"""Every form of the argument ``cells`` against the boolean membership of the same cells."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import scipy.sparse
import torch
from _draw import SEEDS, classes, labels, memberships, representations
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import repsim_kernels as rk
from repsim_kernels._cell_sets import SparseCells, are_partitions, mark_members, to_dense
from repsim_kernels._check_cells import check_cells
from repsim_kernels.forward import AblatedForward
from repsim_kernels.kernels.torch import gram


def store_zeros(member):
    """Return a CSR array that stores every entry, also the zeros."""
    c, p = member.shape
    indices = np.tile(np.arange(p), c)
    return scipy.sparse.csr_array((member.ravel() * 1.0, indices, np.arange(c + 1) * p), (c, p))


def list_neurons(member):
    """Return (indptr, indices) with the neurons of a cell in falling order, and twice."""
    lists = [np.flatnonzero(row)[::-1].repeat(2) for row in member]
    return np.cumsum([0, *map(len, lists)]), np.concatenate([[], *lists]).astype(int)


SPARSE = {
    "csr array": scipy.sparse.csr_array,
    "csr matrix": scipy.sparse.csr_matrix,
    "csr of numbers": lambda member: scipy.sparse.csr_array(member.astype(np.float32)),
    "stored zeros": store_zeros,
    "csc": scipy.sparse.csc_array,
    "coo": scipy.sparse.coo_matrix,
    "lists": list_neurons,
    "tensors": lambda member: tuple(map(torch.from_numpy, list_neurons(member))),
    "nested lists": lambda member: tuple(part.tolist() for part in list_neurons(member)),
}
FORMS = st.sampled_from(list(SPARSE.values()))


def assert_same(got, want, atol=1e-10):
    """Assert that nested dicts have the same values."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for name in want:
            assert_same(got[name], want[name], atol)
    else:
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("make", SPARSE.values(), ids=SPARSE)
def test_every_sparse_form_is_the_membership(make):
    member = np.random.default_rng(0).random((5, 12)) < [[0], [0.2], [0.5], [0.9], [1]]
    cells, n_cells = check_cells(make(member), 12)
    assert isinstance(cells, SparseCells)
    assert n_cells == len(cells) == 5
    np.testing.assert_array_equal(cells.to_membership(), member)
    for c, row in enumerate(member):
        np.testing.assert_array_equal(cells.members(c), np.flatnonzero(row))


@given(st.data(), FORMS)
def test_grams_of_sparse_cells_are_those_of_the_membership(data, make):
    x = data.draw(representations(layouts=("C", "F", "steps")))
    member = data.draw(memberships(x.p))
    for backend in ("torch", "reference"):
        got = rk.cell_grams(x.torch(), make(member), backend=backend)
        want = rk.cell_grams(x.torch(), member, backend=backend)
        assert_same(got, want, 1e-12 * (1 + float(want.abs().max())))


@given(st.data(), FORMS, st.sampled_from([None, 1, 3]), st.booleans())
def test_distances_of_sparse_cells_are_those_of_ablated_copies(data, make, cells_at_once, known):
    """Also in chunks of one or of three cells, from Grams that are known or not."""
    x = data.draw(representations(n=st.integers(4, 9), kinds=("gaussian", "constant columns")))
    member = data.draw(memberships(x.p, max_cells=8))
    options = {"memory": cells_at_once and cells_at_once * 8 * x.n**2}
    if known:
        options["grams"] = rk.cell_grams(x.values(), make(member))
    got = rk.ablation_distances(x.values(), make(member), **options)
    want = rk.ablation_distances(x.values(), member, backend="reference")
    assert_same(got, want, 1e-6)
    assert_same(got, rk.ablation_distances(x.values(), member), 1e-9)


@pytest.mark.parametrize("memory", [None, 1, 3 * 8 * 12**2])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": 1},
        {"target": [2, 0], "score": ["margin", "accuracy"]},
        {"ridge": "gcv", "folds": 3},
        {"probe": "logistic", "folds": 2, "score": "margin"},
    ],
    ids=["all classes", "target", "targets", "gcv", "logistic"],
)
def test_scores_of_sparse_cells_are_those_of_the_membership(options, known, memory):
    rng = np.random.default_rng(1)
    x, classes_of_x = rng.standard_normal((12, 30)) + 1, np.arange(12) % 3
    member = rng.random((8, 30)) < rng.choice([0, 0.2, 0.6, 1], (8, 1))
    member[:2] = [[False], [True]]
    sparse = scipy.sparse.csr_array(member)
    want = rk.ablation_decodability(x, member, classes_of_x, **options)
    grams = rk.cell_grams(x, sparse) if known else None
    options = {"memory": memory, "grams": grams} | options
    got = rk.ablation_decodability(x, sparse, classes_of_x, **options)
    assert_same(got, want)
    got = rk.ablation_decodability(x, sparse, classes_of_x, backend="reference", **options)
    assert_same(got, want, 1e-6)


@given(st.data(), FORMS)
def test_the_published_probe_takes_sparse_cells(data, make):
    x = data.draw(representations(n=st.integers(4, 8), kinds=("gaussian",)))
    y = data.draw(classes(x.n, max_classes=2))
    member = data.draw(memberships(x.p, max_cells=3))
    want = rk.probe_paper(x.values(), member, y, 1, draws=3, size=4)
    assert_same(rk.probe_paper(x.values(), make(member), y, 1, draws=3, size=4), want, 0)


@given(st.data())
def test_parts_of_sparse_cells(data):
    p = data.draw(st.integers(1, 20))
    member = data.draw(memberships(p, max_cells=6))
    cells, _ = check_cells(scipy.sparse.csr_array(member), p)
    ids = data.draw(st.lists(st.integers(0, len(member) - 1), max_size=6))
    run = slice(*sorted(data.draw(st.tuples(st.integers(0, 7), st.integers(0, 7)))))
    for index in (ids, run, slice(None, None, -1)):
        np.testing.assert_array_equal(cells.select(index).to_membership(), member[index])
    start = data.draw(st.integers(0, p - 1))
    stop = data.draw(st.integers(start + 1, p + 3))
    np.testing.assert_array_equal(cells.among(start, stop).to_membership(), member[:, start:stop])
    for c, row in enumerate(member):
        np.testing.assert_array_equal(mark_members(cells, c, len(member)), row)


@given(st.data())
def test_one_mask_is_a_membership_of_one_cell(data):
    x = data.draw(representations(n=st.integers(4, 8)))
    mask = data.draw(memberships(x.p))[0]
    want = rk.ablation_distances(x.values(), mask[None])
    for form in (mask, torch.from_numpy(mask), mask.tolist()):
        got = rk.ablation_distances(x.values(), form)
        assert all(values.shape == (1,) for values in got.values())
        assert_same(got, want, 0)


@given(st.data(), st.booleans())
def test_labels_and_masks_broadcast_over_an_activation(data, is_mask):
    """One run of 1s is where only the number of neurons is known; more where the shape is."""
    shape = tuple(data.draw(st.lists(st.integers(2, 4), min_size=2, max_size=4)))
    p = math.prod(shape)
    kept = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    own = tuple(length if keep else 1 for length, keep in zip(shape, kept, strict=True))
    if math.prod(own) == 1:
        return
    rng = np.random.default_rng(data.draw(SEEDS))
    cells = rng.random(own) < 0.5 if is_mask else rng.integers(-1, 4, own)
    want = np.broadcast_to(cells, shape).ravel()
    got, _ = check_cells(cells, p, shape=shape)
    np.testing.assert_array_equal(got.ravel(), want)
    assert got.shape == ((1, p) if is_mask else (p,))
    trailing = cells.reshape(own[kept.index(True) :])  # as NumPy broadcasts them
    if trailing.shape != (p,):
        np.testing.assert_array_equal(check_cells(trailing, p, shape=shape)[0].ravel(), want)
    x = rng.standard_normal((4, p))
    runs = "".join(".1"[not keep] for keep in kept).split(".")
    if sum(map(bool, runs)) <= 1:
        assert_same(rk.cell_grams(x, cells), rk.cell_grams(x, want if not is_mask else want[None]))
    else:
        with pytest.raises(rk.CellError, match=r"pass np.broadcast_to\(cells, shape\)"):
            rk.cell_grams(x, cells)


def test_memberships_and_partitions_precede_broadcasting():
    """A column for each neuron is one row per cell, or per partition, and no activation's shape."""
    labels_of_both = np.arange(12).reshape(2, 6) % 3
    cells, _ = check_cells(labels_of_both, 6, allow_partitions=True)
    assert are_partitions(cells)
    cells, n_cells = check_cells(labels_of_both > 0, 6, shape=(1, 6))
    assert n_cells == 2
    assert cells.shape == (2, 6)
    flat, _ = check_cells(labels_of_both, 12, allow_partitions=True)
    np.testing.assert_array_equal(flat, labels_of_both.ravel())


def test_channels_of_an_activation_are_labels_with_a_run_of_ones():
    x = np.random.default_rng(0).standard_normal((5, 4, 3, 3))
    flat = x.reshape(5, -1)
    want = rk.cell_grams(flat, rk.cells.channels((4, 3, 3)))
    assert_same(rk.cell_grams(flat, np.arange(4).reshape(4, 1, 1)), want, 0)
    want = rk.cell_grams(flat, rk.cells.positions((4, 3, 3)))
    assert_same(rk.cell_grams(flat, np.arange(9).reshape(1, 3, 3)), want, 0)


@given(st.data())
def test_forward_takes_every_form(data):
    rng = np.random.default_rng(data.draw(SEEDS))
    torch.manual_seed(int(rng.integers(99)))
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(27, 4)
    ).eval()
    forward = AblatedForward(model, "1")
    state = forward.prefix(torch.from_numpy(rng.standard_normal((2, 2, 4, 4), np.float32)))
    member = data.draw(memberships(27, max_cells=4))
    want = forward.logits(state, member, batch=1)
    for make in SPARSE.values():
        assert torch.equal(forward.logits(state, make(member), batch=1), want)
    assert torch.equal(forward.logits(state, member[0], batch=1), want[:1])
    assert torch.equal(forward.logits(state, member[0].reshape(3, 3, 3), batch=1), want[:1])
    per_channel, n_cells = data.draw(labels(3))
    want = forward.logits(state, np.repeat(per_channel, 9), n_cells, batch=1)
    got = forward.logits(state, per_channel.reshape(3, 1, 1), n_cells, batch=1)
    assert torch.equal(got, want)
    columns = np.array([True, False, True])  # as NumPy broadcasts: along the last dimension
    want = forward.logits(state, np.tile(columns, 9), batch=1)
    assert torch.equal(forward.logits(state, columns, batch=1), want)


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that an operation of PyTorch returns, or works on."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in (*args, result):
            if isinstance(value, torch.Tensor):
                self.nbytes = max(self.nbytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_grams_of_all_sparse_cells_never_exist_together(monkeypatch, order):
    """tracemalloc counts what NumPy allocates for PyTorch, and the mode what PyTorch does."""
    n, p, n_cells, size, memory = 24, 300, 20_000, 3, 2**20
    rng = np.random.default_rng(0)
    x = np.asarray(rng.standard_normal((n, p)), order=order)
    cells = np.arange(n_cells + 1) * size, rng.integers(0, p, n_cells * size)
    sizes = []
    empty_grams = gram.empty_grams
    monkeypatch.setattr(
        gram, "empty_grams", lambda x, count: sizes.append(count) or empty_grams(x, count)
    )
    y, metrics = np.arange(n) % 2, ["cka", "cka_debiased"]
    for run in (
        lambda cells: rk.ablation_distances(x, cells, metrics=metrics, memory=memory),
        lambda cells: rk.ablation_decodability(x, cells, y, target=1, memory=memory),
    ):
        with LargestTensor():
            run(cells[1][:p] % 2)  # imports what the mode needs
        sizes.clear()
        tracemalloc.start()
        with LargestTensor() as largest:
            run(cells)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sizes == [memory // (8 * n**2)]
        all_grams = 8 * n_cells * n**2  # 92 MB
        assert largest.nbytes < all_grams / 10
        assert peak < all_grams / 3


def test_a_chunk_does_not_change_the_next(monkeypatch):
    """The chunks' Grams share memory: cells that are empty or absent must not see the last ones."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 30))
    member = np.zeros((7, 30), dtype=bool)
    member[[0, 1, 4]] = rng.random((3, 30)) < 0.4
    sparse = scipy.sparse.csr_array(member)
    got = rk.ablation_distances(x, sparse, memory=2 * 8 * 6**2)
    assert_same(got, rk.ablation_distances(x, member), 1e-12)
    assert (got["cka"][[2, 3, 5, 6]] == 0).all()


def test_no_cells_have_no_distances():
    x, none = np.random.default_rng(0).standard_normal((6, 5)), ([0], np.empty(0, int))
    assert rk.cell_grams(x, none).shape == (0, 6, 6)
    assert all(values.shape == (0,) for values in rk.ablation_distances(x, none).values())
    scores = rk.ablation_decodability(x, none, [0, 0, 0, 1, 1, 1])
    assert scores["refit"].shape == scores["frozen"].shape == (0,)


def test_dense_cells_stay_as_they_are():
    cells = np.arange(3)
    assert to_dense(cells) is cells


X = np.random.default_rng(0).standard_normal((6, 24))
CSR = scipy.sparse.csr_array(np.ones((2, 24)))
REFUSED = [
    (np.arange(5)[:, None], r"shape \(5, 1\), but 24 neurons are not a multiple of 5"),
    (np.arange(4).reshape(1, 4, 1), r"shape \(1, 4, 1\), but any of 2 places could be broadcast"),
    (np.ones((3, 1, 2, 1), bool), r"shape \(3, 1, 2, 1\), but any of 2 places"),
    (np.arange(6), r"shape \(6,\), dtype int64; expected integer labels \(24,\)"),
    (np.ones(6, bool), r"shape \(6,\), dtype bool; expected .* or a boolean mask \(24,\)"),
    ([0], r"shape \(1,\)"),
    (3, r"shape \(\)"),
    (True, r"shape \(\)"),
    (np.ones((1, 1), bool), r"a membership of shape \(1, 1\); expected \(C, 24\)"),
    (np.ones((3, 23), bool), r"a membership of shape \(3, 23\); expected \(C, 24\)"),
    (np.ones((2, 3, 24), bool), r"shape \(2, 3, 24\)"),
    (CSR[:, :5], r"a sparse membership of shape \(2, 5\); expected \(C, 24\)"),
    (([0, 2], [1]), r"offsets \(2,\) that do not divide 1 neurons"),
    (([1, 2], [1, 3]), r"offsets \(2,\) that do not divide 2 neurons"),
    (([0, 2, 1], [1]), r"offsets \(3,\) that do not divide 1 neurons"),
    (([], [1]), r"offsets \(0,\) that do not divide 1 neurons"),
    (([0, 1], [24]), "neuron 24 is out of range; expected 0 … 23"),
    (([0, 1], [-1]), "neuron -1 is out of range"),
]


@pytest.mark.parametrize(("cells", "match"), REFUSED, ids=[r[1][:40] for r in REFUSED])
def test_cells_that_do_not_fit_are_refused(cells, match):
    for call in (rk.cell_grams, rk.ablation_distances):
        with pytest.raises(rk.CellError, match=f"cells: {match}") as caught:
            call(X, cells)
        assert "; expected" in str(caught.value)


def test_cells_that_do_not_fit_a_layer_are_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 2), torch.nn.Flatten()).eval()
    forward = AblatedForward(model, "0")
    state = forward.prefix(torch.ones(1, 1, 3, 3))
    for cells in (np.arange(3).reshape(3, 1, 1), np.arange(4)[:, None], np.ones((4, 4), bool)):
        with pytest.raises(rk.CellError, match=r"cells: shape .*broadcast to \(4, 2, 2\), or"):
            forward.logits(state, cells)
    with pytest.raises(rk.CellError, match=r"cells: a sparse membership of shape \(2, 24\)"):
        forward.logits(state, CSR)


def test_other_numbers_and_other_counts_are_refused():
    with pytest.raises(rk.DtypeError, match=r"cells: a sparse csr_array with the value 0.5; expec"):
        rk.cell_grams(X, CSR / 2)
    with pytest.raises(rk.DtypeError, match=r"cells\[1\]: dtype float64; expected integers"):
        rk.cell_grams(X, ([0, 1], [0.5]))
    with pytest.raises(rk.CellError, match="n_cells: 3, but cells has 2 rows; expected 2"):
        rk.cell_grams(X, CSR, n_cells=3)
    with pytest.raises(rk.CellError, match="n_cells: 2, but cells has 1 rows"):
        rk.cell_grams(X, X[0] > 0, n_cells=2)
    with pytest.raises(rk.ShapeError, match=r"grams: shape \(3, 6, 6\); expected \(2, 6, 6\)"):
        rk.ablation_distances(X, CSR, grams=np.zeros((3, 6, 6)))
