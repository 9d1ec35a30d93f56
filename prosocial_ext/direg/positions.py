"""Two encodings of ascending positions inside a tensor; a file takes the smaller one per tensor.

"bitmap": one bit per element, the lowest bit first. "gaps": the number of elements skipped before each position, in
LEB128 (7 bits a byte, low ones first, the top bit set on all but the last byte). At density 0.10 a bitmap takes 1.25
bytes per position, gaps about 1.0; int64 indices would take 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prosocial_ext import _C

__all__ = ["bits_of", "decode_gaps", "encode_gaps", "gap_bytes", "positions_of"]


def gap_bytes(positions: Tensor, previous: int) -> int:
    """The number of bytes that `encode_gaps` would return.

    >>> gap_bytes(torch.tensor([0, 1, 200]), previous=-1)
    4
    """
    positions = positions.contiguous()
    return int(_C.stream_gap_bytes(positions.data_ptr(), len(positions), previous))


def encode_gaps(positions: Tensor, previous: int) -> Tensor:
    """Encode ascending positions (int64 [n]) that follow ``previous`` (-1 at first) as uint8.

    >>> encode_gaps(torch.tensor([0, 1, 200]), previous=-1).tolist()
    [0, 0, 198, 1]
    """
    positions = positions.contiguous()
    encoded = torch.empty(gap_bytes(positions, previous), dtype=torch.uint8, device="cpu")
    _C.stream_encode_gaps(positions.data_ptr(), len(positions), previous, encoded.data_ptr())
    return encoded


def decode_gaps(encoded: Tensor, most: int, previous: int, numel: int) -> tuple[Tensor, int, bool]:
    """Decode at most ``most`` positions that follow ``previous`` from a block of bytes (uint8).

    Returns:
        The positions (int64), how many bytes they took, and whether all are below ``numel``. A gap that the block
        cuts off is left for the next one.

    Raises:
        OverflowError: A gap takes more than 7 bytes.

    >>> decode_gaps(torch.tensor([0, 198, 1, 200], dtype=torch.uint8), most=9, previous=-1, numel=200)
    (tensor([  0, 199]), 3, True)
    """
    encoded = encoded.contiguous()
    positions = torch.empty(min(most, len(encoded)), dtype=torch.int64, device="cpu")
    found, used, inside = _C.stream_decode_gaps(
        encoded.data_ptr(), len(encoded), len(positions), previous, numel, positions.data_ptr()
    )
    if found < 0:
        raise OverflowError
    return positions[:found], used, inside


def bits_of(positions: Tensor, first: int, count: int) -> Tensor:
    """Return ``count`` bytes of the bitmap, from that of element ``first`` (a multiple of 8) on.

    >>> bits_of(torch.tensor([8, 10, 16]), first=8, count=2).tolist()
    [5, 1]
    """
    positions = positions.contiguous()
    bitmap = torch.zeros(count, dtype=torch.uint8, device="cpu")
    _C.stream_set_bits(positions.data_ptr(), len(positions), first, bitmap.data_ptr())
    return bitmap


def positions_of(bitmap: Tensor, first: int) -> Tensor:
    """Return the positions (int64) that bytes of the bitmap mark, of which the first is that of element ``first``.

    >>> positions_of(torch.tensor([5, 1], dtype=torch.uint8), first=8)
    tensor([ 8, 10, 16])
    """
    bitmap = bitmap.contiguous()
    count = _C.stream_count_bits(bitmap.data_ptr(), len(bitmap))
    positions = torch.empty(count, dtype=torch.int64, device="cpu")
    _C.stream_get_bits(bitmap.data_ptr(), len(bitmap), first, positions.data_ptr())
    return positions
