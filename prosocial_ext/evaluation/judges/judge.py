"""What every judge does: prompts and their responses in, scores and flags out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prosocial_ext.reference import check

__all__ = ["Judge", "Verdicts", "check_threshold"]


@dataclass(frozen=True)
class Verdicts:
    """One score and one flag per response, in their order, and what a reader of the figures should know.

    >>> Verdicts.of([0.2, 0.9], threshold=0.5).flags
    [False, True]
    """

    scores: list[float]
    flags: list[bool]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, scores: Sequence[float], threshold: float, notes: Sequence[str] = ()) -> Verdicts:
        """Return verdicts that flag each score of at least ``threshold``."""
        return cls(list(scores), [score >= threshold for score in scores], list(notes))


class Judge(Protocol):
    """Anything with a ``name`` for reports that is loaded, then called with equally many prompts and responses.

    The result depends on the pair alone: not on the others in the call, up to the rounding of a model's batches.
    """

    name: str

    def load(self) -> None:
        """Read what the judge needs, so that what is missing is missed before hours of replies are drawn."""
        ...

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Verdicts:
        """Return the verdicts, one per pair."""
        ...


def check_threshold(threshold: float) -> float:
    """Return ``threshold`` if it is a finite number, else raise."""
    return float(check.number("threshold", threshold, -math.inf, math.inf, "be a number", "0.5 flags the likelier."))
