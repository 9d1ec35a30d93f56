"""The error of everything that concerns files: checkpoints, harm vectors, outputs."""

from __future__ import annotations

from typing import NoReturn

from prosocial_ext.reference import check

__all__ = ["CheckpointError", "StoppedError", "listed", "refuse", "shown"]

_LONGEST = 80  # characters of a name from a file, of names in a list
_MOST = 4  # names in a list


class CheckpointError(ValueError):
    """A file or folder that cannot be used as asked; the text names it, the rule, what was found and the remedy."""


class StoppedError(CheckpointError):
    """Another process of the same job has stopped; nothing that this one has done is wrong."""


def refuse(  # type: ignore[misc]  # fail raises
    argument: str, rule: str, value: object, remedy: str = "", error: type[CheckpointError] = CheckpointError
) -> NoReturn:
    """Raise ``error`` in the words of every argument error."""
    check.fail(argument, rule, value, remedy, error)


def shown(name: object) -> str:
    """Text from a file as an error shows it: quoted, without control characters, cut.

    >>> shown("a\\nb")
    "'a\\\\nb'"
    """
    text = ascii(name)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def listed(names: list[str]) -> str:
    """The first few names and how many more there are.

    >>> listed(["a", "b", "c", "d", "e"])
    "'a', 'b', 'c', 'd' and 1 more"
    """
    rest = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(map(shown, names[:_MOST])) + rest
