"""Builds the CUDA kernels for the CPU once, and gives tests their launchers under several schedules.

PROSOCIAL_TEST_KERNELS says which: `source` (`make test`), in the harness; `ptx` (`make ptx`), what nvcc makes of them;
`gpu` (`benchmarks/gpu_check.sh`), on a GPU.
"""

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
from prosocial_ext.ops import _cuda, _cuda_projection, _cuda_sampling, _cuda_topm
from tests.simt.moved import moved

ROOT = Path(__file__).resolve().parent.parent.parent
# `make sanitize` has a tree of its own, whose harness is sanitized too.
SANITIZED = "-sanitize" if "sanitize" in Path(_C.__file__).parts else ""
TREE = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{SANITIZED}"

KERNELS = os.environ.get("PROSOCIAL_TEST_KERNELS", "source")
OF_ONE_FORM = {"source": {"test_harness.py", "test_moved.py"}, "ptx": {"test_ptx.py"}, "gpu": set[str]()}
collect_ignore = sorted(set[str]().union(*OF_ONE_FORM.values()) - OF_ONE_FORM[KERNELS])


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


class OnGpu:
    """The launchers of this build."""

    cuda = _C.cuda if _cuda.compiled() else None

    def counts(self) -> Any:
        """Skip a test that counts launches: those do not depend on where the kernels run."""
        pytest.skip("launches are counted in the harness")


@pytest.fixture
def gpu(request: Any, monkeypatch: pytest.MonkeyPatch) -> OnGpu:
    """Let the implementations run on the first GPU, with copies of the CPU's tensors."""
    if not torch.cuda.is_available() or not _cuda.compiled():
        pytest.skip("no GPU here, or no kernels in this build")
    if "clusters" in request.node.name and not _C.cuda.sampling_fits_cluster(1, 0, 0):
        pytest.skip("this GPU has no clusters, or this build no code for them")
    move_to(torch.device("cuda", 0), monkeypatch)
    return OnGpu()


@pytest.fixture
def on_cpu() -> None:
    """Skip a test of what lies on the CPU where the cases are moved to a GPU."""
    if KERNELS == "gpu":
        pytest.skip("of tensors on the CPU")


def move_to(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the implementations run on that device, with copies of the CPU's tensors."""
    for module in (_cuda_projection, _cuda_sampling, _cuda_topm):
        for name in module.__all__:
            monkeypatch.setattr(module, name, moved(getattr(module, name), device))


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
