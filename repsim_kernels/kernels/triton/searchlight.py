"""RDMs of searchlights in one launch: gathers, products and distances, without copies of spheres.

A program takes one sphere and a tile of pairs of patterns. It gathers the sphere's voxels a few at
a time, multiplies them on float64's tensor cores, and turns the tile of products into distances in
registers. Spheres may be of any sizes.

Products lose the digits of distances that are small next to the patterns. A program with such
pairs, equal patterns for example, reads its sphere again and adds squares of differences for these:
equal patterns have a distance of exactly 0, as on a CPU.

Predictions for an H200, since this was not run on a GPU, for 250,000 spheres of 100 voxels and 32
patterns, in order, in a volume of as many voxels:

    distance              gathered   operations   at least
    euclidean             6.4 GB     51 Gop       1.2 ms
    crossnobis, 4 folds   26 GB      256 Gop      4.8 ms

Neighbouring spheres share most of their voxels, so they are gathered from the L2 cache: assumed to
give 5.5 TB/s, it needs 1.2 ms and 4.7 ms. The tensor cores need 1.0 ms and 4.8 ms, for seven steps
of 16 voxels. Distances are 0.5 GB of float32, which take 0.1 ms to write. On sm_90, a step of 32
patterns is issued in 0.7 of the cycles that its products occupy the tensor cores.

Two other forms were estimated. Sums of squared differences need no second reading, but two
operations per voxel and pair, outside the tensor cores: 3.6 ms and 18 ms. PyTorch writes the
gathered voxels, reads them for products, and passes over 1 GB of distances some ten times: 8 ms and
26 ms at the rate of a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.torch.distances import CLOSE
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton._operand_kernels import count_pairs, find_tile


@dataclass(frozen=True)
class Launch:
    tile: int  # patterns on each side of a tile
    block: int  # voxels of a step
    num_warps: int


def choose(n: int, capability: tuple[int, int]) -> Launch:
    """Choose launch settings for n patterns."""
    # One tile if possible, because each one gathers its patterns of a sphere anew.
    tile = min(64, max(16, triton.next_power_of_2(n)))
    if capability >= (10, 0):
        # Triton 3.6 multiplies without tensor cores there: other settings would spill.
        tile = min(tile, 32)
        return Launch(tile, block=16, num_warps=tile // 4)
    # Few warps, so that other programs multiply while one waits for its voxels.
    return Launch(tile, block=16, num_warps=8 if tile == 64 else 2)


def floor(voxels: int, folds: int, n: int, spheres: int, gathered: int) -> _launch.Floor:
    """Lower bound: read the volume and the neighbours once, write the distances.

    A voxel of a sphere adds one product per pair of patterns, and one more per fold if there are
    several; ``gathered`` counts the voxels of all spheres.
    """
    pairs, products = n * (n - 1) // 2, folds + (folds > 1)
    return _launch.Floor(
        8 * (voxels * folds * n + gathered) + 4 * spheres * pairs, 2 * products * gathered * n * n
    )


def unsupported(slabs: Tensor, *others: Tensor) -> str | None:
    """Return why the kernel can't take these float64 slabs and neighbours, or None if it can."""
    return _launch.unsupported(*(t.new_empty(0, dtype=torch.float32) for t in (slabs, *others)))


@triton.jit
def _load_means(slabs_ptr, indices_ptr, count, cols, n, TILE: tl.constexpr):
    """Return the means of patterns over a sphere's voxels; exact for constant patterns."""
    voxel = tl.load(indices_ptr, mask=count > 0, other=0).to(tl.int64)
    shift = tl.load(slabs_ptr + voxel * n + cols, mask=cols < n, other=0)
    total = tl.zeros((TILE,), dtype=tl.float64)
    for v in range(1, count):
        voxel = tl.load(indices_ptr + v).to(tl.int64)
        total += tl.load(slabs_ptr + voxel * n + cols, mask=cols < n, other=0) - shift
    return shift + total / count


