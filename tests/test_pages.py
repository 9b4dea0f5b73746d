"""The pages: links that resolve, sources that exist, tables as the registries, code as shown."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from _prose import FENCE, blocks

from repsim_kernels._metrics import METRICS
from repsim_kernels._operations import OPERATIONS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
METRICS_PAGE = ROOT / "repsim_kernels" / "docs" / "metrics.md"
FOLDERS = (".github", "bench", "experiments", "repsim_kernels/docs", "tests")
PAGES = sorted([README, *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.md"))])
SOURCE_FILES = sorted(
    path
    for folder in ("bench", "experiments", "repsim_kernels")
    for path in ROOT.glob(f"{folder}/**/*.py")
)
# Sources that are no publications.
DEFERRED = ("the docstring of each metric", "scikit-learn's LogisticRegression")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    return re.findall(r"\]\(([^()\s]+)\)", text)


def broken(page: Path) -> list[str]:
    bad = []
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title, here\n[a](#a-title-here) [b](page.md#b) [c](none.md) ![d](d.png)\n")
    assert broken(page) == ["page.md#b", "none.md", "d.png"]


def test_every_page_is_linked():
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in links(page)
        if "://" not in link and not link.startswith("#")
    }
    assert {page for page in PAGES if page.resolve() not in linked} <= {README}


def references() -> list[str]:
    text = METRICS_PAGE.read_text(encoding="utf-8").partition("## References")[2]
    return re.findall(r"^\* (.*)$", text, re.MULTILINE)


def unresolved(source: str) -> list[str]:
    """What a text after "Source:" cites that the pages lack; itself if it cites nothing."""
    bad, cited = [], any(d in source for d in DEFERRED)
    for page, section in re.findall(r'([\w/]+\.md), "([^"]+)"', source):
        target = next((p for p in PAGES if p.as_posix().endswith("/" + page)), None)
        slug = section.lower().replace(" ", "-").replace(",", "")
        cited = True
        if target is None or slug not in anchors(target):
            bad.append(f"{page}, {section}")
    start = 0
    for year in re.finditer(r"\b(?:1[89]|20)\d\d\b", source):
        authors = set(re.findall(r"[A-Z][\w-]{2,}", source[start : year.start()]))
        start, cited = year.end(), True
        if not any(year[0] in r and authors & set(re.findall(r"\w+", r)) for r in references()):
            bad.append(source[: year.end()])
    return bad if cited else [source]


def test_sources_resolve():
    sources = {
        f"{path.relative_to(ROOT)}:{line}": re.split(r" \w+ ---", text.partition("Source:")[2])[
            0
        ].strip()
        for path in SOURCE_FILES
        for line, text in blocks(path)
        if "Source:" in text
    }
    assert len(sources) > 20
    assert {place: bad for place, text in sources.items() if (bad := unresolved(text))} == {}


def test_an_unresolved_source_is_found():
    assert unresolved('docs/metrics.md, "Rank"; Song et al. 2012 for HSIC.') == []
    assert unresolved('docs/metrics.md, "Ranks".') == ["docs/metrics.md, Ranks"]
    assert len(unresolved("Song et al. 2013.")) == len(unresolved("the paper.")) == 1


def test_the_table_of_similarities_and_distances_is_that_of_the_registry():
    text = METRICS_PAGE.read_text(encoding="utf-8")
    table = text.partition("## Similarities and distances")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .*? \| (.*?) \|", table, re.MULTILINE)
    assert [name for name, _, _ in rows] == sorted(
        {m.name for m in METRICS}, key=[r[0] for r in rows].index
    )
    for metric in METRICS:
        ((pair, ablation),) = [row[1:] for row in rows if row[0] == metric.name]
        assert pair.startswith(metric.kind if metric.pairwise else "—"), metric.name
        assert ablation.startswith("—") != metric.ablation, metric.name


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 160
    assert len(text.split()) < 1800


def test_the_readme_names_every_function():
    table = README.read_text(encoding="utf-8").partition("## Functions")[2].partition("\n## ")[0]
    assert {op.name for op in OPERATIONS} <= set(re.findall(r"\w+", table))


def test_the_readme_code_prints_what_is_shown():
    """The output of each block is shown in the comments at its end."""
    text = README.read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n((?:(?!```).*\n)*?)((?:# .*\n)+)```", text, re.M)
    assert len(examples) == text.count("```python") == 3
    names: dict[str, object] = {}
    for code, comments in examples:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "README.md", "exec"), names)
        assert out.getvalue() == re.sub("^# ", "", comments, flags=re.M)
