"""Gradient surgery (PCGrad) in Gram space: two passes over the gradients, whatever conflicts (csrc/cpu/projection.cpp).

The definition, the checks and the docstrings' source are in `prosocial_ext.reference.projection`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch

from prosocial_ext import _C
from prosocial_ext.ops import _cuda, _cuda_projection, _gram_stats, _native
from prosocial_ext.ops._library import passes_autograd, register
from prosocial_ext.reference import check
from prosocial_ext.reference import projection as reference
from prosocial_ext.reference.projection import Form, Gradients
from prosocial_ext.reference.results import ProjectionStats

__all__ = ["gradient_gram", "project_conflicts"]

_MODE = {"given": 0, "fixed": 1, "random": 2}  # pse::ProjectionOrder
_BLOCK = _C.projection_block()


def gradient_gram(grads: Gradients) -> torch.Tensor:
    """Return all dot products of k gradients, the Gram matrix G G^T, in float64.

    The bits are the same for every thread count and instruction set: products are exact for inputs of 32 bits or fewer,
    and partial sums belong to fixed blocks of each tensor. Non-contiguous tensors are copied first.

    Args:
        grads: [..., k, N], or a sequence of k sequences of tensors (tensor t of each has one shape, dtype and device;
            both may differ between tensors), or a sequence of k tensors. float32, float64, float16, bfloat16.

    Returns:
        [..., k, k] float64 (on the CPU for MPS, which has none), symmetric, detached. A NaN or infinity shows in its
        row and column; nothing raises for it.

    Raises:
        TypeError, ValueError: ``grads`` is not of this form.

    >>> gradient_gram(torch.tensor([[3.0, 4.0], [-4.0, 3.0], [-1.0, 0.0]]))
    tensor([[25.,  0., -3.],
            [ 0., 25.,  4.],
            [-3.,  4.,  1.]], dtype=torch.float64)
    """
    form = reference.check_grads(grads)
    if form.dense is not None:
        return _gram(form.dense.detach())
    return _gram_lists(_flat(form), form.k)


def project_conflicts(
    grads: Gradients,
    *,
    weights: torch.Tensor | Sequence[float] | None = None,
    reduction: str = "sum",
    order: str | torch.Tensor = "random",
    seed: int = 0,
    return_stats: bool = False,
) -> torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor | list[torch.Tensor], ProjectionStats]:
    """Return the weighted sum of k gradients after each has dropped what opposes another (PCGrad).

    For each i: v = g_i; for j in i's order: c = v . g_j; if c < 0: v <- v - c / (g_j . g_j) g_j. The result is
    sum_i w_i v_i. Here all dot products come from the Gram matrix: 2kN elements are read and N written, whatever
    conflicts. Same bits for every thread count and instruction set; within 1e-5 of the sum of the gradients' norms of
    the reference, before rounding to the gradients' dtype. Non-contiguous tensors are copied first.

    Args:
        grads: [..., k, N], or a sequence of k sequences of tensors (tensor t of each has one shape, dtype and device;
            both may differ between tensors), or a sequence of k tensors. float32, float64, float16, bfloat16. Each
            sequence is projected as one long vector.
        weights: [k] or [..., k], finite, >= 0, applied after projection; None is all ones. An objective of weight
            exactly 0 takes no part: it is neither projected nor projected against, and may even be non-finite.
        reduction: "sum", or "mean": the weighted sum divided by k.
        order: "random" (each objective draws a permutation of the others), "fixed" (0 .. k - 1), or an integer tensor
            [k, k - 1] (row i: a permutation of the others) or [k, k] (row i: of all; i itself is skipped).
        seed: of the random orders, in [0, 2**63). Group 0 of a batch equals the unbatched call.
        return_stats: also return what was found.

    Returns:
        [..., N], or for a sequence a list of tensors shaped as one of its k members; detached. With ``return_stats``
        the pair of that and a `ProjectionStats`.

    Raises:
        TypeError, ValueError: an argument is not of this form, or a gradient or weight on the CPU or MPS is not finite
            (on other devices the output is NaN and ``ProjectionStats.finite`` False).
        RuntimeError: a CUDA graph is being captured, and an explicit order on the device is to be read, or the
            reference to run, as it does there for more than 256 objectives. Nothing else waits for the device.

    >>> project_conflicts(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))  # [0.5, 0.5] + [0, 1]
    tensor([0.5000, 1.5000])
    """
    form = reference.check_grads(grads)
    weights = reference.check_weights(weights, form)
    mode, given = reference.check_order(order, form)
    check.choice("reduction", reduction, ("sum", "mean"))
    check.boolean("return_stats", return_stats)
    check.integer("seed", seed, 0, 2**63 - 1, "be an integer in [0, 2**63)")
    knobs = (weights, given, mode, seed, reduction, return_stats)
    out: torch.Tensor | list[torch.Tensor]
    if form.dense is not None:
        out, stats = _project(form.dense.detach(), *knobs)
    else:
        out, stats = _project_lists(_flat(form), form.k, form.nested, *knobs)
    return (out, ProjectionStats(*stats)) if return_stats else out


def _flat(form: Form) -> list[torch.Tensor]:
    return [t.detach() for t in chain.from_iterable(form.lists)]


# ---- the kernels


class _Lists(NamedTuple):
    """Arrays that describe k lists of tensors to the kernels, and the contiguous tensors behind the addresses."""

    tensors: list[torch.Tensor]
    table: torch.Tensor
    counts: torch.Tensor
    first_block: torch.Tensor
    dtypes: torch.Tensor
    k: int

    @staticmethod
    def of(grads: Sequence[torch.Tensor], k: int) -> _Lists:
        tensors = [t.detach().contiguous() for t in grads]
        first = tensors[: len(tensors) // k]
        blocks = [0]
        for t in first:
            blocks.append(blocks[-1] + -(-t.numel() // _BLOCK))
        first_block = torch.tensor(blocks, dtype=torch.int64, device="cpu")
        return _Lists(tensors, _native.addresses(tensors), _native.element_counts(first), first_block,
                      _native.dtype_tags(first), k)  # fmt: skip

    def arguments(self) -> tuple[int, ...]:
        arrays = (self.table, self.counts, self.first_block, self.dtypes)
        return *(array.data_ptr() for array in arrays), len(self.counts), self.k


class _Buffers:
    """Gram matrix, coefficients and scratch of one call."""

    def __init__(self, groups: int, k: int, blocks: int) -> None:
        self.threads = _native.threads()
        self.gram = torch.empty(groups, k, k, dtype=torch.float64, device="cpu")
        self.projected = torch.empty(groups, k, k, dtype=torch.float64, device="cpu")
        self.combined = torch.empty(groups, k, dtype=torch.float64, device="cpu")
        scratch_bytes = _C.projection_scratch_bytes(groups, k, blocks, self.threads)
        self.scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device="cpu")


def _dense_arguments(grads: torch.Tensor) -> tuple[int, int, int, int, int]:
    k, n = grads.shape[-2:]
    return grads.data_ptr(), math.prod(grads.shape[:-2]), k, n, _native.DTYPE_TAG[grads.dtype]


def _gram_cpu(grads: torch.Tensor) -> torch.Tensor:
    grads = grads.detach().contiguous()
    arguments = _dense_arguments(grads)
    _, groups, k, n, _ = arguments
    buffers = _Buffers(groups, k, -(-n // _BLOCK))
    _C.gram_dense(*arguments, buffers.gram.data_ptr(), buffers.scratch.data_ptr(), buffers.threads)
    return buffers.gram.reshape(grads.shape[:-2] + (k, k))


def _gram_lists_cpu(grads: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    lists = _Lists.of(grads, k)
    buffers = _Buffers(1, k, int(lists.first_block[-1]))
    _C.gram_lists(*lists.arguments(), buffers.gram.data_ptr(), buffers.scratch.data_ptr(), buffers.threads)
    return buffers.gram[0]


def _knob_arguments(
    buffers: _Buffers, weights: torch.Tensor | None, order: torch.Tensor | None, mode: str, seed: int, reduction: str
) -> tuple[int, int, int, int, int, bool, int, int]:
    return (
        buffers.gram.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        0 if order is None else order.data_ptr(),
        seed,
        _MODE[mode],
        reduction == "mean",
        buffers.projected.data_ptr(),
        buffers.combined.data_ptr(),
    )


def _values(
    k: int, weights: torch.Tensor | None, order: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Checked weights, contiguous, and the checked order as [k, k - 1]."""
    if weights is not None:
        weights = weights.detach().contiguous()
        reference.check_weight_values(weights)
    return weights, None if order is None else reference.check_order_values(order, k)


