"""What takes the study's time besides activations: its probe's fits, and what follows the Grams."""

from __future__ import annotations

COUNT = 25_000  # ablations, of 500 stimuli or of the 50 of a class
STEPS = 12  # Riccati steps; layers of trained networks take 5 to 17, few of their cells more
PRODUCTS = 67e12  # operations a second, of the float64 tensor cores
BYTES = 3.0e12  # a second
SHARED = 132 * 128 * 1.755e9  # bytes of shared memory a second
SWEEPS = 7

# The paper's probe: 17 scores of each layer and class, of AlexNet, MobileNetV2 0.35 and ResNet50.
FITS = 17 * (7 * 50 * 200 + 10 * 61_714 + 10 * 110_385)
NEWTON = 8  # steps of a cold start, on five kinds of activations; from the intact fit some 3
CYCLES = {"reading": 16, "Hessian": 16, "conjugate gradients": 7, "all else": 13}
ENDS = 20  # thousand cycles of a fit, as those of a step: its moments, and its errors
DRAWN = 10e-6  # seconds of the host a fit
CLOCK = 132 * 1.7e9  # cycles of all multiprocessors a second


def fits() -> str:
    """The section of MODEL.md on logistic regressions."""

    def seconds(count: float, cycles: float, steps: float = NEWTON) -> float:
        return count * 1e3 * (cycles * steps + ENDS) / CLOCK

    most = sum(CYCLES.values())
    hidden = most - CYCLES["reading"]
    low, high = seconds(FITS, hidden), seconds(FITS, most)
    goal, slow = seconds(40e6, hidden), seconds(40e6, most)
    warm = seconds(FITS, hidden, (NEWTON + 16 * 3) / 17)
    return f"""\
## The study's logistic regressions

{FITS / 1e6:.0f} million fits, all that the paper's networks, layers and classes come to, of 500 \
stimuli
and 100 neurons. A step of `logistic_fits` takes {most} thousand cycles of a multiprocessor:
{", ".join(f"{name} {cycles}" for name, cycles in CYCLES.items())}
(kernels/triton/logistic.py has the reasons). With {NEWTON} steps a fit, and {ENDS} thousand cycles
around them, all take {low:.0f} s where reading hides behind the rest, and {high:.0f} s where
nothing overlaps; 40 million take {goal:.0f} s and {slow:.0f} s. Of paired draws the ablated fits
start from the intact ones: with 3 steps each, {warm:.0f} s instead of {low:.0f}.

Which neurons are drawn is decided on the host, and takes 10 µs a fit there, by measurement on a
core of a shared CPU: {FITS * DRAWN / 60:.0f} minutes, more than the fits.
"""


def section() -> str:
    """The section of MODEL.md on what follows the Grams."""
    n = 499
    product = 2 * n**3 * COUNT / PRODUCTS
    parts = {
        "a cell's Gram into the original's eigenbasis": 2,
        f"Procrustes: {STEPS} Riccati steps": STEPS,
        "their end: a residual, a Cholesky factor and its inverse": 1 + 1 / 2,
        "ridge CCA: a Cholesky factor and its solves": 1 / 6 + 1,
        "PWCCA: the variates, and CCA in their basis": 2,
    }
    parts["together"] = sum(parts.values())
    rows = [f"| {part} | {k:.3g} | {k * product:.2f} |" for part, k in parts.items()]
    moved = 24 * n * n * STEPS * COUNT / BYTES
    left = 1e3 * (60 - 2 * parts["together"] * product) / COUNT
    accesses = _accesses(49) / 1e6
    jacobi = 1e3 * 8e6 * accesses * COUNT / SHARED
    table = "\n".join(rows)
    return f"""\
## The n x n stage of the whole study

{COUNT:,} ablations of 500 stimuli: CKA, Procrustes, ridge CCA and PWCCA, in float64 matrices of
499 x 499. A product is 2 n³ operations, at 67 TFLOP/s. Arithmetic, like everything here.

| part of an ablation | products | s, all |
| --- | --: | --: |
{table}

With {moved:.1f} s for what the steps read and write behind their products. The eigenproblem of
PWCCA is solved by cuSOLVER for a batch, through CuPy; what it takes is not known. If the products
reach half of their peak, it may take {left:.1f} ms a matrix for all to end in a minute.

The same number of eigenproblems of 50 stimuli by Jacobi rotations in shared memory: {SWEEPS} sweeps
make {accesses:.1f} million accesses of 8 bytes a matrix, {jacobi:.0f} ms for all at 128 bytes a
clock of each of 132 multiprocessors.
"""


def _accesses(n: int) -> int:
    """Of shared memory by cuda/jacobi.cu: 2 x 2 blocks on and under the diagonal, and vectors."""
    m = n + n % 2
    pairs = m // 2
    return SWEEPS * (m - 1) * (12 * pairs * (pairs + 1) // 2 + 4 * pairs * n)
