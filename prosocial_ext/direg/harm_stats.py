"""Where a harm vector sits: entries and energy per module, and the share that the kept entries hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LOW_ENERGY_SHARE", "HarmVectorStats", "ModuleStats"]

LOW_ENERGY_SHARE = 0.5  # copies tuned by AdamW keep 0.2 to 0.5 at density 0.10, those tuned by SGD over 0.99


@dataclass(frozen=True)
class ModuleStats:
    """One tensor, one module or the whole vector.

    ``kept``: entries stored. ``entries``: those that took part. ``energy``: the squared norm of all of them,
    ``kept_energy``: of those stored.
    """

    name: str
    kept: int
    entries: int
    kept_energy: float
    energy: float

    @property
    def energy_share(self) -> float:
        """The stored entries' share of the squared norm; 0 where nothing moved."""
        return min(self.kept_energy / self.energy, 1.0) if self.energy else 0.0


@dataclass(frozen=True)
class HarmVectorStats:
    """The rows of a harm vector's tensors, and sums of them.

    >>> rows = [ModuleStats("h.0.fc.weight", 1, 4, 9.0, 10.0), ModuleStats("h.0.fc.bias", 1, 2, 1.0, 10.0)]
    >>> stats = HarmVectorStats(rows)
    >>> stats.modules(), stats.total.energy_share
    ([ModuleStats(name='h.0.fc', kept=2, entries=6, kept_energy=10.0, energy=20.0)], 0.5)
    """

    tensors: Sequence[ModuleStats]

    @property
    def total(self) -> ModuleStats:
        """The whole vector."""
        return _sum("", self.tensors)

    def modules(self) -> list[ModuleStats]:
        """One row per module: tensors without the last part of their name, in the global order."""
        grouped: dict[str, list[ModuleStats]] = {}
        for row in self.tensors:
            grouped.setdefault(row.name.rpartition(".")[0] or row.name, []).append(row)
        return [_sum(name, rows) for name, rows in grouped.items()]


def _sum(name: str, rows: Sequence[ModuleStats]) -> ModuleStats:
    return ModuleStats(
        name,
        sum(row.kept for row in rows),
        sum(row.entries for row in rows),
        float(sum(row.kept_energy for row in rows)),
        float(sum(row.energy for row in rows)),
    )
