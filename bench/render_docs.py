"""Regenerate the figures, and the blocks of the documentation that come from committed records."""

from __future__ import annotations

import re
from pathlib import Path

from bench import maps, roofline
from bench.accuracy_figure import draw_figure as draw_accuracy
from bench.common.machine import RESULTS, ROOT, load
from bench.doc_blocks import BLOCKS
from bench.peers.tables import draw_figure as draw_peers

PAGES = tuple(
    ROOT / page
    for page in (
        "README.md",
        "bench/README.md",
        "experiments/README.md",
        "repsim_kernels/docs/accuracy.md",
        "repsim_kernels/docs/compare.md",
    )
)
_BLOCK = r"(<!-- {}: made by `python -m bench render-docs` -->\n).*?(<!-- end -->)"


def render_pages(results: Path = RESULTS) -> dict[Path, str]:
    """Return the up-to-date text of each page, by its path."""
    return {path: fill_blocks(path.read_text(encoding="utf-8"), results) for path in PAGES}


def fill_blocks(text: str, results: Path) -> str:
    """Return a page with its generated blocks replaced; raise RuntimeError for an unknown block."""
    for name in re.findall(r"<!-- (\S+): made by", text):
        if name not in BLOCKS:
            raise RuntimeError(f"block {name}: unknown; expected one of {', '.join(BLOCKS)}")
        text = _replace_block(text, name, _render_block(name, results))
    return text


def _replace_block(text: str, name: str, block: str) -> str:
    pattern = re.compile(_BLOCK.format(re.escape(name)), re.DOTALL)
    text, count = pattern.subn(lambda match: f"{match[1]}{block}\n{match[2]}", text)
    if count != 1:
        raise RuntimeError(f"block {name}: found {count} complete blocks; expected one")
    return text


def _render_block(name: str, results: Path) -> str:
    """Return a block, with one part for each device that has a record."""
    kind, render = BLOCKS[name]
    if kind == "*":
        return render(results)
    records = [(path, load(path)) for path in sorted(results.glob(f"{kind}-*.json"))]
    if not records:
        raise RuntimeError(f"{results}: no {kind}-*.json in it; measure one first")
    return "\n\n".join(render(path, record) for path, record in records)


def draw_figures(results: Path = RESULTS) -> list[Path]:
    """Draw the figures of all records that have one; return their paths."""
    written = []
    for kind, name, draw in (
        ("peers", "peers", draw_peers),
        ("accuracy", "accuracy", draw_accuracy),
        ("maps", "maps", maps.draw_maps),
        ("maps", "minibatch", maps.draw_batches),
    ):
        for path in sorted(results.glob(f"{kind}-*.json")):
            written.append(path.with_name(path.name.replace(kind, name, 1)).with_suffix(".png"))
            draw(load(path), written[-1])
    for path in sorted(results.glob("bench-*.json")):
        name = path.stem.replace("bench", "roofline", 1)
        written += roofline.draw_rooflines(path, results / f"{name}.png")
    return written
