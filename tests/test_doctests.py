"""The examples in docstrings are true. (pytest's own collector would import python_ref under a second name.)"""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import prosocial_ext.reference
import pytest

import prosocial_ext


def module_names() -> Iterator[str]:
    yield "benchmarks.instructions"
    for package in (prosocial_ext, prosocial_ext.reference):
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("._C"):
                yield module.name


def examples(module: ModuleType) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__)
    return [test for test in found if test.examples]


WITH_EXAMPLES = [name for name in sorted(set(module_names())) if examples(importlib.import_module(name))]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_every_example_prints_what_it_says(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed; they are printed above"


def test_the_examples_of_the_reference_are_found() -> None:
    assert "prosocial_ext.reference.philox" in WITH_EXAMPLES
