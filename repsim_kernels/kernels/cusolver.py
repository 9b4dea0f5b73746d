"""Symmetric eigenproblems by cuSOLVER's batched solver, checked, and solved again where wrong.

The library that PyTorch loads is called through ctypes; CuPy is not needed. Not run on a GPU.

PyTorch calls the same function for every batch since 2.12 (its pull request 175403), but checks no
results. In 2.11 it solves matrices of more than 32 rows one after another (its issues 174674 and
175585: 914 ms for 500 matrices of 100 x 100, where a batched call of cuSOLVER takes 8.4 ms).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The file that each major version of CUDA brings.
_SONAMES = {"12": "libcusolver.so.11", "13": "libcusolver.so.12"}
# From cusolverDn.h, where enumerations are C's int. All functions return a status.
SIGNATURES = {
    "cusolverDnCreate": (POINTER(c_void_p),),
    "cusolverDnSetStream": (c_void_p, c_void_p),
    "cusolverDnCreateParams": (POINTER(c_void_p),),
    "cusolverDnXsyevBatched_bufferSize": (
        *(c_void_p, c_void_p, c_int, c_int, c_int64),  # handle, params, jobz, uplo, n
        *(c_int, c_void_p, c_int64, c_int, c_void_p, c_int),  # type and A, lda, type and W, type
        *(POINTER(c_size_t), POINTER(c_size_t), c_int64),  # bytes on device, on host, batch
    ),
    "cusolverDnXsyevBatched": (
        *(c_void_p, c_void_p, c_int, c_int, c_int64),
        *(c_int, c_void_p, c_int64, c_int, c_void_p, c_int),
        *(c_void_p, c_size_t, c_void_p, c_size_t),  # workspaces on device and host
        *(c_void_p, c_int64),  # info, batch
    ),
}
# The upper triangle of a column-major matrix is the lower one of a tensor, which PyTorch uses.
_UPPER = 1
Check = Callable[[Tensor, dict[str, Tensor], Tensor | None], Tensor]
_TYPES = {torch.float32: 0, torch.float64: 1}  # CUDA_R_32F, CUDA_R_64F
# Per call. cuSOLVER is reported to refuse batches of 40,000 matrices and of 2³¹ numbers; the bytes
# also bound the workspace.
_MAX_MATRICES, _MAX_BYTES = 2**14, 2**30

_LOCK = threading.Lock()
_HANDLES: dict[tuple[int, int], tuple[c_void_p, c_void_p]] = {}


class CusolverError(RuntimeError):
    """A function of cuSOLVER that returned an error."""


def unsupported(a: Tensor) -> str | None:
    """Return why cuSOLVER can't be called for a, or None if it can."""
    if a.device.type != "cuda":
        return f"it needs CUDA tensors, not {a.device.type}"
    if a.dtype not in _TYPES:
        return f"it takes float32 and float64, not {str(a.dtype)[6:]}"
    if load_library() is None:
        return "there is no cuSOLVER with cusolverDnXsyevBatched (CUDA 12.6.2 or newer)"
    return None


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Load the cuSOLVER of PyTorch's CUDA version; None without one that has the batched solver."""
    name = _SONAMES.get(str(torch.version.cuda).partition(".")[0])
    if name is None:
        return None
    wheels = importlib.util.find_spec("nvidia")
    folders = (wheels and wheels.submodule_search_locations) or ()
    files = [str(path) for folder in folders for path in sorted(Path(folder).glob(f"*/lib/{name}"))]
    # The one that PyTorch has loaded, if it has; then its wheel's, then the system's.
    only_loaded = getattr(os, "RTLD_NOLOAD", 0)
    for path, mode in ((name, only_loaded), *((file, 0) for file in files), (name, 0)):
        try:
            library = ctypes.CDLL(path, mode=ctypes.DEFAULT_MODE | mode)
        except OSError:
            continue
        if not all(hasattr(library, function) for function in SIGNATURES):
            return None
        for function, types in SIGNATURES.items():
            getattr(library, function).argtypes = types
        return library
    return None


