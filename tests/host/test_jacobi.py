"""cuda/jacobi.cu on the CPU, through its launchers, against LAPACK."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import SEEDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repsim_kernels.kernels.cupy import module, spectral

from . import _build

pytestmark = pytest.mark.usefixtures("native")
few_examples = settings(
    max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}
# Errors in units of n · eps · ‖A‖_F; the largest observed is 2.2, for a graded SVD.
TOLERANCE = 4.0
# Deviations of vᵀv from the identity in units of n · eps; the largest observed is 9.2, for repeated
# eigenvalues and n = 24, among 61 matrices of each kind and size.
ORTHONORMAL = 16.0


def spectrum(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw eigenvalues, or singular values up to sign."""
    w = rng.standard_normal(n)
    match kind:
        case "clustered":
            w = 1 + 1e-9 * w
        case "repeated":
            w = np.sign(w)
        case "zero":
            w = 0 * w
        case "rank 1":
            w[1:] = 0
        case "graded":
            w = np.logspace(-16, 0, n)
    return w


SPECTRA = ("random", "clustered", "repeated", "zero", "rank 1", "graded")


def orthogonal(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def symmetric(kind: str, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    q = orthogonal(n, rng)
    a = q * spectrum(kind, n, rng) @ q.T
    return (a + a.T) / 2


def tensor(a: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(a)).to(dtype)


def assert_eigh(a: torch.Tensor, result: dict[str, torch.Tensor]) -> None:
    """Check values against LAPACK; vectors must be orthonormal and diagonalise a."""
    n, exact = a.shape[-1], a.double()
    unit = n * EPS[a.dtype]
    tolerance = TOLERANCE * unit * torch.linalg.matrix_norm(exact)[..., None]
    assert not result["failed"].any()
    assert ((result["values"] - torch.linalg.eigvalsh(exact)).abs() <= tolerance).all()
    assert (result["values"].diff(dim=-1) >= 0).all()
    if "vectors" in result:
        v, w = result["vectors"].double(), result["values"].double()
        assert_orthonormal(v, unit)
        residual = torch.linalg.matrix_norm(exact @ v - v * w[..., None, :])
        assert (residual <= tolerance[..., 0]).all()


def assert_orthonormal(v: torch.Tensor, unit: float) -> None:
    eye = torch.eye(v.shape[-1], dtype=torch.float64)
    assert ((v.double().mT @ v.double() - eye).abs() <= ORTHONORMAL * unit).all()


def assert_svd(a: torch.Tensor, result: dict[str, torch.Tensor]) -> None:
    exact, unit = a.double(), max(a.shape[-2:]) * EPS[a.dtype]
    tolerance = TOLERANCE * unit * torch.linalg.matrix_norm(exact)[..., None]
    assert not result["failed"].any()
    assert ((result["values"] - torch.linalg.svdvals(exact)).abs() <= tolerance).all()
    assert (result["values"].diff(dim=-1) <= 0).all()
    if "left" in result:
        u, s, vh = (result[k].double() for k in ("left", "values", "right"))
        assert_orthonormal(u, unit)
        assert_orthonormal(vh.mT, unit)
        residual = torch.linalg.matrix_norm(u * s[..., None, :] @ vh - exact)
        assert (residual <= tolerance[..., 0]).all()


def use_few_threads(monkeypatch: pytest.MonkeyPatch, threads: int = 4) -> None:
    """Host threads are expensive, and the kernels accept any number of them."""
    choose = spectral.choose

    def fewer(*arguments):
        launch = choose(*arguments)
        return spectral.Launch(threads, launch.placement, launch.shared)

    monkeypatch.setattr(spectral, "choose", fewer)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 49])
def test_eigh(monkeypatch, n, kind, dtype):
    use_few_threads(monkeypatch)
    a = tensor(np.stack([symmetric(kind, n, seed) for seed in range(2)]), dtype)
    result = spectral.solve_batch(a, vectors=True)
    assert_eigh(a, result)
    values = spectral.solve_batch(a, vectors=False)
    assert set(values) == {"values", "failed"}
    assert torch.equal(values["values"], result["values"])


