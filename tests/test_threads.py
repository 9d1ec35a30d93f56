"""Kernels share torch's OpenMP runtime, follow its thread count, and survive fork; PROSOCIAL_ISA picks the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prosocial_ext import _C

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks")

# A kernel call large enough to be split over threads, checked against the sum (xor) in Python's integers.
CALL = """
from prosocial_ext import _C
import functools, operator, torch
words = torch.arange(1, 300_001)  # made once: after a fork torch's own parallel ops hang
expected = functools.reduce(operator.xor, range(1, 300_001))
def kernel_is_right(threads):
    return _C.limit_read(words.data_ptr(), words.numel() * 8, threads) == expected
"""


def run(script: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(script, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


def output(script: str, tmp_path: Path, **environment: str) -> str:
    done = run(script, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@linux_only
@pytest.mark.parametrize("order", ["import torch, prosocial_ext", "import prosocial_ext, torch"])
def test_one_openmp_runtime_in_either_import_order(order: str, tmp_path: Path) -> None:
    script = (
        f"{order}\n{CALL}\n"
        "assert kernel_is_right(2)\n"
        "torch.rand(500, 500) @ torch.rand(500, 500)\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split()[-1].rsplit('/')[-1]}\n"
        "print(len([path for path in paths if '.so' in path]))\n"
    )
    assert output(script, tmp_path) == "1"


@linux_only
def test_a_kernel_given_two_threads_starts_a_second_one(tmp_path: Path) -> None:
    script = (
        f"{CALL}\nimport os\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count(); assert kernel_is_right(1); serial = count(); assert kernel_is_right(2)\n"
        "print(serial - before, count() - before)\n"
    )
    assert output(script, tmp_path, OMP_NUM_THREADS="1") == "0 1"


@pytest.mark.parametrize("isa", _C.available_isas())
def test_prosocial_isa_forces_an_available_set(isa: str, tmp_path: Path) -> None:
    script = f"{CALL}\nassert kernel_is_right(2)\nprint(_C.isa())\n"
    assert output(script, tmp_path, PROSOCIAL_ISA=isa) == isa


def test_an_empty_prosocial_isa_takes_the_best(tmp_path: Path) -> None:
    assert (
        output("from prosocial_ext import _C; print(_C.isa())", tmp_path, PROSOCIAL_ISA="") == _C.available_isas()[-1]
    )


def test_an_unknown_isa_is_an_import_error_that_lists_the_possible(tmp_path: Path) -> None:
    done = run("import prosocial_ext", tmp_path, PROSOCIAL_ISA="avx1024")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: PROSOCIAL_ISA=avx1024 is not possible here")
    assert ", ".join(_C.available_isas()) in last


def test_switching_to_an_unknown_isa_changes_nothing() -> None:
    before = _C.isa()
    with pytest.raises(ValueError, match="avx1024"):
        _C._set_isa("avx1024")
    assert _C.isa() == before


@linux_only
def test_a_forked_child_with_one_thread_finishes(tmp_path: Path) -> None:
    script = (
        f"import os, signal\n{CALL}\n"
        "assert kernel_is_right(2)\n"  # the parent's team exists; the child inherits its memory but not its threads
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(30)\n"
        "    os._exit(0 if kernel_is_right(1) else 1)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    assert output(script, tmp_path) == "0"


def test_dataloader_workers_call_a_kernel(tmp_path: Path) -> None:
    script = (
        f"{CALL}\n"
        "class Rows(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, index): return kernel_is_right(torch.get_num_threads()), torch.get_num_threads()\n"
        "if __name__ == '__main__':\n"
        "    assert kernel_is_right(2)\n"
        "    rows = list(torch.utils.data.DataLoader(Rows(), num_workers=2, timeout=60))\n"
        "    print([(bool(right), int(threads)) for right, threads in rows])\n"
    )
    assert output(script, tmp_path) == str([(True, 1)] * 4)
