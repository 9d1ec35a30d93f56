"""The program ``prosocial``: finds the subcommand, imports its module alone, and words the user's mistakes."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from prosocial_ext import __version__
from prosocial_ext.commands import UserError

__all__ = ["COMMANDS", "Command", "main"]


@dataclass(frozen=True)
class Command:
    """One subcommand: its line in the help, and the module that is imported when it runs."""

    summary: str
    module: str


COMMANDS = {
    "demo": Command("the whole method on a small model: train, edit, guide, measure", "prosocial_ext.commands.demo"),
    "generate": Command(
        "replies to prompts, under a preference and a strength each", "prosocial_ext.commands.generate"
    ),
    "eval": Command("harm, over-refusal and utility of a model, with intervals", "prosocial_ext.commands.eval"),
    "direg": Command("take the harm vector out of a checkpoint, on disk", "prosocial_ext.commands.direg"),
    "env": Command("what was built, found and missing, and the remedy", "prosocial_ext.commands.env"),
    "bench": Command("time the ops beside this machine's memory and torch", "prosocial_ext.commands.bench"),
}


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``prosocial`` with ``argv`` (default: the process's arguments) and return the exit status.

    Raises:
        SystemExit: with status 0 after ``--help`` and ``--version``, with 2 and one line on a mistake in the arguments.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser("prosocial", description="Make a language model safe and prosocial at test time.")
    parser.add_argument("--version", action="version", version=f"prosocial_ext {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((argument for argument in given if not argument.startswith("-")), None)
    run = None
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary)
        if name == chosen:  # the others' modules may import transformers, which takes seconds
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
            run = module.run
    arguments = parser.parse_args(given)
    assert run is not None  # parse_args has refused what is not in the table
    try:
        status = int(run(arguments))
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"prosocial {chosen}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who reads us, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 141  # what a shell says of SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
