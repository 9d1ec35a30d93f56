"""Top-m on CUDA kernels: csrc/cuda/topm.cu and topm_sparse.cu tell how. Arguments and results as on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prosocial_ext.ops import _cuda, _native
from prosocial_ext.ops._in_place import copy_back, may_edit_while_looking
from prosocial_ext.reference import topm as _definition
from prosocial_ext.reference.flags import MISSED
from prosocial_ext.reference.results import bump_versions

__all__ = ["select_cuda", "sparse_cuda", "subtract_cuda"]

CHUNK = 1 << 14  # elements per task
BLOCKS = 32  # per multiprocessor, in a pass over the data: about five waves, so that the last one is short


def subtract_cuda(
    params: Sequence[Tensor],
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    importance: Sequence[Tensor],
    m: Sequence[int],
    per_tensor: bool,
    scale: float,
    check_finite: bool = True,
    undo: bool = False,
    hooks: int = 0,
) -> tuple[Tensor, ...]:
    """Implement ``topm_subtract_`` on CUDA; ``hooks`` are pse::TopmHook (tests).

    Synchronises where ``check_finite`` is True, and not otherwise.
    """
    if check_finite:
        what = "topm_subtract_ with check_finite=True reads a flag back"
        _cuda.refuse_capture(params[0].is_cuda, what, "Pass check_finite=False.")
    size = sum(m) if undo else 0
    one_pass = size > 0 or (not check_finite and may_edit_while_looking(params, base, tuned, scale))
    prepared = _Prepared(params, base, tuned, importance, m, per_tensor, scale, one_pass=one_pass, hooks=hooks)
    bits = _definition.bits_dtype([p.dtype for p in params])
    record = prepared.record(size, bits)
    prepared.settle()
    if check_finite:
        prepared.refuse_nonfinite()
    if size or not one_pass:
        prepared.apply()
    copy_back(params, prepared.written)
    bump_versions(params)
    return prepared.threshold, prepared.kept, prepared.unchanged, prepared.nonfinite, *record


def select_cuda(
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    importance: Sequence[Tensor],
    m: Sequence[int],
    per_tensor: bool = False,
    hooks: int = 0,
) -> tuple[Tensor, ...]:
    """Implement ``topm_select`` on CUDA. Synchronises: a selection has exactly m entries, or is refused."""
    _cuda.refuse_capture(base[0].is_cuda, "topm_select reads a flag back", "Select before the capture.")
    prepared = _Prepared(None, base, tuned, importance, m, per_tensor, 1.0, one_pass=False, hooks=hooks)
    indices, values = prepared.record(sum(m), prepared.threshold.dtype)
    prepared.settle()
    prepared.refuse_nonfinite()
    prepared.apply()
    return indices, values, prepared.kept, prepared.threshold


def sparse_cuda(
    params: Sequence[Tensor],
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    wide: Sequence[bool],
    scale: float,
    undo: bool = False,
) -> tuple[Tensor, ...]:
    """Implement ``sparse_subtract_`` on CUDA. A damaged delta writes nothing and is flagged in ``unchanged``."""
    indices, values, counts = indices.contiguous(), values.contiguous(), counts.contiguous()
    written = [p.contiguous() for p in params]
    first, rows = 0, []
    for param, is_wide in zip(written, wide, strict=True):
        tag = _native.DTYPE_TAG[torch.float64 if is_wide else torch.float32]
        rows.append((param.data_ptr(), 0, 0, 0, _native.DTYPE_TAG[param.dtype], tag, tag, -1, param.numel(), first))
        first += param.numel()
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    like = written[0]
    unchanged = _empty(like, len(params), torch.int64)
    size = indices.numel() if undo else 0
    undo_indices = _empty(like, size, torch.int64)
    undo_bits = _empty(like, size, _definition.bits_dtype([p.dtype for p in params]))
    call = _cuda.launchers.SparseCall()
    call.tensors, call.num_tensors, call.scale = table.data_ptr(), len(params), scale
    call.counts, call.indices, call.values = counts.data_ptr(), indices.data_ptr(), values.data_ptr()
    call.values_wide, call.size, call.unchanged = values.dtype == torch.float64, indices.numel(), unchanged.data_ptr()
    call.blocks = _blocks(params[0])
    if size:
        call.undo_indices, call.undo_bits = undo_indices.data_ptr(), undo_bits.data_ptr()
        call.bits_bytes = undo_bits.element_size()
    scratch = _empty(like, _cuda.launchers.sparse_scratch_bytes(call), torch.uint8)
    call.scratch = scratch.data_ptr()
    _cuda.checked(_cuda.launchers.sparse_subtract(call, *_cuda.target(params[0])))
    copy_back(params, written)
    bump_versions(params)
    return unchanged, undo_indices, undo_bits


class _Prepared:
    """A filled `TopmCall` of csrc/cuda/topm.h, its outputs, and everything that it points to."""

    def __init__(
        self,
        params: Sequence[Tensor] | None,
        base: Sequence[Tensor],
        tuned: Sequence[Tensor],
        importance: Sequence[Tensor],
        m: Sequence[int],
        per_tensor: bool,
        scale: float,
        *,
        one_pass: bool,
        hooks: int,
    ) -> None:
        self.params = params
        self.base, self.tuned, importance = ([t.contiguous() for t in ts] for ts in (base, tuned, importance))
        self.written = self.base if params is None else [p.contiguous() for p in params]
        tag, first, rows = _native.DTYPE_TAG, 0, []
        for i, (p, b, t) in enumerate(zip(self.written, self.base, self.tuned, strict=True)):
            weight = importance[i] if importance else None
            addresses = (p.data_ptr(), b.data_ptr(), t.data_ptr(), 0 if weight is None else weight.data_ptr())
            tags = (tag[p.dtype], tag[b.dtype], tag[t.dtype], -1 if weight is None else tag[weight.dtype])
            rows.append((*addresses, *tags, p.numel(), first))
            first += p.numel()
        self.table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.m = torch.tensor(list(m), dtype=torch.int64, device="cpu")
        self.importance = importance
        wide = any(t.dtype == torch.float64 for ts in (self.written, self.base, self.tuned) for t in ts)
        n, like = len(self.base), self.base[0]
        self.threshold = _empty(like, n, torch.float64 if wide else torch.float32)
        self.kept, self.unchanged, self.nonfinite = (_empty(like, n, torch.int64) for _ in range(3))
        call = _cuda.launchers.TopmCall()
        call.tensors, call.num_tensors = self.table.data_ptr(), n
        call.m, call.per_tensor = self.m.data_ptr(), per_tensor
        call.scale, call.wide, call.one_pass, call.select = scale, wide, one_pass, params is None
        call.hooks, call.chunk, call.blocks = hooks, CHUNK, _blocks(self.base[0])
        call.threshold, call.kept = self.threshold.data_ptr(), self.kept.data_ptr()
        call.unchanged, call.nonfinite = self.unchanged.data_ptr(), self.nonfinite.data_ptr()
        self.call = call

    def record(self, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Make room for ``size`` indices and values, which are then written in order."""
        indices, values = _empty(self.base[0], size, torch.int64), _empty(self.base[0], size, dtype)
        if size:
            self.call.indices, self.call.values = indices.data_ptr(), values.data_ptr()
            self.call.value_bytes, self.call.record = values.element_size(), size
        return indices, values

    def settle(self) -> None:
        """Find what is selected, in scratch of this call's own."""
        self.scratch = _empty(self.base[0], _cuda.launchers.topm_scratch_bytes(self.call), torch.uint8)
        self.call.scratch = self.scratch.data_ptr()
        _cuda.checked(_cuda.launchers.topm_settle(self.call, *_cuda.target(self.base[0])))

    def apply(self) -> None:
        """Edit or list what `settle` has found."""
        _cuda.checked(_cuda.launchers.topm_apply(self.call, *_cuda.target(self.base[0])))

    def refuse_nonfinite(self) -> None:
        """Read the counts back, and raise for the first tensor with entries that cannot be ranked.

        What `settle` has edited is put back before that, and before anything that ends the wait, such as Ctrl-C.
        """
        counts: list[int] = []
        try:
            counts = self.nonfinite.tolist()
        finally:
            if self.call.one_pass and (not counts or any(counts)):
                _cuda.checked(_cuda.launchers.topm_restore(self.call, *_cuda.target(self.base[0])))
        if any(count < 0 for count in counts):
            raise RuntimeError(MISSED)
        for i, count in enumerate(counts):
            if count == 0:
                continue
            b, t = self.base[i], self.tuned[i]
            dtypes = [b.dtype, t.dtype] + ([] if self.params is None else [self.params[i].dtype])
            real = torch.float64 if torch.float64 in dtypes else torch.float32
            _definition.refuse_nonfinite(i, count, bool((t.to(real) - b.to(real)).isfinite().all()))


def _empty(like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """All memory of outputs and scratch: of any content, since the kernels write before they read (tests poison it)."""
    return like.new_empty(size, dtype=dtype)


def _blocks(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 4 * BLOCKS
    return BLOCKS * int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)
