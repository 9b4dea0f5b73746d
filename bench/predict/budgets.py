"""Budgets of the product loops on sm_90, which the compile tests enforce and MODEL.md reports."""

from __future__ import annotations

from dataclasses import dataclass

from bench.predict.compile import CompiledKernel, build, list_cases
from repsim_kernels.kernels.triton._launch import CompileCase


@dataclass(frozen=True)
class ProductBudget:
    """The most that an iteration of a product loop may cost."""

    instructions: float  # per tensor-core instruction
    barriers: float  # per tensor-core instruction
    warpgroup: int  # WARPGROUP instructions, which start and await products
    issue: float = 0.35  # issue cycles as a share of the tensor cores' cycles


ONE_PRODUCT = ProductBudget(16, 0.5, 2)
# For operands that are split in two halves: two or three products per step.
SEVERAL_PRODUCTS = ProductBudget(20, 0.5, 5)

# Kernels with products that no budget binds, and why.
EXEMPT = {
    "_one_plane_weights_kernel": "adds the products' absolute values in the loop",
    "_grams_kernel": "centres and splits its operands in the loop; each layer is its own tensor",
    "_parts_kernel": "gathers the columns of a cell in the loop, for one small product",
    "_masked_pointwise_kernel": "masks its operand in the loop, so that no copy is stored",
    "_logistic_fits_kernel": "weighs its operand in the loop, anew in each Newton step",
}


def has_products(kernel: CompiledKernel) -> bool:
    """Return whether a kernel multiplies on tensor cores, other than in float64."""
    return kernel.tensor_cores not in ("", "DMMA")


def shorten(name: str) -> str:
    """Return the name of a kernel without what all of them have in common."""
    return name.strip("_").removesuffix("_kernel")


def get_budget(kernel: CompiledKernel) -> ProductBudget:
    """Return the budget of a kernel with products; raises LookupError if they can't be counted."""
    if kernel.dots is None:
        raise LookupError(f"{kernel.name}: its products are not in one inner loop of one shape")
    return ONE_PRODUCT if kernel.dots.count == 1 else SEVERAL_PRODUCTS


def list_violations(kernel: CompiledKernel) -> list[str]:
    """Return what exceeds the budget of a kernel with products."""
    budget, loop = get_budget(kernel), kernel.product_loop
    loads = {
        "LDG": sum(loop.count_widths("LDG").values()),
        "LDGSTS narrower than 128 bits": sum(
            count for width, count in loop.count_widths("LDGSTS").items() if width < 128
        ),
    }
    limits = {
        "instructions per product": (len(loop) / loop.products, budget.instructions),
        "barriers per product": (loop.count("BAR") / loop.products, budget.barriers),
        "WARPGROUP": (loop.count("WARPGROUP"), budget.warpgroup),
        "issue / tensor cycles": (kernel.issue_share, budget.issue),
        "accesses to local memory": (loop.spills, 0),
        **{name: (count, 0) for name, count in loads.items()},
    }
    violations = [
        f"{name}: {reached:.3g}, at most {most:.3g} expected"
        for name, (reached, most) in limits.items()
        if reached > most
    ]
    if not loop.count("UTMALDG") + loop.count("LDGSTS"):
        violations.append("neither TMA nor LDGSTS loads the operands")
    return violations


def describe_loops(arch: int) -> str:
    """Return the section of MODEL.md on the budgets and what the compiled loops reach."""
    titles = (
        "kernel", "case", "tensor-core instructions", "instructions each", "BAR each", "WARPGROUP",
        "issue / tensor", "around", "loads", "budget",
    )  # fmt: skip
    rows = [
        row
        for _, case in list_cases()
        if case.products
        for kernel in build(case, arch)
        if has_products(kernel)
        for row in [_make_row(case, kernel)]
    ]
    lines = [" | ".join(titles), " | ".join(["---"] * 3 + ["--:"] * 5 + ["---"] * 2)]
    limits = "\n".join(
        f"* {title}: {b.instructions:g} instructions and {b.barriers:g} BAR per tensor-core"
        f" instruction, {b.warpgroup} WARPGROUP, issue / tensor {b.issue:g}"
        for title, b in (("one product", ONE_PRODUCT), ("two or three products", SEVERAL_PRODUCTS))
    )
    exempt = "\n".join(f"* {shorten(name)}: {reason}" for name, reason in EXEMPT.items())
    table = "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(row) for row in rows)])
    return f"""\
## Product loops

What the compiled product loops reach on sm_{arch}, per iteration. The compile tests allow at most:

{limits}

and require TMA (UTMALDG) or LDGSTS of 128 bits, no other loads, and no spills. **around** counts
the instructions of the loop around the product loop, where there is one. It fills and drains the
pipeline anew each time; no budget binds it, and the predictions leave it out. These kernels are
exempt:

{exempt}

{table}
"""


def _make_row(case: CompileCase, kernel: CompiledKernel) -> tuple[str, ...]:
    loop = kernel.product_loop
    products = ", ".join(f"{count} {name}" for name, count in loop.count_products().items())
    loads = [
        f"{count} {base}" + f".{width}" * (base != "UTMALDG")
        for base in ("UTMALDG", "LDGSTS", "LDG")
        for width, count in loop.count_widths(base).items()
    ]
    within = not list_violations(kernel)
    return (
        shorten(kernel.name),
        case.name,
        products,
        f"{len(loop) / loop.products:.1f}",
        f"{loop.count('BAR') / loop.products:.2f}",
        str(loop.count("WARPGROUP")),
        f"{kernel.issue_share:.2f}",
        str(loop.around or "-"),
        ", ".join(loads) or "none",
        "exempt" if kernel.name in EXEMPT else "met" if within else "exceeded",
    )
