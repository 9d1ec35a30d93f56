"""What each preference did to each attribute: a matrix of mean rewards, and the gains over a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prosocial_ext.evaluation.intervals import Estimate, bootstrap_difference, bootstrap_interval
from prosocial_ext.reference import check

__all__ = ["AttributeMatrix", "attribute_matrix"]


@dataclass(frozen=True)
class AttributeMatrix:
    """Mean rewards by the preference that texts were generated under, then by attribute.

    ``means["empathy"]["helpfulness"]`` is what asking for empathy left of helpfulness. ``gains``: the same less the
    row ``baseline``, by pairs; empty where there is none.

    >>> cell = Estimate(0.5, 0.4, 0.6, 9)
    >>> print(AttributeMatrix(("a", "b"), {"none": {"a": cell, "b": cell}}, None, {}))
               a       b
    none   0.500   0.500
    """

    attributes: tuple[str, ...]
    means: dict[str, dict[str, Estimate]]
    baseline: str | None
    gains: dict[str, dict[str, Estimate]]

    def __str__(self) -> str:
        left = max(map(len, self.means))
        widths = [max(len(name), 6) for name in self.attributes]
        head = zip(self.attributes, widths, strict=True)
        lines = [" " * left + "".join(f"  {name:>{width}}" for name, width in head)]
        for name, row in self.means.items():
            cells = zip(row.values(), widths, strict=True)
            lines.append(f"{name:<{left}}" + "".join(f"  {cell.value:>{width}.3f}" for cell, width in cells))
        return "\n".join(lines)


def attribute_matrix(
    rewards_by_preference: Mapping[str, Any],
    attributes: Sequence[str],
    *,
    baseline: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> AttributeMatrix:
    """Return the matrix with a bootstrap interval in every cell.

    Args:
        rewards_by_preference: for each preference (of any name) the rewards of its texts, [n, k], where row i answers
            prompt i under every preference.
        attributes: the k names, in the order of the columns.
        baseline: the row that gains are over, such as "unguided"; None: no gains.
        confidence, seed: as in `bootstrap_interval`.

    Raises:
        ValueError: no rows, rewards of different shapes or not finite, or a baseline that is no row.

    >>> rewards = {"unguided": [[0.0, 1.0], [0.0, 1.0]], "empathy": [[1.0, 1.0], [1.0, 0.0]]}
    >>> matrix = attribute_matrix(rewards, ["empathy", "helpfulness"], baseline="unguided")
    >>> matrix.means["empathy"]["empathy"].value, matrix.gains["empathy"]["helpfulness"].value
    (1.0, -0.5)
    """
    names = tuple(attributes)
    if not rewards_by_preference:
        check.fail("rewards_by_preference", "hold at least one preference", "none")
    if baseline is not None and baseline not in rewards_by_preference:
        check.fail("baseline", "be one of " + ", ".join(map(repr, rewards_by_preference)), repr(baseline))
    rewards = {name: check.double(given) for name, given in rewards_by_preference.items()}
    n = len(next(iter(rewards.values())))
    for name, given in rewards.items():
        if given.shape != (n, len(names)):
            rule = f"have shape {(n, len(names))}, a row per prompt and a column per attribute"
            check.fail(f"rewards_by_preference[{name!r}]", rule, check.describe(given))
    means, gains = {}, {}
    for name, given in rewards.items():
        columns = dict(zip(names, given.T, strict=True))
        means[name] = {a: bootstrap_interval(column, confidence=confidence, seed=seed) for a, column in columns.items()}
        if baseline is not None and name != baseline:
            under = dict(zip(names, rewards[baseline].T, strict=True))
            gains[name] = {a: bootstrap_difference(columns[a], under[a], confidence, seed) for a in names}
    return AttributeMatrix(names, means, baseline, gains)
