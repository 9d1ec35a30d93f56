"""Two encodings of ascending positions inside a tensor; a file takes the smaller one per tensor.

"bitmap": one bit per element, the lowest bit first. "gaps": the number of elements skipped before each position, in
LEB128 (7 bits a byte, low ones first, the top bit set on all but the last byte). At density 0.10 a bitmap takes 1.25
bytes per position, gaps about 1.0; int64 indices would take 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MOST_GAP_BYTES", "bits_of", "decode_gaps", "encode_gaps", "gap_bytes", "positions_of"]

MOST_GAP_BYTES = 7  # 49 bits: tensors have at most 2**48 elements
_BIT = torch.arange(8, dtype=torch.uint8, device="cpu")


def gap_bytes(positions: Tensor, previous: int) -> int:
    """The number of bytes that `encode_gaps` would return.

    >>> gap_bytes(torch.tensor([0, 1, 200]), previous=-1)
    4
    """
    lengths = _lengths(_gaps(positions, previous))
    return len(positions) if lengths is None else int(lengths.sum())


def encode_gaps(positions: Tensor, previous: int) -> Tensor:
    """Encode ascending positions (int64 [n]) that follow ``previous`` (-1 at first) as uint8.

    >>> encode_gaps(torch.tensor([0, 1, 200]), previous=-1).tolist()
    [0, 0, 198, 1]
    """
    gaps = _gaps(positions, previous)
    lengths = _lengths(gaps)
    if lengths is None:
        return gaps.to(torch.uint8)
    starts = lengths.cumsum(0) - lengths
    encoded = torch.empty(int(lengths.sum()), dtype=torch.uint8, device="cpu")
    for k in range(int(lengths.max())):
        here = lengths > k
        digit = gaps[here] >> 7 * k & 127
        encoded[starts[here] + k] = (digit | (lengths[here] > k + 1).long() << 7).to(torch.uint8)
    return encoded


def decode_gaps(encoded: Tensor) -> tuple[Tensor, int]:
    """Return the gaps in a block of bytes (int64) and how many bytes at its end are the beginning of another.

    Raises:
        OverflowError: A gap is longer than `MOST_GAP_BYTES`.

    >>> decode_gaps(torch.tensor([0, 198, 1, 200], dtype=torch.uint8))
    (tensor([  0, 198]), 1)
    """
    if len(encoded) == 0 or int(encoded.max()) < 128:  # most blocks, at a density of a few per cent and more
        return encoded.long(), 0
    ends = (encoded < 128).nonzero().flatten()
    used = int(ends[-1]) + 1 if len(ends) else 0
    left = len(encoded) - used
    starts = torch.cat([ends.new_zeros(min(1, len(ends))), ends[:-1] + 1])
    lengths = ends - starts + 1
    longest = int(lengths.max()) if len(lengths) else 0
    if max(longest, left + 1) > MOST_GAP_BYTES:
        raise OverflowError
    gaps = torch.zeros_like(ends)
    for k in range(longest):
        here = lengths > k
        gaps[here] |= (encoded[starts[here] + k].long() & 127) << 7 * k
    return gaps, left


def bits_of(positions: Tensor, first: int, count: int) -> Tensor:
    """Return ``count`` bytes of the bitmap, from that of element ``first`` (a multiple of 8) on.

    >>> bits_of(torch.tensor([8, 10, 16]), first=8, count=2).tolist()
    [5, 1]
    """
    marks = torch.zeros(8 * count, dtype=torch.uint8, device="cpu")
    marks[positions - first] = 1
    return (marks.view(count, 8) << _BIT).sum(1, dtype=torch.uint8)


def positions_of(bitmap: Tensor, first: int) -> Tensor:
    """Return the positions (int64) that bytes of the bitmap mark, of which the first is that of element ``first``.

    >>> positions_of(torch.tensor([5, 1], dtype=torch.uint8), first=8)
    tensor([ 8, 10, 16])
    """
    return (bitmap[:, None] >> _BIT & 1).flatten().nonzero().flatten() + first


def _gaps(positions: Tensor, previous: int) -> Tensor:
    return torch.diff(positions, prepend=positions.new_full((min(1, len(positions)),), previous)) - 1


def _lengths(gaps: Tensor) -> Tensor | None:
    """Bytes per gap; None where it is one for all."""
    largest = int(gaps.max()) if len(gaps) else 0
    if largest < 128:
        return None
    lengths = torch.ones_like(gaps)
    for k in range(1, MOST_GAP_BYTES):
        if largest >= 1 << 7 * k:
            lengths += gaps >= 1 << 7 * k
    return lengths
