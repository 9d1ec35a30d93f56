"""Compiled kernels or the reference behind the ops' names, so that a suspicion is settled in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from prosocial_ext.reference import check

_NAMES = ("compiled", "reference")
use_reference: bool = (
    check.choice("PROSOCIAL_BACKEND", os.environ.get("PROSOCIAL_BACKEND", "compiled"), _NAMES) == "reference"
)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops from ``name``, "compiled" or "reference", inside the ``with`` block (process-wide).

    The environment variable ``PROSOCIAL_BACKEND`` sets the default.

    Raises:
        ValueError: ``name`` is neither.
    """
    global use_reference
    before, use_reference = use_reference, check.choice("name", name, _NAMES) == "reference"
    try:
        yield
    finally:
        use_reference = before
