"""The wording of every argument error: argument, rule, value, remedy. Reference and compiled ops share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fail(argument: str, rule: str, value: object, remedy: str = "", error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` with the text "{argument} must {rule}, got {value}. {remedy}"."""
    raise error(f"{argument} must {rule}, got {value}.{' ' + remedy if remedy else ''}")


def describe(value: object) -> str:
    """A value as an error shows it: tensors by shape and dtype, never by content."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype} on {value.device}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)


def tensor(argument: str, value: object) -> torch.Tensor:
    """Return ``value`` if it is a tensor, else raise TypeError."""
    if not isinstance(value, torch.Tensor):
        fail(argument, "be a tensor", describe(value), error=TypeError)
    return value


def floating(argument: str, value: object) -> torch.Tensor:
    """Return ``value`` if it is a strided tensor of a dtype that the ops read, else raise TypeError."""
    checked = tensor(argument, value)
    if checked.dtype not in FLOATING:
        fail(argument, "be float32, float64, float16 or bfloat16", checked.dtype, "Convert it first.", TypeError)
    if checked.layout is not torch.strided:
        fail(argument, "be a dense (strided) tensor", checked.layout, "Call .to_dense() first.", TypeError)
    return checked


def number(argument: str, value: Any, low: float, high: float, rule: str, remedy: str = "") -> float:
    """Return ``value`` if it is a number in [low, high] (so not NaN), else raise."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        fail(argument, rule, describe(value), remedy, TypeError)
    if not low <= value <= high:
        fail(argument, rule, value, remedy)
    return value


def integer(argument: str, value: Any, low: int, high: int, rule: str, remedy: str = "") -> int:
    """Return ``value`` as an int in [low, high], else raise."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(argument, rule, describe(value), remedy, TypeError)
    if not (low <= value <= high):
        fail(argument, rule, value, remedy)
    return value


def choice(argument: str, value: Any, options: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``options``, else raise."""
    if value not in options:
        fail(argument, "be one of " + ", ".join(map(repr, options)), repr(value))
    return value
