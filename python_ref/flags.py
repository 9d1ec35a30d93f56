"""What a device could only flag, as the error that the CPU raises."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from . import check
from .results import ProjectionStats, TopmEdit

__all__ = ["raise_if_bad"]

Result = TypeVar("Result")


def raise_if_bad(result: Result) -> Result:
    """Return ``result`` unchanged, or raise the error that its device flags stand for.

    On a device the ops do not synchronise: a row without a distribution gives token -1 (or NaN log-probs), a gradient
    that is not finite gives NaN and ``ProjectionStats.finite`` False, a delta that is not finite is counted in
    ``TopmEdit.nonfinite``. This reads those flags back, so it synchronises.

    Args:
        result: what any of the ops returned: tokens, log-probs, ``(tokens, logprobs)``, ``TopmEdit``,
            ``ProjectionStats``, a tensor or list of projected gradients, ``(gradients, ProjectionStats)``.

    Raises:
        ValueError: a flag is set; the text names the row, the tensor or the group.
        TypeError: ``result`` is nothing that an op returns.

    >>> raise_if_bad(torch.tensor([3, 1]))
    tensor([3, 1])
    """
    _check(result)
    return result


def _check(result: Any) -> None:
    if isinstance(result, (tuple, list)):
        for part in result:
            _check(part)
    elif isinstance(result, TopmEdit):
        if bool((result.nonfinite > 0).any()):
            tensor = int(result.nonfinite.nonzero()[0])
            count = int(result.nonfinite[tensor])
            check.fail(f"tuned[{tensor}] - base[{tensor}]", "be finite", f"{count} entries that are NaN or Inf")
    elif isinstance(result, ProjectionStats):
        if not bool(result.finite.all()):
            group = tuple((~result.finite).nonzero()[0].tolist())
            where = f"grads of group {group}" if group else "grads"
            check.fail(where, "be finite", "a NaN, an infinity or a squared norm beyond float64")
    elif isinstance(result, torch.Tensor):
        bad = result.isnan() if result.is_floating_point() else result < 0
        if bool(bad.any()):
            row = bad.nonzero()[0].tolist()[0] if result.dim() else 0
            value = "NaN" if result.is_floating_point() else "-1"
            check.fail(f"row {row}", "have a finite result", value, "Run the op on the CPU to see which input is bad.")
    else:
        check.fail("result", "be what an op returned", check.describe(result), error=TypeError)
