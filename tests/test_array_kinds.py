"""Every kind of array is accepted with its exact values, or refused with its name."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from _draw import NUMPY_LAYOUTS, TORCH_LAYOUTS, representations
from _inputs import CELLS, LABELS, T, X, Y, assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import repsim_kernels as rk
from repsim_kernels import _check


def make_quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but still in use
        return torch.quantize_per_tensor(T.float(), 0.1, 0, torch.qint8)


def make_nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype feature
        return torch.nested.nested_tensor([T, T[:3]], layout=layout)


def make_masked():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype feature
        return torch.masked.masked_tensor(T, T > 0)


def make_compressed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a beta feature
        return T.to_sparse_csr()


def add_column(values):
    return pd.DataFrame(X).assign(extra=values)


REFUSED = {
    "meta": (lambda: T.to("meta"), "a meta tensor, which holds no values"),
    "fake": (lambda: FakeTensorMode().from_tensor(T), "a FakeTensor, which holds no values"),
    "nested": (lambda: make_nested(torch.strided), "a nested tensor"),
    "jagged": (lambda: make_nested(torch.jagged), "a nested tensor"),
    "masked tensor": (make_masked, "a MaskedTensor"),
    "coo": (lambda: T.to_sparse(), "a tensor of layout torch.sparse_coo"),
    "csr": (make_compressed, "layout torch.sparse_csr; expected a dense one: pass "),
    "quantized": (make_quantized, "a quantized tensor; expected real numbers: pass "),
    "float8 tensor": (lambda: T.to(torch.float8_e4m3fn), "dtype float8_e4m3fn"),
    "conjugate": (lambda: torch.complex(T, T).conj(), "dtype complex128"),
    "float8": (lambda: X.astype(ml_dtypes.float8_e4m3fn), "dtype float8_e4m3fn"),
    "int4": (lambda: np.ones((6, 4)).astype(ml_dtypes.int4), "dtype int4"),
    "complex": (lambda: X + 1j, "dtype complex128"),
    "longdouble": (lambda: X.astype(np.longdouble), f"dtype {np.dtype(np.longdouble)}"),
    "SciPy matrix": (lambda: scipy.sparse.csr_matrix(X), "a sparse csr_matrix"),
    "SciPy array": (lambda: scipy.sparse.coo_array(X), "a sparse coo_array"),
    "structured": (lambda: np.zeros((6, 4), [("a", "f8")]), "dtype [('a', '<f8')]"),
    "dates": (lambda: np.zeros((6, 4), "M8[s]"), "dtype datetime64[s]"),
    "spans": (lambda: np.zeros((6, 4), "m8[D]"), "dtype timedelta64[D]"),
    "text": (lambda: np.full((6, 4), "a"), "dtype <U1"),
    "a string": (lambda: "a string", "'a string'"),
    "None": (lambda: None, "None"),
    "objects": (lambda: X.astype(object), "dtype object; expected real numbers"),
    "Nones": (lambda: [[1.0, None]] * 6, "dtype object, with NoneType at index (0, 1)"),
    "an object": (lambda: np.array(object()), "object; expected an array"),
    "sparse object": (lambda: np.asarray(scipy.sparse.csr_array(X)), "csr_array"),
    "module": (lambda: torch.nn.Linear(2, 2), "Linear; expected an array"),
    "generator": (lambda: (v for v in X), "generator; expected an array"),
    "dict": (lambda: {"layer": X}, "dict; expected one array: pass one of its values"),
    "ordered": (lambda: OrderedDict(layer=X), "OrderedDict; expected one array"),
    "masked": (lambda: np.ma.masked_less(X, 0), "a masked array with masked entries"),
    "list of masked": (lambda: list(np.ma.masked_less(X, 0)), "a masked array with masked entries"),
    "lengths": (lambda: [X[0], X[1, :2]], "not an array of numbers: its items have different"),
    "layers": (lambda: [X, Y], "not an array of numbers: its items have different shapes"),
    "missing": (lambda: add_column(pd.array([1, None] * 3)), "missing values (NA), 3 of 30"),
    "missing floats": (
        lambda: add_column(pd.array([1.5, None] * 3, dtype="Float64")),
        "missing values (NA), 3 of 30",
    ),
    "NA": (lambda: [[1, pd.NA]] * 6, "a missing value (pd.NA) at index (0, 1)"),
    "a column": (lambda: add_column(["a"] * 6), "column 'extra' has dtype str"),
    "object column": (
        lambda: add_column(np.array(["a", 1] * 3, dtype=object)),
        "column 'extra' has dtype object",
    ),
    "dates of pandas": (
        lambda: add_column(pd.date_range("2020", periods=6)),
        "column 'extra' has dtype datetime64",
    ),
}


@pytest.mark.parametrize(("make", "match"), REFUSED.values(), ids=REFUSED)
def test_anything_but_arrays_of_numbers_is_refused(make, match):
    assert_refused(make(), match)
    for f, name in (
        (lambda: rk.cell_grams(X, make()), "cells"),
        (lambda: rk.class_means(X, make()), "labels"),
        (lambda: rk.logistic_fits(X, make(), [[0]]), "y"),
        (lambda: rk.logistic_fits(X, LABELS, make()), "columns"),
        (lambda: rk.probe_paper(X, make(), LABELS, 1), "cells"),
        (lambda: rk.ablation_decodability(X, CELLS, make()), "labels"),
    ):
        with pytest.raises(rk.DtypeError) as caught:
            f()
        assert str(caught.value).startswith(name)
        # The part after "expected" differs: integers here, real numbers for x.
        assert match.split("; expected")[0] in str(caught.value)


def test_a_dict_of_layers_is_refused_by_pairwise():
    layers = {"conv1": X, "conv2": Y}
    with pytest.raises(rk.ShapeError, match=r"xs: dict; .*pass list\(xs\.values\(\)\)"):
        rk.pairwise(layers)
    with pytest.raises(rk.ShapeError, match=r"ys: dict; .*pass list\(ys\.values\(\)\)"):
        rk.pairwise([X], layers)
    np.testing.assert_array_equal(rk.pairwise(layers.values()), rk.pairwise([X, Y]))


class ArrayObject:
    """An object with only ``__array__``."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


