"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in Python integers."""

from __future__ import annotations

_MASK = 0xFFFFFFFF


def philox4x32(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return the four 32-bit words of one Philox4x32-10 block.

    >>> [hex(word) for word in philox4x32((0, 0), (0, 0, 0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def philox(key: int, counter_low: int, counter_high: int) -> tuple[int, int, int, int]:
    """Return the block of a 64-bit key and a counter given as two 64-bit halves."""
    return philox4x32(
        (key & _MASK, (key >> 32) & _MASK),
        (counter_low & _MASK, (counter_low >> 32) & _MASK, counter_high & _MASK, (counter_high >> 32) & _MASK),
    )


def uniform_u64(key: int, counter_low: int, counter_high: int) -> int:
    """Return one uniform 64-bit word, ``word1 << 32 | word0``, in [0, 2**64)."""
    words = philox(key, counter_low, counter_high)
    return words[1] << 32 | words[0]
