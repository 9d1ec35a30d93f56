"""Registration with torch.library: define, implement per device, fake kernel (design D3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from prosocial_ext.ops import _backend
from prosocial_ext.ops._host import on_host

LIBRARY = torch.library.Library("prosocial_ext", "DEF")


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    elsewhere: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> Any:
    """Register one op and return its default overload, which is what callers hold (the packet costs 0.2 us a call).

    The dispatcher strips trailing arguments equal to the schema's defaults before it calls an implementation, so every
    implementation repeats those defaults. ``elsewhere`` is the reference: it runs on every device without a kernel
    (XPU, HPU...), and inside ``ops.backend("reference")`` on all of them, so that this works in compiled graphs too.
    MPS has no float64, which the reference computes in: there both run on the host.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for kernel, device in ((cpu, "CPU"), (cuda, "CUDA")):
        if kernel is not None:
            LIBRARY.impl(name, _unless_reference(kernel, elsewhere), device)
    LIBRARY.impl(name, on_host(_unless_reference(cpu, elsewhere), writes="(a!)" in schema), "MPS")
    LIBRARY.impl(name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prosocial_ext::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.prosocial_ext, name).default


def passes_autograd(*names: str) -> None:
    """Let autograd pass by ops whose results are detached by definition, in-place ones included."""
    for name in names:
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


def _unless_reference(kernel: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    def implementation(*args: Any) -> Any:
        return elsewhere(*args) if _backend.use_reference else kernel(*args)

    return implementation
