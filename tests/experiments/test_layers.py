"""Imports within the experiments package go in one direction."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from repsim_kernels import experiments

PACKAGE = "repsim_kernels.experiments"
ROOT = Path(experiments.__file__).parent
BASE = {"errors", "columns"}
#: What the files of each directory may import from outside it.
ALLOWED = {
    "inputs": BASE,
    "study": BASE,
    "analysis": BASE,
    "runs": BASE | {"analysis", "study"},
    "report": BASE | {"analysis", "runs"},
    "cli": BASE | {"analysis", "inputs", "report", "runs", "study"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in ROOT.rglob("*.py")}


def find_imports(path: Path) -> set[str]:
    """List the package's modules that a file imports, including within functions and for types."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    inner = {name.removeprefix(f"{PACKAGE}.") for name in names if name.startswith(f"{PACKAGE}.")}
    return inner & set(MODULES)


def test_a_directory_imports_only_from_lower_layers():
    """`Study.run` calls `experiments.run` through the package, which imports it lazily."""
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == set(ALLOWED)
    for name, path in MODULES.items():
        directory = name.partition(".")[0]
        others = {other.partition(".")[0] for other in find_imports(path)} - {directory}
        if directory in ALLOWED:
            assert others <= ALLOWED[directory], path
        elif directory in BASE:
            assert not others, path


def test_no_two_modules_import_each_other():
    graph = {name: find_imports(path) - {name, ""} for name, path in MODULES.items() if name}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_importing_the_experiments_does_not_import_heavy_packages():
    heavy = ("torch", "pandas", "matplotlib")
    for module, absent in (("", heavy), (".cli.app", heavy), (".cli.tables", heavy[2:])):
        code = (
            f"import sys, {PACKAGE}{module};"
            f"print([name for name in {heavy!r} if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert not set(absent) & set(ast.literal_eval(done.stdout)), module


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ("typer", f"from {PACKAGE} import main; main()"),
        ("typer", f"import runpy; runpy.run_module('{PACKAGE}', run_name='__main__')"),
        ("pandas", f"from {PACKAGE} import main; main()"),  # while a command runs
        ("pandas", f"from {PACKAGE} import run"),
    ],
)
def test_a_missing_extra_is_named(missing, code):
    block = f"import sys; sys.argv = ['repsim', 'status']; sys.modules[{missing!r}] = None;"
    done = subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert re.search(f"{missing} is not installed; .*: pip install '.\\[experiments\\]'$", message)
