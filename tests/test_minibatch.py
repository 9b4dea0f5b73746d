"""CKA over batches: the formula written out, merging, distributed use, and layers that fail."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from _draw import SEEDS, Representation
from _inputs import ODD
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import SAME, assert_close

RNG = np.random.default_rng(0)


def hsic(x, y):
    """HSIC₁ of Song et al. 2012, equation 5, with linear kernels."""
    n = len(x)
    k, m = ((a - a[0]) @ (a - a[0]).T * (1 - np.eye(n)) for a in (x, y))
    ones = np.ones(n)
    pairs = np.trace(k @ m)
    quadruples = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    triples = 2 / (n - 2) * (ones @ k @ m @ ones)
    return (pairs + quadruples - triples) / (n * (n - 3))


def oracle(batches, i, j):
    """Return the similarity of layers xs[i] and ys[j], and its standard error, batch by batch."""
    weights = np.array([len(xs[i]) for xs, _ in batches]) / sum(len(xs[i]) for xs, _ in batches)
    h = np.array(
        [[hsic(a, b) for a, b in ((x[i], y[j]), (x[i], x[i]), (y[j], y[j]))] for x, y in batches]
    )
    xy, xx, yy = weights @ h
    r = xy / np.sqrt(xx * yy)
    e = h[:, 0] / np.sqrt(xx * yy) - r * (h[:, 1] / xx + h[:, 2] / yy) / 2
    count = len(batches)
    error = np.sqrt(count / (count - 1) * np.sum((weights * e) ** 2)) if count > 1 else np.nan
    return r, error


def oracle_map(batches):
    xs, ys = batches[0]
    pairs = [[oracle(batches, i, j) for j in range(len(ys))] for i in range(len(xs))]
    return np.moveaxis(np.array(pairs), -1, 0)


def accumulate(batches, **options):
    s = rk.MinibatchCKA(**options)
    for xs, ys in batches:
        s.update(xs, ys)
    return s


def draw_batches(rng, sizes, left, right):
    """Draw related layers of the given widths."""
    mix = [rng.standard_normal((6, p)) for p in (*left, *right)]
    for n in sizes:
        shared = rng.standard_normal((n, 6))
        layers = [shared @ m + rng.standard_normal((n, m.shape[1])) for m in mix]
        yield layers[: len(left)], layers[len(left) :]


@st.composite
def batches(draw, min_size=1):
    """Draw batches of different sizes, of layers with fewer and with more neurons than stimuli."""
    sizes = draw(st.lists(st.integers(4, 12), min_size=min_size, max_size=4))
    widths = st.lists(st.integers(1, 30), min_size=1, max_size=3)
    return list(draw_batches(np.random.default_rng(draw(SEEDS)), sizes, draw(widths), draw(widths)))


def assert_same_map(got, want):
    # Cancellation in the variance, so 1e-8 is what is left of a standard error's digits.
    np.testing.assert_allclose(got.values, want.values, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(got.standard_error, want.standard_error, rtol=1e-7, atol=1e-7)
    names = ("rows", "columns", "metric", "options", "n", "n_left_out")
    assert [getattr(got, name) for name in names] == [getattr(want, name) for name in names]


@given(batches())
def test_values_and_standard_errors_match_the_formula(batches):
    m = accumulate(batches).compute()
    values, errors = oracle_map(batches)
    assert_close(m.values, values, SAME)
    np.testing.assert_allclose(m.standard_error, errors, rtol=1e-7, atol=1e-7)
    assert m.n == sum(len(xs[0]) for xs, _ in batches)


@given(batches(), st.sampled_from(["float16", "bfloat16", "float32"]), st.booleans())
def test_short_tensors_are_accurate(batches, dtype, is_exact):
    rounded = [
        [[torch.from_numpy(a).to(getattr(torch, dtype)) for a in side] for side in batch]
        for batch in batches
    ]
    m = accumulate(rounded, precision="float64" if is_exact else "float32").compute()
    values, _ = oracle_map([[[a.double().numpy() for a in s] for s in batch] for batch in rounded])
    np.testing.assert_allclose(m.values, values, rtol=0, atol=1e-10 if is_exact else 2e-6)


@given(batches(min_size=2))
def test_backends_agree(batches):
    want = accumulate(batches).compute()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPSIM_BACKEND", "reference")
        assert_same_map(accumulate(batches).compute(), want)


def test_one_batch_is_debiased_cka():
    xs, ys = next(draw_batches(RNG, [40], [3, 60], [5, 80]))
    m = accumulate([(xs, ys)]).compute()
    assert_close(m.values, rk.pairwise(xs, ys, debiased=True), SAME)
    assert np.isnan(m.standard_error).all()


@given(batches(min_size=2), st.randoms(use_true_random=False))
def test_the_order_of_batches_does_not_matter(batches, random):
    want = accumulate(batches).compute()
    random.shuffle(batches)
    assert_same_map(accumulate(batches).compute(), want)


@given(batches(min_size=2), st.data())
def test_merging_is_the_same_as_all_at_once(batches, data):
    parts = [[] for _ in range(3)]
    for batch in batches:
        parts[data.draw(st.integers(0, 2))].append(batch)
    first, *others = map(accumulate, parts)
    before = repr(others)
    first.merge_state(others)
    assert_same_map(first.compute(), accumulate(batches).compute())
    assert repr(others) == before


def test_reset_forgets_the_batches_and_layers():
    s = accumulate(draw_batches(RNG, [8, 9], [3], [4]))
    assert repr(s) == "MinibatchCKA: 1 x 1 layers, 2 batches, n = 17"
    s.reset()
    assert repr(s) == "MinibatchCKA: no batches"
    batches = list(draw_batches(RNG, [6, 7], [3, 2], [4, 5]))
    s.update(*batches[0])
    s.update(*batches[1])
    assert_same_map(s.compute(), accumulate(batches).compute())


def test_batches_and_one_other_may_follow_a_result():
    batches = list(draw_batches(RNG, [8, 9, 10], [3], [4]))
    s = accumulate(batches[:1])
    s.compute()
    s.update(*batches[1])
    s.merge_state(accumulate(batches[2:]))
    assert_same_map(s.compute(), accumulate(batches).compute())


def test_one_network_is_exactly_symmetric_and_one_on_the_diagonal():
    batches = list(draw_batches(RNG, [8, 9, 10], [3, 20, 5], []))
    s = rk.MinibatchCKA(rows=["a", "b", "c"])
    for xs, _ in batches:
        s.update(xs)
    m = s.compute()
    assert m.rows == m.columns == ("a", "b", "c")
    np.testing.assert_array_equal(m.values, m.values.T)
    np.testing.assert_array_equal(m.values.diagonal(), 1)
    np.testing.assert_array_equal(m.standard_error.diagonal(), 0)
    want = accumulate([(xs, xs) for xs, _ in batches], rows=m.rows, columns=m.columns).compute()
    np.testing.assert_allclose(m.values, want.values, rtol=1e-10)
    np.testing.assert_allclose(m.standard_error, want.standard_error, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_under_four_are_left_out_and_counted(size):
    batches = list(draw_batches(RNG, [8, size, 9], [3], [4]))
    s = accumulate(batches)
    with pytest.warns(UserWarning, match=f"^{size} stimuli are left out, in batches of fewer"):
        m = s.compute()
    assert (m.n, m.n_left_out) == (17, size)
    want = accumulate([batches[0], batches[2]]).compute()
    np.testing.assert_array_equal(m.values, want.values)


def test_no_batch_is_an_error():
    for s in (rk.MinibatchCKA(), accumulate(draw_batches(RNG, [3, 2], [3], [4]))):
        with pytest.raises(rk.ShapeError, match="batches: none of at least 4 stimuli so far"):
            s.compute()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e36])
@pytest.mark.parametrize("widths", [[2, 3], [20, 30]], ids=["narrow", "wide"])
def test_a_layer_with_wrong_values_is_named_and_the_others_are_not_affected(dtype, bad, widths):
    batches = [
        [[a.astype(dtype) for a in side] for side in batch]
        for batch in draw_batches(RNG, [16, 16], widths, widths)
    ]
    want = accumulate(batches).compute()
    batches[1][0][1][2, 1] = bad
    s = accumulate(batches, rows=["good", "bad"], columns=["c", "d"])
    with pytest.warns(UserWarning, match="^no value for layers 'bad': some of their"):
        m = s.compute()
    assert np.isnan(m.values[1]).all()
    assert np.isnan(m.standard_error[1]).all()
    np.testing.assert_allclose(m.values[0], want.values[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(m.standard_error[0], want.standard_error[0], rtol=0, atol=2e-6)


def test_a_layer_that_is_constant_in_a_batch_contributes_zeros():
    batches = list(draw_batches(RNG, [8, 9, 10], [3, 2], [4]))
    batches[1][0][0][:] = 0.1
    m = accumulate(batches).compute()
    values, errors = oracle_map(batches)
    assert_close(m.values, values, SAME)
    np.testing.assert_allclose(m.standard_error, errors, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["one active", "equally far"])
def test_a_batch_whose_gram_vanishes_when_u_centred_contributes_zeros(kind):
    batches = list(draw_batches(RNG, [8, 9, 10], [9, 2], [4]))
    x = batches[1][0][0]
    x[:] = np.eye(9)
    if kind == "one active":
        x[1:] = 0
    m = accumulate(batches).compute()
    values, errors = oracle_map(batches)
    assert_close(m.values, values, SAME)
    np.testing.assert_allclose(m.standard_error, errors, rtol=1e-7, atol=1e-7)


def test_a_layer_that_is_always_constant_is_named():
    batches = list(draw_batches(RNG, [8, 9, 10], [3, 2], [4]))
    for i, (xs, _) in enumerate(batches):
        xs[1][:] = 0.1 * i
    with pytest.warns(UserWarning, match="^no value for layers '1': .* are the same"):
        m = accumulate(batches).compute()
    assert np.isnan(m.values[1]).all()
    assert not np.isnan(m.values[0]).any()


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_scale_does_not_matter(factor):
    batches = list(draw_batches(RNG, [8, 9, 10], [3, 20], [4, 30]))
    scaled = [([x * factor for x in xs], ys) for xs, ys in batches]
    assert_same_map(accumulate(scaled).compute(), accumulate(batches).compute())


@given(st.integers(4, 20), st.integers(1, 30), st.sampled_from(["large mean", "relu"]), SEEDS)
def test_similarities_are_within_bounds(n, p, kind, seed):
    xs = [Representation(n, p, kind, seed=seed + k).values() for k in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        m = accumulate([(xs, xs[::-1])] * 2).compute()
    assert np.nanmax(np.abs(m.values), initial=0) <= 1


def test_standard_errors_match_the_spread_over_samples():
    rng = np.random.default_rng(2)
    maps = []
    for _ in range(80):
        s = rk.MinibatchCKA()
        for n in (16, 8) * 6:
            shared, noise = rng.standard_normal((2, n, 8))
            s.update([shared, noise], [shared + noise, shared + 3 * rng.standard_normal((n, 8))])
        maps.append(s.compute())
    spread = np.std([m.values for m in maps], axis=0, ddof=1)
    error = np.sqrt(np.mean([m.standard_error**2 for m in maps], axis=0))
    # The spread of 80 values is itself known to 8 %.
    np.testing.assert_allclose(error / spread, 1, atol=0.25)


DRAWN = next(draw_batches(np.random.default_rng(3), [6], [3, 4], [2]))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([],), rk.ShapeError, "xs: an empty list"),
        (({"a": np.eye(4)},), rk.ShapeError, "xs: dict; .*pass list"),
        ((np.eye(4),), rk.ShapeError, r"xs: an array of shape \(4, 4\)"),
        (([np.ones((6, 2, 2))] * 2, DRAWN[1]), rk.ShapeError, r"xs\[0\]: .*flatten\(1\)"),
        (([np.eye(6), np.eye(5)], DRAWN[1]), rk.ShapeError, r"xs\[1\]: 5 stimuli, but xs\[0\]"),
        ((DRAWN[0], [np.eye(5)]), rk.ShapeError, r"ys\[0\]: 5 stimuli, but xs\[0\] has 6"),
        ((DRAWN[0], [torch.eye(6)]), rk.DeviceError, r"ys\[0\]: a torch array on cpu"),
        ((DRAWN[0], [np.eye(6) * 1j]), rk.DtypeError, r"ys\[0\]: dtype complex128"),
        ((DRAWN[0][:1], DRAWN[1]), rk.ShapeError, "xs: 1 and 1 layers; expected 2 and 1 from xs"),
        ((DRAWN[0], DRAWN[0]), rk.ShapeError, "xs: 2 and 2 layers; expected 2 and 1"),
        ((DRAWN[0],), rk.ShapeError, "xs: 2 and 2 layers; expected 2 and 1 from xs and ys"),
    ],
)
def test_a_wrong_batch_is_refused_and_not_added(arguments, error, match):
    s = accumulate([DRAWN])
    before = s.compute()
    with pytest.raises(error, match=match):
        s.update(*arguments)
    assert_same_map(s.compute(), before)


def test_wrong_names_and_options_are_refused():
    with pytest.raises(rk.OptionError, match="precision: 'half'; expected one of 'float32'"):
        rk.MinibatchCKA(precision="half")
    with pytest.raises(rk.OptionError, match="rows: 'ab'; expected a sequence of names"):
        rk.MinibatchCKA("ab")
    with pytest.raises(rk.ShapeError, match="columns: 2 names; expected 1, one for each layer"):
        accumulate([DRAWN], columns=["a", "b"])
    with pytest.raises(rk.OptionError, match="columns: not the names of the rows; expected ys"):
        rk.MinibatchCKA(["a", "b"], ["a", "c"]).update(DRAWN[0])


def test_odd_arguments_are_refused_in_one_line():
    s = accumulate([DRAWN])
    calls = {
        "rows": lambda odd: rk.MinibatchCKA(odd),
        "columns": lambda odd: rk.MinibatchCKA(columns=odd),
        "precision": lambda odd: rk.MinibatchCKA(precision=odd),
        "xs": s.update,
        "ys": lambda odd: s.update(DRAWN[0], odd),
        "others": s.merge_state,
    }
    for argument, call in calls.items():
        for odd in ODD.values():
            with pytest.raises(rk.RepsimError, match=rf"^{argument}\b") as caught:
                call(odd)
            assert len(str(caught.value).splitlines()) == 1
            assert len(str(caught.value)) < 300


def test_wrong_others_are_refused_and_not_added():
    s, good = accumulate([DRAWN]), accumulate([DRAWN])
    for others, match in (
        (3, "others: 3; expected MinibatchCKA, one or several"),
        ([good, None], "others: .*; expected MinibatchCKA"),
        ([good, accumulate([DRAWN], rows=["a", "b"])], r"others\[1\]: other names of layers, or"),
        ([good, accumulate([DRAWN], precision="float64")], r"others\[1\]: other names"),
        ([good, accumulate([DRAWN[::-1]])], r"others\[1\]: 1 x 2 layers; expected 2 x 1"),
    ):
        with pytest.raises(rk.OptionError, match=match):
            s.merge_state(others)
    assert_same_map(s.compute(), good.compute())


RANK = """
import os, sys
import numpy as np, torch.distributed as dist
import repsim_kernels as rk

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], world_size=2, rank=rank)
data = np.load(sys.argv[2])
batches = [(data[f"x{i}"], data[f"y{i}"]) for i in range(4)]

