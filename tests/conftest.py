"""One fixture runs a test over the reference and over every instruction set that this machine has."""

import os
from collections.abc import Iterator
from types import ModuleType

import pytest

import prosocial_ext
from prosocial_ext import _C

# The instruction sets to run, best last; PROSOCIAL_TEST_ISA=v4 runs one (the sanitizers are slow).
ISAS = [isa for isa in _C.available_isas() if os.environ.get("PROSOCIAL_TEST_ISA", isa) == isa]


@pytest.fixture(params=["reference", *ISAS])
def ops(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """`prosocial_ext.reference`, then `prosocial_ext.ops` on each instruction set: drop-in is a test, not a word."""
    if request.param == "reference":
        yield prosocial_ext.reference
        return
    before = _C.isa()
    _C._set_isa(request.param)
    yield prosocial_ext.ops
    _C._set_isa(before)


@pytest.fixture(params=ISAS)
def compiled(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """`prosocial_ext.ops` on each instruction set, for tests that hold it against the reference."""
    before = _C.isa()
    _C._set_isa(request.param)
    yield prosocial_ext.ops
    _C._set_isa(before)
