"""Top-m: subtract scale * (tuned - base) at the m entries of largest magnitude (arXiv 2512.06515, DIReg).

The harm vector is tuned - base; keeping its m largest entries and subtracting them is the training-free repair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import check
from .results import SparseDelta, TopmEdit, UndoRecord, bump_versions, check_same_params, tensor_list, writing

__all__ = ["sparse_subtract_", "topm_select", "topm_subtract_"]

Tensors = Tensor | Iterable[Tensor]
_INTEGER_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOAT32_MAX = 3.4028234663852886e38
_MOST_TRIES = 10_000  # of `_reaches`, a few milliseconds


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
    """Subtract ``scale * (tuned - base)`` from ``params`` in place, at the entries of largest score only.

    Exactly m entries are edited; equal scores go to the lowest flat index (tensors in the order given, row-major
    inside each, whatever the strides). delta = fl(tuned - base), result = round(fl(params - fl(scale * delta))): one
    fp32 rounding each, never fused; fp64 throughout for a tensor where any of the three is fp64 (16-bit params then by
    way of fp32). The same bits on every device and for every thread count.

    Under torch.compile one tensor given twice is refused as in eager mode, but views that overlap are not noticed. Pass
    the same ``scale`` and ``density`` at every call there: a float makes a graph per value.

    Args:
        params: A tensor or several; float32, float64, float16 or bfloat16; may be ``model.parameters()``. May be
            ``base`` or ``tuned`` themselves.
        base: One tensor per param, of its shape, of any of the dtypes.
        tuned: Likewise.
        m: How many entries, 0 <= m <= N. Exactly one of ``m`` and ``density`` is given.
        density: The fraction instead, 0 < density <= 1: m = floor(density * N).
        scale: What the deltas are multiplied with; rounded to fp32 for all but fp64 tensors.
        scope: "global": m of all entries; "per_tensor": m (or the density) of each tensor.
        importance: One tensor per param (float32, float16 or bfloat16, finite, >= 0): entries are ranked by
            abs(fl(delta * importance)) instead of abs(delta).
        undo: Keep what `TopmEdit.revert_` needs.
        check_finite: Raise, and leave params as they were, if a delta is NaN or Inf; on CUDA the call waits for that,
            and a graph cannot capture it. False leaves such entries out, and waits for nothing.

    Returns:
        A `TopmEdit`; its tensors are on the params' device.

    Raises:
        ValueError: Arguments that do not fit together, overlapping params, a delta that is not finite.
        TypeError: An argument or dtype of the wrong type.
        RuntimeError: ``check_finite=False`` without ``undo`` on the CPU, ``check_finite=True`` with ``undo`` on CUDA:
            the sampled bracket missed (probability below 1e-30) and params are spoilt. ``check_finite=True`` while a
            CUDA graph is captured.

    >>> params = torch.tensor([1.0, 2.0, 3.0])
    >>> edit = topm_subtract_(params, torch.zeros(3), torch.tensor([0.5, -4.0, 0.25]), m=2)
    >>> params
    tensor([0.5000, 6.0000, 3.0000])
    """
    call = prepare(params, base, tuned, m, density, scope, importance)
    scale = check_scale(scale)
    check.boolean("check_finite", check_finite)
    check.boolean("undo", undo)
    return edit_result(
        call,
        undo,
        subtract_core(
            call.params, call.base, call.tuned, call.importance, call.m, call.per_tensor, scale, check_finite, undo
        ),
    )


def topm_select(
    base: Tensors,
    tuned: Tensors,
    *,
    m: int | None = None,
    density: float | None = None,
    scope: str = "global",
    importance: Tensors | None = None,
) -> SparseDelta:
    """Return the entries of ``tuned - base`` of largest score; arguments as in `topm_subtract_`.

    On CUDA the call waits for the device, to know that the delta is finite; a graph cannot capture it.

    Returns:
        A `SparseDelta` of exactly m entries.

    Raises:
        ValueError: Arguments that do not fit together, a delta that is not finite.
        TypeError: An argument or dtype of the wrong type.

    >>> delta = topm_select(torch.zeros(3), torch.tensor([0.5, -4.0, 0.25]), m=2)
    >>> delta.indices, delta.values
    (tensor([0, 1]), tensor([ 0.5000, -4.0000]))
    """
    call = prepare(None, base, tuned, m, density, scope, importance, selecting=True)
    return select_result(call, select_core(call.base, call.tuned, call.importance, call.m, call.per_tensor))


def sparse_subtract_(params: Tensors, delta: SparseDelta, *, scale: float = 1.0, undo: bool = False) -> TopmEdit:
    """Subtract ``scale * delta`` from ``params`` in place: `topm_select` and this give the bits of `topm_subtract_`.

    Args:
        params: A tensor or several, of the shapes that ``delta`` was selected from.
        delta: From `topm_select`, or from a file: everything in it is checked before anything is written.
        scale: What the deltas are multiplied with; rounded to fp32 for all but fp64 tensors.
        undo: Keep what `TopmEdit.revert_` needs.

    Returns:
        A `TopmEdit`.

    Raises:
        ValueError: Indices out of range, unsorted or repeated; values that are not finite; counts or shapes that do not
            match; overlapping params (under torch.compile: one param given twice).
        TypeError: Dtypes that do not match, fields of another type.

    >>> params = torch.zeros(3)
    >>> edit = sparse_subtract_(params, topm_select(torch.zeros(3), torch.tensor([0.5, -4.0, 0.25]), m=1))
    >>> params
    tensor([0., 4., 0.])
    """
    tensors = prepare_sparse(params, delta)
    scale, undo = check_scale(scale), check.boolean("undo", undo)
    wide = [dtype == torch.float64 for dtype in delta.dtypes]
    unchanged, indices, bits = sparse_core(tensors, delta.indices, delta.values, delta.counts, wide, scale, undo)
    return sparse_result(tensors, delta, undo, unchanged, indices, bits)


# ---- the definition


def subtract_core(
    params: Sequence[Tensor],
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    importance: Sequence[Tensor],
    m: Sequence[int],
    per_tensor: bool,
    scale: float,
    check_finite: bool,
    undo: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Threshold, kept, unchanged, nonfinite, undo indices and undo bits (both empty without ``undo``)."""
    deltas = [_delta(t, b, p.dtype) for p, b, t in zip(params, base, tuned, strict=True)]
    chosen, threshold, nonfinite = _select(deltas, importance, m, per_tensor, check_finite)
    kept = torch.tensor([len(c) for c in chosen], dtype=torch.int64, device=params[0].device)
    unchanged = torch.zeros_like(kept)
    record: list[tuple[Tensor, Tensor]] = []
    first = 0
    for i, (param, delta, index) in enumerate(zip(params, deltas, chosen, strict=True)):
        before = _edit(param, delta[index], index, scale, unchanged[i])
        record.append((index + first, before))
        first += param.numel()
    bump_versions(params)
    return threshold, kept, unchanged, nonfinite, *_record(params, record, sum(m), undo)


