"""How repetitive generated texts are: the first sign of guidance that is too strong."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch

from prosocial_ext.reference import check

__all__ = ["distinct_n", "repetition_rate"]


def _grams(sequence: Any, index: int, n: int) -> list[tuple[Hashable, ...]]:
    if isinstance(sequence, torch.Tensor):
        sequence = sequence.tolist()
    words = sequence.split() if isinstance(sequence, str) else sequence
    if not isinstance(words, Sequence):
        rule = "be a string, or a sequence of tokens"
        check.fail(f"sequences[{index}]", rule, check.describe(sequence), error=TypeError)
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def _order(n: Any) -> int:
    return check.integer("n", n, 1, 2**31, "be the length of a phrase, at least 1")


def distinct_n(sequences: Iterable[Any], n: int = 2) -> float:
    """Return the share of distinct n-grams among all n-grams of all sequences (distinct-n of Li et al., NAACL 2016).

    Falls as the number of texts grows: compare equal numbers of texts.

    Args:
        sequences: strings (split at white space), or lists or tensors of token ids without padding.
        n: the length of a phrase.

    Returns:
        A share in [0, 1]; 0 where there is no n-gram at all.

    Raises:
        TypeError, ValueError: a sequence that is none, or n below 1.

    >>> distinct_n(["a b a b", "a b c"], n=2)
    0.6
    """
    n = _order(n)
    grams = [gram for index, sequence in enumerate(sequences) for gram in _grams(sequence, index, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition_rate(sequences: Iterable[Any], n: int = 4) -> float:
    """Return the mean share of a sequence's n-grams that it has said before (seq-rep-n of Welleck et al., ICLR 2020).

    Args:
        sequences: as in ``distinct_n``; those shorter than ``n`` are left out of the mean.
        n: the length of a phrase.

    Returns:
        A share in [0, 1); 0 where no sequence has an n-gram.

    Raises:
        TypeError, ValueError: a sequence that is none, or n below 1.

    >>> repetition_rate(["so it goes so it goes", "all is well"], n=3)
    0.125
    """
    n = _order(n)
    every = [grams for index, sequence in enumerate(sequences) if (grams := _grams(sequence, index, n))]
    return sum(1 - len(set(grams)) / len(grams) for grams in every) / len(every) if every else 0.0
