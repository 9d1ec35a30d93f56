"""Distinct phrases and repeated ones."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prosocial_ext.evaluation import distinct_n, repetition_rate


@pytest.mark.parametrize(
    ("sequences", "n", "expected"),
    [
        (["a b c d"], 1, 1.0),
        (["a a a a"], 1, 0.25),
        (["a a a a"], 2, 1 / 3),
        (["a b", "a b"], 2, 0.5),
        (["a b", "b c"], 1, 0.75),  # pooled over texts
        (["a"], 2, 0.0),
        ([], 1, 0.0),
        ([""], 1, 0.0),
    ],
)
def test_distinct_n_of_known_texts(sequences: list[str], n: int, expected: float) -> None:
    assert distinct_n(sequences, n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sequences", "n", "expected"),
    [
        (["a b c d"], 1, 0.0),
        (["a a a a"], 1, 0.75),
        (["a b a b a b"], 2, 3 / 5),
        (["a b", "a b"], 2, 0.0),  # another text is no repetition
        (["a a", "a b"], 1, 0.25),  # the mean over texts
        (["a a", "b"], 2, 0.0),
        (["a a a", "b"], 2, 0.5),  # the short one is left out
        ([], 4, 0.0),
    ],
)
def test_repetition_rate_of_known_texts(sequences: list[str], n: int, expected: float) -> None:
    assert repetition_rate(sequences, n) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [distinct_n, repetition_rate])
def test_strings_lists_and_tensors_read_alike(measure: Callable[..., float]) -> None:
    words, ids = ["1 2 1 2 3", "2 3"], [[1, 2, 1, 2, 3], [2, 3]]
    assert measure(words, n=2) == measure(ids, n=2) == measure(map(torch.tensor, ids), n=2)


@pytest.mark.parametrize("measure", [distinct_n, repetition_rate])
def test_n_below_1_is_refused(measure: Callable[..., float]) -> None:
    with pytest.raises(ValueError, match="n must be the length of a phrase, at least 1, got 0"):
        measure(["a"], n=0)


@pytest.mark.parametrize("measure", [distinct_n, repetition_rate])
@pytest.mark.parametrize("bad", [5, None, {1}], ids=["int", "none", "set"])
def test_what_is_no_sequence_is_refused(measure: Callable[..., float], bad: Any) -> None:
    with pytest.raises(TypeError, match=re.escape("sequences[1] must be a string, or a sequence of tokens")):
        measure(["a", bad])
