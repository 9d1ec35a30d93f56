"""Tests of this folder run on MPS where it is, and elsewhere on tensors that pretend to be there."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.mps.pretended_device import pretended

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(MPS, NoOpDeviceGuardImpl<DeviceType::MPS>);
}
"""


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give torch a device guard for MPS: bindings make one before they dispatch, and a build without MPS has none."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("guard")
    (folder / "guard.cpp").write_text(_GUARD)
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    command = [*compiler.split(), "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
               "-shared", "-fPIC", f"-I{include}", folder / "guard.cpp",
               f"-L{libraries}", "-lc10", "-o", folder / "guard.so"]  # fmt: skip
    subprocess.run(command, check=True)
    ctypes.CDLL(str(folder / "guard.so"))


@pytest.fixture
def mps(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device."""
    if torch.backends.mps.is_available():
        yield torch.device("mps")
        return
    request.getfixturevalue("guard")
    with pretended() as device:
        yield device
