"""Makes one update out of the attributes' gradients, which pull against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prosocial_ext import ops
from prosocial_ext.ops import ProjectionStats
from prosocial_ext.reference import check

__all__ = ["SURGERIES", "combine_gradients"]

SURGERIES = ("pcgrad", "pcgrad_active", "unit_norm", "none")


def combine_gradients(
    gradients: Sequence[Sequence[Tensor]],
    weights: Tensor | None,
    surgery: str,
    *,
    active: float = 0.1,
    seed: int = 0,
) -> tuple[list[Tensor], ProjectionStats]:
    """Return one update direction, and the conflicts among the gradients, found also where they are left as they are.

    - "none": the weighted sum.
    - "pcgrad": each gradient is projected off those that it conflicts with, then weighted (Yu et al., NeurIPS 2020).
      An attribute of little weight keeps its veto over the others.
    - "pcgrad_active": the same among the attributes whose weight is at least ``active``; the others take no part.
    - "unit_norm": each gradient is brought to length 1, then weighted, so that weights alone decide.

    Args:
        gradients: k lists of tensors of the same shapes.
        weights: [k], finite and >= 0; None for ones.
        surgery: one of the above.
        active: a weight; for "pcgrad_active" alone.
        seed: of the order of projections, in [0, 2**63).

    Returns:
        A list of tensors with the gradients' shapes, and statistics of all gradients that took part.

    Raises:
        ValueError: an unknown surgery, or gradients or weights that `prosocial_ext.ops.project_conflicts` refuses.

    >>> gradients = [[torch.tensor([4.0, 0.0])], [torch.tensor([-1.0, 1.0])]]
    >>> combine_gradients(gradients, None, "none")[0]
    [tensor([3., 1.])]
    >>> combine_gradients(gradients, None, "pcgrad")[0]
    [tensor([2., 3.])]
    """
    check.choice("surgery", surgery, SURGERIES)
    if surgery == "pcgrad_active" and weights is not None:
        weights = torch.where(weights >= active, weights, 0.0)
    projected: Any = ops.project_conflicts(gradients, weights=weights, seed=seed, return_stats=True)
    update, stats = projected
    if surgery in ("none", "unit_norm"):
        factors = check.double([1.0] * len(gradients) if weights is None else weights.cpu())
        if surgery == "unit_norm":
            squares = ops.gradient_gram(gradients).diagonal().cpu()
            factors = torch.where(squares > 0, factors / squares.sqrt(), 0.0)
        update = [
            torch.stack([factor * part for factor, part in zip(factors.tolist(), parts, strict=True)]).sum(dim=0)
            for parts in zip(*gradients, strict=True)
        ]
    return update, stats
