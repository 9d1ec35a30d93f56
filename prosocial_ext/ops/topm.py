"""Top-m on compiled kernels: csrc/cpu/topm.cpp tells how. Arguments and results are those of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prosocial_ext import _C
from prosocial_ext import reference as _reference
from prosocial_ext.ops import _cuda, _cuda_topm, _native
from prosocial_ext.ops._in_place import copy_back, may_edit_while_looking
from prosocial_ext.ops._library import passes_autograd, register
from prosocial_ext.reference import SparseDelta, TopmEdit, check
from prosocial_ext.reference import topm as _definition
from prosocial_ext.reference.flags import MISSED
from prosocial_ext.reference.results import bump_versions
from prosocial_ext.reference.topm import Tensors

__all__ = ["sparse_subtract_", "topm_select", "topm_subtract_"]

_NOT_FINITE, _SPOILT = 1, 2  # pse::TopmStatus


def topm_subtract_(
    params: Tensors,
    base: Tensors,
    tuned: Tensors,
    *,
    m: int | None = None,
    density: float | None = None,
    scale: float = 1.0,
    scope: str = "global",
    importance: Tensors | None = None,
    undo: bool = False,
    check_finite: bool = True,
) -> TopmEdit:
    """Subtract ``scale`` times the m largest entries of tuned - base from params (full text: the reference)."""
    call = _definition.prepare(params, base, tuned, m, density, scope, importance)
    outputs = _SUBTRACT(
        call.params,
        call.base,
        call.tuned,
        call.importance,
        call.m,
        call.per_tensor,
        _definition.check_scale(scale),
        check.boolean("check_finite", check_finite),
        check.boolean("undo", undo),
    )
    return _definition.edit_result(call, undo, outputs)


def topm_select(
    base: Tensors,
    tuned: Tensors,
    *,
    m: int | None = None,
    density: float | None = None,
    scope: str = "global",
    importance: Tensors | None = None,
) -> SparseDelta:
    """Return the m largest entries of tuned - base (full text: the reference)."""
    call = _definition.prepare(None, base, tuned, m, density, scope, importance, selecting=True)
    return _definition.select_result(call, _SELECT(call.base, call.tuned, call.importance, call.m, call.per_tensor))


def sparse_subtract_(params: Tensors, delta: SparseDelta, *, scale: float = 1.0, undo: bool = False) -> TopmEdit:
    """Subtract ``scale`` times a ``SparseDelta`` from params (full text: the reference)."""
    tensors = _definition.prepare_sparse(params, delta)
    wide = [dtype == torch.float64 for dtype in delta.dtypes]
    scale, undo = _definition.check_scale(scale), check.boolean("undo", undo)
    outputs = _SPARSE(tensors, delta.indices, delta.values, delta.counts, wide, scale, undo)
    return _definition.sparse_result(tensors, delta, undo, *outputs)


for _op in (topm_subtract_, topm_select, sparse_subtract_):
    _op.__doc__ = getattr(_reference, _op.__name__).__doc__


# ---- the border to csrc/cpu/topm.h


class Prepared:
    """A filled `_C.TopmCall` and everything that it points to. ``params`` are row-major."""

    def __init__(
        self,
        params: Sequence[Tensor] | None,
        base: Sequence[Tensor],
        tuned: Sequence[Tensor],
        importance: Sequence[Tensor],
        m: Sequence[int] | None = None,
        *,
        per_tensor: bool = False,
        scale: float = 1.0,
        check_finite: bool = True,
        one_pass: bool = False,
        wide: bool | None = None,
        hooks: int = 0,
    ) -> None:
        self.params = None if params is None else [p.contiguous() for p in params]
        self.sources = [[t.contiguous() for t in tensors] for tensors in (base, tuned, importance)]
        base, tuned, importance = self.sources
        n, first, rows = len(base), 0, []
        leaders = base if self.params is None else self.params
        tag = _native.DTYPE_TAG
        for i, (leader, b, t) in enumerate(zip(leaders, base, tuned, strict=True)):
            weight = importance[i] if importance else None
            rows.append(
                (
                    leader.data_ptr(),
                    b.data_ptr(),
                    t.data_ptr(),
                    0 if weight is None else weight.data_ptr(),
                    tag[leader.dtype],
                    tag[b.dtype],
                    tag[t.dtype],
                    -1 if weight is None else tag[weight.dtype],
                    leader.numel(),
                    first,
                )
            )
            first += leader.numel()
        self.table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.m = None if m is None else torch.tensor(m, dtype=torch.int64, device="cpu")
        if wide is None:
            wide = any(t.dtype == torch.float64 for tensors in (leaders, base, tuned) for t in tensors)
        self.threshold = torch.full((n,), torch.inf, dtype=torch.float64 if wide else torch.float32, device="cpu")
        self.kept, self.unchanged, self.nonfinite = (torch.zeros(n, dtype=torch.int64, device="cpu") for _ in range(3))
        call = _C.TopmCall()
        call.tensors, call.num_tensors = self.table.data_ptr(), n
        call.m = 0 if self.m is None else self.m.data_ptr()
        call.per_tensor, call.scale, call.wide, call.hooks = per_tensor, scale, wide, hooks
        call.check_finite, call.one_pass, call.select = check_finite, one_pass, params is None
        call.threshold, call.kept = self.threshold.data_ptr(), self.kept.data_ptr()
        call.unchanged, call.nonfinite = self.unchanged.data_ptr(), self.nonfinite.data_ptr()
        call.threads = _native.threads()
        self.call = call

    def run(self) -> int:
        """Run with scratch of this call's own; return the status."""
        scratch = torch.empty(_C.topm_scratch_bytes(self.call), dtype=torch.uint8, device="cpu")
        self.call.scratch = scratch.data_ptr()
        status: int = _C.topm_run(self.call)
        return status

    def refuse(self) -> None:
        """Raise for the first tensor with entries that cannot be ranked."""
        i = int(self.nonfinite.nonzero()[0])
        base, tuned, _ = self.sources
        dtypes = [base[i].dtype, tuned[i].dtype] + ([] if self.params is None else [self.params[i].dtype])
        real = torch.float64 if torch.float64 in dtypes else torch.float32
        finite = bool((tuned[i].to(real) - base[i].to(real)).isfinite().all())
        _definition.refuse_nonfinite(i, int(self.nonfinite[i]), finite)


