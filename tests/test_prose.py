"""No phrase that CONTRIBUTING asks to avoid, in docstrings, comments, messages or pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _prose import blocks

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / ".github" / "CONTRIBUTING.md"
FOLDERS = (".github", "repsim_kernels", "experiments", "bench", "tests")
SUFFIXES = {".py", ".md", ".j2", ".cu", ".h"}


def phrases() -> list[re.Pattern[str]]:
    (block,) = re.findall(r"^```phrases\n(.*?)^```", GUIDE.read_text("utf-8"), re.M | re.S)
    return [re.compile(re.split(r"  +", line)[0]) for line in block.splitlines()]


PHRASES = phrases()


def faults(path: Path) -> list[str]:
    """Each phrase to avoid that a file has. Strings of tests are data, not messages."""
    messages = "tests" not in path.parts
    return [
        f"line {line}: {match[0]!r} in {text[max(0, match.start() - 40) : match.end() + 40]!r}"
        for line, text in blocks(path, messages)
        for phrase in PHRASES
        for match in phrase.finditer(text)
    ]


def files() -> list[Path]:
    paths = [ROOT / "README.md"]
    for folder in FOLDERS:
        paths += (p for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES)
    return sorted(p for p in paths if "repsim_kernels/experiments" not in p.as_posix())


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_phrase_to_avoid(path):
    assert faults(path) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("docstring.py", '"""A cell\nbesides the\nother."""\n'),
        ("comment.py", "x = 1  # fine\n# A cell stands\n# besides it.\n"),
        ("message.py", 'raise ValueError(f"x: {1} besides the other")\n'),
        ("page.md", "# Title\n\nA cell\nbesides it.\n"),
        ("kernel.cu", "// A cell\n// besides it.\nint x;\n"),
    ],
)
def test_every_kind_of_prose_is_searched(tmp_path, name, text):
    path = tmp_path.parent / f"{tmp_path.name}-{name}"
    path.write_text(text)
    assert len(faults(path)) == 1


def test_code_is_not_prose(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("`x if x else y` is code:\n\n```python\nx if x else y\n```\n")
    assert faults(path) == []
