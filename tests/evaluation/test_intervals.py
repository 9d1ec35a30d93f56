"""Bootstrap intervals: known answers, scipy's, coverage, and what moves with the data."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from prosocial_ext.evaluation import Estimate, bootstrap_difference, bootstrap_interval

METHODS = ["bca", "percentile"]
SKEWED = torch.distributions.LogNormal(0.0, 1.0).icdf((torch.arange(60, dtype=torch.float64) + 0.5) / 60)


def correlation(rows: torch.Tensor) -> float:
    return float(torch.corrcoef(rows.T)[0, 1])


@pytest.mark.parametrize(
    ("confidence", "low", "high"), [(0.95, 0.0, 1.0), (0.55, 0.0, 1.0), (0.45, 0.5, 0.5), (0.1, 0.5, 0.5)]
)
def test_two_values_have_resamples_of_known_shares(confidence: float, low: float, high: float) -> None:
    """The mean of two draws from {0, 1} is 0, 1/2, 1 with the shares 1/4, 1/2, 1/4."""
    expected = Estimate(0.5, low, high, 2)
    assert bootstrap_interval([0.0, 1.0], confidence=confidence, method="percentile") == expected
    assert bootstrap_interval([0.0, 1.0], confidence=confidence, method="bca") == expected  # symmetric: no correction


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_the_interval_is_scipys(method: str, confidence: float, statistic: str) -> None:
    of_torch: dict[str, Any] = {"mean": {}, "median": {"statistic": lambda sample: float(sample.quantile(0.5))}}
    found = bootstrap_interval(SKEWED, **of_torch[statistic], confidence=confidence, method=method)
    expected = scipy.stats.bootstrap(
        (SKEWED.numpy(),),
        getattr(np, statistic),
        confidence_level=confidence,
        method="BCa" if method == "bca" else method,
        n_resamples=10_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    # an end's Monte Carlo error at 10,000 resamples is about 2 % of the width; both have it
    near = 0.1 * (expected.high - expected.low)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=near)


def test_bca_leans_towards_the_long_tail() -> None:
    plain, corrected = (bootstrap_interval(SKEWED, method=method) for method in ("percentile", "bca"))
    assert corrected.low > plain.low
    assert corrected.high > plain.high


@pytest.mark.parametrize("method", METHODS)
def test_intervals_cover_the_truth_as_often_as_they_say(method: str) -> None:
    samples = torch.randn(400, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [bootstrap_interval(sample, confidence=0.9, method=method, resamples=500) for sample in samples]
    covered = sum(each.low <= 0 <= each.high for each in found) / len(found)
    assert 0.84 < covered < 0.94  # 0.9 less the bootstrap's known 1 or 2 points at n = 40; sigma is 1.5 points


@pytest.mark.parametrize("method", METHODS)
def test_shifting_and_scaling_the_data_shifts_and_scales_the_interval(method: str) -> None:
    one = bootstrap_interval(SKEWED, method=method)
    other = bootstrap_interval(3 * SKEWED + 7, method=method)
    assert (other.value, other.low, other.high) == pytest.approx((3 * one.value + 7, 3 * one.low + 7, 3 * one.high + 7))


def test_the_seed_decides() -> None:
    assert bootstrap_interval(SKEWED, seed=1) == bootstrap_interval(SKEWED, seed=1)
    assert bootstrap_interval(SKEWED, seed=1) != bootstrap_interval(SKEWED, seed=2)


def test_more_confidence_is_a_wider_interval() -> None:
    found = [bootstrap_interval(SKEWED, confidence=confidence) for confidence in (0.5, 0.9, 0.99, 0.9999)]
    assert all(a.low > b.low and a.high < b.high for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("method", METHODS)
def test_equal_values_have_an_empty_interval(method: str) -> None:
    assert bootstrap_interval([2.5] * 9, method=method) == Estimate(2.5, 2.5, 2.5, 9)


def test_rows_are_resampled_whole() -> None:
    """Columns drawn apart would show no correlation."""
    x = torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.stack([x, x + 0.1 * x.flip(0)], dim=1)
    found = bootstrap_interval(rows, correlation, resamples=1000)
    assert found.value == correlation(rows)
    assert 0.9 < found.low < found.value < found.high <= 1


def test_pairs_make_a_difference_narrow() -> None:
    others = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = others + 0.5 + 0.1 * others.flip(0)
    paired, apart = (bootstrap_difference(values, others, paired=paired) for paired in (True, False))
    assert paired.value == pytest.approx(apart.value) == pytest.approx(float((values - others).mean()))
    assert paired.high - paired.low < 0.2 * (apart.high - apart.low)
    assert paired == bootstrap_interval(values - others)


def test_a_difference_without_pairs_is_as_wide_as_the_two_together() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator, dtype=torch.float64)
    others = torch.randn(100, generator=generator, dtype=torch.float64)
    found = bootstrap_difference(values, others, paired=False)
    reach = 1.96 * float(values.var() / 400 + others.var() / 100) ** 0.5
    assert (found.low, found.high) == pytest.approx((found.value - reach, found.value + reach), abs=0.1 * reach)


REFUSED = {
    "no_values": ([[]], {}, "values must have shape [n] or [n, k] with n >= 2"),
    "one_value": ([[1.0]], {}, "values must have shape [n] or [n, k] with n >= 2"),
    "three_axes": ([torch.ones(2, 2, 2)], {}, "values must have shape [n] or [n, k]"),
    "nan": ([[1.0, float("nan")]], {}, "values[1] must be finite, got nan. Leave failed rows out."),
    "confidence": ([[1.0, 2.0]], {"confidence": 95}, "confidence must be in (0, 1), got 95"),
    "seed": ([[1.0, 2.0]], {"seed": -1}, "seed must be an integer in [0, 2**63), got -1"),
    "method": ([[1.0, 2.0]], {"method": "t"}, "method must be one of 'bca', 'percentile', got 't'"),
    "resamples": ([[1.0, 2.0]], {"resamples": 0}, "resamples must be a count >= 1, got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sample_is_refused(name: str) -> None:
    arguments, options, words = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        bootstrap_interval(*arguments, **options)


def test_pairs_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("others must have 3 values, as values, got 2. Pass paired=False.")):
        bootstrap_difference([1.0, 2.0, 3.0], [1.0, 2.0])


def test_differences_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("others must have shape [n]")):
        bootstrap_difference([1.0, 2.0], torch.ones(2, 2))
