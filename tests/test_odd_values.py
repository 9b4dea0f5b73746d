"""Invalid values raise a one-line error that names the argument."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from _inputs import (
    CELLS,
    LABELS,
    ODD,
    PAIRS,
    RDMS,
    SINGLES,
    UNBATCHED,
    T,
    Unreadable,
    X,
    Y,
    assert_refused,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk

ARGUMENTS = {
    **{name: (X, Y[:, :2], *([2] if "k" in options else [])) for name, options in PAIRS.items()},
    **{name: (X, *rest) for name, rest in (SINGLES | UNBATCHED).items()},
    "pairwise": ([X, Y],),
    "calibrate": ([X, Y],),
    "similarities": (X[:, :2], Y[:, :2]),
    "interval": (X, Y),
    "ceiling": ([X, Y],),
    "compare_rdms": (RDMS, RDMS),
    "gram_ablation_distances": (X @ X.T, (X @ X.T)[None] / 2),
    "eigh": (X @ X.T,),
    "svd": (X,),
}
FIRST = ("x", "xs", "gram", "a", "repeats")  # other tests pass invalid values to these


def call_with(function, parameter, value):
    """Call a function with valid arguments except for one."""
    names = list(inspect.signature(function).parameters)
    arguments = dict(zip(names, ARGUMENTS[function.__name__], strict=False))
    if parameter == "sigma" and "kernel" in names:
        arguments["kernel"] = "rbf"
    return function(**(arguments | {parameter: value}))


def list_parameters():
    for name in ARGUMENTS:
        for parameter in inspect.signature(getattr(rk, name)).parameters.values():
            if parameter.kind != parameter.VAR_KEYWORD and parameter.name not in FIRST:
                yield name, parameter.name


@pytest.mark.parametrize(("name", "parameter"), [*list_parameters()])
def test_every_argument_refuses_odd_values_in_one_line(name, parameter):
    for value in ODD.values():
        with pytest.raises(rk.RepsimError) as caught:
            call_with(getattr(rk, name), parameter, value)
        line = str(caught.value)
        assert line.startswith(parameter), line
        assert len(line.splitlines()) == 1
        assert len(line) < 300


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_backend_is_a_name_or_none(name, monkeypatch):
    for value in (0, [], "", (), False, np.array("torch"), b"torch"):
        with pytest.raises(rk.OptionError, match=r"backend: .*; expected one of 'reference', "):
            call_with(getattr(rk, name), "backend", value)
    monkeypatch.setenv("REPSIM_BACKEND", "")  # an empty variable counts as unset
    call_with(getattr(rk, name), "backend", None)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "NumPy", "torch"])
@settings(max_examples=20)
@given(st.data())
def test_cell_labels_out_of_range_are_named(make, data):
    large = data.draw(st.integers(2**24, 2**63 - 1))
    for label in (large, -large):
        for call in (
            lambda cells: rk.cell_grams(X, cells),
            lambda cells: rk.ablation_distances(X, cells),
            lambda cells: rk.ablation_decodability(X, cells, LABELS),
            lambda cells: rk.probe_paper(X, cells, LABELS, 1),
        ):
            with pytest.raises(rk.CellError, match=f"cells: label {label} is .* 0 … 16777215, or"):
                call(make([0, 1, label, 0]))
    with pytest.raises(rk.CellError, match=rf"n_cells: {large + 1}; .* and at most 16777216"):
        rk.cell_grams(X, CELLS, n_cells=large + 1)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "NumPy", "torch"])
@settings(max_examples=20)
@given(st.data())
def test_class_labels_out_of_range_are_named(make, data):
    large = data.draw(st.integers(6, 2**63 - 1))
    for name, call in (
        ("labels", lambda labels: rk.class_means(X, labels)),
        ("y", lambda labels: rk.logistic_fits(X, labels, [[0, 1]])),
    ):
        expected = rf"{name}: class 2 has no stimulus; expected every class 0 … {large}$"
        with pytest.raises(rk.LabelError, match=expected):
            call(make([0, 1, large, 0, 1, 0]))
        with pytest.raises(rk.LabelError, match=rf"{name}: values {-large} … 1; expected integers"):
            call(make([0, 1, -large, 0, 1, 0]))
    with pytest.raises(rk.LabelError, match="labels: class 3 has no stimulus"):
        rk.class_means(X, LABELS, n_classes=large)


@given(st.lists(st.integers(0, 8), min_size=6, max_size=6), st.integers(1, 9))
def test_the_first_empty_class_is_named(labels, count):
    missing = sorted(set(range(count)) - set(labels))
    if max(labels) >= count:
        expected = f"labels: values {min(labels)} … {max(labels)} with n_classes={count}"
    elif missing:
        expected = f"labels: class {missing[0]} has no stimulus; expected every class 0 … "
    else:
        return np.testing.assert_allclose(
            rk.class_means(X, labels, n_classes=count),
            [X[np.array(labels) == k].mean(0) for k in range(count)],
        )
    with pytest.raises(rk.LabelError, match=expected):
        rk.class_means(X, labels, n_classes=count)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3, unique=True))
def test_large_labels_name_the_same_classes(backend, names):
    """Labels that only distinguish classes may be any 64-bit integers."""
    small = np.array(LABELS)
    large = np.array(names)[small]
    for function, *arguments in (
        (rk.selectivity_grid,),
        (rk.ablation_decodability, CELLS),
        (rk.probe_paper, CELLS),
    ):
        got = function(X, *arguments, large, target=names[1], backend=backend)
        want = function(X, *arguments, small, target=1, backend=backend)
        np.testing.assert_equal(got, want)


def test_integers_beyond_64_bits_are_refused():
    for big in (2**64, -(2**63) - 1, 2**70, 10**400, 10**5000):
        pattern = str(big) if abs(big) <= 2**70 else ".*"
        for name, call in (
            ("cells", lambda big=big: rk.cell_grams(X, [0, 1, big, 0])),
            ("labels", lambda big=big: rk.class_means(X, [0, 1, big, 0, 1, 0])),
            ("folds", lambda big=big: rk.ablation_decodability(X, CELLS, LABELS, folds=[big] * 6)),
            ("columns", lambda big=big: rk.logistic_fits(X, LABELS, [[big]])),
        ):
            with pytest.raises(rk.DtypeError, match=f"{name}: {pattern} does not fit 64") as caught:
                call()
            assert len(str(caught.value)) < 200
    numbers = [0, 1, 2**63 + 5, 0, 1, 0]
    for labels in (np.array(numbers, np.uint64), torch.tensor(numbers, dtype=torch.uint64)):
        for function in (rk.class_means, lambda x, y: rk.logistic_fits(x, y, [[0]])):
            with pytest.raises(rk.LabelError, match=": 9223372036854775813 does not fit a signed"):
                function(X, labels)


def test_objects_that_raise_when_read_are_refused():
    for x in (Unreadable(), [Unreadable()] * 2, [[1.0, Unreadable()]] * 2):
        if not isinstance(x, list):
            for name in ("x", "y"):
                arguments = {"x": X, "y": Y} | {name: x}
                with pytest.raises(rk.DtypeError, match=f"{name}: not an array of numbers") as e:
                    rk.cka(**arguments)
                assert len(str(e.value).splitlines()) == 1
        with pytest.raises(
            rk.DtypeError, match=r"labels.*: not an array of numbers \(.*first line"
        ):
            rk.class_means(X, x)
    endless: list = []
    endless.append(endless)
    with pytest.raises(rk.DtypeError, match="x: a list that contains itself"):
        rk.cka(endless, X)


TRANSFORMED = "a tensor inside torch.func (vmap, grad, jvp)"


@pytest.mark.parametrize("name", [*PAIRS, *SINGLES])
def test_vmap_raises(name):
    rest = SINGLES.get(name, (torch.from_numpy(Y),))
    with pytest.raises(rk.DtypeError, match=r"x: a tensor inside torch\.func \(vmap, grad, jvp\)"):
        torch.vmap(lambda x: getattr(rk, name)(x, *rest, **PAIRS.get(name, {})))(T[None])


@pytest.mark.parametrize("level", [1, 2])
def test_every_array_raises_under_vmap(level):
    calls = []

    def refuse(x):
        assert_refused(x, TRANSFORMED)
        calls.append(x)
        return x

    for _ in range(level):
        refuse = torch.vmap(refuse)
    refuse(T.expand(*[2] * level, 6, 4))
    assert calls
    cells = torch.tensor([CELLS, CELLS])
    with pytest.raises(rk.DtypeError, match=r"cells: a tensor inside torch\.func"):
        torch.vmap(lambda c: rk.cell_grams(T, c))(cells)
    with pytest.raises(rk.DtypeError, match=r"x\[0\]: a tensor inside torch\.func"):
        torch.vmap(lambda x: rk.cka(list(x), T))(T[None])