@pytest.mark.parametrize("n", [127, 128])
@pytest.mark.parametrize("kind", ["random", "graded"])
def test_largest_matrices(monkeypatch, n, kind):
    """The vectors are in global memory."""
    use_few_threads(monkeypatch)
    a = tensor(symmetric(kind, n))
    assert spectral.choose("eigh", n, n, 8, True, 163 * 1024).placement == 2
    assert_eigh(a, spectral.solve_batch(a, vectors=True))
    assert_svd(a, spectral.svd(a, vectors=True))


@few_examples
@given(st.integers(1, 24), st.sampled_from(SPECTRA), st.sampled_from(list(EPS)), SEEDS)
def test_eigh_of_random_sizes(n, kind, dtype, seed):
    a = tensor(symmetric(kind, n, seed), dtype)
    assert_eigh(a, spectral.solve_batch(a, vectors=True))


@pytest.mark.parametrize("n", [50, 64])
def test_thread_counts_of_a_gpu(n):
    a = tensor(symmetric("random", n))
    assert_eigh(a, spectral.solve_batch(a, vectors=True))
    assert_svd(a, spectral.svd(a, vectors=True))


@few_examples
@given(st.data())
def test_svd_of_random_sizes(data):
    rows, n = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    dtype = data.draw(st.sampled_from(list(EPS)))
    rng = np.random.default_rng(data.draw(SEEDS))
    u, v, k = orthogonal(rows, rng), orthogonal(n, rng), min(rows, n)
    values = spectrum(data.draw(st.sampled_from(SPECTRA)), k, rng)
    a = tensor(u[:, :k] * values @ v[:, :k].T, dtype)
    result = spectral.svd(a, vectors=True)
    assert_svd(a, result)
    assert torch.equal(spectral.svd(a, vectors=False)["values"], result["values"])


@pytest.mark.parametrize("shape", [(2, 3, 30, 7), (5, 49), (49, 49)])
def test_svd_of_exactly_deficient_matrices(monkeypatch, shape):
    """Columns that are zero or equal still give orthonormal vectors."""
    use_few_threads(monkeypatch)
    a = np.random.default_rng(0).integers(-2, 3, shape).astype(float)
    a[..., 1] = a[..., 2]
    a[..., 3] = 0
    assert_svd(tensor(a), spectral.svd(tensor(a), vectors=True))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("decades", [40, 200])
def test_svd_of_columns_whose_squares_underflow(monkeypatch, decades, dtype):
    """Their cosines are undefined, but must not keep the others from converging."""
    use_few_threads(monkeypatch)
    rng = np.random.default_rng(3)
    a = tensor(rng.standard_normal((2, 24, 20)) * np.logspace(-decades, 0, 20), dtype)
    assert_svd(a, spectral.svd(a, vectors=True))


@pytest.mark.parametrize("scale", [1e-150, 1e-300, 1e150, 1e300])
def test_scales(scale):
    a = tensor(symmetric("random", 9)) * scale
    for result, unscaled in (
        (spectral.solve_batch(a, vectors=True), spectral.solve_batch(a / scale, vectors=True)),
        (spectral.svd(a, vectors=True), spectral.svd(a / scale, vectors=True)),
    ):
        values = result["values"] / scale
        torch.testing.assert_close(values, unscaled["values"], rtol=1e-13, atol=1e-13)
        assert not result["failed"].any()


def count_sweeps(a: torch.Tensor) -> int:
    """Return how many sweeps are enough."""
    return next(
        k for k in range(40) if not spectral.solve_batch(a, vectors=True, sweeps=k)["failed"]
    )


def test_nearly_diagonal_matrices_need_few_sweeps(monkeypatch):
    use_few_threads(monkeypatch)
    rng = np.random.default_rng(1)
    diagonal = np.diag(np.linspace(1, 2, 20))
    assert count_sweeps(tensor(diagonal)) == 0
    off = rng.standard_normal((20, 20))
    assert count_sweeps(tensor(diagonal + 1e-5 * (off + off.T))) <= 3
    assert 4 <= count_sweeps(tensor(symmetric("random", 20))) <= 9


