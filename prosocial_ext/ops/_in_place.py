"""What edits in place need on every device: working copies written back, and when one pass over the data is safe."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prosocial_ext.reference.results import writing

__all__ = ["copy_back", "may_edit_while_looking"]


def copy_back(params: Sequence[Tensor], worked_on: Sequence[Tensor]) -> None:
    """Write row-major working copies back to where they came from."""
    for param, worked in zip(params, worked_on, strict=True):
        if param.data_ptr() != worked.data_ptr():
            with writing(param):
                param.copy_(worked)


def may_edit_while_looking(
    params: Sequence[Tensor], base: Sequence[Tensor], tuned: Sequence[Tensor], scale: float
) -> bool:
    """Whether nothing has to be read again from what a top-m edit has written (csrc/cpu/topm.cpp, Alias)."""

    def among(others: Sequence[Tensor]) -> bool:  # empty tensors all have address 0
        return any(p.numel() and p.data_ptr() == t.data_ptr() for p, t in zip(params, others, strict=True))

    return not (among(tuned) or (scale < 0 and among(base)))
