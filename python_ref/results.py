"""The result classes of the ops, defined once: reference and compiled ops return the very same types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from . import check

__all__ = ["ProjectionStats", "SparseDelta", "TopmEdit", "UndoRecord"]

_INTEGER_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class UndoRecord:
    """What a top-m edit overwrote.

    ``indices``: int64 [m], flat indices in the list, ascending; -1 fills up at the end where fewer than m entries could
    be selected. ``bits``: the original bits, int16, int32 or int64 [m] by the widest dtype of the list. ``shapes`` and
    ``dtypes``: of the params.
    """

    indices: torch.Tensor
    bits: torch.Tensor
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class TopmEdit:
    """What a top-m edit did; every tensor has one entry per param, on the params' device.

    ``threshold``: the score of the last entry selected in the tensor's scope, infinity where none is (float64 where any
    tensor of the call is float64, else float32). ``kept``: entries selected, int64. ``unchanged``: selected, but the
    rounded result equals the original, int64. ``nonfinite``: entries that could not be selected because their delta is
    NaN or Inf (or their importance is not finite and >= 0), int64. ``undo``: the undo record, or None.

    Negative counts are what CUDA can only flag (`raise_if_bad` makes them the CPU's errors). ``nonfinite`` -1:
    `topm_subtract_` missed its bracket, and params are spoilt. ``unchanged`` below 0: `sparse_subtract_` wrote nothing,
    since at this tensor the delta has an index out of range or order (-1), a value that is not finite (-2) or a count
    out of range (-3), or, at the first tensor, its counts do not sum up (-4). Its undo record holds only -1.
    """

    threshold: torch.Tensor
    kept: torch.Tensor
    unchanged: torch.Tensor
    nonfinite: torch.Tensor
    undo: UndoRecord | None = None

    def revert_(self, params: torch.Tensor | Iterable[torch.Tensor]) -> None:
        """Restore every bit that the edit changed. Version counters are bumped as by the edit.

        On CUDA the call waits for the device, and a graph cannot capture it.

        Args:
            params: The params that were edited, or equally shaped ones that hold the same values.

        Raises:
            ValueError: There is no undo record, or number, shapes or dtypes of the params differ from it.
            TypeError: ``params`` is not made of tensors.

        >>> params = torch.tensor([1.0, 2.0])
        >>> from prosocial_ext.reference import topm_subtract_
        >>> edit = topm_subtract_(params, torch.zeros(2), torch.tensor([0.5, 4.0]), m=1, undo=True)
        >>> edit.revert_(params)
        >>> params
        tensor([1., 2.])
        """
        if self.undo is None:
            check.fail("undo", "have been True when the edit was made", False, "There is no record to revert from.")
        record = self.undo
        tensors = tensor_list("params", params)
        check_same_params(tensors, record.shapes, record.dtypes)
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + tensor.numel())
        valid = int((record.indices >= 0).sum())
        indices, bits = record.indices[:valid], record.bits[:valid]
        ends = torch.searchsorted(indices, torch.tensor(starts, device=indices.device)).tolist()
        for i, tensor in enumerate(tensors):
            here = slice(ends[i], ends[i + 1])
            target = tensor.detach()
            flat = target.contiguous().view(-1)
            integers = flat.view(_INTEGER_OF[flat.element_size()])
            place = (indices[here] - starts[i]).to(flat.device)
            with writing(target):
                integers[place] = bits[here].to(flat.device, integers.dtype)
                if not target.is_contiguous():
                    target.copy_(flat.view(target.shape))
        bump_versions(tensors)


def tensor_list(argument: str, value: Any) -> list[torch.Tensor]:
    """A tensor, or an iterable of at least one, as a list of floating tensors."""
    if isinstance(value, torch.Tensor):
        return [check.floating(argument, value)]
    if not isinstance(value, Iterable):
        check.fail(argument, "be a tensor or a sequence of tensors", check.describe(value), error=TypeError)
    tensors = [check.floating(f"{argument}[{i}]", tensor) for i, tensor in enumerate(value)]
    if not tensors:
        check.fail(argument, "have at least one tensor", "none")
    return tensors


def writing(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Where ``tensor`` may be written: inference tensors only in inference mode, all others everywhere."""
    return torch.inference_mode() if tensor.is_inference() else nullcontext()


def bump_versions(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd that the tensors were written, also in inference mode; inference tensors have no version."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def check_same_params(
    params: list[torch.Tensor], shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...] | None
) -> None:
    """Raise unless ``params`` have the recorded number, shapes and (where given) dtypes."""
    if len(params) != len(shapes):
        check.fail("params", f"be the {len(shapes)} tensors that were recorded", f"{len(params)} tensors")
    for i, tensor in enumerate(params):
        if tuple(tensor.shape) != tuple(shapes[i]):
            check.fail(f"params[{i}]", f"have the recorded shape {tuple(shapes[i])}", tuple(tensor.shape))
        if dtypes is not None and tensor.dtype != dtypes[i]:
            check.fail(f"params[{i}]", f"have the recorded dtype {dtypes[i]}", tensor.dtype)


@dataclass(frozen=True)
class SparseDelta:
    """The selected entries of tuned - base.

    ``indices``: int64 [m], flat (row-major) indices inside their tensor, ascending within a tensor, tensor after
    tensor. ``values``: the deltas [m], float64 where any tensor of the call is float64, else float32. ``counts``: int64
    [n], how many entries belong to each tensor. ``threshold``: as in `TopmEdit`. ``shapes``: of the tensors.
    ``dtypes``: what each tensor's deltas were computed in, float32 or float64.
    """

    indices: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor
    threshold: torch.Tensor
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class ProjectionStats:
    """What `project_conflicts` found, for logs, on the gradients' device; ``...`` are their batch dimensions.

    Cosines are float64, on the CPU where the gradients' device is MPS, which has none.

    Attributes:
        cosines: [..., k, k] of the gradients with each other. 0 where a gradient is zero.
        cosines_after: [..., k, k] of projected gradient i with original gradient j. Row i is 0 where less than a
            millionth of the gradient's norm is left: what remains is rounding and points nowhere.
        conflicts: [...] int64, the pairs i < j of negative cosine among the objectives that take part.
        finite: [...] bool. False where a gradient that takes part has a NaN, an infinity or a squared norm beyond
            float64, or a weight is bad: the output there is NaN. Always True on the CPU and MPS, where it is raised.
    """

    cosines: torch.Tensor
    cosines_after: torch.Tensor
    conflicts: torch.Tensor
    finite: torch.Tensor
