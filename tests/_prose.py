"""The prose of a source file or page: docstrings, comments, messages and paragraphs."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

CODE = re.compile(
    r"``.+?``|`[^`]*`|^\s*(?:>>>|\.\.\.) [^\n]*$|\{%.*?%\}|\{\{.*?\}\}", re.MULTILINE | re.DOTALL
)
COMMENT = re.compile(r"/\*.*?\*/|(?:^ *//[^\n]*\n)+|//[^\n]*", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


def read_prose(path: Path, messages: bool = True) -> Iterator[tuple[int, str]]:
    """Yield each block's first line number, and its text as one line without code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        blocks = [*_find_comments(text), *_find_strings(text, messages)]
    elif path.suffix in (".cu", ".h"):
        blocks = [
            (_count_lines(text, m.start()), re.sub(r"^ *//", "", m[0], flags=re.M))
            for m in COMMENT.finditer(text)
        ]
    else:
        text = FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)
        paragraphs = re.finditer(r"(?:^(?!\s*$).*\n?)+", text, re.MULTILINE)
        blocks = [(_count_lines(text, m.start()), m[0]) for m in paragraphs]
    for line, block in blocks:
        yield line, " ".join(CODE.sub(" ", block).split())


def _count_lines(text: str, position: int) -> int:
    """Return the number, from 1, of the line at a position."""
    return text.count("\n", 0, position) + 1


def _find_comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield comments; a comment line directly below another continues it."""
    start, end, lines = 0, 0, []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, alone = token.start[0], not token.line[: token.start[1]].strip()
        if lines and not (alone and row == end + 1):
            yield start, " ".join(lines)
            lines = []
        start, end = (start if lines else row), row
        lines.append(token.string.lstrip("#"))
    if lines:
        yield start, " ".join(lines)


def _find_strings(text: str, messages: bool) -> Iterator[tuple[int, str]]:
    """Yield docstrings and, with `messages`, every other string or f-string part with a space."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if id(node) in docstrings or (messages and " " in node.value):
            yield node.lineno, node.value
