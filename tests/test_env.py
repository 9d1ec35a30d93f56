"""`prosocial env`: the facts, and one remedy for each thing that can be wrong."""

import copy
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from prosocial_ext import _C, cli
from prosocial_ext.commands import env

Facts = dict[str, Any]


@pytest.fixture
def facts() -> Facts:
    """A machine on which nothing is wrong: two cores, a GPU, all libraries."""
    return {
        "prosocial_ext": {"version": "1.0", "location": "here", "backend": "compiled", "PROSOCIAL_BACKEND": None},
        "python": {"version": "3.12.1", "executable": "python", "system": "Linux", "machine": "x86_64"},
        "cpu": {
            "isa": "v4",
            "available": ["v2", "v3", "v4"],
            "PROSOCIAL_ISA": None,
            "threads": 2,
            "cores": 2,
            "openmp": ["torch/lib/libgomp.so.1"],
        },
        "torch": {
            "version": "2.13.0",
            "cuda_toolkit": "13.0",
            "cuda_available": True,
            "devices": ["a GPU"],
            "mps_available": False,
        },
        "cuda": {
            "compiled": True,
            "request": "auto",
            "toolkit": "13.0.88",
            "archs": "90-real",
            "error": 0,
            "devices": 1,
        },
        "libraries": {"transformers": "5.23.0", "peft": "0.21.2", "safetensors": "0.8.0"},
        "remedies": [],
    }


def test_nothing_to_repair_when_nothing_is_wrong(facts: Facts) -> None:
    assert env.remedies(facts) == []
    assert env.report(facts).endswith("Nothing to repair.")


def test_mps_is_told_where_it_is(facts: Facts) -> None:
    assert "mps" not in env.report(facts)
    facts["torch"]["mps_available"] = True
    assert "torch.mps     available" in env.report(facts)


@pytest.mark.parametrize(
    ("group", "wrong", "remedy"),
    [
        ("prosocial_ext", {"backend": "reference"}, "unset PROSOCIAL_BACKEND"),
        ("cpu", {"isa": "v2", "PROSOCIAL_ISA": "v2"}, "unset PROSOCIAL_ISA"),
        ("cpu", {"threads": 1}, "raise OMP_NUM_THREADS"),
        ("cpu", {"openmp": []}, "No OpenMP runtime"),
        ("cpu", {"openmp": ["libgomp.so.1", "libiomp5.so"]}, "import torch first"),
        ("cuda", {"compiled": False, "toolkit": None, "archs": None}, "PROSOCIAL_CUDA=on"),
        ("cuda", {"error": 35, "devices": 0}, "No NVIDIA driver, or one too old for CUDA 13.0.88"),
        ("cuda", {"error": 100, "devices": 0}, "CUDA_VISIBLE_DEVICES"),
        ("cuda", {"error": 999, "devices": 0}, "error 999"),
        ("torch", {"cuda_available": False, "devices": [], "cuda_toolkit": None}, "CPUs only"),
        ("torch", {"cuda_available": False, "devices": []}, "CUDA 13.0"),
        ("libraries", {"peft": None}, "pip install 'peft>="),
    ],
    ids=[
        "reference_forced",
        "older_instruction_set_forced",
        "one_thread",
        "no_openmp",
        "two_openmp",
        "gpu_without_kernels",
        "no_driver",
        "no_device",
        "another_cuda_error",
        "torch_for_cpus",
        "torch_without_gpu",
        "library_missing",
    ],
)
def test_one_thing_wrong_has_one_remedy(facts: Facts, group: str, wrong: Facts, remedy: str) -> None:
    facts[group].update(wrong)
    (found,) = env.remedies(facts)
    assert remedy in found
    assert found in env.report(facts | {"remedies": [found]})


def test_a_machine_without_gpu_and_nvcc_has_nothing_to_repair(facts: Facts) -> None:
    facts["cuda"].update(compiled=False, toolkit=None, archs=None, devices=0)
    facts["torch"].update(cuda_available=False, devices=[], cuda_toolkit=None)
    assert env.remedies(facts) == []


def test_a_system_without_proc_says_so(facts: Facts) -> None:
    facts["cpu"]["openmp"] = None
    assert env.remedies(facts) == []
    assert "unknown on this system" in env.report(facts)


def test_the_facts_are_those_of_this_process() -> None:
    facts = env.gather()
    assert facts["prosocial_ext"]["version"] == _C.version
    assert facts["python"]["version"] == platform.python_version()
    assert facts["cpu"]["isa"] == _C.isa()
    assert facts["cpu"]["available"] == _C.available_isas()
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["torch"]["version"] == torch.__version__
    assert facts["cuda"]["compiled"] == hasattr(_C, "cuda_device_count")
    assert facts["libraries"]["safetensors"] == importlib.metadata.version("safetensors")
    assert facts["remedies"] == env.remedies(facts)


def test_a_missing_library_reads_none_and_names_the_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    facts = env.gather()
    assert set(facts["libraries"].values()) == {None}
    assert sum("is missing: pip install" in remedy for remedy in facts["remedies"]) == 3


def test_json_is_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(env.gather()))


def test_the_report_shows_every_fact_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    for value in (_C.version, platform.python_version(), torch.__version__, f"{_C.isa()} of"):
        assert value in out


def test_gathering_changes_nothing() -> None:
    first = env.gather()
    assert env.gather() == copy.deepcopy(first)


@pytest.mark.parametrize(
    ("line", "is_runtime"),
    [
        ("7f00-7f01 r-xp 0 08:01 5 /v/torch/lib/libgomp.so.1", True),
        ("7f00-7f01 r-xp 0 08:01 5 /v/torch/lib/libgomp-a34b3233.so.1", True),
        ("7f00-7f01 r-xp 0 08:01 5 /usr/lib/libomp.so.5", True),
        ("7f00-7f01 r-xp 0 08:01 5 /usr/lib/libiomp5.so", True),
        ("7f00-7f01 r-xp 0 08:01 5 /usr/lib/libompi.txt", False),
        ("7f00-7f01 r-xp 0 08:01 5 /usr/lib/libc.so.6", False),
    ],
    ids=["gnu", "gnu_renamed", "llvm", "intel", "another_name", "libc"],
)
def test_openmp_runtimes_are_recognised(line: str, is_runtime: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"{line}\n{line}\n")
    assert env.openmp_libraries() == ([line.split(" ", 5)[-1]] if is_runtime else [])


def test_openmp_is_unknown_where_proc_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert env.openmp_libraries() is None
