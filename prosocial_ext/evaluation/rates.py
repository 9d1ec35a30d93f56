"""How often something happened, with an interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from prosocial_ext.evaluation.intervals import Estimate
from prosocial_ext.reference import check

__all__ = ["Rate", "rate"]


@dataclass(frozen=True)
class Rate(Estimate):
    """A share of ``n`` trials and the ends of its confidence interval, all in [0, 1]."""


def rate(flags: Iterable[Any], confidence: float = 0.95) -> Rate:
    """Return the share of true flags with its Wilson score interval (Wilson 1927).

    Unlike the normal approximation the interval stays within [0, 1] and is not empty at 0 or n of n, where an edited
    model's harm rate often is.

    Args:
        flags: booleans, or numbers or tensor elements that are 0 or 1; at least one.
        confidence: how often such intervals cover the true share, in (0, 1).

    Raises:
        ValueError: no flags, a flag other than 0 and 1, or a confidence outside (0, 1).

    >>> print(rate([True, False, False, False]))
    0.250 (0.046..0.699, n = 4)
    >>> print(rate([False] * 300))
    0.000 (0.000..0.013, n = 300)
    """
    read = [float(flag) for flag in flags]
    if not read:
        check.fail("flags", "hold at least one flag", "none", "A rate of nothing has no value.")
    for index, flag in enumerate(read):
        if flag not in (0.0, 1.0):
            check.fail(f"flags[{index}]", "be true or false, 1 or 0", flag, "Compare scores with a threshold first.")
    if not 0 < confidence < 1:
        check.fail("confidence", "be in (0, 1)", confidence, "For 95 per cent pass 0.95.")
    n, p = len(read), sum(read) / len(read)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at 0 and n of n the end is p exactly; rounding would miss it by an ulp
    return Rate(p, 0.0 if p == 0 else centre - reach, 1.0 if p == 1 else centre + reach, n)
