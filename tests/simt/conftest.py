"""Builds the CUDA kernels for the CPU once, and gives tests their launchers under several schedules."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prosocial_ext.ops import _cuda

ROOT = Path(__file__).resolve().parent.parent.parent
TREE = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    """The module prosocial_simt (tests/simt/module.cpp), built where `make build` built the package."""
    if not TREE.is_dir():
        pytest.skip("no build tree here: make build")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert cmake is not None
    with open(TREE / "prosocial_simt.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of a test run would write ninja's log at once
        built = subprocess.run([cmake, "--build", TREE, "--target", "prosocial_simt"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = TREE.glob("prosocial_simt.*.so")
    spec = importlib.util.spec_from_file_location("prosocial_simt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def simt(request: Any, harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The CUDA implementations of the ops on CPU tensors: every kernel runs in the harness.

    Each test has a schedule of its own, drawn from its name: over the folder all kinds are seen, and a failure comes
    again. PROSOCIAL_SIMT_SEED draws other ones.
    """
    seed = zlib.crc32(f"{os.environ.get('PROSOCIAL_SIMT_SEED', '')}{request.node.nodeid}".encode())
    harness.set_schedule(seed, seed % 3 > 0)  # blocks in turns in two of three tests
    monkeypatch.setattr(_cuda, "launchers", harness.cuda)
    return harness
