"""What an edit found in the tensors of a stretch, and what all stretches together come to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Tally"]


@dataclass
class Tally:
    """Counts, and by tensor what must not depend on who found it when: sums of squares, sums of words.

    ``edited`` entries; ``unchanged`` of them rounding left as they were; ``skipped`` lie in rows that the checkpoint
    lacks. ``threshold``: the smallest magnitude edited. ``requested`` and ``effective``: squared norms of the edit as
    computed and as rounded. ``compared``, ``written``: word sums of what the vector's fingerprint covers, and of the
    edited tensors.

    >>> one, other = Tally(edited=2, requested={"a": 0.5}), Tally(edited=1, threshold=0.25, requested={"b": 1.5})
    >>> Tally.total([vars(one), vars(other)])
    Tally(edited=3, unchanged=0, skipped=0, threshold=0.25, requested={'a': 0.5, 'b': 1.5}, effective={}, compared={}, \
written={})
    """

    edited: int = 0
    unchanged: int = 0
    skipped: int = 0
    threshold: float = math.inf
    requested: dict[str, float] = field(default_factory=dict)
    effective: dict[str, float] = field(default_factory=dict)
    compared: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)

    @classmethod
    def total(cls, stretches: Iterable[Mapping[str, Any]]) -> Tally:
        """Join what was found in several stretches, each the ``vars`` of a tally; no tensor lies in two."""
        total = cls()
        for found in stretches:
            for name in ("edited", "unchanged", "skipped"):
                setattr(total, name, getattr(total, name) + found[name])
            total.threshold = min(total.threshold, found["threshold"])
            for name in ("requested", "effective", "compared", "written"):
                getattr(total, name).update(found[name])
        return total
