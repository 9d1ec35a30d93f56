"""Builds the CUDA kernels for the CPU once, and gives tests their launchers under several schedules.

PROSOCIAL_TEST_KERNELS says which: `source` (`make test`), in the harness; `ptx` (`make ptx`), what nvcc makes of them;
`gpu` (`benchmarks/gpu_check.sh`), on a GPU that reaches the memory of the CPU's tensors.
"""

import ctypes
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
import torch

from prosocial_ext import _C
from prosocial_ext.ops import _cuda

ROOT = Path(__file__).resolve().parent.parent.parent
# `make sanitize` has a tree of its own, whose harness is sanitized too.
SANITIZED = "-sanitize" if "sanitize" in Path(_C.__file__).parts else ""
TREE = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{SANITIZED}"

KERNELS = os.environ.get("PROSOCIAL_TEST_KERNELS", "source")
collect_ignore = {"source": ["test_ptx.py"], "ptx": ["test_harness.py"], "gpu": ["test_harness.py", "test_ptx.py"]}[
    KERNELS
]


def built(name: str) -> ModuleType:
    """The extension module of that target, built where `make build` built the package."""
    if not TREE.is_dir():
        pytest.skip("no build tree here: make build")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert cmake is not None
    with open(TREE / "tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of a test run would write ninja's log at once
        done = subprocess.run([cmake, "--build", TREE, "--target", name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = TREE.glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    """The module prosocial_simt (tests/simt/module.cpp): the kernels' sources, checked access by access."""
    return built("prosocial_simt")


@pytest.fixture(scope="session")
def ptx() -> ModuleType:
    """The module prosocial_ptx (tests/simt/ptx/module.cpp): what nvcc makes of the same sources."""
    if not _cuda.compiled():
        pytest.skip("built without nvcc: no PTX to run")
    return built("prosocial_ptx")


def pageable_memory_access() -> bool:
    """Whether the first GPU reads and writes what malloc() gave (heterogeneous memory management, or NVLink)."""
    driver = ctypes.CDLL("libcuda.so.1")
    value = ctypes.c_int(0)
    attribute = 88  # CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0
        and value.value == 1
    )


class OnGpu:
    """The launchers of this build; each call returns when the GPU is done, for its results lie in the CPU's tensors."""

    def __init__(self) -> None:
        self.cuda = self

    def counts(self) -> Any:
        """Skip a test that counts launches: those do not depend on where the kernels run."""
        pytest.skip("launches are counted in the harness")

    def __getattr__(self, name: str) -> Any:
        found = getattr(_C.cuda, name)
        if not callable(found) or isinstance(found, type):
            return found

        def call(*arguments: Any) -> Any:
            result = found(*arguments)
            torch.cuda.synchronize()
            return result

        return call


@pytest.fixture(scope="session")
def gpu() -> OnGpu:
    """The kernels on the first GPU, at the addresses of CPU tensors."""
    if not torch.cuda.is_available() or not _cuda.compiled():
        pytest.skip("no GPU here, or no kernels in this build")
    if not pageable_memory_access():
        pytest.skip("this GPU, or its driver, does not reach pageable memory")
    return OnGpu()


@pytest.fixture
def simt(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA implementations of the ops on CPU tensors: every kernel runs in the harness, or as PTX.

    Each test has a schedule and an architecture of its own, drawn from its name: over the folder all kinds are seen,
    and a failure comes again. PROSOCIAL_SIMT_SEED draws other ones.
    """
    seed = zlib.crc32(f"{os.environ.get('PROSOCIAL_SIMT_SEED', '')}{request.node.nodeid}".encode())
    module = request.getfixturevalue({"source": "harness"}.get(KERNELS, KERNELS))
    if KERNELS == "source":
        module.set_schedule(seed, seed % 3 > 0)  # blocks in turns in two of three tests
    elif KERNELS == "ptx":
        module.set_schedule(seed)
        device = 0 if seed % 2 or "clusters" in request.node.name else 1  # compute capability 9.0 or 8.0
        monkeypatch.setattr(_cuda, "target", lambda tensor: (device, 0))
    monkeypatch.setattr(_cuda, "launchers", module.cuda)
    return module
