"""Functions of CPU tensors that run on another device: tensors are copied there, storage by storage, and back."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from tests.asserts import assert_same_bits


class _Move:
    """The storages of one call: what is written there is written here when the call has ended, however it ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.tensors: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def there(self, value: Any) -> Any:
        """The same value with its tensors on the device, as views of one storage where they were that."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.there(part) for part in value)
        if not isinstance(value, torch.Tensor):
            return value
        here = value.untyped_storage()
        if here.data_ptr() not in self.storages:
            there = torch.UntypedStorage(here.nbytes(), device=self.device)
            there.copy_(here)
            self.storages[here.data_ptr()] = here, there
        twin = torch.tensor([], dtype=value.dtype, device=self.device)
        twin.set_(self.storages[here.data_ptr()][1], value.storage_offset(), value.shape, value.stride())
        self.tensors.append((value, twin, twin._version))
        return twin

    def back(self, value: Any) -> Any:
        """A result, on the CPU."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.back(part) for part in value)
        return value.to("cpu") if isinstance(value, torch.Tensor) else value

    def end(self) -> None:
        for here, there in self.storages.values():
            here.copy_(there)
        written = [here for here, there, version in self.tensors if there._version != version]
        torch.autograd.graph.increment_version(written)


def moved(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Run ``function`` on ``device``: it may write its arguments, which lie as they did, and may raise."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        move = _Move(device)
        try:
            there = [move.there(argument) for argument in arguments]
            result = function(*there, **{name: move.there(value) for name, value in options.items()})
            return move.back(result)
        finally:
            move.end()

    return call


def assert_torch_agrees(actual: torch.Tensor, expected: torch.Tensor, what: str = "result") -> None:
    """What torch computes, not the kernels: the same bits on the CPU, nearly the same on a GPU."""
    if os.environ.get("PROSOCIAL_TEST_KERNELS") == "gpu":
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True, msg=what)
    else:
        assert_same_bits(actual, expected, what)
