"""The subcommands of ``prosocial``, one module each, listed in ``prosocial_ext.cli.COMMANDS``.

A command's module has ``add_arguments(parser)`` and ``run(arguments) -> int``, the exit status. It parses, calls one
library function and reports. ``run`` raises `UserError` for what the user can repair.
"""

__all__ = ["UserError"]


class UserError(Exception):
    """The user's mistake, worded as argument, rule, value, remedy; the program prints it on one line and exits 2."""
