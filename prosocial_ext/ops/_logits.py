"""How logits cross the border to the sampling kernels of any device: where they lie, never copied where avoidable."""

from __future__ import annotations

import torch

from prosocial_ext.ops import _native

View = tuple[int, int, int, int]
_NO_GUIDE: View = (0, 0, 0, 0)


def unit_columns(logits: torch.Tensor) -> torch.Tensor:
    """Any row and guide stride is read as it is; columns must be neighbours."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def view(logits: torch.Tensor | None) -> tuple[View, int]:
    """(address, dtype tag, guide stride, row stride) of logits with unit columns, and the number of guides."""
    if logits is None:
        return _NO_GUIDE, 0
    stacked = logits.dim() == 3
    stride = logits.stride()
    place = logits.data_ptr(), _native.DTYPE_TAG[logits.dtype], stride[0] if stacked else 0, stride[-2]
    return place, logits.shape[0] if stacked else 1
