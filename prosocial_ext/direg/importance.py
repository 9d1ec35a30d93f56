"""Ranks the entries of a harm vector by their first-order effect on the harm loss instead of by their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.direg.models import named_floats
from prosocial_ext.reference import check

__all__ = ["gradient_importance"]


def gradient_importance(
    model: torch.nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Return the magnitude of the mean gradient of ``loss`` over ``batches``, by parameter name.

    With it `subtract_harm_` ranks entries by abs(difference * gradient), the first-order effect of taking an entry
    back. Use it where the copy was tuned by AdamW: every entry then moves by about the learning rate, whatever it is
    good for, and the largest are mostly noise. Evaluate it half-way, inside
    ``harm_subtracted(model, base, tuned, density=1.0, scale=0.5)``, where it stands for the whole path.

    Each gradient is added to its sum and freed as soon as it is complete, so the sums are what needs memory.

    Args:
        model: Where the gradient is taken. Its mode, its parameters' ``grad`` and ``requires_grad`` are left alone.
        loss: Called as ``loss(model, batch)``; returns a scalar.
        batches: At least one; all weigh the same. Some hundreds of harmful answers are enough.
        device: Where the sums are kept; None: each beside its parameter.

    Returns:
        float32 tensors, finite and >= 0, one per floating-point parameter, 0 where the loss does not reach.

    Raises:
        ValueError: No batches, or a gradient that is not finite.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> gradient_importance(model, lambda m, x: m(x).sum(), [torch.tensor([[1.0, -3.0]])])
    {'weight': tensor([[1., 3.]])}
    """
    named_floats("model", model)
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    before = [(p, p.requires_grad, p.grad) for p in parameters.values()]
    sums = {name: torch.zeros_like(p, dtype=torch.float32, device=device) for name, p in parameters.items()}
    count = 0
    hooks = []
    try:
        for name, p in parameters.items():
            p.requires_grad_(True).grad = None
            hooks.append(p.register_post_accumulate_grad_hook(_adding(sums[name])))
        for batch in batches:
            with torch.enable_grad():
                loss(model, batch).backward()
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
        for p, required, gradient in before:
            p.requires_grad_(required).grad = gradient
    if count == 0:
        check.fail("batches", "hold at least one batch", "none", "A gradient of nothing ranks nothing.")
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            remedy = "Check the loss for infinite logits or empty labels."
            check.fail(f"the gradient at {name!r}", "be finite", "NaN or Inf", remedy)
        total.div_(count).abs_()
    return sums


def _adding(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's gradient to its sum and frees it."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad.to(total.device).float())
        parameter.grad = None

    return add
