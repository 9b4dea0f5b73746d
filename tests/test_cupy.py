"""CuPy arrays in and out of every public function.

Without a GPU, a stand-in wraps NumPy's memory under CuPy's name and supports the same protocols.
With a GPU and CuPy, the same calls run on real arrays.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import repsim_kernels as rk
from repsim_kernels import _arrays, _dispatch
from repsim_kernels._operations import OPERATIONS

OPS = [op.name for op in OPERATIONS if op.name != "pairwise"]
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((8, 20)), RNG.standard_normal((8, 5))
CELLS, LABELS = np.arange(20) % 3, np.arange(8) % 2
K = np.stack([X[:, c::3] @ X[:, c::3].T for c in range(3)])
ARGUMENTS: dict[str, tuple[tuple[np.ndarray, ...], dict[str, Any]]] = {
    "centered_gram": ((X,), {}),
    "cell_grams": ((X, CELLS), {}),
    "class_means": ((X, LABELS), {}),
    "selectivity_grid": ((X, LABELS), {"target": 1, "grid": (2, 2)}),
    "cka": ((X, Y), {"debiased": True}),
    "cca": ((X, Y), {"ridge": 0.1}),
    "svcca": ((X, Y), {}),
    "pwcca": ((X, Y), {"ridge": 0.1}),
    "procrustes": ((X, Y), {}),
    "procrustes_distance": ((X, Y), {"form": "angular"}),
    "rsa": ((X, Y), {}),
    "rdm": ((X,), {"distance": "mahalanobis", "labels": LABELS, "noise": LABELS}),
    "compare_rdms": ((RNG.random((2, 6)), RNG.random((3, 6))), {}),
    "searchlight": ((X,), {"neighbours": [[0, 1], [2, 3, 4]]}),
    "linear_predictivity": ((X, Y), {"ridge": "gcv"}),
    "mutual_knn": ((X, Y), {"k": 3}),
    "cknna": ((X, Y), {"k": 3}),
    "jaccard_knn": ((X, Y), {"k": 3}),
    "similarities": ((X, Y), {"ridge": 0.1}),
    "calibrate": ((X, Y), {"permutations": 20}),
    "interval": ((X, Y), {}),
    "ceiling": ((np.stack([X, X**2, X**3]),), {}),
    "ablation_distances": ((X, CELLS), {}),
    "ablation_decodability": ((X, CELLS, LABELS), {}),
    "logistic_fits": ((X, LABELS, np.arange(6).reshape(2, 3)), {}),
    "probe_paper": ((X, CELLS, LABELS), {"target": 1, "draws": 3, "size": 4}),
    "gram_ablation_distances": ((K.sum(0), K), {}),
    "eigh": ((K,), {"vectors": False}),
    "svd": ((K,), {"vectors": False}),
}


class Device:
    """A device; `with` makes it the current one."""

    current = 0

    def __init__(self, index: int) -> None:
        self.id = index

    def __enter__(self) -> None:
        self.before, Device.current = Device.current, self.id

    def __exit__(self, *_: object) -> None:
        Device.current = self.before


class Array:
    """A NumPy array that claims to be CuPy's, on one of two devices; refuses what CuPy refuses."""

    __module__ = "cupy"

    def __init__(self, values: Any, index: int | None = None) -> None:
        self.values = np.asarray(values)
        self.device = Device(Device.current if index is None else index)

    shape, ndim, dtype, strides = (
        property(lambda self, name=name: getattr(self.values, name))
        for name in ("shape", "ndim", "dtype", "strides")
    )

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __bool__(self) -> bool:
        return bool(self.values)

    def __float__(self) -> float:
        return float(self.values)

    def __getitem__(self, index: Any) -> Array:
        return Array(self.values[index], self.device.id)

    def __setitem__(self, index: Any, value: float) -> None:
        self.values[index] = value

    def get(self) -> np.ndarray:
        return np.array(self.values)

    def reshape(self, *shape: Any) -> Array:
        return Array(self.values.reshape(*shape), self.device.id)

    def copy(self) -> Array:
        return Array(self.values.copy())  # on the current device, as CuPy does

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.values.__dlpack_device__()

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        # CuPy makes the consumer wait for its stream on the current device.
        assert self.device.id == Device.current
        return self.values.__dlpack__(max_version=max_version)


