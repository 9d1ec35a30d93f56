"""Sampling parameters on their way to the kernels.

A knob is a tensor with a value per row on the logits' device, or, where all rows have the same, with one on the CPU: a
tensor of equal values would cost a GPU two or three launches a knob, and sampling itself is one to three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prosocial_ext.ops import _cuda
from prosocial_ext.reference import sampling_arguments as arguments

__all__ = ["guidance", "knob", "spread", "tables"]

_CPU = torch.device("cpu")


def _is_one_value(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and value.device == _CPU
    return not torch.compiler.is_compiling()  # it would make a graph per value, and fuses what fills the tensors


def _refuse_copy_inside_a_capture(name: str, value: Any, device: torch.device) -> None:
    if isinstance(value, torch.Tensor) and value.device != device and not torch.compiler.is_compiling():
        what = f"{name} is on {value.device} and must be copied"
        _cuda.refuse_capture(device.type == "cuda", what, f"Pass it on {device}.")


def knob(name: str, value: Any, rows: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a parameter as [B] on ``device`` or [1] on the CPU, or raise."""
    if _is_one_value(value):
        return arguments.knob(name, value, 1, _CPU, dtype)
    _refuse_copy_inside_a_capture(name, value, device)
    return arguments.knob(name, value, rows, device, dtype)


def guidance(value: Any, rows: int, guides: int, stacked: bool, device: torch.device) -> torch.Tensor:
    """Return the strengths of the guides as [B, G] on ``device``, or one number as [1, G] on the CPU, or raise."""
    if _is_one_value(value):
        return arguments.guidance(value, 1, min(guides, 1), stacked, _CPU).expand(1, guides)
    _refuse_copy_inside_a_capture("guidance", value, device)
    return arguments.guidance(value, rows, guides, stacked, device)


def spread(knob: torch.Tensor, rows: int, device: torch.device) -> torch.Tensor:
    """Return a knob with a value per row on ``device``; nothing waits for it."""
    if knob.device != device:
        value = knob.flatten()[0].item() if knob.numel() else 0
        knob = torch.full(knob.shape, value, dtype=knob.dtype, device=device)
    return knob.expand(rows, *knob.shape[1:])


def tables(knobs: Sequence[torch.Tensor], rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the knobs of `guided_sample_rows` as fp32 [B, 3 + G] and int64 [B, 3]."""
    temperature, top_p, min_p, strength, *whole = (spread(knob, rows, device) for knob in knobs)
    real = torch.cat([torch.stack([temperature, top_p, min_p], dim=1), strength], dim=1)
    return real.to(torch.float32), torch.stack(whole, dim=1)
