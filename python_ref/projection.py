"""Gradient surgery: PCGrad (Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020, Algorithm 1)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from . import check
from .philox import philox4x32
from .results import ProjectionStats

__all__ = ["gradient_gram", "project_conflicts"]

LARGEST = sys.float_info.max

Gradients = torch.Tensor | Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]]


def gradient_gram(grads: Gradients) -> torch.Tensor:
    """Return all dot products of k gradients, the Gram matrix G G^T, in float64.

    It is what conflicts are read from: entry (i, j) is negative where objectives i and j pull apart. Gram matrices of
    the parts of sharded gradients add up to the whole's. A NaN or infinity shows in its row and column; nothing raises
    for it, since a rank that raised would leave the others waiting.

    Args:
        grads: [..., k, N], or a sequence of k sequences of tensors (tensor t of each has one shape, dtype and device;
            both may differ between tensors), or a sequence of k tensors. float32, float64, float16, bfloat16.

    Returns:
        [..., k, k] float64, symmetric, detached. Without batch dimensions for a sequence.

    Raises:
        TypeError, ValueError: ``grads`` is not of this form.

    >>> gradient_gram(torch.tensor([[3.0, 4.0], [-4.0, 3.0], [-1.0, 0.0]]))
    tensor([[25.,  0., -3.],
            [ 0., 25.,  4.],
            [-3.,  4.,  1.]], dtype=torch.float64)
    """
    form = check_grads(grads)
    rows = _rows(form)
    return (rows @ rows.mT).reshape(form.batch + (form.k, form.k))


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
    sum_i w_i v_i, computed in float64 and rounded to the gradients' dtype (16-bit dtypes through float32, as torch
    converts). Compiled kernels and this reference agree within 1e-5 of the sum of the gradients' norms, before that
    rounding; the orders drawn are equal. Squared norms are formed in float64: a float64 gradient of norm below 1e-154
    counts as zero.

    Args:
        grads: [..., k, N], or a sequence of k sequences of tensors (tensor t of each has one shape, dtype and device;
            both may differ between tensors), or a sequence of k tensors. float32, float64, float16, bfloat16. Each
            sequence is projected as one long vector.
        weights: [k] or [..., k], finite, >= 0, applied after projection; None is all ones. An objective of weight
            exactly 0 takes no part: it is neither projected nor projected against, and may even be non-finite.
        reduction: "sum", or "mean": the weighted sum divided by k.
        order: "random" (each objective draws a permutation of the others), "fixed" (0 .. k - 1), or an integer tensor
            [k, k - 1] (row i: a permutation of the others) or [k, k] (row i: of all; i itself is skipped).
        seed: of the random orders, in [0, 2**63). Objective i of group g draws by Fisher-Yates from Philox with key
            seed and counter (i, draw // 4, g), so group 0 equals the unbatched call.
        return_stats: also return what was found.

    Returns:
        [..., N], or for a sequence a list of tensors shaped as one of its k members; detached. With ``return_stats``
        the pair of that and a `ProjectionStats`.

    Raises:
        TypeError, ValueError: an argument is not of this form, or a gradient or weight on the CPU is not finite (on
            other devices the output is NaN and ``ProjectionStats.finite`` False).

    >>> project_conflicts(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))  # [0.5, 0.5] + [0, 1]
    tensor([0.5000, 1.5000])
    """
    form = check_grads(grads)
    weights = check_weights(weights, form)
    mode, given = check_order(order, form)
    check.choice("reduction", reduction, ("sum", "mean"))
    check.boolean("return_stats", return_stats)
    check.integer("seed", seed, 0, 2**63 - 1, "be an integer in [0, 2**63)")

    rows = _rows(form)
    groups, k, _ = rows.shape
    orders = order_table(mode, given, groups, k, int(seed)).to(rows.device)
    if weights is None:
        weights = rows.new_ones(groups, k)
    check_weight_values(weights)
    weights = weights.to(rows.device)
    active = weights != 0
    rows = torch.where(active[..., None], rows, 0)  # no part at all: as if zero, whose projections change nothing
    squared_norms = (rows * rows).sum(-1)
    finite = finite_groups(squared_norms, weights)
    check_finite(form, finite, active)

    every = torch.arange(groups, device=rows.device)
    projected = []
    total = rows.new_full((groups, rows.shape[-1]), -0.0)  # -0 + x is x, also for x = -0
    for i in range(k):
        v = rows[:, i]
        for j in orders[:, i].unbind(-1):
            other, norm = rows[every, j], squared_norms[every, j]
            dot = (v * other).sum(-1)
            conflict = active[:, i] & (dot < 0) & (norm > 0)
            v = torch.where(conflict[:, None], v - (dot / norm)[:, None] * other, v)
        projected.append(v)
        total = torch.where(active[:, i, None], total + weights[:, i, None] * v, total)
    if reduction == "mean":
        total = total / k
    total = torch.where(active.any(-1)[:, None], total, 0)
    out = _shaped(torch.where(finite[:, None], total, torch.nan), form)
    if not return_stats:
        return out

    rows = _rows(form)
    v = torch.where(active[..., None], torch.stack(projected, 1), rows)
    return out, make_stats(form, rows @ rows.mT, v @ rows.mT, (v * v).sum(-1), active, finite)