def eigh(a: Tensor, *, vectors: bool) -> dict[str, Tensor]:
    """Return ascending ``values``, their ``vectors`` as columns, and which matrices ``failed``.

    Only the lower triangle of a is used, as by PyTorch: a may be symmetric only up to rounding.
    LAPACK solves the matrices that cuSOLVER fails on; only those that both fail on are marked.
    """
    a = mirror_lower_triangle(a)
    result = solve_batch(a, vectors=vectors)
    retry(a, result)
    return result


def mirror_lower_triangle(a: Tensor) -> Tensor:
    """Return the symmetric matrices that have the lower triangles of a."""
    return a.tril() + a.tril(-1).mT


def _solve_by_pytorch(a: Tensor, vectors: bool) -> Sequence[Tensor]:
    return torch.linalg.eigh(a) if vectors else [torch.linalg.eigvalsh(a)]


def solve_batch(
    a: Tensor,
    *,
    vectors: bool,
    otherwise: Callable[[Tensor, bool], Sequence[Tensor]] = _solve_by_pytorch,
    check: Check | None = None,
) -> dict[str, Tensor]:
    """Solve symmetric matrices, without a second attempt; those solved wrongly count as failed.

    ``otherwise`` solves the batch if cuSOLVER can't be called, and also, after a warning, if a
    function of cuSOLVER returns an error. ``check`` replaces `find_wrong`.
    """
    check = check or find_wrong
    if unsupported(a) is None:
        try:
            w, v, info = _solve_by_cusolver(a.reshape(-1, *a.shape[-2:]), vectors)
        except CusolverError as error:
            warnings.warn(f"{error}; another solver is used", RuntimeWarning, stacklevel=2)
        else:
            result = _as_result((w.view(a.shape[:-1]), v.view(a.shape).mT)[: 1 + vectors])
            result["failed"] = check(a, result, info.view(a.shape[:-2]))
            return result
    result = _as_result(otherwise(a, vectors))
    result["failed"] = check(a, result, None)
    return result


def retry(a: Tensor, result: dict[str, Tensor]) -> int:
    """Solve each failed matrix again by LAPACK, update `result` in place, and count failures.

    On the host, since PyTorch would call the same solver on a GPU. Matrices that LAPACK fails on,
    or solves wrongly, stay marked as failed. Reads from the device once if nothing failed.
    """
    failed = result["failed"].cpu()
    n_failed = int(failed.sum())
    for index in map(tuple, failed.nonzero().tolist()):
        matrix = a[index].cpu()
        try:
            retried = _as_result(_solve_by_pytorch(matrix, "vectors" in result))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        wrong = bool(find_wrong(matrix, retried))
        for name, value in retried.items():
            result[name][index] = value.to(a.device)
        result["failed"][index] = wrong
        n_failed -= not wrong
    return n_failed