def accumulate(parts, **options):
    s = rk.MinibatchCKA(**options)
    for x, y in parts:
        s.update([x], [y])
    return s

def save(m, name):
    results = {"values": m.values, "error": m.standard_error, "n": m.n}
    np.savez(f"{sys.argv[3]}/{name}{rank}.npz", **results)

s = accumulate(batches[rank::2])
save(s.compute(), "both")
save(s.compute(), "again")
save(accumulate(batches if rank == 1 else []).compute(), "one")
try:
    accumulate(batches, rows=[f"rank {rank}"]).compute()
except rk.OptionError as error:
    print(error)
dist.destroy_process_group()
"""


def test_two_processes_return_what_one_does(tmp_path):
    batches = list(draw_batches(RNG, [8, 9, 10, 11], [3], [4]))
    arrays = {
        f"{side}{i}": x[0] for i, b in enumerate(batches) for side, x in zip("xy", b, strict=True)
    }
    np.savez(tmp_path / "data.npz", **arrays)
    command = [sys.executable, "-c", RANK, tmp_path / "meet", tmp_path / "data.npz", tmp_path]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all("other names of layers" in output for output in outputs)
    want = accumulate(batches).compute()
    for name in ("both", "again", "one"):
        first, second = (dict(np.load(tmp_path / f"{name}{rank}.npz")) for rank in range(2))
        for key in first:
            np.testing.assert_array_equal(first[key], second[key])
        assert_close(first["values"], want.values, SAME)
        np.testing.assert_allclose(first["error"], want.standard_error, rtol=1e-7)
        assert first["n"] == want.n