def test_matrices_that_do_not_converge_are_reported():
    a = tensor(np.stack([symmetric("random", 8), np.eye(8)]))
    assert spectral.solve_batch(a, vectors=True, sweeps=1)["failed"].tolist() == [True, False]
    assert spectral.svd(a, vectors=True, sweeps=1)["failed"].tolist() == [True, False]
    a[1, 3, 2] = torch.nan
    assert spectral.solve_batch(a, vectors=True)["failed"].tolist() == [False, True]
    assert spectral.svd(a, vectors=True)["failed"].tolist() == [False, True]


def test_results_do_not_depend_on_the_thread_count(monkeypatch):
    a = tensor(symmetric("random", 13))
    results = []
    for threads in (1, 5, 32):
        with monkeypatch.context() as patch:
            use_few_threads(patch, threads)
            results.append((spectral.solve_batch(a, vectors=True), spectral.svd(a, vectors=True)))
    for eigh, svd in results[1:]:
        for result, first in zip((eigh, svd), results[0], strict=True):
            for name, value in first.items():
                assert torch.equal(result[name], value), name


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize(("rows", "n"), [(7, 7), (9, 4)])
def test_sanitizers_find_nothing(monkeypatch, native, sanitizer, rows, n):
    """No access out of bounds, undefined behaviour or race, with vectors in either memory."""
    use_few_threads(monkeypatch, 6)
    native(sanitizer)
    a = tensor(np.random.default_rng(2).standard_normal((2, rows, n)))
    for vectors in (True, False):
        assert_svd(a, spectral.svd(a, vectors=vectors))
        assert_eigh(a @ a.mT, spectral.solve_batch(a @ a.mT, vectors=vectors))
    for operation, function, check, matrices, sizes in (
        ("svd", spectral.svd, assert_svd, a, (rows, n)),
        ("eigh", spectral.eigh, assert_eigh, a @ a.mT, (rows, rows)),
    ):
        limit = spectral.choose(operation, *sizes, 8, True, 2**20).shared - 1
        monkeypatch.setattr(spectral, "_SHARED", limit)
        assert spectral.choose(operation, *sizes, 8, True, limit).placement == 2
        check(matrices, function(matrices, vectors=True))


WRONG = {
    "address": ("x[threadIdx.x + 1] = 1;", "AddressSanitizer"),
    "thread": ("x[0] += threadIdx.x;", "ThreadSanitizer: data race"),
    None: (
        "if (threadIdx.x == 0) {\n__syncthreads();\n} else {\n__syncthreads();\n}\nx[0] = 0;",
        "threads wait at different barriers",
    ),
}


@pytest.mark.parametrize("sanitizer", WRONG)
def test_the_shim_detects_faults(tmp_path, sanitizer):
    """Detect an access past the end, a race, and barriers that not all threads reach."""
    body, message = WRONG[sanitizer]
    source = tmp_path / "wrong.cu"
    source.write_text(f'extern "C" __global__ void wrong(float *x) {{\n{body}\n}}\n')
    library = _build.load_library(source, sanitizer)
    with pytest.raises(_build.HostError, match=message):
        library.launch("wrong", (1,), (4,), np.zeros(4, np.float32))


def test_launch_settings(monkeypatch):
    monkeypatch.setattr(module, "unsupported", lambda *tensors: None)
    assert spectral.unsupported(torch.zeros(3, 3)) is None
    assert "float32 and float64, not float16" in spectral.unsupported(torch.zeros(3, 3).half())
    for operation, rows, n in (("eigh", 128, 128), ("svd", 128, 128), ("eigh", 1, 1)):
        launch = spectral.choose(operation, rows, n, 8, True, 163 * 1024)
        assert launch.shared <= 163 * 1024
        assert launch.threads % 32 == 0
    assert spectral.choose("eigh", 129, 129, 8, False, 227 * 1024) is None
    assert spectral.choose("eigh", 128, 128, 8, False, 99 * 1024) is None
    assert spectral.choose("eigh", 128, 128, 4, False, 99 * 1024).placement == 0


@pytest.mark.parametrize("shape", [(2, 130, 7), (130, 131)])
def test_large_matrices_go_to_pytorch(shape):
    a = tensor(np.random.default_rng(6).standard_normal(shape))
    result = spectral.svd(a, vectors=True)
    assert_svd(a, {**result, "failed": torch.tensor(False)})
    assert_svd(a, {**spectral.svd(a, vectors=False), "failed": torch.tensor(False)})
