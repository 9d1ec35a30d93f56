"""A function that the user names as module:function."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from prosocial_ext.reference import check

__all__ = ["import_function"]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def import_function(argument: str, text: str) -> Callable[..., Any]:
    """Import what ``text`` names; modules of the working folder can be named, as for ``python -m``.

    Args:
        argument: what errors call it.
        text: module:function.

    Raises:
        ValueError: another form, or it cannot be imported; an error inside the module keeps its own type.

    >>> import_function("evaluate", "math:sqrt")(4.0)
    2.0
    """
    if not _FUNCTION.fullmatch(text):
        check.fail(argument, "be module:function", repr(text))
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{argument} must name what can be imported, got {text}: {error}") from error
    if not callable(function):
        check.fail(argument, "name a function", f"{text}, a {type(function).__name__}")
    return function