# ---- the form of the arguments


class Form(NamedTuple):
    """Checked gradients: ``dense`` [..., k, N], or ``lists`` of k lists of equally shaped tensors."""

    dense: torch.Tensor | None
    lists: list[list[torch.Tensor]]
    nested: bool
    batch: tuple[int, ...]
    k: int
    device: torch.device

    @property
    def groups(self) -> int:
        """How many independent problems there are: the product of the batch dimensions."""
        return math.prod(self.batch)


def check_grads(grads: Gradients) -> Form:
    """Return ``grads`` in one of two forms, or raise."""
    if isinstance(grads, torch.Tensor):
        dense = check.floating("grads", grads)
        if dense.dim() < 2:
            check.fail(
                "grads", "have at least two dimensions, [..., k, N]", check.describe(dense), "Stack k gradients."
            )
        if dense.shape[-2] == 0:
            check.fail("grads", "hold at least one gradient, k >= 1", check.describe(dense))
        return Form(dense, [], False, tuple(dense.shape[:-2]), dense.shape[-2], dense.device)
    if not isinstance(grads, Sequence) or isinstance(grads, str):
        check.fail("grads", "be a tensor or a sequence of k sequences of tensors", check.describe(grads), "", TypeError)
    if len(grads) == 0:
        check.fail("grads", "hold at least one gradient, k >= 1", check.describe(grads))
    nested = not isinstance(grads[0], torch.Tensor)
    lists: list[list[torch.Tensor]] = []
    for i, gradient in enumerate(grads):
        if isinstance(gradient, torch.Tensor) == nested:
            check.fail(f"grads[{i}]", f"be a {'sequence, as' if nested else 'tensor, like'} grads[0]",
                       check.describe(gradient), error=TypeError)  # fmt: skip
        if nested and (not isinstance(gradient, Sequence) or isinstance(gradient, str)):
            check.fail(f"grads[{i}]", "be a sequence of tensors", check.describe(gradient),
                       "Generators are read once: pass list(...).", TypeError)  # fmt: skip
        lists.append([gradient] if isinstance(gradient, torch.Tensor) else list(gradient))
    first = lists[0]
    if not first:
        check.fail("grads[0]", "hold at least one tensor", check.describe(first))
    for i, tensors in enumerate(lists):
        if len(tensors) != len(first):
            check.fail(f"grads[{i}]", f"hold as many tensors as grads[0], {len(first)}", len(tensors),
                       "Pass zeros where an objective has no gradient (autograd.grad's None).")  # fmt: skip
        for t, tensor in enumerate(tensors):
            name = _name(nested, i, t)
            check.floating(name, tensor)
            like = first[t]
            if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
                check.fail(name, f"match {_name(nested, 0, t)}, {check.describe(like)}", check.describe(tensor))
            if tensor.device != first[0].device:
                check.fail(name, f"be on the device of {_name(nested, 0, 0)}, {first[0].device}", tensor.device)
    return Form(None, lists, nested, (), len(lists), first[0].device)


