"""Hostile inputs shared by the tests of the ops, by name."""

from __future__ import annotations

import math
import mmap

import torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def logits_cases(vocab: int = 300) -> dict[str, torch.Tensor]:
    """Rows of logits [2, vocab] chosen to hurt a sampler."""
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(2, vocab, generator=generator)
    one_finite = torch.full((2, vocab), -math.inf)
    one_finite[0, vocab // 2] = 3.0
    one_finite[1, 0] = -5.0
    masked = normal.clone()
    masked[:, ::3] = -math.inf
    signed_zeros = torch.zeros(2, vocab)
    signed_zeros[:, ::2] = -0.0
    denormal = normal * 1e-41
    return {
        "normal": normal,
        "peaked": normal * 20,
        "flat": normal * 1e-3,
        "all_equal": torch.full((2, vocab), 2.5),
        "signed_zeros": signed_zeros,
        "ties_everywhere": (normal * 2).round(),
        "denormal": denormal,
        "one_finite": one_finite,
        "masked": masked,
        "huge": normal * 1e37,
        "ascending": torch.arange(vocab, dtype=torch.float32).repeat(2, 1) / 10,
        "far_apart": torch.where(normal > 0, 1e4, -1e4),
    }


def zero_pages(elements: int) -> torch.Tensor:
    """A bfloat16 tensor that costs memory only where it is written, for sizes past 2^31."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # pages of a shared map, mmap's default, are made by reads too
    pages = mmap.mmap(-1, elements * 2, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # reads then fault once in 2 MB
    return torch.frombuffer(pages, dtype=torch.bfloat16)


def border_words(weights):
    """The first and the last word of every possible token's share, and the token of each."""
    possible = weights.nonzero().flatten().tolist()
    mass = int(weights.sum())
    words, expected = [0, 2**64 - 1], [possible[0], possible[-1]]
    for border, before, after in zip(weights[possible].cumsum(0).tolist(), possible, possible[1:], strict=False):
        first = -(-(border << 64) // mass)  # the smallest word whose threshold reaches the border
        words += [first - 1, first]
        expected += [before, after]
    return words, expected
