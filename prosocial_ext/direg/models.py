"""Pairs up the parameters of several models by name, in the one order that makes an edit reproducible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.reference import check

__all__ = ["Weights", "matching_parameters", "named_floats"]

Weights = torch.nn.Module | Mapping[str, Tensor]

_SHOWN = 4  # names per error


def matching_parameters(model: torch.nn.Module, **others: Weights) -> tuple[list[str], dict[str, list[Tensor]]]:
    """Return the model's trainable-kind parameters and those of ``others`` that carry the same names.

    The order is that of the sorted names: it settles which of several equal entries a top-m edit takes, so it must not
    depend on how a model was put together. Tied parameters come once, under the first name that the model gives them.
    Buffers and parameters that are not floating point are left out.

    Args:
        model: A model.
        others: Models of the same architecture, or mappings from names to tensors such as a state dict (in which tied
            parameters may come under all their names).

    Returns:
        The names, and the tensors of ``model`` (under "model") and of each of ``others`` in their order.

    Raises:
        TypeError: Neither a module nor a mapping.
        ValueError: Names or shapes that differ, or the model has no floating-point parameters. The text lists them.

    >>> layer = torch.nn.Linear(2, 3)
    >>> names, tensors = matching_parameters(layer, base=torch.nn.Linear(2, 3), tuned=layer.state_dict())
    >>> names, [tuple(tensor.shape) for tensor in tensors["tuned"]]
    (['bias', 'weight'], [(3,), (3, 2)])
    """
    if not isinstance(model, torch.nn.Module):
        check.fail("model", "be a torch.nn.Module", check.describe(model), error=TypeError)
    own = named_floats("model", model)
    if not own:
        check.fail("model", "have floating-point parameters", "none", "A quantised model must be dequantised first.")
    names = sorted(own)
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {"model": [own[name] for name in names]}
    for label, other in others.items():
        theirs = named_floats(label, other)
        allowed = set(names)
        if not isinstance(other, torch.nn.Module):  # a state dict repeats tied parameters and holds buffers
            allowed |= aliases | {name for name, _ in model.named_buffers()}
        _same_names(label, names, theirs, allowed)
        for name in names:
            if theirs[name].shape != own[name].shape:
                check.fail(
                    f"{label}[{name!r}]",
                    f"have the model's shape {tuple(own[name].shape)}",
                    tuple(theirs[name].shape),
                    "Only models of one architecture and vocabulary can be subtracted.",
                )
        found[label] = [theirs[name] for name in names]
    return names, found


def named_floats(argument: str, weights: Weights) -> dict[str, Tensor]:
    """Floating-point parameters (of a mapping: entries) by name, tied parameters of a module once."""
    items: Any
    if isinstance(weights, torch.nn.Module):
        items = weights.named_parameters()
    elif isinstance(weights, Mapping):
        items = weights.items()
    else:
        check.fail(
            argument,
            "be a torch.nn.Module or a mapping from names to tensors",
            check.describe(weights),
            error=TypeError,
        )
    return {
        name: check.tensor(f"{argument}[{name!r}]", value).detach()
        for name, value in items
        if not isinstance(value, Tensor) or value.is_floating_point()
    }


def _same_names(label: str, names: Sequence[str], theirs: Mapping[str, Tensor], allowed: set[str]) -> None:
    missing = [name for name in names if name not in theirs]
    extra = sorted(set(theirs) - allowed)
    if not missing and not extra:
        return
    parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} besides"] * bool(extra)
    remedy = "Load models of one architecture, with the same parameters tied, and merge adapters first."
    check.fail(label, "have the model's parameter names", f"one that {' and '.join(parts)}", remedy)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
