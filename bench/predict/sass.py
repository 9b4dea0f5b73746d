"""Find the loops of a kernel in its disassembly, and count the instructions of an iteration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bench.predict.h200 import SCHEDULERS, TENSOR_RATES

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE
)
_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")
_ENDS = ("EXIT", "RET")
_INDIRECT = ("BRX", "BRXU", "JMX", "JMXU")
_PRODUCTS = ("HGMMA", "HMMA", "DMMA")


@dataclass(frozen=True)
class Instruction:
    """An instruction such as ``@!P0 BRA 0x1b30``: guard ``!P0``, name BRA, operands 0x1b30."""

    address: int
    guard: str
    name: str  # with its modifiers, e.g. LDGSTS.E.BYPASS.128
    operands: str

    @property
    def base(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch may go to; None for other instructions."""
        if self.base in _INDIRECT:
            raise ValueError(f"{self.name} at {self.address:#x}: indirect branches are not read")
        if self.base not in ("BRA", "JMP"):
            return None
        match = _ADDRESS.search(self.operands)
        if match is None:
            raise ValueError(f"{self.name} {self.operands} at {self.address:#x}: no target")
        return int(match[1], 16)

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        conditional = self.guard not in ("", "PT") or "," in self.operands or ".DIV" in self.name
        return conditional or not (self.base in _ENDS or self.target is not None)


@dataclass(frozen=True)
class Loop:
    """The instructions of one iteration, those that a branch may skip included."""

    instructions: tuple[Instruction, ...]
    around: int = 0  # instructions of the loop around it, without its own

    def __len__(self) -> int:
        return len(self.instructions)

    def count(self, base: str) -> int:
        """Count the instructions of a name, whatever their modifiers."""
        return sum(i.base == base for i in self.instructions)

    def count_widths(self, base: str) -> dict[int, int]:
        """Count the loads or stores of a name by their bits per thread."""
        widths = [_read_width(i) for i in self.instructions if i.base == base]
        return {width: widths.count(width) for width in sorted(set(widths))}

    def count_products(self) -> dict[str, int]:
        """Count the tensor-core instructions by name and shape, e.g. ``HGMMA.64x128x16``."""
        names = [".".join(i.name.split(".")[:2]) for i in self.instructions if is_product(i)]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    @property
    def products(self) -> int:
        """The number of tensor-core instructions."""
        return sum(map(is_product, self.instructions))

    @property
    def spills(self) -> int:
        """The number of accesses to local memory."""
        return self.count("LDL") + self.count("STL")

    def issue_cycles(self, warps: int) -> float:
        """Return the cycles in which the schedulers issue an iteration of a block."""
        return len(self) * warps / SCHEDULERS

    def tensor_operations(self, warps: int) -> float:
        """Return the operations of the tensor cores in an iteration of a block."""
        return sum(_read_product(i, warps)[0] for i in self.instructions if is_product(i))

    def tensor_cycles(self, warps: int) -> float:
        """Return the cycles that the tensor cores need for an iteration of a block."""
        products = [_read_product(i, warps) for i in self.instructions if is_product(i)]
        return sum(operations / rate for operations, rate in products)


def is_product(instruction: Instruction) -> bool:
    """Return whether an instruction runs on the tensor cores of sm_80 or sm_90."""
    return instruction.base in _PRODUCTS


def parse(text: str) -> list[Instruction]:
    """Return the instructions that cuobjdump -sass prints for a binary of one function."""
    functions = _FUNCTION.findall(text)
    if len(functions) > 1:
        raise ValueError(f"one function was expected, not {len(functions)}: {functions}")
    instructions = [
        Instruction(int(address, 16), guard, name, operands.strip())
        for address, guard, name, operands in _INSTRUCTION.findall(text)
    ]
    if not instructions:
        raise ValueError("the disassembly has no instructions")
    return instructions


def find_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Return the natural loops, one for each header, in the order of their headers.

    A loop's header is on every path from the kernel's start to the way back to it, so a jump back
    from code that the compiler moved out of the way does not make a loop.
    """
    return [loop for _, loop in _find_bodies(instructions)]


def find_product_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Return the innermost loops that hold tensor-core instructions."""
    found = _find_bodies(instructions)
    holding = [(body, loop) for body, loop in found if loop.products]
    innermost = [(b, loop) for b, loop in holding if not any(other < b for other, _ in holding)]
    return [
        replace(
            loop, around=min((len(other - body) for other, _ in found if body < other), default=0)
        )
        for body, loop in innermost
    ]