def _stats(form: Form, buffers: _Buffers, weights: torch.Tensor | None) -> list[torch.Tensor]:
    finite = torch.ones(form.groups, dtype=torch.bool, device="cpu")
    return _gram_stats.stats(form, buffers.gram, buffers.projected, weights, finite)


def _project_cpu(
    grads: torch.Tensor,
    weights: torch.Tensor | None,
    order: torch.Tensor | None,
    mode: str,
    seed: int,
    reduction: str,
    stats: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    form = reference.check_grads(grads.detach().contiguous())
    assert form.dense is not None
    weights, order = _values(form.k, weights, order)
    arguments = _dense_arguments(form.dense)
    _, groups, k, n, _ = arguments
    buffers = _Buffers(groups, k, -(-n // _BLOCK))
    out = form.dense.new_empty(form.batch + (n,))
    knobs = _knob_arguments(buffers, weights, order, mode, seed, reduction)
    if not _C.project_dense(*arguments, *knobs, out.data_ptr(), buffers.scratch.data_ptr(), buffers.threads):
        reference.raise_not_finite(form, None if weights is None else weights != 0)
    return out, _stats(form, buffers, weights) if stats else []


def _project_lists_cpu(
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
    lists = _Lists.of(grads, k)
    weights, order = _values(k, weights, order)
    buffers = _Buffers(1, k, int(lists.first_block[-1]))
    out = [torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in lists.tensors[: len(grads) // k]]
    to = _native.addresses(out)
    knobs = _knob_arguments(buffers, weights, order, mode, seed, reduction)
    ends = to.data_ptr(), buffers.scratch.data_ptr(), buffers.threads
    form = _form_of(lists.tensors, k, nested)
    if not _C.project_lists(*lists.arguments(), *knobs, *ends):
        reference.raise_not_finite(form, None if weights is None else weights != 0)
    return out, _stats(form, buffers, weights) if stats else []


# ---- the reference behind the ops, on devices without kernels


def _form_of(grads: Sequence[torch.Tensor], k: int, nested: bool) -> Form:
    count = len(grads) // k
    lists = [list(grads[i * count : (i + 1) * count]) for i in range(k)]
    return Form(None, lists, nested, (), k, grads[0].device)


def _gram_lists_elsewhere(grads: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    return reference.gradient_gram(_form_of(grads, k, True).lists)


def _project_elsewhere(
    grads: torch.Tensor,
    weights: torch.Tensor | None,
    order: torch.Tensor | None,
    mode: str,
    seed: int,
    reduction: str,
    stats: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    if weights is not None:
        weights = weights.reshape(grads.shape[:-1])
    out, found = reference.project_conflicts(
        grads, weights=weights, order=mode if order is None else order, seed=seed, reduction=reduction,
        return_stats=True)  # fmt: skip
    return out, list(vars(found).values()) if stats else []


def _project_lists_elsewhere(
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
    lists = _form_of(grads, k, nested).lists
    out, found = reference.project_conflicts(
        lists if nested else [t for (t,) in lists], weights=None if weights is None else weights[0],
        order=mode if order is None else order, seed=seed, reduction=reduction, return_stats=True)  # fmt: skip
    return out, list(vars(found).values()) if stats else []


# ---- shapes and dtypes


def _double(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return like.new_empty(tuple(shape), dtype=torch.float64, device=check.float64_device(like.device))


def _gram_fake(grads: torch.Tensor) -> torch.Tensor:
    return _double(grads, grads.shape[:-1] + grads.shape[-2:-1])


def _gram_lists_fake(grads: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    return _double(grads[0], (k, k))


def _stats_fake(like: torch.Tensor, batch: Sequence[int], k: int) -> list[torch.Tensor]:
    pairs = (*batch, k, k)
    return [
        _double(like, pairs),
        _double(like, pairs),
        like.new_empty(batch, dtype=torch.int64),
        like.new_empty(batch, dtype=torch.bool),
    ]


def _project_fake(
    grads: torch.Tensor,
    weights: torch.Tensor | None,
    order: torch.Tensor | None,
    mode: str,
    seed: int,
    reduction: str,
    stats: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    batch, (k, n) = grads.shape[:-2], grads.shape[-2:]
    return grads.new_empty((*batch, n)), _stats_fake(grads, batch, k) if stats else []


def _project_lists_fake(
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
    out = [t.new_empty(t.shape) for t in grads[: len(grads) // k]]
    return out, _stats_fake(grads[0], (), k) if stats else []


_gram = register("gradient_gram(Tensor grads) -> Tensor", cpu=_gram_cpu, elsewhere=reference.gradient_gram,
                 fake=_gram_fake, cuda=_cuda_projection.gram if _cuda.compiled() else None)  # fmt: skip
_gram_lists = register("gradient_gram_lists(Tensor[] grads, int k) -> Tensor", cpu=_gram_lists_cpu,
                       elsewhere=_gram_lists_elsewhere, fake=_gram_lists_fake,
                       cuda=_cuda_projection.gram_lists if _cuda.compiled() else None)  # fmt: skip
_KNOBS = "Tensor? weights, Tensor? order, str mode, SymInt seed, str reduction, bool stats"
_project = register(f"project_conflicts(Tensor grads, {_KNOBS}) -> (Tensor, Tensor[])", cpu=_project_cpu,
                    elsewhere=_project_elsewhere, fake=_project_fake,
                    cuda=_cuda_projection.project if _cuda.compiled() else None)  # fmt: skip
_project_lists = register(
    f"project_conflicts_lists(Tensor[] grads, int k, bool nested, {_KNOBS}) -> (Tensor[], Tensor[])",
    cpu=_project_lists_cpu,
    elsewhere=_project_lists_elsewhere,
    fake=_project_lists_fake,
    cuda=_cuda_projection.project_lists if _cuda.compiled() else None,
)
passes_autograd("gradient_gram", "gradient_gram_lists", "project_conflicts", "project_conflicts_lists")
