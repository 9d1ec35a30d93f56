"""Where in a model a harm vector sits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prosocial_ext import ops
from prosocial_ext.direg.models import Weights, matching_parameters
from prosocial_ext.direg.subtract import SAFETY_ARITHMETIC_DENSITY
from prosocial_ext.reference import check

__all__ = ["TensorShare", "harm_by_tensor"]


@dataclass(frozen=True)
class TensorShare:
    """One parameter's part in a harm vector.

    ``entries``: how many it has. ``energy``: its share of the vector's squared norm. ``selected``: how many of its
    entries top-m takes. ``selected_energy``: the share of the vector's squared norm that these hold.
    """

    entries: int
    energy: float
    selected: int
    selected_energy: float


def harm_by_tensor(
    base: torch.nn.Module,
    tuned: Weights,
    *,
    density: float = SAFETY_ARITHMETIC_DENSITY,
    importance: Mapping[str, Tensor] | None = None,
) -> dict[str, TensorShare]:
    """Return each parameter's share of tuned - base, and of what a global top-m at ``density`` takes of it.

    Args:
        base: The model that was tuned.
        tuned: The tuned model, or its state dict.
        density: The share of entries, 0 < density <= 1.
        importance: What the selection ranks by, as in `subtract_harm_`.

    Returns:
        By parameter name, sorted. The energies sum to 1, or are all 0 where nothing differs.

    Raises:
        ValueError: Names or shapes of the models differ; a difference is not finite.

    >>> base, tuned = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> with torch.no_grad():
    ...     _ = [p.zero_() for p in (*base.parameters(), *tuned.parameters())]
    ...     _ = tuned.weight[0, 1].fill_(3.0), tuned.bias[0].fill_(4.0)
    >>> for name, share in harm_by_tensor(base, tuned, density=0.2).items():
    ...     print(name, share)
    bias TensorShare(entries=2, energy=0.64, selected=1, selected_energy=0.64)
    weight TensorShare(entries=4, energy=0.36, selected=0, selected_energy=0.0)
    """
    others: dict[str, Weights] = {"tuned": tuned} | ({} if importance is None else {"importance": importance})
    names, found = matching_parameters(base, **others)
    delta = ops.topm_select(found["model"], found["tuned"], density=density, importance=found.get("importance"))
    counts = delta.counts.tolist()
    squares = [
        float((check.double(t) - check.double(b)).square().sum())
        for b, t in zip(found["model"], found["tuned"], strict=True)
    ]
    kept = [float(check.double(part).square().sum()) for part in delta.values.split(counts)]
    total = sum(squares) or 1.0
    return {
        name: TensorShare(tensor.numel(), square / total, count, part / total)
        for name, tensor, square, count, part in zip(names, found["model"], squares, counts, kept, strict=True)
    }