def _find_bodies(instructions: Sequence[Instruction]) -> list[tuple[set[int], Loop]]:
    """Return each loop with the addresses of all its instructions, those of its waits included."""
    after = _link(instructions)
    entry = instructions[0].address
    reached = _reach(after, [entry])
    before: dict[int, list[int]] = {address: [] for address in reached}
    for address in sorted(reached):
        for follower in after[address]:
            before[follower].append(address)
    sources: dict[int, list[int]] = {}  # of the ways back to a header
    for header, leading in before.items():
        if len(leading) > (header != entry):
            elsewhere = _reach(after, [entry], without=header)
            if back := [address for address in leading if address not in elsewhere]:
                sources[header] = back
    bodies = {
        header: _reach(before, back, without=header) | {header} for header, back in sources.items()
    }
    by_address = {i.address: i for i in instructions}
    loops = []
    for header in sorted(bodies):
        body = bodies[header]
        nested = [h for h, other in bodies.items() if other < body]
        waits = [h for h in nested if _is_wait(by_address[a] for a in bodies[h])]
        kept = _skip_waits(after, header, sources[header], body, waits)
        loops.append((body, Loop(tuple(by_address[a] for a in sorted(kept)))))
    return loops


def _is_wait(instructions: Iterable[Instruction]) -> bool:
    """Return whether a loop only repeats the question whether a barrier's phase is over."""
    names = [i.base for i in instructions]
    return "SYNCS" in names and set(names) <= {"SYNCS", "BRA", "NANOSLEEP", "NOP"}


def _skip_waits(
    after: dict[int, list[int]], header: int, sources: list[int], body: set[int], waits: list[int]
) -> set[int]:
    """Return the body without the waits that an iteration enters only if it comes too early."""
    for wait in waits:
        links = {a: [b for b in after[a] if b in body] for a in body}
        without = _reach(links, [header], without=wait)
        if without.issuperset(sources):
            body = without
    return body


def _link(instructions: Sequence[Instruction]) -> dict[int, list[int]]:
    """Return the addresses that may follow each address."""
    addresses = {i.address for i in instructions}
    after: dict[int, list[int]] = {}
    for i, following in zip(instructions, [*instructions[1:], None], strict=True):
        target = i.target
        if target is not None and target not in addresses:
            raise ValueError(f"{i.name} at {i.address:#x} goes to {target:#x}, outside the kernel")
        after[i.address] = [] if target is None else [target]
        if i.falls_through and following is not None:
            after[i.address].append(following.address)
    return after


def _reach(
    links: dict[int, list[int]], starts: Iterable[int], without: int | None = None
) -> set[int]:
    """Return all addresses that can be reached from the starts on paths without one address."""
    seen: set[int] = set()
    waiting = [a for a in starts if a != without]
    while waiting:
        address = waiting.pop()
        if address not in seen:
            seen.add(address)
            waiting += [a for a in links.get(address, ()) if a != without]
    return seen


def _read_width(instruction: Instruction) -> int:
    """Return the bits that a load or store moves per thread; 32 if its name has no width."""
    parts = instruction.name.split(".")
    named = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    return next((named[part] for part in parts if part in named), 32)


def _read_product(instruction: Instruction, warps: int) -> tuple[float, int]:
    """Return the operations of a tensor-core instruction in a block, and their rate per cycle."""
    base, shape, *types = instruction.name.split(".")
    sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)|(16)(8)(\d+)", shape)  # 1688 is 16 x 8 x 8
    if sizes is None:
        raise ValueError(f"{instruction.name}: expected a shape such as 64x128x16 or 1688")
    m, n, k = (int(size) for size in sizes.groups() if size)
    kind = "float64" if base == "DMMA" else "tf32" if "TF32" in types else "16 bits"
    groups = warps / 4 if base == "HGMMA" else warps  # four warps share an HGMMA
    return 2 * m * n * k * groups, TENSOR_RATES[kind]