def subtract_cpu(
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
    """Implement ``topm_subtract_`` on the CPU; ``hooks`` are pse::TopmHook (tests)."""
    one_pass = not (check_finite or undo) and may_edit_while_looking(params, base, tuned, scale)
    prepared = Prepared(
        params,
        base,
        tuned,
        importance,
        m,
        per_tensor=per_tensor,
        scale=scale,
        check_finite=check_finite,
        one_pass=one_pass,
        hooks=hooks,
    )
    assert prepared.params is not None
    size = sum(m) if undo else 0
    indices = torch.empty(size, dtype=torch.int64, device="cpu")
    bits = torch.empty(size, dtype=_definition.bits_dtype([p.dtype for p in params]), device="cpu")
    if undo:
        prepared.call.indices, prepared.call.values = indices.data_ptr(), bits.data_ptr()
        prepared.call.value_bytes = bits.element_size()
    status = prepared.run()
    if status == _NOT_FINITE:
        prepared.refuse()
    copy_back(params, prepared.params)
    bump_versions(params)
    if status == _SPOILT:
        raise RuntimeError(MISSED)
    if undo:
        kept = int(prepared.kept.sum())
        indices[kept:] = -1
        bits[kept:] = 0
    return prepared.threshold, prepared.kept, prepared.unchanged, prepared.nonfinite, indices, bits


def select_cpu(
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    importance: Sequence[Tensor],
    m: Sequence[int],
    per_tensor: bool = False,
    hooks: int = 0,
) -> tuple[Tensor, ...]:
    """Implement ``topm_select`` on the CPU."""
    prepared = Prepared(None, base, tuned, importance, m, per_tensor=per_tensor, hooks=hooks)
    indices = torch.empty(sum(m), dtype=torch.int64, device="cpu")
    values = torch.empty(sum(m), dtype=prepared.threshold.dtype, device="cpu")
    prepared.call.indices, prepared.call.values = indices.data_ptr(), values.data_ptr()
    prepared.call.value_bytes = values.element_size()
    if prepared.run() == _NOT_FINITE:
        prepared.refuse()
    return indices, values, prepared.kept, prepared.threshold


def sparse_cpu(
    params: Sequence[Tensor],
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    wide: Sequence[bool],
    scale: float,
    undo: bool = False,
) -> tuple[Tensor, ...]:
    """Implement ``sparse_subtract_`` on the CPU."""
    indices, values, counts = indices.contiguous(), values.contiguous(), counts.contiguous()
    worked_on = [p.contiguous() for p in params]
    table = sparse_table(worked_on, counts, indices, wide)
    _definition.check_values(values, counts.tolist())
    unchanged = torch.zeros(len(params), dtype=torch.int64, device="cpu")
    size = indices.numel() if undo else 0
    undo_indices = torch.empty(size, dtype=torch.int64, device="cpu")
    bits = torch.empty(size, dtype=_definition.bits_dtype([p.dtype for p in params]), device="cpu")
    delta_wide = torch.tensor(list(wide), dtype=torch.int64, device="cpu")
    _C.topm_sparse(
        table.data_ptr(),
        len(params),
        counts.data_ptr(),
        indices.data_ptr(),
        values.data_ptr(),
        values.dtype == torch.float64,
        delta_wide.data_ptr(),
        scale,
        unchanged.data_ptr(),
        undo_indices.data_ptr(),
        bits.data_ptr() if size else 0,
        bits.element_size(),
        _native.threads(),
    )
    copy_back(params, worked_on)
    bump_versions(params)
    return unchanged, undo_indices, bits


def sparse_table(params: Sequence[Tensor], counts: Tensor, indices: Tensor, wide: Sequence[bool]) -> Tensor:
    """Check counts and indices on the host, then lay out the table of pse::TopmTensor."""
    _definition.check_counts(params, indices, counts)
    numel = _native.element_counts(params)
    bad = _C.topm_first_bad_index(
        numel.data_ptr(), len(params), counts.data_ptr(), indices.data_ptr(), _native.threads()
    )
    if bad >= 0:
        i = int((counts.cumsum(0) <= bad).sum())
        _definition.refuse_index(i, int(indices[bad]), params[i].numel())
    first, rows = 0, []
    for param, is_wide in zip(params, wide, strict=True):
        tag = _native.DTYPE_TAG[torch.float64 if is_wide else torch.float32]
        rows.append((param.data_ptr(), 0, 0, 0, _native.DTYPE_TAG[param.dtype], tag, tag, -1, param.numel(), first))
        first += param.numel()
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _subtract_fake(
    params: Sequence[Tensor],
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    importance: Sequence[Tensor],
    m: Sequence[int],
    per_tensor: bool,
    scale: float,
    check_finite: bool = True,
    undo: bool = False,
) -> tuple[Tensor, ...]:
    wide = any(t.dtype == torch.float64 for tensors in (params, base, tuned) for t in tensors)
    n, size = len(params), sum(m) if undo else 0
    empty = params[0].new_empty
    return (
        empty(n, dtype=torch.float64 if wide else torch.float32),
        empty(n, dtype=torch.int64),
        empty(n, dtype=torch.int64),
        empty(n, dtype=torch.int64),
        empty(size, dtype=torch.int64),
        empty(size, dtype=_definition.bits_dtype([p.dtype for p in params])),
    )


def _select_fake(
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    importance: Sequence[Tensor],
    m: Sequence[int],
    per_tensor: bool = False,
) -> tuple[Tensor, ...]:
    wide = any(t.dtype == torch.float64 for tensors in (base, tuned) for t in tensors)
    real = torch.float64 if wide else torch.float32
    empty = base[0].new_empty
    return (
        empty(sum(m), dtype=torch.int64),
        empty(sum(m), dtype=real),
        empty(len(base), dtype=torch.int64),
        empty(len(base), dtype=real),
    )


def _sparse_fake(
    params: Sequence[Tensor],
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    wide: Sequence[bool],
    scale: float,
    undo: bool = False,
) -> tuple[Tensor, ...]:
    size = indices.shape[0] if undo else 0
    empty = params[0].new_empty
    return (
        empty(len(params), dtype=torch.int64),
        empty(size, dtype=torch.int64),
        empty(size, dtype=_definition.bits_dtype([p.dtype for p in params])),
    )


def _with_defaults(core: Any, *defaults: Any) -> Any:
    """The dispatcher strips trailing arguments that equal the schema's defaults; the reference's core has none."""
    full = core.__code__.co_argcount

    def implementation(*args: Any) -> Any:
        missing = full - len(args)
        return core(*args, *defaults[len(defaults) - missing :])

    return implementation


_SUBTRACT = register(
    "topm_subtract_(Tensor(a!)[] params, Tensor[] base, Tensor[] tuned, Tensor[] importance, SymInt[] m, "
    "bool per_tensor, float scale, bool check_finite=True, bool undo=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=subtract_cpu,
    cuda=_cuda_topm.subtract_cuda if _cuda.compiled() else None,
    elsewhere=_with_defaults(_definition.subtract_core, True, False),
    fake=_subtract_fake,
)
_SELECT = register(
    "topm_select(Tensor[] base, Tensor[] tuned, Tensor[] importance, SymInt[] m, bool per_tensor=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cpu=select_cpu,
    cuda=_cuda_topm.select_cuda if _cuda.compiled() else None,
    elsewhere=_with_defaults(_definition.select_core, False),
    fake=_select_fake,
)
_SPARSE = register(
    "sparse_subtract_(Tensor(a!)[] params, Tensor indices, Tensor values, Tensor counts, bool[] wide, float scale, "
    "bool undo=False) -> (Tensor, Tensor, Tensor)",
    cpu=sparse_cpu,
    cuda=_cuda_topm.sparse_cuda if _cuda.compiled() else None,
    elsewhere=_with_defaults(_definition.sparse_core, False),
    fake=_sparse_fake,
)
passes_autograd("topm_subtract_", "topm_select", "sparse_subtract_")
