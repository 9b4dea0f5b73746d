"""The prose of a source file: docstrings, comments, messages, and the text of pages."""

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


def blocks(path: Path, messages: bool = True) -> Iterator[tuple[int, str]]:
    """Yield the first line's number and the text, on one line and without code, of each block."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        numbered = [*_comments(text), *_strings(text, messages)]
    elif path.suffix in (".cu", ".h"):
        matches = COMMENT.finditer(text)
        numbered = [
            (_line(text, m.start()), re.sub(r"^ *//", "", m[0], flags=re.M)) for m in matches
        ]
    else:
        text = FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)
        paragraphs = re.finditer(r"(?:^(?!\s*$).*\n?)+", text, re.MULTILINE)
        numbered = [(_line(text, m.start()), m[0]) for m in paragraphs]
    for number, block in numbered:
        yield number, " ".join(CODE.sub(" ", block).split())


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield comments, those on consecutive lines of their own as one block."""
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


def _strings(text: str, messages: bool) -> Iterator[tuple[int, str]]:
    """Yield docstrings, and with `messages` all other strings of several words."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    strings = (
        n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )
    for node in strings:
        if id(node) in docstrings or (messages and " " in node.value.strip()):
            yield node.lineno, node.value
