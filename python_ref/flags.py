"""What a device could only flag, as the error that the CPU raises."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from . import check
from .results import ProjectionStats, SparseDelta, TopmEdit

__all__ = ["raise_if_bad"]

Result = TypeVar("Result")
MISSED = (
    "topm_subtract_ missed its bracket (probability below 1e-30) and params are spoilt. Load them again and "
    "pass check_finite=True and undo=False, which looks before it edits."
)


def raise_if_bad(result: Result) -> Result:
    """Return ``result`` unchanged, or raise the error that its device flags stand for.

    On CUDA the ops do not synchronise: a row without a distribution gives token -1 (or NaN log-probs), a gradient
    that is not finite gives NaN and ``ProjectionStats.finite`` False, a delta that is not finite is counted in
    ``TopmEdit.nonfinite``, and negative counts there say that params are spoilt or that a sparse delta was damaged.
    This reads those flags back, so it synchronises.

    Args:
        result: what any of the ops returned: tokens, log-probs, ``(tokens, logprobs)``, ``TopmEdit``,
            ``SparseDelta``, ``ProjectionStats``, a tensor or list of projected gradients,
            ``(gradients, ProjectionStats)``.

    Raises:
        ValueError: a flag is set; the text names the row, the tensor, the group or the index.
        RuntimeError: `topm_subtract_` missed its bracket and params are spoilt.
        TypeError: ``result`` is nothing that an op returns.

    >>> raise_if_bad(torch.tensor([3, 1]))
    tensor([3, 1])
    """
    _check(result)
    return result


def _check(result: Any, rows: bool = False) -> None:
    """Raise for a flag of ``result``; ``rows``: its first dimension is known to be the rows of a batch of logits."""
    if isinstance(result, (tuple, list)):
        tokens = [part for part in result if isinstance(part, torch.Tensor) and not part.is_floating_point()]
        for part in result:
            _check(part, bool(tokens))
    elif isinstance(result, TopmEdit):
        _check_edit(result)
        if bool((result.nonfinite > 0).any()):
            tensor = int(result.nonfinite.nonzero()[0])
            check.fail(
                f"every entry of tensor {tensor}",
                "have a finite delta and, where given, a finite importance >= 0",
                f"{int(result.nonfinite[tensor])} that could not be selected",
            )
    elif isinstance(result, ProjectionStats):
        if not bool(result.finite.all()):
            group = tuple((~result.finite).nonzero()[0].tolist())
            where = f"grads of group {group}" if group else "grads"
            check.fail(where, "be finite", "a NaN, an infinity or a squared norm beyond float64")
    elif isinstance(result, torch.Tensor):
        floats = result.is_floating_point()
        bad = result.isnan() if floats else result < 0
        if bool(bad.any()):
            index = tuple(bad.nonzero()[0].tolist())
            value, remedy = "NaN" if floats else "-1", "Run the op on the CPU to see which input is bad."
            if index and (rows or not floats):
                check.fail(f"row {index[0]}", "have a finite result", value, remedy)
            check.fail(f"the result at index {index}", "be finite", value, remedy)
    elif not isinstance(result, SparseDelta):  # which holds nothing that is not finite
        check.fail("result", "be what an op returned", check.describe(result), error=TypeError)


# What a damaged sparse delta leaves in ``TopmEdit.unchanged``, in the order in which the CPU looks.
_DAMAGE = {
    -3: ("delta.counts[{i}]", "be between 0 and the entries of params[{i}]", "{count}"),
    -4: ("delta.counts", "sum up to the number of indices", "{sum}"),
    -1: ("delta.indices of tensor {i}", "be ascending without repetition, in range", "an offending index"),
    -2: ("delta.values of tensor {i}", "be finite", "entries that are NaN or Inf"),
}


def _check_edit(edit: TopmEdit) -> None:
    """Raise for the negative counts of a `TopmEdit`."""
    if bool((edit.nonfinite < 0).any()):
        raise RuntimeError(MISSED)
    unchanged = edit.unchanged.tolist()
    for code, words in _DAMAGE.items():
        if code in unchanged:
            i = unchanged.index(code)
            figures = {"i": i, "count": int(edit.kept[i]), "sum": int(edit.kept.sum())}
            remedy = "The delta is damaged or belongs to other params. Nothing was written."
            argument, rule, value = (word.format(**figures) for word in words)
            check.fail(argument, rule, value, remedy)
