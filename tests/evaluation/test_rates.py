"""Rates and their intervals."""

import re

import pytest
import torch
from scipy.stats import binomtest

from prosocial_ext.evaluation import rate


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 300), (300, 300), (34, 300), (1, 7), (150, 300)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_interval_is_wilsons(hits: int, n: int, confidence: float) -> None:
    expected = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    result = rate([True] * hits + [False] * (n - hits), confidence)
    assert result.value == hits / n
    assert result.n == n
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("n", [1, 3, 1000])
def test_none_and_all_have_exact_ends_and_a_width(n: int) -> None:
    none, every = rate([0] * n), rate([1] * n)
    assert none.low == none.value == 0.0 < none.high < 1.0
    assert every.high == every.value == 1.0 > every.low > 0.0


@pytest.mark.parametrize(
    "flags", [[True, False, True], [1, 0, 1], torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, 1.0])],
    ids=["bools", "ints", "bool_tensor", "float_tensor"],
)  # fmt: skip
def test_flags_of_any_kind_read_alike(flags: object) -> None:
    assert rate(flags) == rate(iter([True, False, True]))


def test_no_flags_are_refused() -> None:
    with pytest.raises(ValueError, match="flags must hold at least one flag, got none"):
        rate([])


@pytest.mark.parametrize("flag", [0.5, 2, float("nan")])
def test_a_score_is_no_flag(flag: float) -> None:
    with pytest.raises(ValueError, match=re.escape("flags[1] must be true or false, 1 or 0")):
        rate([1, flag])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, float("nan")])
def test_a_confidence_outside_0_to_1_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\).*For 95 per cent pass 0.95"):
        rate([True], confidence)