def _method(name: str) -> Callable[..., Array]:
    def method(self: Array, *others: Any, **options: Any) -> Array:
        plain = [other.values if isinstance(other, Array) else other for other in others]
        assert not any(isinstance(a, np.ndarray) for a in others)
        return Array(getattr(self.values, name)(*plain, **options), self.device.id)

    return method


for _name in ("max", "sum", "all", "any", "swapaxes"):
    setattr(Array, _name, _method(_name))
for _name in ("add", "truediv", "ne", "gt"):
    setattr(Array, f"__{_name}__", _method(f"__{_name}__"))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> type[Array]:
    """Make `import cupy` find the stand-in, and return its array type."""
    module = ModuleType("cupy")
    module.__spec__ = ModuleSpec("cupy", None)
    module.asarray = Array
    module.from_dlpack = lambda t: Array(np.from_dlpack(t))
    module.cuda = SimpleNamespace(Device=Device)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return Array


def flatten(result: Any) -> list[Any]:
    """List the arrays of a result."""
    if isinstance(result, dict):
        return flatten(list(result.values()))
    if isinstance(result, (list, tuple)):
        return [a for value in result for a in flatten(value)]
    return [result]


def assert_same(name: str, array: Callable[[Any], Any], kind: type, rtol: float) -> None:
    arguments, options = ARGUMENTS[name]
    function = getattr(rk, name)
    got = flatten(function(*map(array, arguments), **options))
    want = flatten(function(*arguments, **options))
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert isinstance(a, float if type(b) is float else kind)
        a = a if isinstance(a, float) else a.get()
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", OPS)
def test_every_function(cupy, name):
    assert_same(name, cupy, Array, 1e-13)


def test_pairwise(cupy):
    got = rk.pairwise([cupy(X), cupy(Y)])
    assert isinstance(got, Array)
    np.testing.assert_array_equal(got.get(), rk.pairwise([X, Y]))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_device_that_is_not_current(cupy, backend):
    for values in (X, X[::-1], X.T.copy().T, X[::2, 1::3]):
        cells = CELLS[: values.shape[1]]
        got = rk.cell_grams(cupy(values, 1), cupy(cells), backend=backend)
        assert got.device.id == 1
        want = rk.cell_grams(values, cells, backend=backend)
        np.testing.assert_allclose(got.get(), want, rtol=1e-13, atol=1e-13)
    assert Device.current == 0


def test_no_copies(cupy):
    a = cupy(X[::2, 1::3])
    t, source = _arrays.convert(a, "a")
    assert t.data_ptr() == a.values.ctypes.data
    assert np.shares_memory(source.restore(t).values, a.values)
    flipped, _ = _arrays.convert(cupy(X[::-1]), "a")  # strides that no tensor can have
    assert flipped.tolist() == X[::-1].tolist()


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "bool", "uint8"])
def test_dtypes(cupy, dtype):
    x = (np.arange(24).reshape(4, 6) % 5 % 3).astype(dtype)
    got = rk.centered_gram(cupy(x))
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got.get(), rk.centered_gram(x))


def test_memberships(cupy):
    cells = rk.selectivity_grid(cupy(X), cupy(LABELS), 1, grid=(2, 2), edges="inclusive")
    assert isinstance(cells, Array)
    assert cells.dtype == bool
    want = rk.selectivity_grid(X, LABELS, 1, grid=(2, 2), edges="inclusive")
    np.testing.assert_array_equal(cells.get(), want)
    got = rk.cell_grams(cupy(X), cells)
    np.testing.assert_allclose(got.get(), rk.cell_grams(X, want), rtol=1e-13, atol=1e-13)


