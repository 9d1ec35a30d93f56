"""Hypervolumes of known boxes, and by inclusion and exclusion."""

import itertools
import math
import re
from typing import Any

import pytest
import torch

from prosocial_ext.evaluation import hypervolume

DIMENSIONS = [1, 2, 3, 4, 5]


def by_inclusion_and_exclusion(points: list[list[float]], reference: list[float]) -> float:
    """Over all subsets: the box that a subset's points share, added or taken away."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            shared = torch.tensor(subset, dtype=torch.float64).amin(dim=0).tolist()
            sides = [max(0.0, best - worst) for best, worst in zip(shared, reference, strict=True)]
            total -= (-1) ** size * math.prod(sides)
    return total


def drawn(n: int, d: int, seed: int) -> list[list[float]]:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def front(n: int, d: int, seed: int) -> list[list[float]]:
    """On the sphere no point dominates another."""
    points = torch.tensor(drawn(n, d, seed)).double() + 0.05
    return (points / points.norm(dim=1, keepdim=True)).tolist()


@pytest.mark.parametrize("d", DIMENSIONS)
def test_one_point_is_a_box(d: int) -> None:
    assert hypervolume([[3.0] * d], [1.0] * d) == 2.0**d
    assert hypervolume([list(range(2, d + 2))], [1.0] * d) == math.factorial(d)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_two_crossing_boxes_count_what_they_share_once(d: int) -> None:
    long, wide = [2.0] + [1.0] * (d - 1), [1.0] * (d - 1) + [2.0]
    assert hypervolume([long, wide], [0.0] * d) == (3.0 if d > 1 else 2.0)


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("points", [drawn, front], ids=["random", "front"])
@pytest.mark.parametrize("seed", range(5))
def test_equals_inclusion_and_exclusion(points: Any, d: int, seed: int) -> None:
    given, reference = points(9, d, seed), [0.1] * d
    assert hypervolume(given, reference) == pytest.approx(by_inclusion_and_exclusion(given, reference), rel=1e-12)


@pytest.mark.parametrize("d", DIMENSIONS[1:])
def test_more_points_dominate_more(d: int) -> None:
    points = front(12, d, seed=1)
    volumes = [hypervolume(points[:n], [0.0] * d) for n in range(13)]
    assert volumes[0] == 0.0
    assert all(a < b for a, b in itertools.pairwise(volumes))


@pytest.mark.parametrize("d", DIMENSIONS[1:])
def test_dominated_points_repeated_ones_and_the_order_do_not_matter(d: int) -> None:
    points = front(8, d, seed=2)
    volume = hypervolume(points, [0.0] * d)
    dominated = [[0.9 * x for x in point] for point in points] + [points[0][:-1] + [points[0][-1] / 2]]
    assert hypervolume(points + dominated + points[:3], [0.0] * d) == volume
    assert hypervolume(points[::-1], [0.0] * d) == volume
    swapped = [point[::-1] for point in points]
    assert hypervolume(swapped, [0.0] * d) == pytest.approx(volume, rel=1e-12)


def test_points_not_above_the_reference_add_nothing() -> None:
    points = [[2.0, 2.0, 2.0], [5.0, 5.0, 0.0], [5.0, 5.0, -1.0], [-1.0, -1.0, -1.0]]
    assert hypervolume(points, [0.0, 0.0, 0.0]) == 8.0
    assert hypervolume(points[1:], [0.0, 0.0, 0.0]) == 0.0


def test_tensors_read_as_lists() -> None:
    points = torch.tensor(front(6, 3, seed=3))
    assert hypervolume(points, torch.zeros(3)) == hypervolume(points.tolist(), [0.0] * 3)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("points must have shape [n, 3], as reference")):
        hypervolume([[1.0, 2.0]], [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=re.escape("reference must have shape [d] with d >= 1")):
        hypervolume([[1.0, 2.0]], 0.0)


def test_a_value_that_is_not_finite_is_refused_by_its_place() -> None:
    with pytest.raises(ValueError, match=re.escape("points[1, 0] must be finite, got inf")):
        hypervolume([[1.0, 2.0], [math.inf, 1.0]], [0.0, 0.0])
    with pytest.raises(ValueError, match=re.escape("reference[1] must be finite, got nan")):
        hypervolume([[1.0, 2.0]], [0.0, math.nan])
