"""``prosocial env``: what was built, found and missing, and the remedy."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from prosocial_ext import _C
from prosocial_ext.ops import _backend, _native

__all__ = ["add_arguments", "gather", "openmp_libraries", "remedies", "report", "run"]

_LIBRARIES = ("transformers", "peft", "safetensors")
_DRIVER_TOO_OLD = 35  # cudaErrorInsufficientDriver: CUDA's word for "no driver" too
_NO_DEVICE = 100  # cudaErrorNoDevice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prosocial env``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; the status is 0 whatever it says."""
    facts = gather()
    print(json.dumps(facts, indent=2) if arguments.json else report(facts))
    return 0


def gather() -> dict[str, Any]:
    """Return the facts, grouped, with ``remedies`` last. Imports neither transformers nor peft."""
    facts: dict[str, Any] = {
        "prosocial_ext": {
            "version": _C.version,
            "location": str(Path(_C.__file__).parent),
            "backend": "reference" if _backend.use_reference else "compiled",
            "PROSOCIAL_BACKEND": os.environ.get("PROSOCIAL_BACKEND"),
        },
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "system": platform.system(),
            "machine": platform.machine(),
        },
        "cpu": {
            "isa": _C.isa(),
            "available": list(_C.available_isas()),
            "PROSOCIAL_ISA": os.environ.get("PROSOCIAL_ISA"),
            "threads": _native.threads(),
            "cores": _cores(),
            "openmp": openmp_libraries(),
        },
        "torch": {"version": torch.__version__, "cuda_toolkit": torch.version.cuda, **_torch_devices()},
        "cuda": _cuda(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    facts["remedies"] = remedies(facts)
    return facts


def remedies(facts: dict[str, Any]) -> list[str]:
    """Return one sentence for everything in ``facts`` that the user may want to repair."""
    found: list[str] = []
    cpu, cuda, torch_facts = facts["cpu"], facts["cuda"], facts["torch"]

    if facts["prosocial_ext"]["backend"] == "reference":
        found.append("The ops run in pure PyTorch: unset PROSOCIAL_BACKEND to use the compiled kernels.")
    if cpu["isa"] != cpu["available"][-1]:
        found.append(f"Kernels for {cpu['available'][-1]} are built and supported: unset PROSOCIAL_ISA to use them.")
    if cpu["threads"] == 1 and cpu["cores"] > 1:
        found.append(f"The kernels run on one of {cpu['cores']} cores: raise OMP_NUM_THREADS or torch.set_num_threads.")
    if cpu["openmp"] is not None and len(cpu["openmp"]) == 0:
        found.append("No OpenMP runtime is loaded, so the kernels run on one thread: install torch from a wheel.")
    if cpu["openmp"] is not None and len(cpu["openmp"]) > 1:
        found.append(
            "Several OpenMP runtimes are loaded and may slow each other down (tens of times): import torch first, and "
            "find out which package brings the second."
        )

    if not cuda["compiled"]:
        if torch_facts["cuda_available"]:
            found.append(
                "There is a GPU but no CUDA kernels, so CUDA tensors run the reference: install CUDA 12.4 or later "
                "(or point CUDACXX or CUDA_HOME to it) and build again with PROSOCIAL_CUDA=on."
            )
    elif cuda["error"] == _DRIVER_TOO_OLD:
        found.append(f"No NVIDIA driver, or one too old for CUDA {cuda['toolkit']}: install or update it to use a GPU.")
    elif cuda["error"] == _NO_DEVICE:
        found.append("The NVIDIA driver sees no GPU: check CUDA_VISIBLE_DEVICES and nvidia-smi.")
    elif cuda["error"] != 0:
        found.append(f"CUDA answers error {cuda['error']} when asked for GPUs: check nvidia-smi.")
    elif not torch_facts["cuda_available"]:
        found.append(
            "There is a GPU, but torch cannot use it: install a torch built for CUDA (this one is for "
            f"{'CUDA ' + torch_facts['cuda_toolkit'] if torch_facts['cuda_toolkit'] else 'CPUs only'})."
        )

    for name, version in facts["libraries"].items():
        if version is None:
            found.append(f"{name} is missing: pip install '{_requirement(name)}'.")
    return found


def report(facts: dict[str, Any]) -> str:
    """Return the facts as text for people."""
    own, python, cpu, torch_facts, cuda = (facts[key] for key in ("prosocial_ext", "python", "cpu", "torch", "cuda"))
    forced = f" (PROSOCIAL_ISA={cpu['PROSOCIAL_ISA']})" if cpu["PROSOCIAL_ISA"] else ""
    runtimes = "unknown on this system" if cpu["openmp"] is None else ", ".join(cpu["openmp"]) or "none"
    if cuda["compiled"]:
        devices = f"{cuda['devices']} found" if cuda["error"] == 0 else f"none usable (error {cuda['error']})"
        kernels = f"compiled with CUDA {cuda['toolkit']} for {cuda['archs']}"
    else:
        devices = "not asked for"
        kernels = f"not compiled (PROSOCIAL_CUDA={cuda['request']})"
    names = ", ".join(torch_facts["devices"])
    lines = [
        ("prosocial_ext", f"{own['version']} in {own['location']}"),
        ("ops", own["backend"]),
        ("python", f"{python['version']} ({python['system']} {python['machine']}), {python['executable']}"),
        ("torch", f"{torch_facts['version']}, {'CUDA ' + (torch_facts['cuda_toolkit'] or 'not built in')}"),
        ("torch.cuda", f"available: {names}" if torch_facts["cuda_available"] else "not available"),
        *([("torch.mps", "available; the ops run on the CPU for it")] if torch_facts["mps_available"] else []),
        ("CPU kernels", f"{cpu['isa']} of {', '.join(cpu['available'])}{forced}"),
        ("threads", f"{cpu['threads']} of {cpu['cores']} cores"),
        ("OpenMP", runtimes),
        ("CUDA kernels", kernels),
        ("CUDA devices", devices),
        *((name, version or "missing") for name, version in facts["libraries"].items()),
    ]
    text = [f"{name:<14}{value}" for name, value in lines]
    text += ["", *(f"- {remedy}" for remedy in facts["remedies"])] if facts["remedies"] else ["", "Nothing to repair."]
    return "\n".join(text)


def openmp_libraries() -> list[str] | None:
    """Return the paths of the OpenMP runtimes that this process has loaded; None where /proc does not tell."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return sorted(set(re.findall(r"/.*/lib(?:g|i|)omp\d*[-.\w]*\.so[.\w]*", maps)))


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch_devices() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about drivers; the remedies word it
        available = torch.cuda.is_available()
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else []
    return {"cuda_available": available, "devices": names, "mps_available": torch.backends.mps.is_available()}


def _cuda() -> dict[str, Any]:
    compiled = _C.cuda_toolkit is not None
    error, devices = _C.cuda_device_count() if compiled else (0, 0)
    return {
        "compiled": compiled,
        "request": _C.cuda_request,
        "toolkit": _C.cuda_toolkit,
        "archs": _C.cuda_archs,
        "error": error,
        "devices": devices,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirement(name: str) -> str:
    """The package's own requirement on ``name``, such as "peft>=0.20"; the bare name when its metadata is missing."""
    try:
        required = importlib.metadata.requires("prosocial_ext") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    return next((text for text in required if re.match(rf"{name}\b", text)), name)