@triton.jit(do_not_specialize=["folds"])
def _searchlight_rdms_kernel(
    slabs_ptr,  # (p, folds, n) float64
    indptr_ptr, indices_ptr,  # (C + 1,), (m,)
    out_ptr,  # (C, n (n - 1) / 2) float32
    folds, n,
    DISTANCE: tl.constexpr, CLOSE: tl.constexpr, SAME: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    CROSS: tl.constexpr = DISTANCE == "crossnobis"
    UNIT: tl.constexpr = DISTANCE == "correlation" or DISTANCE == "cosine"
    # The tiles of a sphere run concurrently: all but the first find its voxels in the L2 cache.
    pairs = count_pairs(n, TILE)
    sphere = (tl.program_id(0) // pairs).to(tl.int64)
    col_tile, row_tile = find_tile(tl.program_id(0) % pairs)
    rows = row_tile * TILE + tl.arange(0, TILE)
    cols = col_tile * TILE + tl.arange(0, TILE)
    first = tl.load(indptr_ptr + sphere).to(tl.int64)
    count = (tl.load(indptr_ptr + sphere + 1) - first).to(tl.int32)  # voxels
    indices_ptr += first
    row_mean = tl.zeros((TILE,), dtype=tl.float64)
    col_mean = row_mean
    if DISTANCE == "correlation":
        row_mean = _load_means(slabs_ptr, indices_ptr, count, rows, n, TILE)
        col_mean = row_mean
        if not SAME:
            col_mean = _load_means(slabs_ptr, indices_ptr, count, cols, n, TILE)

    gram = tl.zeros((TILE, TILE), dtype=tl.float64)
    # Squares of patterns, and of their sums over folds: the size of what cancels in a distance.
    row_squares = tl.zeros((BLOCK, TILE), dtype=tl.float64)
    col_squares = tl.zeros((BLOCK, TILE), dtype=tl.float64)
    row_cross = tl.zeros((BLOCK, TILE), dtype=tl.float64)
    col_cross = tl.zeros((BLOCK, TILE), dtype=tl.float64)
    for start in tl.range(0, count, BLOCK, num_stages=3):  # loads the numbers of voxels ahead
        v = start + tl.arange(0, BLOCK)
        voxel = tl.load(indices_ptr + v, mask=v < count, other=0).to(tl.int64)  # (BLOCK,)
        source = slabs_ptr + (voxel * folds * n)[:, None]
        row_mask = (v < count)[:, None] & (rows < n)[None, :]
        col_mask = (v < count)[:, None] & (cols < n)[None, :]
        if CROSS:
            row_sum = tl.zeros((BLOCK, TILE), dtype=tl.float64)
            col_sum = tl.zeros((BLOCK, TILE), dtype=tl.float64)
            for fold in range(folds):
                a = tl.load(source + (fold * n + rows)[None, :], mask=row_mask, other=0)
                row_sum += a
                row_squares += a * a
                b = a
                if not SAME:
                    b = tl.load(source + (fold * n + cols)[None, :], mask=col_mask, other=0)
                    col_sum += b
                    col_squares += b * b
                gram = tl.dot((-a).T, b, gram, input_precision="ieee", out_dtype=tl.float64)
            row_cross += row_sum * row_sum
            if SAME:
                col_sum = row_sum
            else:
                col_cross += col_sum * col_sum
            gram = tl.dot(row_sum.T, col_sum, gram, input_precision="ieee", out_dtype=tl.float64)
        else:
            a = tl.load(source + rows[None, :], mask=row_mask, other=0)
            if DISTANCE == "correlation":
                a = tl.where(row_mask, a - row_mean[None, :], 0)
            row_squares += a * a
            b = a
            if not SAME:
                b = tl.load(source + cols[None, :], mask=col_mask, other=0)
                if DISTANCE == "correlation":
                    b = tl.where(col_mask, b - col_mean[None, :], 0)
                col_squares += b * b
            gram = tl.dot(a.T, b, gram, input_precision="ieee", out_dtype=tl.float64)

    if SAME:
        col_squares, col_cross = row_squares, row_cross
    row_energy = tl.sum(row_squares, 0)
    col_energy = tl.sum(col_squares, 0)
    if UNIT:  # lengths, which are 0 and give NaN for patterns that don't vary or are 0
        row_energy = tl.sqrt(row_energy)
        col_energy = tl.sqrt(col_energy)
        distance = 1 - gram / row_energy[:, None] / col_energy[None, :]
        close = distance <= CLOSE
    else:
        row_cross_energy = tl.sum(row_cross, 0)
        col_cross_energy = tl.sum(col_cross, 0)
        size = (row_energy + row_cross_energy)[:, None] + (col_energy + col_cross_energy)[None, :]
        energy = size
        if CROSS:
            energy = (row_cross_energy - row_energy)[:, None]
            energy += (col_cross_energy - col_energy)[None, :]
        distance = energy - 2 * gram
        close = tl.abs(distance) <= CLOSE * size
    is_pair = (rows[:, None] < cols[None, :]) & (cols < n)[None, :]
    if tl.max(tl.max((close & is_pair).to(tl.int32), 1), 0) > 0:
        exact = tl.zeros((TILE, TILE), dtype=tl.float64)
        for v in range(count):
            voxel = tl.load(indices_ptr + v).to(tl.int64)
            source = slabs_ptr + voxel * folds * n
            total = tl.zeros((TILE, TILE), dtype=tl.float64)
            for fold in range(folds):
                a = tl.load(source + fold * n + rows, mask=rows < n, other=0) - row_mean
                b = tl.load(source + fold * n + cols, mask=cols < n, other=0) - col_mean
                if UNIT:
                    a /= row_energy
                    b /= col_energy
                difference = a[:, None] - b[None, :]
                if CROSS:
                    exact -= difference * difference
                    total += difference
                else:
                    exact += difference * difference
            exact += total * total
        if UNIT:
            exact *= 0.5
        distance = tl.where(close, exact, distance)

    if DISTANCE == "euclidean":
        # Rounding may leave the diagonal, which is not stored, below 0.
        distance = tl.sqrt(tl.where(distance < 0, 0.0, distance))
    if CROSS:
        distance = distance / (folds * (folds - 1)) / count
    distance = tl.where(count > 0, distance, float("nan"))
    row = rows.to(tl.int64)
    place = sphere * n * (n - 1) // 2 + row * (2 * n - row - 1) // 2 - row - 1
    tl.store(out_ptr + place[:, None] + cols[None, :], distance, mask=is_pair)


def searchlight_rdms(
    slabs: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    distance: str,
    launch: Launch | None = None,
) -> Tensor:
    """Return the RDMs of spheres, (C, n (n - 1) / 2) float32, in the order of SciPy's ``pdist``.

    ``slabs`` (p, K, n) has n patterns in K folds, float64; K is 1 except for "crossnobis". The
    voxels of sphere c are ``indices[indptr[c] : indptr[c + 1]]``. NaN for an empty sphere, and for
    the correlation or cosine distance of a pattern that has no direction there.
    """
    _, folds, n = slabs.shape
    spheres = len(indptr) - 1
    launch = launch or choose(n, _launch.capability(slabs.device))
    out = slabs.new_empty(spheres, n * (n - 1) // 2, dtype=torch.float32)
    tiles = triton.cdiv(n, launch.tile)
    _launch.launch(
        _searchlight_rdms_kernel,
        (spheres * (tiles * (tiles + 1) // 2),),
        *(slabs.contiguous(), indptr.contiguous(), indices.contiguous(), out),
        *(folds, n),
        DISTANCE=distance,
        CLOSE=CLOSE,
        SAME=tiles == 1,
        TILE=launch.tile,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
        maxnreg=255,  # without a limit, ptxas spills some to hold more programs
    )
    return out


def _make_case(distance: str, folds: int, n: int) -> _launch.CompileCase:
    spheres, size = 250_000, 100

    def call(device: torch.device) -> None:
        slabs = torch.empty(1, folds, n, dtype=torch.float64, device=device)
        indptr = torch.empty(2, dtype=torch.int64, device=device)
        searchlight_rdms(slabs, indptr, indptr, distance=distance)

    return _launch.CompileCase(
        f"{distance}, {spheres:,} spheres of {size} voxels, {n} patterns"
        + (f" in {folds} folds" if folds > 1 else ""),
        call,
        floor(spheres, folds, n, spheres, size * spheres),
    )


AOT_CASES = (
    # Numbers of patterns of which 16 is a factor are loaded in wider pieces.
    *(_make_case(distance, 1, n) for distance in ("euclidean", "correlation") for n in (32, 92)),
    *(_make_case("crossnobis", 4, n) for n in (32, 92)),
    # One tile, and rows of which 16 is no factor.
    _make_case("euclidean", 1, 12),
    _make_case("correlation", 1, 20),
    _make_case("crossnobis", 4, 20),
)