def check_weights(weights: torch.Tensor | Sequence[float] | None, form: Form) -> torch.Tensor | None:
    """Return the weights as float64 [groups, k], values unchecked, or raise.

    They are on the CPU, where their values are checked without reading a device, or with the gradients (on the CPU for
    MPS, which has no float64).
    """
    if weights is None:
        return None
    device = check.float64_device(form.device)
    if not isinstance(weights, torch.Tensor):
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            check.fail("weights", "be a tensor or a sequence of k numbers", check.describe(weights), "", TypeError)
        numbers = [_weight(f"weights[{i}]", w) for i, w in enumerate(weights)]
        if torch.compiler.is_compiling() and numbers:  # torch.tensor would make a graph per value
            weights = torch.stack([torch.ones((), dtype=torch.float64, device=device) * w for w in numbers])
        else:
            weights = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    weights = check.values("weights", weights, form.device)
    shape = form.batch + (form.k,)
    if tuple(weights.shape) not in ((form.k,), shape):
        either = f"[{form.k}]" + (f" or {list(shape)}" if form.batch else "")
        check.fail("weights", f"have shape {either}", list(weights.shape), "One weight per objective.")
    weights = weights if weights.device.type == "cpu" else weights.to(device)
    return weights.double().expand(shape).reshape(form.groups, form.k)


def _weight(name: str, value: Any) -> float:
    """One weight of a sequence as a float; NaN and infinities are refused later, by value."""
    if isinstance(value, float):
        return value
    return float(check.number(name, value, -LARGEST, LARGEST, "be a number that float64 holds"))


def check_order(order: str | torch.Tensor, form: Form) -> tuple[str, torch.Tensor | None]:
    """Return ("random" | "fixed" | "given", the tensor if given), values unchecked, or raise.

    A given order is on the CPU, where its values are checked without reading a device, or with the gradients.
    """
    k = form.k
    if isinstance(order, torch.Tensor):
        order = check.values("order", order, form.device, "hold integers")
        if order.is_floating_point():
            check.fail("order", "hold integers", order.dtype, "Convert it with .long().", TypeError)
        if tuple(order.shape) not in ((k, k - 1), (k, k)):
            check.fail("order", f"have shape [{k}, {k - 1}] or [{k}, {k}]", list(order.shape))
        return "given", order if order.device.type == "cpu" else order.to(form.device)
    if not isinstance(order, str) or order not in ("random", "fixed"):
        check.fail("order", "be 'random', 'fixed' or an integer tensor [k, k - 1] or [k, k]", check.describe(order))
    return order, None


# ---- what depends on values: inside the ops


def order_table(mode: str, given: torch.Tensor | None, groups: int, k: int, seed: int) -> torch.Tensor:
    """Return int64 [groups, k, k - 1]: for each group and objective, the others in the order they are projected on."""
    if mode == "random":
        table = [[draw_order(seed, g, i, k) for i in range(k)] for g in range(groups)]
        return torch.tensor(table, dtype=torch.int64, device="cpu").reshape(groups, k, k - 1)
    if given is not None:
        return check_order_values(given, k).expand(groups, k, k - 1)
    others = [[j for j in range(k) if j != i] for i in range(k)]
    return torch.tensor(others, dtype=torch.int64, device="cpu").reshape(k, k - 1).expand(groups, k, k - 1)


