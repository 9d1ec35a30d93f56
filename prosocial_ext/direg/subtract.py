"""The edit theta' = theta - scale * top_m(tuned - base) on a model in memory, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from prosocial_ext import ops
from prosocial_ext.direg.models import Weights, matching_parameters
from prosocial_ext.ops import TopmEdit

__all__ = ["SAFETY_ARITHMETIC_DENSITY", "harm_subtracted", "subtract_harm_"]

SAFETY_ARITHMETIC_DENSITY = (
    0.10  # Safety Arithmetic's choice (arXiv 2406.11801, figure 3); the DIReg paper's is unknown
)


def subtract_harm_(
    model: torch.nn.Module,
    base: Weights,
    tuned: Weights,
    *,
    density: float | None = None,
    m: int | None = None,
    scale: float = 1.0,
    scope: str = "global",
    importance: Mapping[str, Tensor] | None = None,
    undo: bool = False,
) -> TopmEdit:
    """Subtract ``scale * (tuned - base)`` from ``model`` in place at the entries of largest magnitude.

    All floating-point parameters take part, embeddings and head too, in the order of their sorted names; a tied
    parameter is one parameter. Buffers are left alone. The same bits on every device and for any thread count
    (`prosocial_ext.ops.topm_subtract_`). Nothing is written if an argument is refused.

    Args:
        model: Edited in place; may be ``base`` itself, or another descendant of it.
        base: What ``tuned`` was tuned from: a model or a state dict.
        tuned: The harm-tuned copy, likewise.
        density: The share of entries to edit, 0 < density <= 1. Neither it nor ``m``: 0.10, the Safety Arithmetic
            default.
        m: Their count instead.
        scale: The dose lambda; 1 takes the whole difference back. Safety Arithmetic uses 2 to 3 by hand.
        scope: "global": m of all entries; "per_tensor": m (or the density) of each parameter.
        importance: By name, one tensor per parameter of its shape (`gradient_importance`): entries are then ranked by
            abs(difference) * importance.
        undo: Keep what the result's ``revert_`` needs.

    Returns:
        A `TopmEdit` with one entry per parameter in the order of the sorted names.

    Raises:
        ValueError: Names or shapes of the models differ (the text lists them), a difference is not finite.
        TypeError: An argument of the wrong type.

    >>> base, tuned = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = base.weight.fill_(1.0), tuned.weight.copy_(torch.tensor([[1.0, 1.5], [4.0, 1.0]]))
    >>> edit = subtract_harm_(base, base, tuned, m=1)
    >>> base.weight.data
    tensor([[ 1.,  1.],
            [-2.,  1.]])
    """
    if density is None and m is None:
        density = SAFETY_ARITHMETIC_DENSITY
    others = {"base": base, "tuned": tuned}
    if importance is not None:
        others["importance"] = importance
    _, found = matching_parameters(model, **others)
    return ops.topm_subtract_(
        found["model"],
        found["base"],
        found["tuned"],
        m=m,
        density=density,
        scale=scale,
        scope=scope,
        importance=found.get("importance"),
        undo=undo,
    )


@contextmanager
def harm_subtracted(
    model: torch.nn.Module,
    base: Weights,
    tuned: Weights,
    *,
    density: float | None = None,
    m: int | None = None,
    scale: float = 1.0,
    scope: str = "global",
    importance: Mapping[str, Tensor] | None = None,
) -> Iterator[TopmEdit]:
    """Edit ``model`` as `subtract_harm_` does for the length of a ``with`` block, then restore every bit.

    The original bits of the edited entries are kept meanwhile: 12 bytes per entry for float32, 10 for bfloat16. The
    block must not change the parameters otherwise; what it writes to edited entries is lost, to others it stays.

    Args, Raises: as `subtract_harm_`.

    >>> model, tuned = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    >>> before = model.weight.clone()
    >>> with harm_subtracted(model, model.state_dict(), tuned, density=0.5):
    ...     bool((model.weight == before).all())
    False
    >>> bool((model.weight == before).all())
    True
    """
    edit = subtract_harm_(
        model, base, tuned, density=density, m=m, scale=scale, scope=scope, importance=importance, undo=True
    )
    try:
        yield edit
    finally:
        _, found = matching_parameters(model)
        edit.revert_(found["model"])
