"""A device that is not there: tensors on "mps" whose memory is the CPU's, as strict as MPS about what it holds.

Inside ``pretended()``, `.to("mps")` and `device="mps"` give them. Float64 is refused, and so is a call that mixes
devices. Our ops are dispatched as torch would, to their MPS implementations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_MAY_MIX = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")
_MPS = torch._C.DispatchKeySet(torch._C.DispatchKey.MPS)


class _Buffer:
    """What a tensor's storage tells: a handle, not an address, and the next handle is 64 bytes further."""

    handles: ClassVar[dict[int, int]] = {}

    def __init__(self, address: int) -> None:
        self.handle = self.handles.setdefault(address, 0x600000 + 64 * len(self.handles))

    def data_ptr(self) -> int:
        return self.handle


class Far(torch.Tensor):
    """A tensor that says it is on "mps"; ``near`` holds its values."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        if near.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        far = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device="mps",
        )
        far.near = near
        return far

    def untyped_storage(self) -> _Buffer:  # type: ignore[override]
        return _Buffer(self.near.untyped_storage().data_ptr())

    def data_ptr(self) -> int:
        return self.untyped_storage().data_ptr() + self.storage_offset() * self.element_size()

    def tolist(self) -> Any:
        return self.near.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.near!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    """Sees the calls that make tensors, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {}, self)


def _call(func: Any, args: Any, kwargs: dict[str, Any], mode: _Device | None = None) -> Any:
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    far = [x for x in given if isinstance(x, Far)]
    with mode or nullcontext():
        if far and func.namespace == "prosocial_ext":
            return func.redispatch(_MPS, *args, **kwargs)
        if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
            return parts
    name = func.__name__.split(".")[0]
    if far and name not in _MAY_MIX and any(x.dim() and not isinstance(x, Far) for x in given):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device")
    if far and "index_put" in name and args[2].dim() and not isinstance(args[2], Far):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device")
    to = args[0].dtype if name == "copy_" else kwargs.get("dtype")
    if name in ("copy_", "_to_copy") and isinstance(args[name == "copy_"], Far) and to == torch.float64:
        raise TypeError("MPS has no float64 to convert to before it copies: move first")
    device = kwargs.get("device")
    wanted = bool(far) if device is None else torch.device(device).type == "mps"
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    near = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, kwargs))
    written = {id(x.near): x for x in far}

    def home(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return written[id(x)] if id(x) in written else Far(x) if wanted else x

    return tree_map(home, func(*near[0], **near[1]))


def _move(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    dtype = dtype or tensor.dtype
    if (tensor.device, tensor.dtype) == (device, dtype):
        return tensor
    return torch.ops.aten._to_copy.default(tensor, dtype=dtype, device=device)


class _Moves(TorchFunctionMode):
    """`Tensor.to` and `torch.tensor` ask for the real device before anything is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "mps":
            return _move(func(*args, **{**kwargs, "device": "cpu"}), torch.device("mps"))
        if func is torch.Tensor.to and not isinstance(args[1] if len(args) > 1 else None, torch.Tensor):
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **{k: v for k, v in kwargs.items() if k != "copy"})
            if device is not None and device.type == "mps":
                return _move(args[0], device, dtype)
        return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Make the device for a while."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter that is moved must become ours
    try:
        with _Moves(), _Device():
            yield torch.device("mps")
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