def draw_order(seed: int, group: int, objective: int, k: int) -> list[int]:
    """Return one objective's permutation of the others, by Fisher-Yates; draw d is word d % 4 of block d // 4.

    >>> draw_order(0, 0, 1, 5)
    [0, 3, 2, 4]
    """
    order = [j for j in range(k) if j != objective]
    low, high = seed & 0xFFFFFFFF, seed >> 32
    for draw, left in enumerate(range(k - 1, 1, -1)):
        words = philox4x32((low, high), (objective, draw // 4, group & 0xFFFFFFFF, group >> 32))
        pick = words[draw % 4] * left >> 32
        order[left - 1], order[pick] = order[pick], order[left - 1]
    return order


def check_order_values(order: torch.Tensor, k: int) -> torch.Tensor:
    """Return an explicit order as int64 [k, k - 1] on the CPU, or raise. An order on a device is read back."""
    rows = order.tolist()
    for i, row in enumerate(rows):
        wanted = set(range(k)) if len(row) == k else set(range(k)) - {i}
        if set(row) != wanted:
            what = "all objectives" if len(row) == k else "the others"
            check.fail(f"order[{i}]", f"be a permutation of {what}, {sorted(wanted)}", row)
    others = [[j for j in row if j != i] for i, row in enumerate(rows)]
    return torch.tensor(others, dtype=torch.int64, device="cpu").reshape(k, k - 1)


def check_weight_values(weights: torch.Tensor) -> None:
    """Raise, on the CPU, for the first of ``weights`` [groups, k] that is not finite and >= 0."""
    if weights.device.type != "cpu" or check.abstract(weights):
        return
    bad = ~(weights.isfinite() & (weights >= 0))
    if bad.any():
        group, objective = bad.nonzero()[0].tolist()
        place = f" in group {group}" if weights.shape[0] > 1 else ""
        check.fail(f"weights[{objective}]{place}", "be finite and >= 0", weights[group, objective].item())


def finite_groups(squared_norms: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return bool [groups]: whether what takes part is finite. ``squared_norms`` [groups, k]."""
    if weights is None:
        return squared_norms.isfinite().all(-1)
    sound = weights.isfinite() & (weights >= 0)
    return (sound & (squared_norms.isfinite() | (weights == 0))).all(-1)


def check_finite(form: Form, finite: torch.Tensor, active: torch.Tensor | None) -> None:
    """Raise, on the CPU, for the first gradient that takes part (``active`` [groups, k]) and is not finite."""
    if finite.device.type == "cpu" and not finite.all():
        raise_not_finite(form, active)


def raise_not_finite(form: Form, active: torch.Tensor | None) -> NoReturn:
    """Word the error: which objective, which tensor, how many elements."""
    if form.dense is not None:
        stacked = form.dense.detach().reshape(form.groups, form.k, form.dense.shape[-1])
        named = []
        for g in range(stacked.shape[0]):
            batch = torch.unravel_index(torch.tensor(g, device="cpu"), form.batch) if form.batch else ()
            prefix = "".join(f"{int(b)}, " for b in batch)
            named += [(g, i, f"grads[{prefix}{i}]", stacked[g, i]) for i in range(form.k)]
    else:
        named = [(0, i, _name(form.nested, i, t), x) for i, ts in enumerate(form.lists) for t, x in enumerate(ts)]
    named = [entry for entry in named if active is None or active[entry[0], entry[1]]]
    for _, objective, name, tensor in named:
        if bad := tensor.numel() - int(tensor.isfinite().sum()):
            check.fail(name, "be finite", f"{bad} NaN or infinite of {tensor.numel()} elements",
                       f"Check the loss of objective {objective}, or give it weight 0.")  # fmt: skip
    check.fail("grads", "have squared norms that float64 holds", "an infinite one", "Scale the gradients down first.")


def make_stats(
    form: Form,
    gram: torch.Tensor,
    dots_after: torch.Tensor,
    squared_norms_after: torch.Tensor,
    active: torch.Tensor | None,
    finite: torch.Tensor,
) -> ProjectionStats:
    """Form `ProjectionStats` from [groups, k, k] dots before and after (v_i . g_j) and [groups, k] squared norms."""
    k, batch = form.k, form.batch
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    after = squared_norms_after.clamp(min=0).sqrt()
    after = torch.where(after < 1e-6 * norms, 0, after)
    conflicts = (gram < 0).triu(1)
    if active is not None:
        conflicts = conflicts & active[:, :, None] & active[:, None, :]
    return ProjectionStats(
        _cosines(gram, norms, norms).reshape(batch + (k, k)),
        _cosines(dots_after, after, norms).reshape(batch + (k, k)),
        conflicts.sum((-2, -1)).reshape(batch),
        finite.reshape(batch),
    )


def _cosines(dots: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    left, right = left[..., :, None], right[..., None, :]
    cosines = (dots / left / right).clamp(-1, 1)  # divided in turn: the norms' product may underflow
    return torch.where((left == 0) | (right == 0), 0, cosines)


def _name(nested: bool, objective: int, t: int) -> str:
    return f"grads[{objective}][{t}]" if nested else f"grads[{objective}]"


def _rows(form: Form) -> torch.Tensor:
    """The gradients as float64 [groups, k, N]."""
    if form.dense is not None:
        return form.dense.detach().double().reshape(form.groups, form.k, form.dense.shape[-1])
    return torch.stack([torch.cat([t.detach().double().reshape(-1) for t in ts]) for ts in form.lists])[None]


def _shaped(total: torch.Tensor, form: Form) -> torch.Tensor | list[torch.Tensor]:
    """The inverse of `_rows` for one vector per group, rounded to the gradients' dtypes."""
    if form.dense is not None:
        return total.to(form.dense.dtype).reshape(form.batch + (form.dense.shape[-1],))
    first = form.lists[0]
    parts = total[0].split([t.numel() for t in first])
    return [part.to(t.dtype).reshape(t.shape) for part, t in zip(parts, first, strict=True)]
