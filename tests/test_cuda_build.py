"""Which nvcc the build takes and for which architectures, seen by configuring alone: nothing is compiled for a GPU."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pybind11
import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """The names that setup.py defines, with nothing built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))


def configure(recipe: dict[str, Any], tree: Path, nvcc: str, *options: str) -> tuple[int, str]:
    """CMake's exit status and output, with the line breaks that it puts into messages taken out."""
    done = subprocess.run(
        [recipe["tool"]("cmake", "CMAKE_BIN_DIR", "cmake"), "-S", ROOT, "-B", tree, "-G", "Ninja",
         f"-DCMAKE_MAKE_PROGRAM={recipe['tool']('ninja', 'BIN_DIR', 'ninja')}", f"-DPython_EXECUTABLE={sys.executable}",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options],
        capture_output=True, text=True, env={**os.environ, "CUDACXX": nvcc},
    )  # fmt: skip
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def old_nvcc(tmp_path: Path) -> str:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 12.3, V12.3.107"\n')
    nvcc.chmod(0o755)
    return str(nvcc)


def test_an_old_toolkit_that_is_asked_for_is_refused(recipe: dict[str, Any], old_nvcc: str, tmp_path: Path) -> None:
    status, output = configure(recipe, tmp_path / "tree", old_nvcc, "-DPSE_CUDA=on")
    assert status != 0
    assert f"PROSOCIAL_CUDA=on needs CUDA 12.4 or later, got 12.3 ({old_nvcc}). Point CUDACXX to a newer nvcc" in output


def test_an_old_toolkit_that_lies_around_is_passed_over(recipe: dict[str, Any], old_nvcc: str, tmp_path: Path) -> None:
    status, output = configure(recipe, tmp_path / "tree", old_nvcc, "-DPSE_CUDA=auto")
    assert status == 0, output
    assert "CUDA 12.3 is older than 12.4, building for the CPU only" in output


def test_architectures_that_nvcc_does_not_know_are_left_out(recipe: dict[str, Any], tmp_path: Path) -> None:
    nvcc = recipe["find_nvcc"]()
    if nvcc is None:
        pytest.skip("no nvcc here")
    configured = [
        configure(recipe, tmp_path, nvcc, "-DPSE_CUDA=on", f"-DPSE_CUDA_ARCHS={archs}")
        for archs in ("80-real;90-real;999-real;999-virtual", "999-real")
    ]
    (some, output), (none, refusal) = configured
    assert some == 0, output
    assert "does not know architecture 999-real: left out" in output
    assert "for 80-real;90-real;90-virtual" in output  # PTX was asked for, so there is PTX: of the newest that is left
    assert none != 0
    assert "90" in refusal.partition("PROSOCIAL_CUDA_ARCHS must name an architecture")[2].partition("got 999-real")[0]


@pytest.mark.parametrize(
    ("cache", "nvcc", "options"),
    [
        (None, "/new/nvcc", []),
        ("CMAKE_BUILD_TYPE:STRING=Release\n", "/new/nvcc", []),
        ("A:BOOL=ON\nCMAKE_CUDA_COMPILER:STRING=/new/nvcc\n", "/new/nvcc", []),
        ("A:BOOL=ON\nCMAKE_CUDA_COMPILER:STRING=/old/nvcc\n", None, []),
        ("A:BOOL=ON\nCMAKE_CUDA_COMPILER:STRING=/old/nvcc\n", "/new/nvcc", ["--fresh"]),
        ("A:BOOL=ON\nCMAKE_CUDA_COMPILER:FILEPATH=NOTFOUND\n", "/new/nvcc", ["-UCMAKE_CUDA_COMPILER"]),
    ],
    ids=["no_tree", "for_the_cpu", "the_same", "none_now", "another", "none_then"],
)
def test_a_kept_tree_looks_again_when_nvcc_is_another(
    recipe: dict[str, Any], tmp_path: Path, cache: str | None, nvcc: str | None, options: list[str]
) -> None:
    another_compiler: Callable[[Path, str | None], list[str]] = recipe["another_compiler"]
    if cache is not None:
        (tmp_path / "CMakeCache.txt").write_text(cache)
    assert another_compiler(tmp_path, nvcc) == options
