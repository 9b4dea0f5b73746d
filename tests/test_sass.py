"""Loops in a disassembly: which instructions they hold, and what an iteration costs."""

from __future__ import annotations

import re

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.predict import sass
from bench.predict.sass import find_loops, find_product_loops, parse

HEAD = "\tcode for sm_90a\n\t\tFunction : _toy_kernel\n"
HGMMA = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24"


def assemble(*lines):
    """Return the text that cuobjdump would print; a line such as ``loop:`` names the next one."""
    labels, code = {}, []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = hex(16 * len(code))
        else:
            code.append(line)
    printed = []
    for i, line in enumerate(code):
        text = re.sub(r"\b[a-z]+$", lambda match: labels.get(match[0], match[0]), line)
        printed.append(f"        /*{16 * i:04x}*/    {text} ;    /* 0x00000a00ff017b82 */")
        printed.append(f"{'':>40}/* 0x000e620000000800 */")
    return HEAD + "\n".join(printed) + "\n"


def read(*lines):
    return parse(assemble(*lines))


def names(loop):
    return [i.name for i in loop.instructions]


def test_a_loop_is_what_a_backward_branch_repeats():
    instructions = read(
        "LDC R1, c[0x0][0x28]", "loop:", "IADD3 R2, R2, 0x1, RZ", HGMMA, "@!P0 BRA loop", "EXIT"
    )
    (loop,) = find_product_loops(instructions)
    assert names(loop) == ["IADD3", "HGMMA.64x128x16.F32.BF16", "BRA"]
    assert find_loops(instructions) == [loop]
    assert len(loop) == 3
    assert loop.around == 0
    assert loop.count_products() == {"HGMMA.64x128x16": 1}


def test_guards_and_operands_are_read():
    branch, load, leave = read("@P0 BRA P3, 0x20", "@!UP2 UTMALDG.2D [UR4], [UR10]", "@PT EXIT")
    assert (branch.guard, branch.base, branch.operands, branch.target) == (
        "P0", "BRA", "P3, 0x20", 0x20,
    )  # fmt: skip
    assert (load.guard, load.name, load.target) == ("!UP2", "UTMALDG.2D", None)
    assert branch.falls_through
    assert load.falls_through
    assert not leave.falls_through


def test_predicated_instructions_and_skipped_ones_are_counted():
    (loop,) = find_product_loops(
        read(
            "loop:",
            "@P1 LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64], !P2",
            "@P3 BRA after",
            "STG.E [R2], R4",
            "after:",
            HGMMA,
            "BRA P0, loop",
            "EXIT",
        )
    )
    assert len(loop) == 5
    assert loop.count("LDGSTS") == loop.count("STG") == 1


def test_the_innermost_loop_with_products_is_chosen():
    instructions = read(
        "outer:", "MOV R1, R2", "inner:", HGMMA, "@P0 BRA inner", "copy:", "LDS R1, [R2]",
        "@P1 BRA copy", "@P2 BRA outer", "EXIT",
    )  # fmt: skip
    assert [len(loop) for loop in find_loops(instructions)] == [6, 2, 2]
    (loop,) = find_product_loops(instructions)
    assert names(loop) == ["HGMMA.64x128x16.F32.BF16", "BRA"]
    assert loop.around == 4


def test_every_innermost_loop_with_products_is_found():
    instructions = read("one:", HGMMA, "@P0 BRA one", "two:", HGMMA, "NOP", "@P0 BRA two", "EXIT")
    assert [len(loop) for loop in find_product_loops(instructions)] == [2, 3]


@pytest.mark.parametrize(
    "lines",
    [
        ("loop:", "HFMA2.MMA R1, -RZ, RZ, 0, 0", "@P0 BRA loop", "EXIT"),
        (HGMMA, "loop:", "FADD R1, R2, R3", "@P0 BRA loop", HGMMA, "EXIT"),
        ("@P0 BRA skip", HGMMA, "skip:", "EXIT"),
    ],
    ids=["no products", "products outside the loop", "no loop"],
)
def test_without_products_in_a_loop_none_is_found(lines):
    assert find_product_loops(read(*lines)) == []


def test_the_trap_behind_the_end_is_not_a_loop():
    assert find_loops(read("EXIT", "trap:", "BRA trap")) == []


def test_a_jump_back_from_code_out_of_line_is_not_a_loop():
    instructions = read(
        "loop:", "@P1 BRA far", "back:", HGMMA, "@P0 BRA loop", "EXIT", "far:", "NOP", "BRA back"
    )
    (loop,) = find_loops(instructions)
    assert names(loop) == ["BRA", "HGMMA.64x128x16.F32.BF16", "BRA", "NOP", "BRA"]


def test_a_wait_out_of_line_is_not_counted():
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R5"
    (loop,) = find_product_loops(
        read(
            "loop:",
            wait,
            "@!P1 BRA again",
            "back:",
            HGMMA,
            "@P0 BRA loop",
            "EXIT",
            "again:",
            wait,
            "@!P1 BRA again",
            "BRA back",
        )
    )
    assert len(loop) == 4
    assert loop.count("SYNCS") == 1


