"""prosocial_ext: make a language model safe and prosocial at test time, without retraining it (arXiv 2512.06515).

`prosocial_ext.ops` has the compiled ops, `prosocial_ext.reference` the same ops in pure PyTorch, the definition of
correct.
"""

import importlib
from typing import Any

import torch  # noqa: F401  before _C: the kernels use torch's OpenMP runtime, and two runtimes would spin against each other

try:
    import prosocial_ext._C as _C
except ImportError as error:
    if "PROSOCIAL_ISA" in str(error):
        raise
    raise ImportError(
        f"prosocial_ext._C could not be imported ({error}). If Python was started in the source tree, build it there "
        "with `pip install -e .`, or start Python elsewhere to use the installed package."
    ) from error

from prosocial_ext import reference  # isort: skip  (ops are built on it)
from prosocial_ext import ops  # isort: skip

__version__: str = _C.version
__all__ = ["GuidedGenerator", "HarmVector", "__version__", "ops", "reference"]

_LAZY = {"GuidedGenerator": "prosocial_ext.decoding", "HarmVector": "prosocial_ext.direg"}


def __getattr__(name: str) -> Any:
    """Import what the pipeline offers here when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
