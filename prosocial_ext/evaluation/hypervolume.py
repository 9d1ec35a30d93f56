"""How much of the space of outcomes a set of points dominates: one figure for a whole front of trade-offs."""

from __future__ import annotations

import math
from typing import Any

from prosocial_ext.reference import check

__all__ = ["hypervolume"]

_Point = tuple[float, ...]


def hypervolume(points: Any, reference: Any) -> float:
    """Return the volume between ``reference`` and the points, all of whose coordinates are to be maximised.

    Exact up to rounding, by the exclusive volumes of While et al. (WFG, IEEE TEC 2012). Points that another one
    dominates add nothing, nor do those that are not above the reference in every coordinate. The work grows fast with
    the coordinates: some hundreds of points in 3 of them, some tens in 5, take a second or less.

    Args:
        points: [n, d], such as the mean rewards under n preferences; n may be 0.
        reference: [d], the worst outcome that counts, the same wherever volumes are compared.

    Raises:
        ValueError: shapes that do not match, or a value that is not finite.

    >>> hypervolume([[1.0, 3.0], [2.0, 2.0], [1.0, 1.0]], reference=[0.0, 0.0])
    5.0
    """
    worst = check.double(reference)
    if worst.dim() != 1 or len(worst) == 0:
        check.fail("reference", "have shape [d] with d >= 1", check.describe(worst))
    given = check.double(points)
    if given.numel() == 0:
        given = given.reshape(0, len(worst))
    if given.dim() != 2 or given.shape[1] != len(worst):
        check.fail("points", f"have shape [n, {len(worst)}], as reference", check.describe(given))
    for name, values in (("reference", worst), ("points", given)):
        if not bool(values.isfinite().all()):
            index = (~values.isfinite()).nonzero()[0].tolist()
            check.fail(f"{name}{index}", "be finite", values[tuple(index)].item())
    sides = given - worst
    return _volume(_front([tuple(row) for row in sides[(sides > 0).all(dim=1)].tolist()]))


def _volume(front: list[_Point]) -> float:
    """The volume that points above the origin dominate together; none of them dominates another.

    Each point brings its own box less what the later ones already dominate of it.
    """
    if not front:
        return 0.0
    if len(front[0]) == 2:
        return _area(front)
    total = 0.0
    for i, point in enumerate(front):
        shared = [tuple(map(min, point, later)) for later in front[i + 1 :]]
        total += math.prod(point) - _volume(_front(shared))
    return total


def _area(front: list[_Point]) -> float:
    """In a plane: from the right, each point adds a strip above the one before."""
    total = height = 0.0
    for x, y in sorted(front, reverse=True):
        total += x * max(0.0, y - height)
        height = max(height, y)
    return total


def _front(points: list[_Point]) -> list[_Point]:
    """The points that no other one dominates, each once, the largest last coordinate first: the rest then shrink."""
    front: list[_Point] = []
    for point in sorted(set(points), key=lambda p: p[::-1], reverse=True):
        if not any(all(a >= b for a, b in zip(better, point, strict=True)) for better in front):
            front.append(point)
    return front
