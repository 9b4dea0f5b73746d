"""Pages: their links and sources resolve, their tables match the registries, their code runs."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from _prose import FENCE, read_prose

from repsim_kernels._metrics import METRICS
from repsim_kernels._operations import OPERATIONS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
COMPARE = ROOT / "repsim_kernels" / "docs" / "compare.md"
ABLATION = ROOT / "repsim_kernels" / "docs" / "ablation.md"
RSA = ROOT / "repsim_kernels" / "docs" / "rsa.md"
SIGNIFICANCE = ROOT / "repsim_kernels" / "docs" / "significance.md"
METRICS_PAGE = ROOT / "repsim_kernels" / "docs" / "metrics.md"
FOLDERS = (".github", "bench", "experiments", "repsim_kernels/docs", "tests")
PAGES = sorted([README, *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.md"))])
SOURCE_FILES = sorted(
    path
    for folder in ("bench", "experiments", "repsim_kernels")
    for path in ROOT.glob(f"{folder}/**/*.py")
)
# What a "Source:" may cite instead of a publication or a page.
OTHER_SOURCES = ("the docstring of each metric", "scikit-learn's LogisticRegression")


def make_anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def find_anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return set(map(make_anchor, re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)))


def find_links(page: Path) -> list[str]:
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    return re.findall(r"\]\(([^()\s]+)\)", text)


def find_broken_links(page: Path) -> list[str]:
    broken = []
    for link in find_links(page):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in find_anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    assert find_broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title, here\n[a](#a-title-here) [b](page.md#b) [c](none.md) ![d](d.png)\n")
    assert find_broken_links(page) == ["page.md#b", "none.md", "d.png"]


def test_every_page_is_linked():
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in find_links(page)
        if "://" not in link and not link.startswith("#")
    }
    assert {page for page in PAGES if page.resolve() not in linked} <= {README}


def read_references() -> list[str]:
    text = METRICS_PAGE.read_text(encoding="utf-8").partition("## References")[2]
    return re.findall(r"^\* (.*)$", text, re.MULTILINE)


def find_unresolved(source: str) -> list[str]:
    """Return the citations in a source that the pages lack, or the source if it cites nothing.

    A publication resolves if one reference has its year and every name before the year.
    """
    unresolved, cites = [], any(other in source for other in OTHER_SOURCES)
    for name, section in re.findall(r'([\w/]+\.md), "([^"]+)"', source):
        cites = True
        page = next((p for p in PAGES if p.as_posix().endswith(f"/{name}")), None)
        if page is None or make_anchor(section) not in find_anchors(page):
            unresolved.append(f"{name}, {section}")
    start = 0
    for year in re.finditer(r"\b(?:1[89]|20)\d\d\b", source):
        cites = True
        # After the previous publication's title or volume.
        citation = re.split(r'[;"*]|\d,', source[start : year.start()])[-1]
        names, start = set(re.findall(r"\b[A-Z][a-zà-ž]+", citation)), year.end()
        words = [set(re.findall(r"\w+", r)) for r in read_references()]
        if not names or not any(names | {year[0]} <= w for w in words):
            unresolved.append(f"{citation.strip()} {year[0]}")
    return unresolved if cites else [source.strip()]


def test_sources_resolve():
    sources = {
        # Up to the docstring's next section.
        f"{path.relative_to(ROOT)}:{line}": re.split(r" \w+ ---", text.partition("Source:")[2])[0]
        for path in SOURCE_FILES
        for line, text in read_prose(path)
        if "Source:" in text
    }
    assert len(sources) > 20
    assert {place: bad for place, text in sources.items() if (bad := find_unresolved(text))} == {}


def test_an_unresolved_source_is_found():
    assert find_unresolved('docs/metrics.md, "Rank"; Song et al. 2012 for HSIC.') == []
    assert find_unresolved('docs/metrics.md, "Ranks".') == ["docs/metrics.md, Ranks"]
    assert find_unresolved("Song et al. 2013.") == ["Song et al. 2013"]
    assert find_unresolved("Song & Rank 2012.") == ["Song & Rank 2012"]
    assert find_unresolved("the paper.") == ["the paper."]


def test_the_table_of_similarities_and_distances_matches_the_registry():
    text = METRICS_PAGE.read_text(encoding="utf-8")
    table = text.partition("## Similarities and distances")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .*? \| (.*?) \|", table, re.MULTILINE)
    metrics = {metric.name: metric for metric in METRICS}
    assert sorted(name for name, _, _ in rows) == sorted(metrics)
    for name, pair, ablation in rows:
        metric = metrics[name]
        assert pair.startswith(metric.kind if metric.pairwise else "—"), name
        assert ablation.startswith("—") != metric.ablation, name


def test_every_metric_is_defined():
    text = METRICS_PAGE.read_text(encoding="utf-8")
    table = text.partition("## Definitions")[2].partition("\n## ")[0]
    defined = set(re.findall(r"^\| `(\w+)", table, re.MULTILINE))
    assert defined == {metric.name for metric in METRICS if metric.has_function}


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 160
    assert len(text.split()) < 1800


def test_the_readme_names_every_function():
    table = README.read_text(encoding="utf-8").partition("## Functions")[2].partition("\n## ")[0]
    assert {op.name for op in OPERATIONS} <= set(re.findall(r"\w+", table))


@pytest.mark.parametrize(
    ("page", "count"), [(README, 3), (SIGNIFICANCE, 7), (ABLATION, 6), (COMPARE, 1), (RSA, 6)]
)
def test_the_code_of_a_page_prints_what_is_shown(monkeypatch, tmp_path, page, count):
    """The output of each block is shown in the comments at its end."""
    text = page.read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n((?:(?!```).*\n)*?)((?:# .*\n)+)```", text, re.M)
    assert len(examples) == text.count("```python") == count
    names: dict[str, object] = {}
    monkeypatch.chdir(tmp_path)  # where it writes
    for code, comments in examples:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, page.name, "exec"), names)
        assert out.getvalue() == re.sub("^# ", "", comments, flags=re.M)
