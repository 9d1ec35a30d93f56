"""What the compiler made of the CPU kernels, read from the build tree with nm and objdump."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prosocial_ext import _C

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
FAMILIES = sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
SETS = ["v2", "v3", "v4"]
PROMISE_BITS = ["sampling", "stream", "topm"]  # projection may fuse: its result is defined up to rounding
WIDE_REGISTER = {"v3": "ymm", "v4": "zmm"}

pytestmark = [
    pytest.mark.skipif(not (TREE / "CMakeFiles" / "cpu_v4.dir").is_dir(), reason="no x86-64 build tree here"),
    pytest.mark.skipif(shutil.which("nm") is None or shutil.which("objdump") is None, reason="needs binutils"),
]


def kernel_object(isa: str, family: str) -> Path:
    return TREE / "CMakeFiles" / f"cpu_{isa}.dir" / "csrc" / "cpu" / f"{family}.cpp.o"


def read(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def instructions(isa: str, family: str) -> str:
    return read("objdump", "--disassemble", "--no-show-raw-insn", kernel_object(isa, family))


def test_every_source_has_an_object_per_instruction_set() -> None:
    missing = [str(path) for isa in SETS for family in FAMILIES if not (path := kernel_object(isa, family)).is_file()]
    assert missing == []


def test_the_sets_offered_are_those_of_the_processor() -> None:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    flags = next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("/proc/cpuinfo does not tell")
    adds = {
        "v2": {"pni", "ssse3", "sse4_1", "sse4_2", "popcnt", "cx16", "lahf_lm"},
        "v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
        "v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    }
    has = [adds[name] <= flags for name in SETS]
    assert _C.available_isas() == [name for i, name in enumerate(SETS) if all(has[: i + 1])]


def compile_plain(compiler: str, family: str, *flags: str) -> None:
    flags += ("-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DPSE_ISA=generic")
    read(compiler, *flags, f"-I{ROOT / 'csrc'}", ROOT / "csrc" / "cpu" / f"{family}.cpp")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_need_nothing_of_x86(family: str) -> None:
    """Neither its intrinsics nor what their header brings along: arm64 has none."""
    compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", (TREE / "CMakeCache.txt").read_text(), re.MULTILINE)
    assert compiler is not None
    compile_plain(compiler[1], family, "-U__SSE__", "-U__SSE2__")


@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_compilers_take_the_kernels(family: str, compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    compile_plain(compiler, family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("isa", SETS)
def test_no_weak_symbol_that_could_replace_another_set_s_code(isa: str, family: str) -> None:
    lines = [line.split() for line in read("nm", "--demangle=none", kernel_object(isa, family)).splitlines()]
    weak = [fields[-1] for fields in lines if fields[-2] in "WVu"]
    assert weak == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("isa", SETS)
def test_no_static_constructor_runs_before_the_processor_is_known(isa: str, family: str) -> None:
    sections = read("objdump", "--section-headers", kernel_object(isa, family))
    assert not re.search(r"\.(init_array|ctors)\b", sections)


@pytest.mark.parametrize("family", PROMISE_BITS)
@pytest.mark.parametrize("isa", SETS)
def test_nothing_is_fused_where_bits_are_promised(isa: str, family: str) -> None:
    fused = re.findall(r"\bvfn?m(?:add|sub)\w*", instructions(isa, family))
    assert fused == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("isa", list(WIDE_REGISTER))
def test_the_kernels_use_the_set_s_vector_width(isa: str, family: str) -> None:
    code = instructions(isa, family)
    if "<" not in code:
        pytest.skip("this family has no kernels yet")
    assert code.count(f"%{WIDE_REGISTER[isa]}") > 20  # a failed vectorisation is silent; a copy of a struct uses a few


def test_the_module_exports_its_entry_point_alone() -> None:
    exported = [line.split()[-1] for line in read("nm", "-D", "--defined-only", _C.__file__).splitlines()]
    assert [name for name in exported if "cuda" in name.lower() or name.startswith("GOMP")] == []
    assert "PyInit__C" in exported


def test_the_module_needs_no_openmp_library_of_its_own() -> None:
    needed = re.findall(r"NEEDED\s+(\S+)", read("objdump", "--private-headers", _C.__file__))
    assert [name for name in needed if "omp" in name] == []
