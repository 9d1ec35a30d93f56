"""Where a run took place, as far as its figures or its seconds may depend on it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from prosocial_ext import _C
from prosocial_ext.ops import _backend

__all__ = ["describe_machine"]


def describe_machine() -> dict[str, Any]:
    """Return versions, the ops' backend and the number of threads."""
    return {
        "prosocial_ext": _C.version,
        "ops": "reference" if _backend.use_reference else "compiled",
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