def select_core(
    base: Sequence[Tensor], tuned: Sequence[Tensor], importance: Sequence[Tensor], m: Sequence[int], per_tensor: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices, values, counts, threshold."""
    deltas = [_delta(t, b, b.dtype) for b, t in zip(base, tuned, strict=True)]
    chosen, threshold, _ = _select(deltas, importance, m, per_tensor, True)
    values = [delta[index].to(threshold.dtype) for delta, index in zip(deltas, chosen, strict=True)]
    counts = torch.tensor([len(c) for c in chosen], dtype=torch.int64, device=base[0].device)
    return torch.cat(chosen), torch.cat(values), counts, threshold


def sparse_core(
    params: Sequence[Tensor],
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    wide: Sequence[bool],
    scale: float,
    undo: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unchanged, undo indices and undo bits (both empty without ``undo``)."""
    per_tensor = check_counts(params, indices, counts)
    chosen = indices.split(per_tensor)
    for i, index in enumerate(chosen):
        bad = (index < 0) | (index >= params[i].numel())
        bad[1:] |= index[1:] <= index[:-1]
        if bad.any():
            refuse_index(i, int(index[bad][0]), params[i].numel())
    check_values(values, per_tensor)
    unchanged = torch.zeros(len(params), dtype=torch.int64, device=params[0].device)
    record: list[tuple[Tensor, Tensor]] = []
    first = 0
    for i, (param, index, value) in enumerate(zip(params, chosen, values.split(per_tensor), strict=True)):
        real = torch.float64 if wide[i] or param.dtype == torch.float64 else torch.float32
        before = _edit(param, value.to(real), index, scale, unchanged[i])
        record.append((index + first, before))
        first += param.numel()
    bump_versions(params)
    return unchanged, *_record(params, record, indices.numel(), undo)


def _delta(tuned: Tensor, base: Tensor, params_dtype: torch.dtype) -> Tensor:
    real = torch.float64 if torch.float64 in (tuned.dtype, base.dtype, params_dtype) else torch.float32
    return tuned.detach().reshape(-1).to(real) - base.detach().reshape(-1).to(real)


def _select(
    deltas: Sequence[Tensor], importance: Sequence[Tensor], m: Sequence[int], per_tensor: bool, check_finite: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Per tensor: ascending flat indices of the selected; threshold; entries that may not be selected."""
    widest = torch.float64 if any(d.dtype == torch.float64 for d in deltas) else torch.float32
    scores, nonfinite = [], []
    for i, delta in enumerate(deltas):
        eligible = delta.isfinite()
        score = delta
        if importance:
            weight = importance[i].detach().reshape(-1).to(delta.dtype)
            eligible = eligible & weight.isfinite() & (weight >= 0)
            score = delta * weight
        nonfinite.append((~eligible).sum())
        if check_finite and nonfinite[-1] > 0:
            refuse_nonfinite(i, int(nonfinite[-1]), bool(delta.isfinite().all()))
        scores.append(torch.where(eligible, score.abs(), -1.0).to(widest))
    chosen: list[Tensor] = []
    threshold: list[Tensor] = []
    for count, group in zip(m, [[score] for score in scores] if per_tensor else [scores], strict=True):
        ranked, index = torch.sort(torch.cat(list(group)), descending=True, stable=True)  # ties: lowest index first
        eligible = ranked[:count] >= 0
        index = index[:count][eligible].sort().values
        last = ranked[:count][eligible][-1:]
        for score in group:
            inside = index < score.numel()
            chosen.append(index[inside])
            index = index[~inside] - score.numel()
            threshold.append(
                last
                if len(last)
                else torch.full_like(ranked[:1], math.inf)
                if len(ranked)
                else torch.full((1,), math.inf, dtype=widest, device=score.device)
            )
    return chosen, torch.cat(threshold), torch.stack(nonfinite)


def _edit(param: Tensor, delta: Tensor, index: Tensor, scale: float, unchanged: Tensor) -> Tensor:
    """Edit one tensor; return the entries as they were."""
    param = param.detach()
    flat = param.reshape(-1)  # a copy where the strides are not row-major
    before = flat[index]
    step = torch.tensor(scale, dtype=delta.dtype, device=delta.device) * delta
    after = before.to(delta.dtype) - step
    if param.element_size() == 2:
        after = after.to(torch.float32)
    after = after.to(param.dtype)
    unchanged += (after == before).sum()
    with writing(param):
        flat[index] = after
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))
    return before


def _record(
    params: Sequence[Tensor], parts: Sequence[tuple[Tensor, Tensor]], m: int, undo: bool
) -> tuple[Tensor, Tensor]:
    integer = bits_dtype([p.dtype for p in params])
    indices = torch.full((m if undo else 0,), -1, dtype=torch.int64, device=params[0].device)
    bits = torch.zeros(m if undo else 0, dtype=integer, device=params[0].device)
    if undo:
        kept = sum(len(index) for index, _ in parts)
        indices[:kept] = torch.cat([index for index, _ in parts])
        bits[:kept] = torch.cat([before.view(_INTEGER_OF[before.element_size()]).to(integer) for _, before in parts])
    return indices, bits


# ---- arguments and results, shared with the compiled ops


def bits_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The integer dtype that holds the bits of the widest of ``dtypes``."""
    return _INTEGER_OF[max(dtype.itemsize for dtype in dtypes)]


class Call:
    """The checked arguments of a top-m call. ``importance`` is empty where none was given."""

    def __init__(
        self,
        params: list[Tensor],
        base: list[Tensor],
        tuned: list[Tensor],
        importance: list[Tensor],
        m: list[int],
        per_tensor: bool,
    ) -> None:
        self.params, self.base, self.tuned, self.importance = params, base, tuned, importance
        self.m, self.per_tensor = m, per_tensor


def prepare(
    params: Tensors | None,
    base: Tensors,
    tuned: Tensors,
    m: Any,
    density: Any,
    scope: str,
    importance: Tensors | None,
    *,
    selecting: bool = False,
) -> Call:
    """Check everything that can be checked without reading data; ``selecting``: there are no params."""
    lists = {} if selecting else {"params": tensor_list("params", params)}
    lists["base"] = tensor_list("base", base)
    lists["tuned"] = tensor_list("tuned", tuned)
    if importance is not None:
        lists["importance"] = tensor_list("importance", importance)
        for i, weight in enumerate(lists["importance"]):
            if weight.dtype == torch.float64:
                check.fail(
                    f"importance[{i}]",
                    "be float32, float16 or bfloat16",
                    weight.dtype,
                    "Call .float() first.",
                    TypeError,
                )
    (leader, tensors), *others = lists.items()
    for i, tensor in enumerate(tensors):
        if tensor.device != tensors[0].device:
            check.fail(f"{leader}[{i}]", f"be on the device of {leader}[0], {tensors[0].device}", tensor.device)
    for name, other in others:
        if len(other) != len(tensors):
            check.fail(name, f"have one tensor per tensor of {leader} ({len(tensors)})", len(other))
        for i, (tensor, expected) in enumerate(zip(other, tensors, strict=True)):
            if tensor.shape != expected.shape:
                check.fail(
                    f"{name}[{i}]", f"have the shape of {leader}[{i}], {tuple(expected.shape)}", tuple(tensor.shape)
                )
            if tensor.device != tensors[0].device:
                check.fail(f"{name}[{i}]", f"be on the device of {leader}[0], {tensors[0].device}", tensor.device)
    per_tensor = check.choice("scope", scope, ("global", "per_tensor")) == "per_tensor"
    counts = [t.numel() for t in tensors] if per_tensor else [sum(t.numel() for t in tensors)]
    if not selecting:
        check_storage(tensors, dict(others))
    return Call(
        [t.detach() for t in lists.get("params", [])],
        [t.detach() for t in lists["base"]],
        [t.detach() for t in lists["tuned"]],
        [t.detach() for t in lists.get("importance", [])],
        [entry_count(m, density, n, f"tensor {i}" if per_tensor else "all tensors") for i, n in enumerate(counts)],
        per_tensor,
    )


def entry_count(m: Any, density: Any, n: int, of: str) -> int:
    """m, from exactly one of ``m`` and ``density``."""
    if (m is None) == (density is None):
        check.fail(
            "m and density",
            "be given one and not the other",
            f"m={m} and density={density}",
            "Pass density=0.10 for ten per cent, or m=10 for ten entries.",
        )
    if m is not None:
        return check.integer(
            "m", m, 0, n, f"be an integer in [0, {n}], the entries of {of}", "For a fraction pass density."
        )
    rule, remedy = "be a number in (0, 1]", "For ten per cent pass density=0.10; for a count pass m."
    check.number("density", density, 0.0, 1.0, rule, remedy)
    if density == 0:
        check.fail("density", rule, density, remedy)
    return math.floor(density * n)


def check_scale(scale: Any) -> float:
    """``scale`` as a float, if it is a number that fp32 can hold."""
    checked = check.number("scale", scale, -_FLOAT32_MAX, _FLOAT32_MAX, "be a finite fp32 number")
    return float(checked) if isinstance(checked, int) else checked


def check_counts(params: Sequence[Tensor], indices: Tensor, counts: Tensor) -> list[int]:
    """The counts of a sparse delta as integers that are at least 0 and sum up to the number of indices."""
    values: list[int] = counts.tolist()
    for i, count in enumerate(values):
        if not 0 <= count <= params[i].numel():
            check.fail(f"delta.counts[{i}]", f"be in [0, {params[i].numel()}], the entries of params[{i}]", count)
    if sum(values) != indices.numel():
        check.fail("delta.counts", f"sum up to the number of indices, {indices.numel()}", sum(values))
    return values


def check_values(values: Tensor, counts: Sequence[int]) -> None:
    """Raise for the first tensor of a sparse delta with values that are not finite."""
    if bool(values.isfinite().all()):
        return
    for i, part in enumerate(values.split(counts)):
        if bad := int((~part.isfinite()).sum()):
            check.fail(f"delta.values of tensor {i}", "be finite", f"{bad} entries that are NaN or Inf",
                       "The delta is damaged.")  # fmt: skip


def refuse_index(i: int, index: int, n: int) -> None:
    """Raise: tensor ``i`` of a sparse delta has an index out of range, repeated or out of order."""
    check.fail(
        f"delta.indices of tensor {i}",
        f"be ascending without repetition, in [0, {n})",
        f"{index} at an offending place",
        "The delta is damaged or belongs to other params.",
    )


def refuse_nonfinite(i: int, count: int, deltas_are_finite: bool) -> None:
    """Raise: tensor ``i`` has entries that cannot be ranked."""
    if deltas_are_finite:
        check.fail(f"importance[{i}]", "be finite and not negative", f"{count} other entries")
    check.fail(
        f"tuned[{i}] - base[{i}]",
        "be finite",
        f"{count} entries that cannot be ranked",
        "Repair the checkpoint (topm_subtract_ with check_finite=False leaves such entries as they are).",
    )


def prepare_sparse(params: Tensors, delta: Any) -> list[Tensor]:
    """Check what can be checked without reading data; return the detached params."""
    tensors = tensor_list("params", params)
    if not isinstance(delta, SparseDelta):
        check.fail("delta", "be a SparseDelta", check.describe(delta), "Get one from topm_select.", TypeError)
    for name, kind in (("shapes", tuple), ("dtypes", torch.dtype)):
        entries = getattr(delta, name)
        if not isinstance(entries, (tuple, list)) or not all(isinstance(entry, kind) for entry in entries):
            rule = f"be a tuple of {'tuples of ints' if kind is tuple else 'torch.dtypes'}"
            check.fail(f"delta.{name}", rule, check.describe(entries), error=TypeError)
    check_same_params(tensors, delta.shapes, None)
    n = len(tensors)
    real = (torch.float32, torch.float64)
    for name, dtypes in (
        ("indices", (torch.int64,)),
        ("counts", (torch.int64,)),
        ("values", real),
        ("threshold", real),
    ):
        tensor = check.tensor(f"delta.{name}", getattr(delta, name))
        if tensor.dtype not in dtypes:
            check.fail(f"delta.{name}", "be " + " or ".join(map(str, dtypes)), tensor.dtype, error=TypeError)
        if tensor.dim() != 1:
            check.fail(f"delta.{name}", "have one dimension", tuple(tensor.shape))
        if tensor.device != tensors[0].device:
            check.fail(f"delta.{name}", f"be on the params' device, {tensors[0].device}", tensor.device)
    for i, tensor in enumerate(tensors):
        if tensor.device != tensors[0].device:
            check.fail(f"params[{i}]", f"be on the device of params[0], {tensors[0].device}", tensor.device)
    if delta.values.numel() != delta.indices.numel():
        check.fail("delta.values", f"have one entry per index ({delta.indices.numel()})", delta.values.numel())
    if delta.counts.numel() != n:
        check.fail("delta.counts", f"have one entry per param ({n})", delta.counts.numel())
    if delta.threshold.numel() != n:
        check.fail("delta.threshold", f"have one entry per param ({n})", delta.threshold.numel())
    if len(delta.dtypes) != n:
        check.fail("delta.dtypes", f"have one entry per param ({n})", len(delta.dtypes))
    for i, dtype in enumerate(delta.dtypes):
        if dtype not in (torch.float32, delta.values.dtype):
            check.fail(
                f"delta.dtypes[{i}]", f"be torch.float32 or the values' {delta.values.dtype}", dtype, error=TypeError
            )
    fields = ("indices", "values", "counts", "threshold")
    check_storage(tensors, {f"delta.{name}": [getattr(delta, name)] for name in fields})
    return [t.detach() for t in tensors]


def check_storage(params: Sequence[Tensor], others: dict[str, Sequence[Tensor]]) -> None:
    """Raise where writing one param would write another, or change what is still to be read.

    A param may be its own base or tuned exactly. Views of one storage that have no element in common are fine. Under
    torch.compile, where tensors have no address, only one tensor given twice is noticed.
    """
    if torch.compiler.is_compiling():
        owners: dict[Tensor, int] = {}
        for name, tensors in (("params", params), *others.items()):
            for i, tensor in enumerate(tensors):
                if tensor in owners and (name not in ("base", "tuned") or owners[tensor] != i):
                    _refuse_shared(owners[tensor], name, i)
                if name == "params":
                    owners[tensor] = i
        return
    spans = []
    for name, tensors in (("params", params), *others.items()):
        for i, tensor in enumerate(tensors):
            if tensor.numel() and not check.abstract(tensor):
                spans.append((_address(tensor), _address(tensor) + _extent(tensor), name, i, tensor))
                if name == "params" and _overlaps_itself(tensor):
                    check.fail(
                        f"params[{i}]", "not overlap itself", f"strides {tensor.stride()}", "Pass a contiguous copy."
                    )
    spans.sort(key=lambda span: span[:2])
    active: list[Any] = []
    for span in spans:
        active = [other for other in active if other[1] > span[0]]
        for other in active:
            (_, _, name, i, first), (_, _, other_name, j, second) = sorted(
                (span, other), key=lambda s: (s[2] != "params", s[3])
            )
            if name != "params" or (i == j and other_name in ("base", "tuned") and _same_view(first, second)):
                continue
            if _have_common_bytes(first, second):
                _refuse_shared(i, other_name, j)
        active.append(span)


def _refuse_shared(i: int, other_name: str, j: int) -> None:
    remedy = {"params": "Pass tied weights once.", "base": "Pass a copy, or the very same view."}
    other = other_name if other_name.startswith("delta.") else f"{other_name}[{j}]"
    check.fail(
        f"params[{i}]",
        f"not share memory with {other}",
        "overlapping tensors",
        remedy.get("base" if other_name == "tuned" else other_name, "Pass a copy."),
    )


def _address(tensor: Tensor) -> int:
    """Where a tensor begins. MPS tells the handle of its buffer, and handles lie closer than buffers are long."""
    if tensor.device.type != "mps":
        return tensor.data_ptr()
    return (tensor.untyped_storage().data_ptr() << 48) + int(tensor.storage_offset()) * tensor.element_size()


def _same_view(a: Tensor, b: Tensor) -> bool:
    """Whether both read the same elements in the same order; the stride of a dimension of size 1 means nothing."""
    strides = [[step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1] for t in (a, b)]
    return _address(a) == _address(b) and a.dtype == b.dtype and strides[0] == strides[1]


def _extent(tensor: Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * step for size, step in steps)) * tensor.element_size()


def _steps(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride in bytes, size) of every dimension that is not trivial, largest first, and of the bytes of an element."""
    width = tensor.element_size()
    steps = [(step * width, size) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return [*sorted(steps, reverse=True), (1, width)]


def _overlaps_itself(tensor: Tensor) -> bool:
    extent = 1
    for step, size in reversed(_steps(tensor)):
        if step == 0:
            return True
        if step < extent:
            marks = _marks(_extent(tensor))
            _mark(tensor, _address(tensor), marks).fill_(True)
            return int(marks.sum()) < tensor.numel() * tensor.element_size()
        extent += (size - 1) * step
    return False  # every step leaps over all that the smaller ones reach


def _have_common_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether some byte of ``a`` is one of ``b``: base_a + sum of steps of a == base_b + sum of steps of b."""
    ranges: dict[int, tuple[int, int]] = {}
    for tensor, sign in ((a, 1), (b, -1)):
        for step, size in _steps(tensor):
            if step == 0:  # an expanded base: no further byte
                continue
            low, high = ranges.get(step, (0, 0))
            ranges[step] = (low, high + size - 1) if sign > 0 else (low - size + 1, high)
    budget = [_MOST_TRIES]
    found = _reaches(_address(b) - _address(a), sorted(ranges.items(), reverse=True), budget)
    if budget[0] > 0:
        return found
    start = min(_address(a), _address(b))
    marks = _marks(max(_address(t) - start + _extent(t) for t in (a, b)))
    _mark(a, start, marks).fill_(True)
    return bool(_mark(b, start, marks).any())


def _reaches(distance: int, ranges: Sequence[tuple[int, tuple[int, int]]], budget: list[int]) -> bool:
    """Whether sum n_i * step_i == distance for some n_i, each in its range, or the budget of tries is spent.

    The largest step comes first, and of it only the numbers from where the smaller steps still reach: one or two where
    steps nest as in views of one matrix.
    """
    if not ranges:
        return distance == 0
    (step, (low, high)), rest = ranges[0], ranges[1:]
    least, most = (sum(other * bounds[side] for other, bounds in rest) for side in (0, 1))
    for n in range(max(low, -((most - distance) // step)), min(high, (distance - least) // step) + 1):
        budget[0] -= 1
        if budget[0] <= 0 or _reaches(distance - n * step, rest, budget):
            return True
    return False


def _marks(size: int) -> Tensor:
    """One mark per byte: the last resort, for steps that interlock."""
    return torch.zeros(size, dtype=torch.bool, device="cpu")


def _mark(tensor: Tensor, start: int, marks: Tensor) -> Tensor:
    """The marks of the bytes of ``tensor``, where the first mark is of address ``start``."""
    size = tensor.element_size()
    strides = [step * size for step in tensor.stride()]
    return marks.as_strided([*tensor.shape, size], [*strides, 1], _address(tensor) - start)


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in tensors)


def edit_result(call: Call, undo: bool, outputs: Sequence[Tensor]) -> TopmEdit:
    """Outputs of the core as a `TopmEdit`."""
    threshold, kept, unchanged, nonfinite, indices, bits = outputs
    record = UndoRecord(indices, bits, _shapes(call.params), tuple(t.dtype for t in call.params)) if undo else None
    return TopmEdit(threshold, kept, unchanged, nonfinite, record)


def select_result(call: Call, outputs: Sequence[Tensor]) -> SparseDelta:
    """Outputs of the core as a `SparseDelta`."""
    dtypes = tuple(
        torch.float64 if torch.float64 in (b.dtype, t.dtype) else torch.float32
        for b, t in zip(call.base, call.tuned, strict=True)
    )
    indices, values, counts, threshold = outputs
    return SparseDelta(indices, values, counts, threshold, _shapes(call.base), dtypes)


def sparse_result(
    params: Sequence[Tensor], delta: SparseDelta, undo: bool, unchanged: Tensor, indices: Tensor, bits: Tensor
) -> TopmEdit:
    """Outputs of the core as a `TopmEdit`: threshold and counts are those of the delta, copied."""
    record = UndoRecord(indices, bits, _shapes(params), tuple(t.dtype for t in params)) if undo else None
    threshold, kept = delta.threshold.detach().clone(), delta.counts.clone()
    return TopmEdit(threshold, kept, unchanged, torch.zeros_like(unchanged), record)
