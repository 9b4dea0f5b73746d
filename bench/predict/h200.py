"""What MODEL.md assumes of an H200 (SXM): rates from its data sheet, and lower
ones that were measured or assumed.

The data sheet gives 989 TFLOP/s for dense bfloat16 and half of that for TF32. At 132
multiprocessors and the boost clock of 1.83 GHz this is 4096 operations per cycle, and 2048. Its
67 TFLOP/s for float64 products is 256 at 1.98 GHz.
"""

from __future__ import annotations

MULTIPROCESSORS = 132
SCHEDULERS = 4  # per multiprocessor; each issues one instruction of one warp per cycle
# Cycles per second, sustained: below the boost clock, as large products stay below their peak.
CLOCK = 1.7e9
# Operations per cycle and multiprocessor, by the operands of the products.
TENSOR_RATES = {"16 bits": 4096, "tf32": 2048, "float64": 256}

BYTES = 4.3e12  # per second: a large copy, measured on an H200 (its data sheet says 4.8e12)
# Operations per second by precision. 770-800 TFLOP/s were measured for bfloat16; TF32 runs at half
# that rate. A precision that ends in x3 needs three products.
OPERATIONS = {
    "bfloat16": 800e12,
    "float16": 800e12,
    "float16x3": 800e12 / 3,
    "tf32": 400e12,
    "tf32x3": 400e12 / 3,
    "ieee": 60e12,
}


def count_products(precision: str) -> int:
    """Return how many products of the tensor cores a product at a precision needs."""
    return 3 if precision.endswith("x3") else 1
