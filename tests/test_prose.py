"""Docstrings, comments, messages and pages have none of the phrases in CONTRIBUTING's list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _prose import read_prose

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / ".github" / "CONTRIBUTING.md"
FOLDERS = (".github", "repsim_kernels", "experiments", "bench", "tests")
SUFFIXES = {".py", ".md", ".j2", ".cu", ".h"}


def read_phrases() -> list[re.Pattern[str]]:
    """Read the regular expressions from the left column of CONTRIBUTING's list."""
    (block,) = re.findall(r"^```phrases\n(.*?)^```", GUIDE.read_text("utf-8"), re.M | re.S)
    return [re.compile(re.split(r"  +", line)[0]) for line in block.splitlines()]


PHRASES = read_phrases()


def find_phrases(path: Path) -> list[str]:
    """Find each phrase to avoid in a file. Strings of tests are data, not messages."""
    messages = not path.is_relative_to(ROOT / "tests")
    return [
        f"line {line}: {match[0]!r} in {text[max(0, match.start() - 40) : match.end() + 40]!r}"
        for line, text in read_prose(path, messages)
        for phrase in PHRASES
        for match in phrase.finditer(text)
    ]


def list_files() -> list[Path]:
    linked = ROOT / "repsim_kernels" / "experiments"  # a link to `experiments`
    paths = [ROOT / "README.md"]
    for folder in FOLDERS:
        paths += (p for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES)
    return sorted(p for p in paths if not p.is_relative_to(linked))


@pytest.mark.parametrize("path", list_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_phrase_to_avoid(path):
    assert find_phrases(path) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("docstring.py", '"""There are so\nmany cells."""\n'),
        ("comment.py", "x = 1  # fine\n# There are so\n# many cells.\n"),
        ("message.py", 'raise ValueError(f"x: {1} besides the other")\n'),
        ("part.py", 'raise ValueError(f"x: {1} besides {2}")\n'),
        ("page.md", "# Title\n\nThere are so\nmany cells.\n"),
        ("kernel.cu", "// There are so\n// many cells.\nint x;\n"),
        ("trailing.h", "int x;  // a cell besides it\n"),
        ("block.h", "/* There are so\n   many cells. */\nint x;\n"),
    ],
)
def test_every_kind_of_prose_is_searched_across_lines(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert len(find_phrases(tmp_path / name)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.md", "`x if x else y` is code:\n\n```python\nx if x else y\n```\n"),
        ("module.py", '"""Choose.\n\n>>> 1 if 2 else 3\n1\n"""\nx = 1 if 2 else 3\n'),
        ("kernel.cu", "if (x) y(); else z();\n"),
    ],
)
def test_code_is_not_prose(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert find_phrases(tmp_path / name) == []
