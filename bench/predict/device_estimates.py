"""Estimates for MODEL.md: the probe's logistic regressions and the n x n stage of the study."""

from __future__ import annotations

from bench.predict.h200 import BYTES, CLOCK, MULTIPROCESSORS

ABLATIONS = 25_000  # of 500 stimuli, or of the 50 stimuli of a class
STEPS = 12  # Riccati steps; layers of trained networks take 5 to 17, a few of their cells more
PRODUCTS = 67e12  # float64 tensor-core operations per second, the data sheet's peak
CYCLES_PER_SECOND = MULTIPROCESSORS * CLOCK  # of all multiprocessors together
SHARED = 128 * CYCLES_PER_SECOND  # bytes of shared memory per second
SWEEPS = 7

# The paper's probe: 17 scores per layer and class of AlexNet, MobileNetV2 0.35 and ResNet50.
FITS = 17 * (7 * 50 * 200 + 10 * 61_714 + 10 * 110_385)
NEWTON = 8  # steps from zero, on five kinds of activations; about 3 from the intact fit
CYCLES = {"reading": 16, "Hessian": 16, "conjugate gradients": 7, "the rest": 13}  # thousands
SETUP = 20  # thousand cycles per fit outside the steps: its moments and its errors


def describe_fits() -> str:
    """Return the section of MODEL.md on logistic regressions."""

    def count_seconds(count: float, cycles: float, steps: float = NEWTON) -> float:
        return count * 1e3 * (cycles * steps + SETUP) / CYCLES_PER_SECOND

    total = sum(CYCLES.values())
    overlapped = total - CYCLES["reading"]
    low, high = count_seconds(FITS, overlapped), count_seconds(FITS, total)
    low_40, high_40 = count_seconds(40e6, overlapped), count_seconds(40e6, total)
    warm = count_seconds(FITS, overlapped, (NEWTON + 16 * 3) / 17)
    return f"""\
## The study's logistic regressions

The paper's networks, layers and classes need {FITS / 1e6:.0f} million fits of 500 stimuli and 100
neurons. A step of `logistic_fits` costs {total} thousand cycles of a multiprocessor:
{", ".join(f"{name} {cycles}" for name, cycles in CYCLES.items())}
(kernels/triton/logistic.py gives the reasons). With {NEWTON} steps per fit, and {SETUP} thousand
cycles around them, all fits take {low:.0f} s if reading overlaps with the rest, and {high:.0f} s if
nothing overlaps; 40 million take {low_40:.0f} s and {high_40:.0f} s. With paired draws, the ablated
fits start from the intact ones: with 3 steps each, {warm:.0f} s instead of {low:.0f} s.

The host draws the neurons of the next cell during the fits of the current one. A draw of 100 took
1 µs of CPU time from 802,816 neurons and 29 µs from 4,096 (measured).
"""


def describe_stage() -> str:
    """Return the section of MODEL.md on the computations that follow the Grams."""
    n = 499
    product = 2 * n**3 * ABLATIONS / PRODUCTS
    parts = {
        "a cell's Gram into the original's eigenbasis": 2,
        f"Procrustes: {STEPS} Riccati steps": STEPS,
        "its final step: a residual, a Cholesky factor and its solves": 1 + 1 / 6 + 1,
        "ridge CCA: a Cholesky factor and its solves": 1 / 6 + 1,
        "PWCCA: the variates, and CCA in their basis": 2,
    }
    parts["together"] = sum(parts.values())
    rows = [f"| {part} | {k:.3g} | {k * product:.2f} |" for part, k in parts.items()]
    traffic = 24 * n * n * STEPS * ABLATIONS / BYTES
    remaining = 1e3 * (60 - 2 * parts["together"] * product) / ABLATIONS
    eigenproblems = 9 * n**3 * ABLATIONS / PRODUCTS
    accesses = _count_shared_accesses(49) / 1e6
    jacobi = 1e3 * 8e6 * accesses * ABLATIONS / SHARED
    table = "\n".join(rows)
    return f"""\
## The n x n stage of the whole study

{ABLATIONS:,} ablations of 500 stimuli: CKA, Procrustes, ridge CCA and PWCCA on float64 matrices of
499 x 499. One product is 2 n³ operations, at the peak of 67 TFLOP/s. Like everything on this page,
this is arithmetic.

| part of an ablation | products | s, all ablations |
| --- | --: | --: |
{table}

Memory traffic of the steps adds {traffic:.1f} s.

**The table leaves out PWCCA's eigenproblems, one of 499 x 499 per ablation, because nobody knows
their cost.** With 9 n³ operations each, all of them would take {eigenproblems:.1f} s at the peak,
but eigensolvers stay far below it. Anything between 8 s ({eigenproblems / 8:.0%} of the peak) and
600 s ({600e3 / ABLATIONS:.0f} ms each) is possible, and may be more than all other parts together.
If the products reach half of their peak, each eigenproblem may take {remaining:.1f} ms for all
ablations to finish within a minute.

For the same number of eigenproblems of 50 stimuli, solved by Jacobi rotations in shared memory:
{SWEEPS} sweeps make {accesses:.1f} million accesses of 8 bytes per matrix, {jacobi:.0f} ms in total
at 128 bytes per clock for each of {MULTIPROCESSORS} multiprocessors.
"""


def _count_shared_accesses(n: int) -> int:
    """Count the accesses of cuda/jacobi.cu: 2 x 2 blocks up to the diagonal, and vectors."""
    m = n + n % 2
    pairs = m // 2
    return SWEEPS * (m - 1) * (12 * pairs * (pairs + 1) // 2 + 4 * pairs * n)