def test_a_wait_in_line_is_counted_once():
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R5"
    (loop,) = find_product_loops(
        read("loop:", "wait:", "NOP", wait, "@!P1 BRA wait", HGMMA, "@P0 BRA loop", "EXIT")
    )
    assert loop.count("SYNCS") == 1


def test_loads_are_counted_by_width():
    (loop,) = find_product_loops(
        read(
            "loop:",
            "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]",
            "LDGSTS.E.64 [R2], [R4.64]",
            "LDGSTS.E [R2], desc[UR4][R4.64]",
            "LDG.E.U16 R1, desc[UR4][R4.64]",
            "LDG.E.128.STRONG.GPU R1, desc[UR4][R4.64]",
            "LDL R1, [R2]",
            "STL.64 [R2], R4",
            HGMMA,
            "@P0 BRA loop",
            "EXIT",
        )
    )
    assert loop.count_widths("LDGSTS") == {32: 1, 64: 1, 128: 1}
    assert loop.count_widths("LDG") == {16: 1, 128: 1}
    assert loop.count_widths("LDS") == {}
    assert loop.spills == 2


@pytest.mark.parametrize(
    ("product", "count", "others", "warps", "issue", "tensor"),
    [
        ("HGMMA.64x128x16.F32", 12, 165, 8, 354, 1536),
        ("HGMMA.64x32x8.F32.TF32", 6, 590, 8, 1192, 192),
        ("HGMMA.64x128x8.F32.TF32", 12, 158, 8, 340, 1536),
        ("HMMA.1688.F32.TF32", 4, 0, 4, 4, 16),
        ("HMMA.16816.F32.BF16", 4, 4, 4, 8, 16),
        ("DMMA.8x8x4", 32, 0, 4, 32, 256),
    ],
)
def test_cycles_of_an_iteration(product, count, others, warps, issue, tensor):
    """Worked by hand, for instance 12 of 2 x 64 x 128 x 16 / 4096 = 64 cycles by two warpgroups."""
    lines = [f"{product} R24, R8, R16, R24"] * count + ["NOP"] * others
    loop = sass.Loop(tuple(read(*lines)))
    assert loop.issue_cycles(warps) == issue
    assert loop.tensor_cycles(warps) == tensor


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no instructions"),
        (HEAD, "no instructions"),
        (assemble("EXIT") + assemble("EXIT"), "not 2"),
    ],
)
def test_a_text_that_cannot_be_read_raises(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse(text)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("BRX R2 -0x40", "indirect"),
        ("@P0 BRA 0x500", "outside the kernel"),
        ("BRA R2", "no target"),
    ],
)
def test_a_branch_that_cannot_be_followed_raises(line, reason):
    with pytest.raises(ValueError, match=reason):
        find_loops(read(line, "EXIT"))


def test_a_product_of_unknown_shape_raises():
    loop = sass.Loop(tuple(read("HGMMA.NEW R24, R8")))
    with pytest.raises(ValueError, match="expected a shape"):
        loop.tensor_cycles(8)


@st.composite
def draw_programs(draw):
    """Draw straight code with branches to any place, each with or without a condition."""
    size = draw(st.integers(1, 12))
    lines = []
    for _ in range(size):
        target = hex(16 * draw(st.integers(0, size)))
        kinds = ["NOP", HGMMA, f"@P0 BRA {target}", f"BRA {target}", "@P1 EXIT"]
        lines.append(draw(st.sampled_from(kinds)))
    return [*lines, "EXIT"]


def make_graph(lines):
    graph = networkx.DiGraph()
    for i, line in enumerate(lines):
        graph.add_node(i)
        if "BRA" in line:
            graph.add_edge(i, int(line.split()[-1], 16) // 16)
        if line.startswith("@") or line in ("NOP", HGMMA):
            graph.add_edge(i, i + 1)
    return graph


def find_loops_by_dominators(graph):
    """Return the places in each natural loop, ordered by header, from their definition."""
    parents = networkx.immediate_dominators(graph, 0)
    above = networkx.DiGraph()
    above.add_nodes_from(graph)
    above.add_edges_from((parents[node], node) for node in graph if node != 0)
    bodies = {}
    for source, header in graph.edges:
        if header in networkx.ancestors(above, source) | {source}:
            rest = graph.subgraph(set(graph) - {header})
            body = networkx.ancestors(rest, source) | {source} if source != header else set()
            bodies.setdefault(header, {header}).update(body)
    return [bodies[header] for header in sorted(bodies)]


@given(draw_programs())
def test_loops_match_their_definition_by_dominators(lines):
    def get_places(loops):
        return [{i.address // 16 for i in loop.instructions} for loop in loops]

    graph = make_graph(lines)
    want = find_loops_by_dominators(graph.subgraph(networkx.descendants(graph, 0) | {0}))
    assert get_places(find_loops(read(*lines))) == want
    holding = [body for body in want if any(lines[i] == HGMMA for i in body)]
    innermost = [body for body in holding if not any(other < body for other in holding)]
    assert get_places(find_product_loops(read(*lines))) == innermost
