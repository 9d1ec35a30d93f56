"""What one read of the data keeps, a piece per chunk: in memory first, then in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from prosocial_ext.checkpoints.raw_io import read_all, write_all
from prosocial_ext.checkpoints.readers import word_sum
from prosocial_ext.ops._stream import Buffers

__all__ = ["Kept", "Piece"]


class Piece(NamedTuple):
    """Where the kept entries of one chunk lie: in memory or in the file, from a byte on."""

    start: int
    n: int
    in_memory: bool
    place: int
    dtype: torch.dtype
    columns: int

    @property
    def parts(self) -> list[tuple[str, int, torch.dtype]]:
        """Name, first byte and dtype of offsets and columns; each begins at a multiple of 8."""
        sizes = [_padded(4 * self.n)] + [_padded(self.dtype.itemsize * self.n)] * self.columns
        names = ["offsets", *(f"column {k}" for k in range(self.columns))]
        dtypes = [torch.int32, *[self.dtype] * self.columns]
        return list(zip(names, accumulate(sizes[:-1], initial=self.place), dtypes, strict=True))


class Kept:
    """Candidates, a piece per chunk of data: offsets in the chunk and columns. In memory first, then in a file.

    ``pieces``: by tensor, in the order of the chunks.

    Args:
        descriptor: Of the file.
        room: Bytes of memory.
        lasting: What the file holds stays, and is added up for `settle`.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     kept = Kept(file.fileno(), room=1024, lasting=True)
    ...     kept.append(0, 100, torch.tensor([1, 3], dtype=torch.int32), [torch.tensor([0.5, 1.0])])
    ...     kept.settle()[0], kept.read(kept.pieces[0][0], Buffers())
    (16, (tensor([1, 3], dtype=torch.int32), [tensor([0.5000, 1.0000])]))
    """

    def __init__(self, descriptor: int, room: int, *, lasting: bool = False) -> None:
        self._descriptor, self._memory = descriptor, torch.empty(room, dtype=torch.uint8, device="cpu")
        self._bytes = self._memory.numpy().data
        self._lasting = lasting
        self.pieces: dict[int, list[Piece]] = {}
        self._used = self._sum = 0
        self._end = os.fstat(descriptor).st_size
        self._in_memory: set[int] = set()  # tensors

    def forget(self, tensors: Iterable[int]) -> None:
        """Drop the pieces of these tensors, and all others, with their room, unless the file lasts."""
        for i in tensors:
            self.pieces.pop(i, None)
        if not self._lasting:
            self.pieces.clear()
            self._used = self._end = 0
            os.ftruncate(self._descriptor, 0)

    def append(self, tensor: int, start: int, offsets: Tensor, columns: Sequence[Tensor]) -> None:
        """Keep the entries of the next chunk of a tensor, int32 from its first element on, and columns of one dtype."""
        count, dtype = len(offsets), columns[0].dtype
        if count == 0:
            return  # numpy gives no buffer of nothing
        size = _padded(4 * count) + len(columns) * _padded(dtype.itemsize * count)
        in_memory = self._used + size <= len(self._memory)
        place = self._used if in_memory else self._end
        piece = Piece(start, count, in_memory, place, dtype, len(columns))
        self.pieces.setdefault(tensor, []).append(piece)
        for (_, at, _), part in zip(piece.parts, (offsets, *columns), strict=True):
            if in_memory:
                self._bytes[at : at + part.nbytes] = part.contiguous().view(torch.uint8).numpy().data  # one thread
            else:
                write_all(self._descriptor, at, part)
                self._sum += word_sum(part) if self._lasting else 0
        if in_memory:
            self._used += size
            self._in_memory.add(tensor)
        else:
            self._end += size

    def count(self, tensors: Iterable[int]) -> int:
        """The number of entries kept of these tensors."""
        return sum(piece.n for i in tensors for piece in self.pieces.get(i, []))

    def read(self, piece: Piece, buffers: Buffers) -> tuple[Tensor, list[Tensor]]:
        """Offsets and columns; they may lie in the buffers."""
        found = []
        for name, at, dtype in piece.parts:
            stop = at + piece.n * dtype.itemsize
            if piece.in_memory:
                found.append(self._memory[at:stop].view(dtype))
                continue
            found.append(buffers.take(name, piece.n, dtype))
            read_all(self._descriptor, at, stop, found[-1].view(torch.uint8))
        return found[0], found[1:]

    def settle(self) -> tuple[int, int]:
        """Put on the disk what is in memory, which is free again; return where the file ends, and a sum.

        The sum is that of the words (`word_sum`) by which the file has grown since the last call.
        """
        if self._used:
            held = self._memory[: self._used]
            write_all(self._descriptor, self._end, held)
            for i in self._in_memory:
                moved = (piece._replace(in_memory=False, place=self._end + piece.place) if piece.in_memory else piece
                         for piece in self.pieces.get(i, []))  # fmt: skip
                self.pieces[i] = list(moved)
            self._in_memory.clear()
            self._sum += word_sum(held)
            self._end += self._used
            self._used = 0
        os.ftruncate(self._descriptor, self._end)  # the last piece's padding
        os.fsync(self._descriptor)
        total, self._sum = self._sum % 2**64, 0
        return self._end, total


def _padded(size: int) -> int:
    return -(-size // 8) * 8