class DlpackObject:
    """An object with only the DLPack protocol."""

    def __init__(self, values):
        self.values = values

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)


class Unconvertible:
    """An object that can't be converted, such as a tracer of JAX."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("traced:\nno values")


def to_bfloat16(x):
    return x.numpy().astype(ml_dtypes.bfloat16)


ACCEPTED = {
    "bfloat16": (to_bfloat16, "bfloat16"),
    "bfloat16 rows": (lambda x: list(to_bfloat16(x)), "bfloat16"),
    "bfloat16 scalars": (lambda x: [list(row) for row in to_bfloat16(x)], "bfloat16"),
    "__array__": (lambda x: ArrayObject(x.numpy()), None),
    "__array__ of bfloat16": (lambda x: ArrayObject(to_bfloat16(x)), "bfloat16"),
    "__dlpack__": (lambda x: DlpackObject(x.numpy()), None),
    "lists": (lambda x: x.numpy().tolist(), None),
    "list of tensors": (lambda x: list(torch.from_numpy(x.values())), None),
    "list of bfloat16 tensors": (lambda x: list(torch.tensor(x.values()).bfloat16()), "bfloat16"),
    "list of Series": (lambda x: [pd.Series(v).convert_dtypes() for v in x.values()], None),
    "DataFrame": (lambda x: pd.DataFrame(x.numpy()), None),
    "nullable": (lambda x: pd.DataFrame(x.values()).convert_dtypes(), None),
    "Arrow": (lambda x: pd.DataFrame(x.values()).convert_dtypes(dtype_backend="pyarrow"), None),
    "masked": (lambda x: np.ma.masked_array(x.numpy()), None),
}


@pytest.mark.parametrize(("make", "dtype"), ACCEPTED.values(), ids=ACCEPTED)
@settings(max_examples=20)
@given(representations(kinds=("gaussian", "relu", "low rank"), layouts=NUMPY_LAYOUTS))
def test_arrays_of_numbers_are_accepted(make, dtype, x):
    """The values are unchanged: class means of single stimuli are the stimuli."""
    expected = x.values()
    if dtype == "bfloat16":
        expected = torch.from_numpy(expected).bfloat16().double().numpy()
    for backend in ("torch", "reference"):
        result = rk.class_means(make(x), np.arange(x.n), backend=backend)
        assert isinstance(result, np.ndarray)
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(representations(kinds=("gaussian", "relu"), layouts=TORCH_LAYOUTS))
def test_parts_of_complex_tensors_are_accepted(backend, x):
    """Imaginary parts of conjugates are negated lazily, which NumPy can't do; -0 becomes 0."""
    parts = torch.complex(x.torch(), x.torch()).conj()
    assert parts.imag.is_neg()
    labels = np.arange(x.n)
    for part, expected in ((parts.real, x.values()), (parts.imag, 0 - x.values())):
        result = rk.class_means(part, labels, backend=backend)
        np.testing.assert_array_equal(result.numpy(), expected)
        rows = rk.class_means(list(part), labels, backend=backend)
        np.testing.assert_array_equal(rows, expected)


def test_a_failed_conversion_is_refused_with_the_reason():
    with pytest.raises(rk.DtypeError, match=r"x: not an array of numbers \(traced: no values\)"):
        rk.cka(Unconvertible(), X)


