"""What a top-m edit would carry, told before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prosocial_ext import ops
from prosocial_ext.direg.models import Weights, matching_parameters
from prosocial_ext.direg.subtract import SAFETY_ARITHMETIC_DENSITY
from prosocial_ext.reference import check

__all__ = ["HarmVectorReport", "harm_vector_report"]


@dataclass(frozen=True)
class HarmVectorReport:
    """The harm vector tuned - base and the part of it that top-m selects.

    ``entries``, ``selected``: counts. ``norm``: the Euclidean norm of all of it. ``energy``: the selected entries'
    share of the squared norm; below about 0.6 the largest entries do not carry the vector. ``effect``: their share of
    the first-order effect sum(abs(difference * gradient)), the better predictor; None without gradients.
    """

    entries: int
    selected: int
    norm: float
    energy: float
    effect: float | None


def harm_vector_report(
    base: torch.nn.Module,
    tuned: Weights,
    *,
    density: float = SAFETY_ARITHMETIC_DENSITY,
    importance: Mapping[str, Tensor] | None = None,
    gradient: Mapping[str, Tensor] | None = None,
) -> HarmVectorReport:
    """Report on the harm vector of two models and what top-m at ``density`` would take of it.

    Args:
        base: The model that was tuned.
        tuned: The tuned model, or its state dict.
        density: The share of entries, 0 < density <= 1.
        importance: What the selection ranks by, as in `subtract_harm_`.
        gradient: The harm loss's gradients by name, or their magnitudes (`gradient_importance`), for ``effect``.

    Raises:
        ValueError: Names or shapes of the models differ; a difference is not finite.

    >>> base, tuned = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = base.weight.zero_(), tuned.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> harm_vector_report(base, tuned, density=0.25)
    HarmVectorReport(entries=4, selected=1, norm=5.0, energy=0.64, effect=None)
    """
    others: dict[str, Weights] = {"tuned": tuned}
    for name, given in (("importance", importance), ("gradient", gradient)):
        if given is not None:
            others[name] = given
    _, found = matching_parameters(base, **others)
    delta = ops.topm_select(found["model"], found["tuned"], density=density, importance=found.get("importance"))
    differences = [check.double(t) - check.double(b) for b, t in zip(found["model"], found["tuned"], strict=True)]
    total = float(sum(d.square().sum() for d in differences))
    chosen = delta.indices.split(delta.counts.tolist())
    kept = float(check.double(delta.values).square().sum())
    effect = None
    if gradient is not None:
        effects = [(d * check.double(g)).abs().flatten() for d, g in zip(differences, found["gradient"], strict=True)]
        of_all = float(sum(e.sum() for e in effects))
        of_chosen = float(sum(e[i.to(e.device)].sum() for e, i in zip(effects, chosen, strict=True)))
        effect = of_chosen / of_all if of_all else 0.0
    return HarmVectorReport(
        entries=sum(d.numel() for d in differences),
        selected=delta.indices.numel(),
        norm=total**0.5,
        energy=kept / total if total else 0.0,
        effect=effect,
    )