def _solve_by_cusolver(a: Tensor, vectors: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return values (B, n), vectors as rows, and a status per matrix, for a (B, n, n).

    Raises CusolverError. Without ``vectors`` the second result has no meaning.
    """
    count, n = a.shape[:2]
    v = a.clone(memory_format=torch.contiguous_format)  # overwritten by the vectors
    w, info = v.new_empty(count, n), torch.empty(count, dtype=torch.int32, device=a.device)
    step = max(1, min(_MAX_MATRICES, _MAX_BYTES // (n * n * a.element_size())))
    # A handle serves one thread at a time.
    with _LOCK, torch.cuda.device(a.device):
        handle, params = _get_handle(a.device.index, torch.cuda.current_stream(a.device))
        for i in range(0, count, step):
            part, values, status = (t[i : i + step] for t in (v, w, info))
            kind = _TYPES[a.dtype]
            matrices = kind, part.data_ptr(), n, kind, values.data_ptr(), kind
            problem = handle, params, int(vectors), _UPPER, n, *matrices
            sizes = c_size_t(), c_size_t()
            _call("cusolverDnXsyevBatched_bufferSize", *problem, *sizes, len(part))
            on_device = torch.empty(sizes[0].value, dtype=torch.uint8, device=a.device)
            on_host = torch.empty(sizes[1].value, dtype=torch.uint8)
            spaces = on_device.data_ptr(), len(on_device), on_host.data_ptr(), len(on_host)
            _call("cusolverDnXsyevBatched", *problem, *spaces, status.data_ptr(), len(part))
    return w, v, info


def _get_handle(device: int, stream: torch.cuda.Stream) -> tuple[c_void_p, c_void_p]:
    """Return a handle and parameters for a stream of the current device; hold _LOCK meanwhile.

    Each stream has a handle of its own, since the memory that a handle owns can't serve two.
    """
    key = device, stream.cuda_stream
    if key not in _HANDLES:
        handle, params = c_void_p(), c_void_p()
        _call("cusolverDnCreate", handle)
        _call("cusolverDnCreateParams", params)
        _HANDLES[key] = handle, params
    _call("cusolverDnSetStream", _HANDLES[key][0], stream.cuda_stream)
    return _HANDLES[key]


def _call(function: str, *arguments: object) -> None:
    """Call a function of cuSOLVER; numbers passed for pointers receive results."""
    values: list[Any] = list(arguments)
    for i, kind in enumerate(SIGNATURES[function]):
        if kind in (POINTER(c_void_p), POINTER(c_size_t)):
            values[i] = ctypes.byref(values[i])
    status = getattr(load_library(), function)(*values)
    if status:
        raise CusolverError(f"{function}: cuSOLVER's status {status}; expected 0")


def _as_result(solved: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("values", "vectors"), solved, strict=False))


def find_wrong(a: Tensor, result: dict[str, Tensor], status: Tensor | None = None) -> Tensor:
    """Return for each matrix of a (…, n, n) whether its values, and vectors if any, are wrong.

    So are those with a solver's ``status`` (…) other than 0. With vectors the check is complete:
    a V = V diag(w), and the columns of V are orthonormal. Without vectors it is only necessary: the
    values match the trace and the Frobenius norm of a. Either way the values must ascend.
    """
    n, eps = a.shape[-1], torch.finfo(a.dtype).eps
    # In float64, since float32 products may be rounded to TF32.
    a, w = a.to(torch.float64), result["values"].to(torch.float64)
    if "vectors" in result:
        v = result["vectors"].to(torch.float64)
        tolerance = find_tolerance(n, result["values"].dtype)
        residual = (a @ v).addcmul_(v, w[..., None, :], value=-1)
        gram = v.mT @ v
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        size = torch.linalg.vector_norm(w, torch.inf, dim=-1)
        # Not as a comparison of both, since an infinite value would be as large as its residual.
        correct = torch.sub(_find_largest(residual), size, alpha=tolerance) <= 0
        correct &= _find_largest(gram) <= tolerance
    else:
        # Hoffman and Wielandt: the values of a + E differ from those of a by at most ‖E‖ in norm,
        # 0.1 n eps ‖a‖ for LAPACK. With a scaled to magnitude 1, no square overflows.
        tolerance = 10 * n * eps
        unit = a.abs().amax((-2, -1))
        unit = torch.where(unit > 0, unit, 1)
        a, w = a / unit[..., None, None], w / unit[..., None]
        norm = torch.linalg.matrix_norm(a)
        trace_error = (w.sum(-1) - a.diagonal(dim1=-2, dim2=-1).sum(-1)).abs()
        norm_error = (torch.linalg.vector_norm(w, dim=-1) - norm).abs()
        correct = (trace_error <= n**0.5 * tolerance * norm) & (norm_error <= tolerance * norm)
    if status is not None:
        correct &= status == 0
    return ~(correct & (w.diff(dim=-1) >= 0).all(-1))  # NaN fails every comparison


def find_tolerance(n: int, dtype: torch.dtype) -> float:
    """Return the largest entry of both residuals of `find_wrong` that is not an error.

    Largest entries need no squares, which could overflow. LAPACK's are 2 to 12 eps ‖a‖ for the
    first and 3 to 17 eps for the second condition, at 3 to 700 rows.
    """
    return float(20 * n**0.5 * torch.finfo(dtype).eps)


def _find_largest(matrices: Tensor) -> Tensor:
    """Return the largest magnitude in each matrix."""
    return torch.linalg.vector_norm(matrices, torch.inf, dim=(-2, -1))
