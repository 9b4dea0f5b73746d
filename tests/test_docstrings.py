"""Docstrings of public functions and classes: complete sections, and examples that run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re

import pytest

import repsim_kernels as rk

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
FUNCTIONS = [name for name in rk.__all__ if inspect.isfunction(getattr(rk, name))]
# Examples in these modules run too, but not every name needs one.
OTHER_MODULES = ("repsim_kernels.forward", "repsim_kernels.experiments")
OTHERS = [
    (module, name) for module in OTHER_MODULES for name in importlib.import_module(module).__all__
]


def run_examples(item: object, name: str) -> int:
    """Run the examples of a function, or of a class and its methods; return their number."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    output: list[str] = []
    for test in finder.find(item, name, globs={}):
        runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)
    return runner.tries


def split_sections(doc: str) -> dict[str, str]:
    """Return the text of each section of a NumPy docstring, by title."""
    parts = re.split(r"^(\w+)\n-+$", doc, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", rk.__all__)
def test_public_names_have_examples_that_run(name):
    assert run_examples(getattr(rk, name), name) > 0


@pytest.mark.parametrize(("module", "name"), OTHERS, ids=lambda value: value.rpartition(".")[2])
def test_other_examples_run(module, name):
    try:
        item = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        pytest.skip(f"the extra `experiments` is not installed: {error.name}")
    run_examples(item, name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_are_complete(name):
    function = getattr(rk, name)
    sections = split_sections(inspect.getdoc(function))
    assert {"Returns", "Examples"} <= set(sections)
    names = [parameter.name for parameter in inspect.signature(function).parameters.values()]
    documented = re.findall(r"^(\S[^:\n]*?)(?: : .*)?$", sections.get("Parameters", ""), re.M)
    assert [name.strip(" *") for line in documented for name in line.split(",")] == names


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_name_the_types_of_arrays(name):
    signature = inspect.signature(getattr(rk, name))
    types = {p.name: p.annotation for p in signature.parameters.values() if p.name != "options"}
    assert inspect.Signature.empty not in types.values()
    assert "Any" not in types.values()
    assert "ArrayLike" in " ".join(map(str, types.values())) or name == "show_config"
