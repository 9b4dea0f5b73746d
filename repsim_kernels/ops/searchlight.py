"""RDMs of searchlights."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import repsim_kernels
from repsim_kernels import (
    _arrays,
    _check,
    _check_conditions,
    _check_matrices,
    _check_neighbours,
    _check_noise,
    _dispatch,
    _files,
    _options,
    _progress,
)
from repsim_kernels._arrays import Source
from repsim_kernels._row_file import RowFile
from repsim_kernels._typing import Array, ArrayLike, Tensor
from repsim_kernels.errors import OptionError, ShapeError
from repsim_kernels.ops.rdm_comparison import METHODS

_MEMORY = 32 * 2**20
_CENTRES = 4096  # spheres whose voxels are looked up together


def searchlight(
    x: ArrayLike,
    neighbours: ArrayLike | Sequence[ArrayLike],
    *,
    distance: str = "euclidean",
    labels: ArrayLike | None = None,
    folds: ArrayLike | None = None,
    noise: ArrayLike | None = None,
    shrinkage: str | None = None,
    compare_to: ArrayLike | None = None,
    method: str = "spearman",
    memory: int | None = None,
    out: str | Path | None = None,
    progress: bool | None = None,
    backend: str | None = None,
) -> Array:
    """Searchlight: the RDM of each of many small sets of voxels, or how it compares with models.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations: n stimuli or trials by p voxels (or neurons, channels). Integers are converted
        to float64.
    neighbours : list of arrays, or CSR
        The indices of the voxels in the sphere around each of C centres: a list of C integer
        arrays, which may be empty, or the same as CSR: a SciPy CSR array (C, p), or
        ``(indptr, indices)`` as `spheres` returns it. A tuple of two arrays is always CSR. An index
        that a sphere has twice counts once.
    distance : {"euclidean", "sqeuclidean", "correlation", "cosine", "mahalanobis", "crossnobis"}
        Distance between the patterns of two conditions, as in `rdm`.
    labels, folds : (n,), optional
        Condition and fold of each row, as in `rdm`.
    noise, shrinkage : optional
        The noise of all p voxels, as in `rdm`. Each sphere has its own covariance: that of its
        voxels, or one that is estimated and shrunk from the residuals of its voxels.
    compare_to : array, (N,) or (M, N), optional
        Model RDMs. The result is then the similarity of each sphere's RDM to each model, and the
        RDMs are not kept.
    method : {"spearman", "pearson", "cosine", "kendall", "rho-a", "whitened"}
        How RDMs are compared with the models, as in `compare_rdms`.
    memory : int, optional
        Bytes for the RDMs and indices of the spheres that are computed together, 32 MiB by
        default. The patterns of their voxels are copied as well, in float64.
    out : path, optional
        A .npy file for the result, which is written while it is computed and need not fit in
        memory; see Notes. An existing file is replaced at the end.
    progress : bool, optional
        Whether to show on stderr how many spheres are done. By default, after two seconds if that
        is a terminal.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    result : array like x; with ``out``, a read-only memory map of that file
        Without ``compare_to`` the RDMs (C, N), float32, N = n_cond(n_cond - 1)/2, with pairs and
        units as in `rdm`. Otherwise similarities (C,) or (C, M), float64.

        What is undefined is NaN instead of an error, so that one sphere does not stop all others:
        every distance of a sphere without voxels, or whose covariance is singular; "correlation"
        distances of a pattern that does not vary in the sphere, as in any single-voxel sphere, and
        "cosine" distances of a pattern that is zero there; similarities of an RDM with NaN, or
        without variance where `compare_rdms` needs it.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, DeviceError, OptionError, BackendUnavailable
    LabelError, ConstantError
        As for `rdm`, or for a model that `compare_rdms` refuses.
    CellError
        If ``neighbours`` is in no accepted form, or has indices out of range.

    Notes
    -----
    Everything is computed in float64, and distances are rounded to float32 at the end: outside of
    about 1e-38 … 3e38 they become 0 or infinite, so rescale such activations. Similarities are
    those of the rounded distances: ``compare_rdms(searchlight(x, neighbours), models)``.

    With ``out``, results are appended to ``<out>.<fingerprint>.partial``, one group of spheres
    after the other, and that file gets the name ``out`` when it is complete. After an interruption,
    even a kill, the same call resumes after the last whole group and returns bit-identical results
    on the same machine. The fingerprint is a hash of x, the neighbours and all options, so that no
    other call touches the file; delete it if the call will not be repeated.

    Centres that are close in space should be close in order, as those of `spheres` are for the
    voxels of a mask: spheres that are computed together then share most of their voxels.

    Source: Kriegeskorte, Goebel & Bandettini 2006, "Information-based functional brain mapping",
    PNAS 103; Nili et al. 2014, "A toolbox for representational similarity analysis", PLOS
    Computational Biology 10.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> mask = np.ones((6, 6, 6), dtype=bool)
    >>> neighbours = rk.spheres(np.argwhere(mask), radius=1.5)
    >>> x = rng.standard_normal((8, 216))  # 8 conditions, a column for each voxel of the mask
    >>> x[4:, :36] += 2  # voxels in the first plane tell two groups of four conditions apart
    >>> rk.searchlight(x, neighbours, distance="correlation").shape
    (216, 28)
    >>> model = rk.rdm([[0.0]] * 4 + [[1.0]] * 4)
    >>> similarity = rk.searchlight(x, neighbours, compare_to=model, method="rho-a")
    >>> similarity.reshape(mask.shape).mean((1, 2)).round(2)  # by plane
    array([ 0.66,  0.5 , -0.03, -0.01, -0.01, -0.01])
    """
    distance = _options.check_rdm_distance(distance)
    x, source = _check.check_representation(x, allow_constant=True, allow_batch=False)
    groups = _check_conditions.check_conditions(labels, folds, len(x), distance)
    n_conditions = len(x) if groups is None else groups.shape[1]
    sets = _check_neighbours.check_neighbours(neighbours, x.shape[1])
    models, shape = _check_models(compare_to, method, n_conditions, source)
    checked_noise = _check_noise.check_noise(noise, shrinkage, x, distance, groups, source)
    options: dict[str, Any] = {
        "distance": distance,
        "groups": groups,
        "noise": checked_noise,
        # Similarities do not depend on it, and distances should not leave the range of float32.
        "scale": 1.0 if models is None or checked_noise is not None else _choose_scale(x),
        "models": models,
        "method": method,
    }
    budget = _options.check_memory(memory) or _MEMORY
    path = _check_out(out)
    progress = None if progress is None else _options.check_flag(progress, "progress")
    own = Source("torch", str(x.device))
    chosen = _dispatch.choose_backend("searchlight", backend, own, x)
    n = len(sets)
    n_pairs, dtype = n_conditions * (n_conditions - 1) // 2, "<f4" if models is None else "<f8"
    step = max(1, budget * n // (16 * len(sets.indices) + 4 * n * n_pairs))

    def iter_results(first: int) -> Iterator[Any]:
        with _progress.show_progress("spheres", n, first, progress) as report:
            for start in range(first, n, step):
                part = sets.select(slice(start, start + step))
                values = _dispatch.call("searchlight", backend, own, x, neighbours=part, **options)
                yield values.reshape(-1, *shape)
                report(min(start + step, n))

    if path is None:
        return source.restore(_concatenate(iter_results(0), n))
    fingerprint = _hash(chosen, own, step, x, sets.indptr, sets.indices, shape, *options.values())
    with RowFile(path, fingerprint, (n, *shape), dtype, step) as rows:
        for values in iter_results(rows.count):
            rows.append(_arrays.to_numpy(values))
        rows.finish()
    return np.load(path, mmap_mode="r")


def _choose_scale(x: Tensor) -> float:
    """Return the power of two that brings the largest magnitude of x to 0.5 … 1."""
    low, high = map(float, x.aminmax())
    return math.ldexp(1.0, -math.frexp(max(-low, high))[1])


def _check_models(
    compare_to: Any, method: Any, n_conditions: int, source: Source
) -> tuple[Any, tuple[int, ...]]:
    """Check model RDMs; return them as (M, N), and the shape of the result for a sphere.

    Without models, the first is None and the second that of an RDM.
    """
    _options.check_choice(method, "method", METHODS)
    n_pairs = n_conditions * (n_conditions - 1) // 2
    if compare_to is None:
        return None, (n_pairs,)
    models, models_source = _check_matrices.check_rdms(compare_to, "compare_to")
    _check.check_same_source(source, models_source, "x", "compare_to")
    if models.shape[-1] != n_pairs:
        raise ShapeError(
            f"compare_to: {models.shape[-1]} dissimilarities, but x has {n_conditions} conditions; "
            f"expected {n_pairs}, one for each pair of them"
        )
    _check_matrices.raise_if_undefined(models, "compare_to", method)
    return models.reshape(-1, n_pairs), tuple(models.shape[:-1])


def _check_out(out: Any) -> Path | None:
    """Check the path of a .npy file."""
    if out is None:
        return None
    if not isinstance(out, (str, os.PathLike)) or Path(out).suffix != ".npy":
        raise OptionError(f"out: {_options.short_repr(out)}; expected the path of a .npy file")
    path = Path(out)
    if obstacle := _files.find_write_obstacle(path):
        raise OptionError(f"out: {obstacle}")
    return path


def _concatenate(parts: Iterator[Any], n: int) -> Any:
    """Return n rows from tensors with some rows each, of which only one exists at a time."""
    result, start = None, 0
    for part in parts:
        if result is None:
            result = part.new_empty((n, *part.shape[1:]))
        result[start : start + len(part)] = part
        start += len(part)
    return result


def _hash(*values: Any) -> str:
    """Return a hash of arrays and options, and of this version of the package."""
    digest = hashlib.blake2b(repsim_kernels.__version__.encode(), digest_size=8)

    def update(value: Any) -> None:
        value = _arrays.to_numpy(value)
        if isinstance(value, tuple):
            for item in value:
                update(item)
        elif isinstance(value, np.ndarray):
            digest.update(f"{value.dtype.str}{value.shape}".encode())
            for block in [value] if value.flags.c_contiguous else value:  # no copy of the whole
                digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        else:
            digest.update(repr(value).encode())

    for value in values:
        update(value)
    return digest.hexdigest()


def spheres(
    coordinates: ArrayLike, radius: float, *, centres: ArrayLike | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return which voxels are in the sphere around each centre, for `searchlight`.

    Parameters
    ----------
    coordinates : array, (p, 3)
        The position of each voxel: for example ``numpy.argwhere(mask)`` for a radius in voxels, or
        positions in mm, of which there may be any number of columns.
    radius : float
        Largest distance of a voxel from its centre, in the units of the coordinates, at least 0. A
        voxel at exactly this distance belongs to the sphere.
    centres : array, (C, 3), optional
        Positions of the centres; by default those of all voxels.

    Returns
    -------
    indptr : NumPy array, (C + 1,), int64
    indices : NumPy array, int32
        The voxels in the sphere of centre c are ``indices[indptr[c] : indptr[c + 1]]``, ascending:
        rows of ``coordinates``, and so columns of x. The two are a CSR membership;
        ``numpy.diff(indptr)`` are the numbers of voxels.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError
    ImportError
        If SciPy is not installed.

    Notes
    -----
    By SciPy's ``KDTree``. Spheres end at the border of the mask, since only voxels in it have
    coordinates: leave out small ones by ``centres``, or in the result. rsatoolbox's
    ``get_volume_searchlight`` excludes voxels at exactly the radius, and by default drops centres
    whose sphere leaves the mask.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> mask = np.ones((4, 4, 4), dtype=bool)
    >>> indptr, indices = rk.spheres(np.argwhere(mask), radius=1)
    >>> indices[indptr[0] : indptr[1]]  # a corner and its three neighbours
    array([ 0,  1,  4, 16], dtype=int32)
    """
    try:
        from scipy.spatial import KDTree  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("spheres needs SciPy: pip install scipy") from None
    points = _check_points(coordinates, "coordinates")
    around = points if centres is None else _check_points(centres, "centres")
    if around.shape[1] != points.shape[1]:
        raise ShapeError(
            f"centres: {around.shape[1]} columns, but coordinates has {points.shape[1]}; expected "
            "the same"
        )
    radius = _options.check_number(radius, "radius", low=0)
    tree = KDTree(points)
    sizes, indices = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)]
    for start in range(0, len(around), _CENTRES):
        members = tree.query_ball_point(
            around[start : start + _CENTRES], radius, return_sorted=True
        )
        sizes.append(np.fromiter(map(len, members), np.int64))
        indices.append(np.fromiter(itertools.chain.from_iterable(members), np.int32))
    return np.concatenate(sizes).cumsum(), np.concatenate(indices)


def _check_points(a: Any, name: str) -> NDArray[np.float64]:
    """Check positions (p, d); return them as float64."""
    values = _arrays.to_numpy(_check.check_numbers(a, name))
    if values.ndim != 2 or 0 in values.shape:
        raise ShapeError(f"{name}: shape {values.shape}; expected (p, 3), a position in each row")
    return np.asarray(values, np.float64)
