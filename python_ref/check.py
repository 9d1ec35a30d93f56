"""The wording of every argument error: argument, rule, value, remedy. Reference and compiled ops share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fail(argument: str, rule: str, value: object, remedy: str = "", error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` with the text "{argument} must {rule}, got {value}. {remedy}"."""
    raise error(f"{argument} must {rule}, got {value}.{' ' + remedy if remedy else ''}")


def describe(value: object) -> str:
    """A value as an error shows it: tensors by shape and dtype, never by content; huge integers by their length."""
    if isinstance(value, torch.Tensor):
        if value.is_nested:  # it has no shape
            return f"a nested tensor of dtype {value.dtype} on {value.device}"
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype} on {value.device}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if is_dataclass(value) and not isinstance(value, type):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) >= 2**128:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def tensor(argument: str, value: object) -> torch.Tensor:
    """Return ``value`` if it is a dense (strided) tensor, else raise TypeError."""
    if not isinstance(value, torch.Tensor):
        fail(argument, "be a tensor", describe(value), error=TypeError)
    if value.is_nested:
        fail(argument, "be a dense (strided) tensor", describe(value), "Call .to_padded_tensor(0.0) first.", TypeError)
    if value.layout is not torch.strided:
        fail(argument, "be a dense (strided) tensor", value.layout, "Call .to_dense() first.", TypeError)
    return value


def floating(argument: str, value: object) -> torch.Tensor:
    """Return ``value`` if it is a strided tensor of a dtype that the ops read, else raise TypeError."""
    if isinstance(value, torch.Tensor) and value.dtype not in FLOATING:
        fail(argument, "be float32, float64, float16 or bfloat16", value.dtype, "Convert it first.", TypeError)
    checked = tensor(argument, value)
    if not torch.compiler.is_compiling() and checked.is_neg():
        fail(argument, "hold its values as they are", "a view with the negative bit set", "Call .resolve_neg() first.")
    return checked


def abstract(value: object) -> bool:
    """Whether ``value`` is a tensor without data: on the meta device, or fake as under torch.compile."""
    return isinstance(value, torch.Tensor) and (value.is_meta or isinstance(value, FakeTensor))


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` holds float64 tensors."""
    return device.type != "mps"


def float64_device(device: torch.device) -> torch.device:
    """Return where the float64 tensors of a call on ``device`` are: there, or on the host, for MPS has none.

    Move first and convert then: in one `.to` MPS would convert.
    """
    return device if has_float64(device) else torch.device("cpu")


def double(value: Any) -> torch.Tensor:
    """Return numbers, or a tensor where it is, in float64; on the host where its device has none."""
    if isinstance(value, torch.Tensor):
        return value.to(float64_device(value.device)).double()
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def values(argument: str, value: torch.Tensor, device: torch.device, rule: str = "be real numbers") -> torch.Tensor:
    """Return a tensor of parameters for a call on ``device``, detached, if it holds numbers that can be read there.

    A lazily negated tensor is resolved: kernels read what lies in memory.
    """
    tensor(argument, value)
    if value.is_complex() or value.dtype == torch.bool:
        fail(argument, rule, value.dtype, error=TypeError)
    if value.is_meta and device.type != "meta":
        fail(argument, "hold values", describe(value), f"Pass it on {device}.")
    return value.detach().resolve_neg()


def boolean(argument: str, value: Any) -> bool:
    """Return ``value`` if it is True or False, else raise TypeError."""
    if type(value) is not bool:
        fail(argument, "be True or False", describe(value), error=TypeError)
    return value


def number(argument: str, value: Any, low: float, high: float, rule: str, remedy: str = "") -> float:
    """Return ``value`` if it is a number in [low, high] (so not NaN), else raise."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        fail(argument, rule, describe(value), remedy, TypeError)
    if not low <= value <= high:
        fail(argument, rule, describe(value), remedy)
    return value


def integer(argument: str, value: Any, low: int, high: int, rule: str, remedy: str = "") -> int:
    """Return ``value`` as an int in [low, high], else raise."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(argument, rule, describe(value), remedy, TypeError)
    if not (low <= value <= high):
        fail(argument, rule, describe(value), remedy)
    return value


def choice(argument: str, value: Any, options: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``options``, else raise."""
    rule = "be one of " + ", ".join(map(repr, options))
    if not isinstance(value, str):
        fail(argument, rule, describe(value), error=TypeError)
    if value not in options:
        fail(argument, rule, repr(value))
    return value
