"""How sure a figure is: bootstrap intervals of means, differences and anything else that a sample gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.reference import check

__all__ = ["Estimate", "bootstrap_difference", "bootstrap_interval", "mean"]

_METHODS = ("bca", "percentile")
_DRAWN_AT_ONCE = 1 << 22  # indices: 32 MiB
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Estimate:
    """A figure of ``n`` values and the ends of its confidence interval.

    >>> print(Estimate(value=0.25, low=0.1, high=0.5, n=12))
    0.250 (0.100..0.500, n = 12)
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}..{self.high:.3f}, n = {self.n})"


def mean(sample: Tensor) -> float:
    """Return the mean of all values.

    >>> mean(torch.tensor([1.0, 2.0]))
    1.5
    """
    return float(sample.mean())


def bootstrap_interval(
    values: Any,
    statistic: Callable[[Tensor], float] = mean,
    confidence: float = 0.95,
    seed: int = 0,
    *,
    method: str = "bca",
    resamples: int = 10_000,
) -> Estimate:
    """Return a statistic of a sample with its bootstrap interval (Efron 1987).

    Rows are resampled whole: a statistic of several columns sees each row's values together, which is the paired
    bootstrap. A sample of equal values has an empty interval; for shares near 0 or 1 use `rate`.

    Args:
        values: [n] or [n, k], a row per independent trial (not per token), n >= 2; numbers or a tensor.
        statistic: maps float64 [n] or [n, k] to a number; the mean is computed for all resamples at once.
        confidence: how often such intervals cover the true value, in (0, 1).
        seed: of the resamples, in [0, 2**63); the same seed gives the same interval.
        method: "bca" corrects the percentiles for bias and skew, "percentile" takes them as they are.
        resamples: how many, >= 1.

    Raises:
        ValueError, TypeError: fewer than two rows, a value that is not finite, or an argument out of its range.

    >>> print(bootstrap_interval([1.0, 2.0, 3.0, 4.0, 5.0], seed=0, method="percentile"))
    3.000 (1.800..4.200, n = 5)
    >>> bootstrap_interval([[1.0, 2.0], [2.0, 3.0], [5.0, 6.0]], lambda rows: mean(rows[:, 1] - rows[:, 0])).low
    1.0
    """
    sample = _sample("values", values)
    _check(confidence, seed, method, resamples)
    n, value = len(sample), float(statistic(sample))
    generator = torch.Generator().manual_seed(seed)
    drawn = _replicates(sample, statistic, resamples, generator)

    if method == "bca":
        shares = _corrected(confidence, drawn, value, _without_each(sample, statistic))
    else:
        shares = _tails(confidence)
    return Estimate(value, *_quantiles(drawn, shares), n)


def bootstrap_difference(
    values: Any,
    others: Any,
    confidence: float = 0.95,
    seed: int = 0,
    *,
    paired: bool = True,
    method: str = "bca",
    resamples: int = 10_000,
) -> Estimate:
    """Return mean(values) - mean(others) with its bootstrap interval.

    Args:
        values: [n].
        others: [n], the same prompts in the same order, where ``paired``; else [m], resampled on its own.
        paired: take the differences of the pairs: narrower where both depend on the prompt.
        confidence, seed, method, resamples: as in `bootstrap_interval`; without pairs the method is "percentile".

    Returns:
        The difference; its ``n`` is that of ``values``.

    Raises:
        ValueError, TypeError: lengths that differ where ``paired``, and as in `bootstrap_interval`.

    >>> print(bootstrap_difference([1.0, 5.0, 9.0], [0.0, 4.0, 8.0]))
    1.000 (1.000..1.000, n = 3)
    >>> bootstrap_difference([1.0, 5.0, 9.0], [0.0, 4.0, 8.0], paired=False).low < 0
    True
    """
    one, other = _sample("values", values), _sample("others", others)
    for name, sample in (("values", one), ("others", other)):
        if sample.dim() != 1:
            check.fail(name, "have shape [n]", check.describe(sample))
    if check.boolean("paired", paired):
        if len(one) != len(other):
            check.fail("others", f"have {len(one)} values, as values", f"{len(other)}", "Pass paired=False.")
        return bootstrap_interval(one - other, mean, confidence, seed, method=method, resamples=resamples)
    _check(confidence, seed, method, resamples)
    generator = torch.Generator().manual_seed(seed)
    drawn = _replicates(one, mean, resamples, generator) - _replicates(other, mean, resamples, generator)
    return Estimate(mean(one) - mean(other), *_quantiles(drawn, _tails(confidence)), len(one))


