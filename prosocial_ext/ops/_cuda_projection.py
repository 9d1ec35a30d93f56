"""Gradient surgery on CUDA tensors: what the launches of csrc/cuda/projection.cu need, and no wait for any of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from prosocial_ext.ops import _cuda, _gram_stats, _native
from prosocial_ext.reference import projection as reference
from prosocial_ext.reference.projection import Form

__all__ = ["gram", "gram_lists", "project", "project_lists"]

_MODE = {"given": 0, "fixed": 1, "random": 2}  # pse::ProjectionOrder

gram_path = 0  # pse::cuda::GramPath; the tests take each in turn


class _Call:
    """One call's arguments for the launchers, and the tensors behind their addresses.

    Whatever is freed after the launches goes back to the allocator of the stream that runs them, so nothing waits.
    """

    def __init__(self, groups: int, k: int, blocks: int, like: torch.Tensor) -> None:
        self.like = like
        self.kept: list[torch.Tensor] = []
        self.arguments: Any = _cuda.launchers.ProjectionCall()
        self.gram = self.new((groups, k, k), torch.float64)
        scratch = self.new((_cuda.launchers.projection_scratch_bytes(groups, k, blocks),), torch.uint8)
        self.set(groups=groups, k=k, blocks=blocks, gram=self.gram, scratch=scratch, path=gram_path)

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor on the call's device."""
        return torch.empty(shape, dtype=dtype, device=self.like.device)

    def set(self, **fields: Any) -> None:
        """Fill in fields of the arguments; a tensor stands for its address and is kept."""
        for name, value in fields.items():
            if isinstance(value, torch.Tensor):
                self.kept.append(value)
                value = value.data_ptr()
            setattr(self.arguments, name, value)

    def on_device(self, words: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``words``, which are on the CPU and have 8 bytes each.

        They travel as kernel arguments: a copy from pageable memory would wait for the stream, one from pinned memory
        would have to outlive every replay of a graph, and some versions of torch cannot pin memory during a capture
        (pytorch#146924).
        """
        there = self.new(words.shape, words.dtype)
        self.launch("projection_table", words.data_ptr(), words.numel(), there.data_ptr())
        return there

    def rows_on_device(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``rows`` [groups, k]; what all groups have in common travels once."""
        own = rows if rows.stride(0) else rows[:1]
        return self.on_device(own.contiguous()).expand_as(rows).contiguous()

    def launch(self, name: str, *arguments: Any) -> None:
        """Call a launcher on torch's current stream."""
        _cuda.checked(getattr(_cuda.launchers, name)(*arguments, *_cuda.target(self.like)))


def _elsewhere() -> ModuleType:
    """Return the module that runs the reference, for more objectives than the kernels take."""
    from prosocial_ext.ops import projection  # which imports this one

    return projection


def _blocks(count: int) -> int:
    return -(-count // int(_cuda.launchers.projection_block))


def _dense(grads: torch.Tensor) -> _Call:
    grads = grads.detach().contiguous()
    k, n = grads.shape[-2:]
    call = _Call(math.prod(grads.shape[:-2]), k, _blocks(n), grads)
    call.set(grads=grads, n=n, dtype=_native.DTYPE_TAG[grads.dtype])
    return call


def _lists(grads: Sequence[torch.Tensor], k: int, out: Sequence[torch.Tensor] | None = None) -> _Call:
    tensors = [t.detach().contiguous() for t in grads]
    first = tensors[: len(tensors) // k]
    first_block = [0]
    for t in first:
        first_block.append(first_block[-1] + _blocks(t.numel()))
    addresses = [t.data_ptr() for t in (*tensors, *(first if out is None else out))]
    counts, tags = [t.numel() for t in first], [_native.DTYPE_TAG[t.dtype] for t in first]
    call = _Call(1, k, first_block[-1], tensors[0])
    call.kept += tensors
    words = torch.tensor(addresses + counts + tags + first_block, dtype=torch.int64, device="cpu")
    call.set(table=call.on_device(words), tensors=len(first))
    return call


def gram(grads: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrices of [..., k, N]."""
    k = grads.shape[-2]
    if k > _cuda.launchers.projection_most_objectives:
        return reference.gradient_gram(grads)  # a tensor, since grads is one
    call = _dense(grads)
    call.launch("gram", call.arguments)
    return call.gram.reshape(grads.shape[:-2] + (k, k))


def gram_lists(grads: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """Return the Gram matrix of k lists of tensors, given one after the other."""
    if k > _cuda.launchers.projection_most_objectives:
        return _elsewhere()._gram_lists_elsewhere(grads, k)
    call = _lists(grads, k)
    call.launch("gram", call.arguments)
    return call.gram[0]


def _run(
    call: _Call,
    form: Form,
    weights: torch.Tensor | None,
    order: torch.Tensor | None,
    mode: str,
    seed: int,
    reduction: str,
    stats: bool,
) -> list[torch.Tensor]:
    """Launch the projection into the output that ``call`` has; return the statistics."""
    groups, k = form.groups, form.k
    projected, finite = call.new((groups, k, k), torch.float64), call.new((groups,), torch.bool)
    call.set(projected=projected, finite=finite, mode=_MODE[mode], seed=seed, mean=reduction == "mean")
    if weights is not None:
        reference.check_weight_values(weights)
        weights = weights.detach()
        weights = weights.contiguous() if weights.device == call.like.device else call.rows_on_device(weights)
        call.set(weights=weights)
    if order is not None and k > 1:
        what = "project_conflicts reads an order on the device back"
        _cuda.refuse_capture(order.is_cuda, what, "Pass it on the CPU, or order='random' or 'fixed'.")
        others = reference.check_order_values(order, k).flatten()
        packed = torch.zeros(-(-others.numel() // 4) * 4, dtype=torch.int16, device="cpu")
        packed[: others.numel()] = others
        call.set(order=call.on_device(packed.view(torch.int64)))
    call.launch("project", call.arguments)
    return _gram_stats.stats(form, call.gram, projected, weights, finite) if stats else []


def _refuse_capture_of_reference(like: torch.Tensor, k: int) -> None:
    most = _cuda.launchers.projection_most_objectives
    what = f"project_conflicts of {k} objectives runs the reference, which waits for the device"
    _cuda.refuse_capture(like.is_cuda, what, f"Pass at most {most}, or project before the capture.")


def project(
    grads: torch.Tensor,
    weights: torch.Tensor | None,
    order: torch.Tensor | None,
    mode: str,
    seed: int,
    reduction: str,
    stats: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Project the gradients [..., k, N]. Up to 256 nothing is read back but an explicit order on the device."""
    k = grads.shape[-2]
    if k > _cuda.launchers.projection_most_objectives:
        _refuse_capture_of_reference(grads, k)
        return _elsewhere()._project_elsewhere(grads, weights, order, mode, seed, reduction, stats)
    call = _dense(grads)
    form = Form(None, [], False, tuple(grads.shape[:-2]), k, grads.device)
    out = call.new((*grads.shape[:-2], grads.shape[-1]), grads.dtype)
    call.set(out=out)
    return out, _run(call, form, weights, order, mode, seed, reduction, stats)


def project_lists(
    grads: Sequence[torch.Tensor],
    k: int,
    nested: bool,
    weights: torch.Tensor | None,
    order: torch.Tensor | None,
    mode: str,
    seed: int,
    reduction: str,
    stats: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Project k lists of tensors, given one after the other, each list as one long vector."""
    if k > _cuda.launchers.projection_most_objectives:
        _refuse_capture_of_reference(grads[0], k)
        return _elsewhere()._project_lists_elsewhere(grads, k, nested, weights, order, mode, seed, reduction, stats)
    out = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in grads[: len(grads) // k]]
    call = _lists(grads, k, out)
    form = Form(None, [], nested, (), k, grads[0].device)
    return out, _run(call, form, weights, order, mode, seed, reduction, stats)