def test_columns_of_several_nullable_dtypes_are_accepted():
    frame = pd.DataFrame({"a": [1, 2, 3], "b": [0.5, 0.25, 0], "c": [True, False, True]})
    expected = frame.to_numpy(dtype=float)

    class Derived(pd.DataFrame):
        __module__ = "geography"

    for variant in (
        frame,
        frame.convert_dtypes(),
        frame.astype({"a": "Int8", "c": "boolean"}),
        Derived(frame.convert_dtypes()),
        frame.set_axis(["nnz", "isna", "nnz"], axis=1),
    ):
        np.testing.assert_array_equal(rk.class_means(variant, [0, 1, 2]), expected)


# Labels, cells and other integers

INTEGERS = {
    "bytes": lambda v: v.astype(">i4"),
    "reversed": lambda v: v[::-1].copy()[::-1],
    "steps": lambda v: np.repeat(v, 3)[::3],
    "list": lambda v: v.tolist(),
    "tensor": torch.from_numpy,
    "tensors": lambda v: list(torch.from_numpy(v)),
    "masked": np.ma.masked_array,
    "Series": lambda v: pd.Series(v, index=np.arange(len(v))[::-1] * 7),
    "named Series": lambda v: pd.Series(v, index=[f"image {i}" for i in range(len(v))]),
    "Index": pd.Index,
    "Int64": lambda v: pd.Series(v, dtype="Int64"),
    "UInt8": lambda v: pd.array(v, dtype="UInt8"),
    "Arrow": lambda v: pd.Series(v, dtype="int64[pyarrow]"),
    "categories": lambda v: pd.Series(v).astype("category"),
    "column": lambda v: pd.DataFrame({"a": v[::-1], "label": v})["label"],
}


@pytest.mark.parametrize("make", INTEGERS.values(), ids=INTEGERS)
@settings(max_examples=15)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=9))
def test_integers_of_any_kind_are_accepted_in_order(make, values):
    values = [0, 1, *values]  # at least two classes
    variant = make(np.array(values))
    result = _check.check_integers(variant, "labels", rk.LabelError)
    assert isinstance(result, np.ndarray)
    assert result.dtype.isnative
    assert result.tolist() == values
    x = np.random.default_rng(0).standard_normal((len(values), 3))
    for backend in ("torch", "reference"):
        result = rk.selectivity_grid(x, variant, 1, grid=(2, 1), backend=backend)
        expected = rk.selectivity_grid(x, values, 1, grid=(2, 1), backend=backend)
        np.testing.assert_array_equal(result, expected)
        result = rk.cell_grams(x.T, variant, n_cells=101, backend=backend)
        expected = rk.cell_grams(x.T, values, n_cells=101, backend=backend)
        np.testing.assert_array_equal(result, expected)


@given(
    st.lists(st.floats(allow_nan=False, width=16), min_size=1, max_size=6),
    st.sampled_from(["float16", "float32", "float64", "bfloat16"]),
)
def test_floats_are_not_integers(values, dtype):
    """Not even whole numbers of a floating-point dtype."""
    tensor = torch.tensor(values, dtype=getattr(torch, dtype))
    for variant in (tensor, tensor[:1] * 0 + 1):
        with pytest.raises(rk.DtypeError, match=f"targets: dtype {dtype}; expected integers"):
            _check.check_integers(variant, "targets", rk.LabelError)
    array = np.array(values, dtype="float64")
    for variant in (array, values, pd.Series(array), pd.Series(array, dtype="Float64")):
        with pytest.raises(rk.DtypeError, match="targets: dtype float64; expected integers"):
            _check.check_integers(variant, "targets", rk.LabelError)


def test_missing_masked_and_malformed_integers_are_refused():
    for variant, error, match in (
        (pd.Series([0, None, 1], dtype="Int64"), rk.DtypeError, "labels: missing values .*1 of 3"),
        (np.ma.masked_equal([0, 1, 2], 2), rk.DtypeError, "labels: a masked array with masked"),
        (pd.DataFrame({"label": [0, 1, 1]}), rk.LabelError, r"labels: shape \(3, 1\)"),
        (np.array([0, 1, 2**63], np.uint64), rk.LabelError, "labels: 9223372036854775808 does not"),
        (torch.tensor([0.0, 1, 1], requires_grad=True), rk.DtypeError, "labels: .* requires grad"),
    ):
        with pytest.raises(error, match=match):
            rk.class_means(np.eye(3), variant)
    with pytest.raises(rk.DtypeError, match="target: a tensor that requires grad"):
        rk.ablation_decodability(X, CELLS, LABELS, target=torch.ones(1, requires_grad=True))
    with pytest.raises(rk.DtypeError, match="folds: a masked array"):
        rk.ablation_decodability(X, CELLS, LABELS, folds=np.ma.masked_equal(LABELS, 2))
