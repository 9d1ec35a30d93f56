"""Ops on devices that cannot run them, by copies in host memory: MPS shares it, and has no float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from prosocial_ext.reference import check
from prosocial_ext.reference.results import bump_versions, writing

__all__ = ["on_host"]


def on_host(kernel: Callable[..., Any], writes: bool) -> Callable[..., Any]:
    """Return ``kernel`` for tensors of another device: they are copied to the CPU, and what it gives is copied back.

    Results that the device cannot hold stay on the CPU. ``writes``: the first argument is a list that is written in
    place; where the kernel raises, nothing is.
    """

    def implementation(*args: Any) -> Any:
        device = next(t.device for t in _tensors(args) if t.device.type != "cpu")
        near = [_each(argument, lambda t: t.to("cpu")) for argument in args]
        outputs = _each(kernel(*near), lambda t: t.to(_home(t, device)))
        if writes:
            for param, worked in zip(args[0], near[0], strict=True):
                with writing(param):
                    param.copy_(worked)
            bump_versions(args[0])
        return outputs

    return implementation


def _home(tensor: torch.Tensor, device: torch.device) -> torch.device:
    return check.float64_device(device) if tensor.dtype == torch.float64 else device


def _tensors(argument: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _each(argument, found.append)
    return found


def _each(argument: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Apply a function to every tensor of an op's arguments or results: one, a list, or a tuple of these."""
    if isinstance(argument, torch.Tensor):
        return function(argument)
    if isinstance(argument, (list, tuple)):
        return type(argument)(_each(part, function) for part in argument)
    return argument
