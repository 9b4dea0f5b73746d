"""Docstrings of public functions and classes: complete sections, and examples that run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re

import pytest

import repsim_kernels as rk
from repsim_kernels._metrics import METRICS
from repsim_kernels._operations import OPERATIONS
from repsim_kernels.ops import ablation, spectral

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
FUNCTIONS = [name for name in rk.__all__ if inspect.isfunction(getattr(rk, name))]
# Further modules with examples.
MODULES = (
    "cells",
    *(f"forward.{name}" for name in ("cost", "engine", "passes", "prefix")),
    *(f"experiments.study.{name}" for name in ("study", "checks", "performance")),
    *(f"experiments.inputs.{name}" for name in ("images", "imagenet", "networks", "presets")),
    *(f"experiments.runs.{name}" for name in ("driver", "results")),
)


def run_examples(item: object, name: str, flags: int = 0) -> int:
    """Run the examples of a module, a function, or a class's methods; return their number."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
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
    assert run_examples(getattr(rk, name), name, FLAGS) > 0


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_examples_that_run(name):
    assert run_examples(importlib.import_module(f"repsim_kernels.{name}"), name) > 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_are_complete(name):
    function = getattr(rk, name)
    sections = split_sections(inspect.getdoc(function))
    assert {"Returns", "Examples"} <= set(sections)
    names = [parameter.name for parameter in inspect.signature(function).parameters.values()]
    documented = re.findall(r"^(\S[^:\n]*?)(?: : .*)?$", sections.get("Parameters", ""), re.M)
    assert [name.strip(" *") for line in documented for name in line.split(",")] == names


@pytest.mark.parametrize("name", [operation.name for operation in OPERATIONS])
def test_docstrings_name_errors_and_source(name):
    doc = inspect.getdoc(getattr(rk, name))
    for section in ("Raises", "Notes", "Source"):
        assert section in doc, section


@pytest.mark.parametrize(
    ("function", "parameter", "names"),
    [
        (rk.pairwise, "metric", [m.name for m in METRICS if m.pairwise]),
        (rk.similarities, "metrics", [m.name for m in METRICS if m.pairwise]),
        (rk.ablation_distances, "metrics", ablation.ALL_METRICS),
        (rk.gram_ablation_distances, "metrics", spectral.ALL_GRAM_METRICS),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_docstrings_name_the_metrics_of_the_registry(function, parameter, names):
    doc = inspect.getdoc(function)
    choice = re.search(rf"^{parameter} : (.*?)^\w+ : ", doc, re.M | re.S)[1].partition('. "')[0]
    assert sorted(re.findall(r'"(\w+)"', choice)) == sorted(names)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_name_the_types_of_arrays(name):
    signature = inspect.signature(getattr(rk, name))
    types = {p.name: p.annotation for p in signature.parameters.values() if p.name != "options"}
    assert inspect.Signature.empty not in types.values()
    assert "Any" not in types.values()
    assert name == "show_config" or re.search(
        "ArrayLike|Module", " ".join(map(str, types.values()))
    )