def _sample(name: str, values: Any) -> Tensor:
    sample = torch.as_tensor(values).detach().cpu().double()
    if sample.dim() not in (1, 2) or len(sample) < 2 or sample.numel() == 0:
        check.fail(name, "have shape [n] or [n, k] with n >= 2", check.describe(sample), "One value has no spread.")
    if not bool(sample.isfinite().all()):
        index = (~sample.isfinite()).nonzero()[0].tolist()
        check.fail(f"{name}{index}", "be finite", sample[tuple(index)].item(), "Leave failed rows out.")
    return sample


def _check(confidence: Any, seed: Any, method: Any, resamples: Any) -> None:
    if not 0 < confidence < 1:
        check.fail("confidence", "be in (0, 1)", confidence, "For 95 per cent pass 0.95.")
    check.integer("seed", seed, 0, 2**63 - 1, "be an integer in [0, 2**63)")
    check.choice("method", method, _METHODS)
    check.integer("resamples", resamples, 1, 2**31, "be a count >= 1")


def _replicates(
    sample: Tensor, statistic: Callable[[Tensor], float], resamples: int, generator: torch.Generator
) -> Tensor:
    """The statistic of every resample, float64 [resamples]."""
    n, parts = len(sample), []
    at_once = max(1, _DRAWN_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        rows = torch.randint(n, (min(at_once, resamples - start), n), generator=generator)
        if statistic is mean:
            parts.append(sample[rows].flatten(1).mean(dim=1))
        else:
            parts.append(torch.tensor([float(statistic(sample[row])) for row in rows], dtype=torch.float64))
    return torch.cat(parts)


def _without_each(sample: Tensor, statistic: Callable[[Tensor], float]) -> Tensor:
    """The jackknife: the statistic without row i, float64 [n]."""
    n = len(sample)
    if statistic is mean:
        each = sample.reshape(n, -1).mean(dim=1)
        return (each.sum() - each) / (n - 1)
    rows = torch.arange(n)
    return torch.tensor([float(statistic(sample[rows != i])) for i in range(n)], dtype=torch.float64)


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2


def _corrected(confidence: float, drawn: Tensor, value: float, without_each: Tensor) -> tuple[float, float]:
    """The shares at which BCa reads the percentiles: bias from the resamples, skew from the jackknife."""
    below = float((drawn < value).double().mean() + (drawn == value).double().mean() / 2)
    edge = 0.5 / len(drawn)  # all on one side: as far out as so many resamples can tell
    bias = _NORMAL.inv_cdf(min(max(below, edge), 1 - edge))
    away = without_each.mean() - without_each
    spread = float(away.square().sum()) ** 1.5
    skew = float(away.pow(3).sum()) / (6 * spread) if spread > 0 else 0.0
    low, high = (bias + _NORMAL.inv_cdf(share) for share in _tails(confidence))
    # |skew| <= 1/6, so only confidences near 1 bring the divisor to 0; the share is then 0 or 1
    low, high = (_NORMAL.cdf(bias + z / max(1 - skew * z, 1e-9)) for z in (low, high))
    return low, high


def _quantiles(drawn: Tensor, shares: tuple[float, float]) -> tuple[float, float]:
    """Two quantiles, interpolated linearly; torch.quantile refuses more than 2**24 values."""
    ordered = drawn.sort().values

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return float(ordered[below].lerp(ordered[above], place - below))

    return at(shares[0]), at(shares[1])
