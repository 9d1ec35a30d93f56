"""Fixtures run a test over the reference and every instruction set that this machine has; models get one thread."""

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import prosocial_ext
from prosocial_ext import _C

# The instruction sets to run, best last; PROSOCIAL_TEST_ISA=v4 runs one (the sanitizers are slow).
ISAS = [isa for isa in _C.available_isas() if os.environ.get("PROSOCIAL_TEST_ISA", isa) == isa]
MODELS = {"arm", "commands", "decoding", "demo", "evaluation", "examples", "mps"}


@pytest.fixture(autouse=True, scope="module")
def one_thread_for_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread in these folders: their models are so small that a second one only waits, longer on a loaded machine.

    By module and not by package: where folders have no __init__.py a package's fixture lasts to the end of the session.
    """
    before = torch.get_num_threads()
    if request.path.parent.name in MODELS:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