def test_arrays_on_different_devices(cupy):
    other = cupy(Y, 1)
    with pytest.raises(rk.DeviceError, match="y: a cupy array on cuda:1, but x is a cupy array on"):
        rk.cka(cupy(X), other)
    with pytest.raises(rk.DeviceError, match="y: a numpy array on cpu, but x is a cupy array"):
        rk.cka(cupy(X), Y)


def test_errors_name_the_argument(cupy):
    with pytest.raises(rk.NonFiniteError, match="x: 1 of 160 values"):
        rk.cka(cupy(np.where(X.max() == X, np.nan, X)), cupy(Y))
    with pytest.raises(rk.DtypeError, match="x: not an array of numbers"):
        rk.cka([cupy(X[0]), cupy(X[1])], cupy(Y))
    with pytest.raises(rk.CellError, match="cells: label 9 is out of range"):
        rk.cell_grams(cupy(X), cupy(CELLS + 7), n_cells=8)


def test_default_backends_on_a_gpu(cupy, monkeypatch):
    """CuPy arrays prefer CUDA C++ kernels, tensors prefer Triton; otherwise PyTorch."""
    reasons: dict[str, str | None] = {"cupy": None, "triton": None}

    def why_not(operation: str, backend: str, *xs: Any) -> str | None:
        return "none" if (operation, backend) not in _dispatch.KERNELS else reasons[backend]

    monkeypatch.setattr(_dispatch, "_explain_unsupported", why_not)
    x, array = _arrays.convert(cupy(X, 1), "x")
    assert array == ("cupy", "cuda:1")
    tensor = _arrays.Source("torch", "cuda:0")
    assert _dispatch.choose_backend("cell_grams", None, array, x) == "cupy"
    assert _dispatch.choose_backend("centered_gram", None, array, x) == "triton"
    assert _dispatch.choose_backend("rsa", None, array, x, x) == "torch"
    assert _dispatch.choose_backend("cell_grams", None, tensor, x) == "triton"
    assert _dispatch.choose_backend("eigh", None, tensor, x) == "cupy"
    reasons["cupy"] = "it takes float32"
    assert _dispatch.choose_backend("cell_grams", None, array, x) == "triton"
    with pytest.raises(rk.BackendUnavailable, match="can't serve cell_grams: it takes float32"):
        _dispatch.choose_backend("cell_grams", "cupy", array, x)


@pytest.mark.parametrize("backend", ["triton", "cupy"])
def test_operations_without_kernels(backend):
    with pytest.raises(rk.BackendUnavailable, match="rsa: it has no kernel for this operation"):
        rk.rsa(X, Y, backend=backend)


@pytest.fixture
def real() -> Any:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    import cupy

    return cupy


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_every_function_on_a_gpu(real, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(name, real.asarray, real.ndarray, 1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cupy", None])
@pytest.mark.parametrize("n", [1, 50, 64, 128, 200])
def test_native_spectra(real, backend, n):
    a = np.random.default_rng(n).standard_normal((3, n, n))
    a = a + a.swapaxes(1, 2)
    for array in (real.asarray(a), torch.from_numpy(a).cuda()):
        w, v = rk.eigh(array, backend=backend)
        s = rk.svd(array, vectors=False, backend=backend)
        np.testing.assert_allclose(w.tolist(), np.linalg.eigvalsh(a), atol=1e-11)
        assert float(abs(array @ v - v * w[..., None, :]).max()) < 1e-10
        np.testing.assert_allclose(s.tolist(), np.linalg.svd(a, compute_uv=False), atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_native_cell_grams(real, dtype):
    x = np.random.default_rng(1).standard_normal((70, 3000)).astype(dtype)
    cells = np.arange(3000) % 7
    got = rk.cell_grams(real.asarray(x), cells, backend="cupy")
    want = rk.cell_grams(x, cells)
    np.testing.assert_allclose(got.get(), want, atol={"float32": 1e-2, "float64": 1e-9}[dtype])
