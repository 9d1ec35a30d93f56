"""Hands the native part over to CMake + Ninja; everything else is in pyproject.toml.

Environment variables read here:
  PROSOCIAL_CUDA        auto (default), on, off: compile the CUDA kernels
  PROSOCIAL_CUDA_ARCHS  CMake architecture list, e.g. "90-real" (default: every released architecture + PTX)
  PROSOCIAL_CUDA_STRICT 1: warnings and register spills of the CUDA kernels are errors (.ci/run)
  PROSOCIAL_SANITIZE    1: with the address and undefined-behaviour sanitizers (`make sanitize`)
  CUDACXX, CUDA_HOME, CUDA_PATH, PATH: where nvcc is looked for, in this order, then /usr/local/cuda
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """CMake alone looks at neither CUDA_HOME nor /usr/local/cuda, where many machines have nvcc."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named) or named
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (nvcc := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return nvcc
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def tool(module: str, directory: str, name: str) -> str:
    """The program from its wheel when that is installed, else from PATH."""
    try:
        return str(Path(getattr(__import__(module), directory)) / name)
    except ImportError:
        found = shutil.which(name)
        if found is None:
            sys.exit(f"{name} not found: pip install {name}, or put it on PATH")
        return found


def another_compiler(build: Path, nvcc: str | None) -> list[str]:
    """What makes CMake look at CUDA again in a tree that was configured without nvcc, or with another one.

    Its first answer stays in the cache: CUDACXX would be ignored without a word.
    """
    cache = build / "CMakeCache.txt"
    kept = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache.read_text(), re.MULTILINE) if cache.is_file() else None
    if nvcc is None or kept is None or kept[1] == nvcc:
        return []
    return ["-UCMAKE_CUDA_COMPILER"] if kept[1].endswith("NOTFOUND") else ["--fresh"]


def switch(name: str) -> bool:
    """Whether an environment variable is set to anything but 0."""
    return os.environ.get(name, "") not in ("", "0")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cuda = os.environ.get("PROSOCIAL_CUDA", "auto")
        if cuda not in ("auto", "on", "off"):
            sys.exit(f"PROSOCIAL_CUDA must be auto, on or off, got {cuda!r}.")
        environment = dict(os.environ)
        nvcc = None
        if cuda != "off":
            nvcc = find_nvcc()
            print(f"prosocial_ext: nvcc {nvcc or 'not found: building for the CPU only'}")
            if nvcc:
                environment["CUDACXX"] = nvcc
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        sanitize, strict = switch("PROSOCIAL_SANITIZE"), switch("PROSOCIAL_CUDA_STRICT")
        suffix = "-sanitize" * sanitize + "-strict" * strict
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{suffix}"
        cmake = tool("cmake", "CMAKE_BIN_DIR", "cmake")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR', 'ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPSE_CUDA={cuda}",
            f"-DPSE_CUDA_STRICT={'ON' if strict else 'OFF'}",
            f"-DPSE_SANITIZE={'ON' if sanitize else 'OFF'}",
            f"-DPSE_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            *another_compiler(build, nvcc),
        ]  # fmt: skip
        if archs := os.environ.get("PROSOCIAL_CUDA_ARCHS"):
            configure.append(f"-DPSE_CUDA_ARCHS={archs}")
        subprocess.run(configure, check=True, env=environment)
        subprocess.run([cmake, "--build", str(build)], check=True, env=environment)
        subprocess.run([cmake, "--install", str(build), "--component", "python"], check=True, env=environment)

    def get_source_files(self) -> list[str]:
        return []  # the sources are CMake's; MANIFEST.in ships them


setup(
    ext_modules=[Extension("prosocial_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=[*find_packages(include=["prosocial_ext*"]), "prosocial_ext.reference"],
    package_dir={"prosocial_ext.reference": "python_ref"},
    package_data={"prosocial_ext": ["py.typed", "*.pyi"]},
    zip_safe=False,
)
