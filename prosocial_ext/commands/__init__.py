"""The subcommands of ``prosocial``, one module each, listed in ``prosocial_ext.cli.COMMANDS``.

A command's module has ``add_arguments(parser)`` and ``run(arguments) -> int``, the exit status. It parses, calls one
library function and reports. ``run`` raises `UserError` for what the user can repair.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "users_mistakes"]


class UserError(Exception):
    """The user's mistake, worded as argument, rule, value, remedy; the program prints it on one line and exits 2."""


@contextmanager
def users_mistakes(arguments: argparse.Namespace, *errors: type[Exception]) -> Iterator[None]:
    """Turn what the library's checks raise into the user's mistake; an argument that is an option has its name.

    >>> with users_mistakes(argparse.Namespace(top_k=-1), ValueError):
    ...     raise ValueError("top_k must be a count >= 0, got -1.")
    Traceback (most recent call last):
    ...
    prosocial_ext.commands.UserError: --top-k must be a count >= 0, got -1.
    """
    try:
        yield
    except errors as error:
        argument, _, rule = str(error).partition(" ")
        option = argument in vars(arguments) and rule.startswith("must ")
        raise UserError(f"--{argument.replace('_', '-')} {rule}" if option else str(error)) from error
