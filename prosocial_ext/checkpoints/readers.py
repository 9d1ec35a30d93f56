"""Where the elements of one tensor come from: a file, or memory of any device. Everything is read in chunks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from prosocial_ext.checkpoints.safetensors_file import DTYPES, SafetensorsFile
from prosocial_ext.ops import _stream as streaming

__all__ = ["FileReader", "Reader", "TensorReader", "word_sum"]


class Reader(Protocol):
    """A flat (row-major) tensor that is read piece by piece; pieces lie on the CPU."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its elements."""

    def read(self, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Elements [start, stop); ``into``, uint8 of their number of bytes, is memory that they may be put in."""

    def gather(self, positions: Tensor) -> Tensor:
        """The elements at ``positions``, int64 [n]."""


class FileReader:
    """A tensor of a safetensors file."""

    def __init__(self, file: SafetensorsFile, name: str) -> None:
        self._file, self._name = file, name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its elements."""
        return DTYPES[self._file.entry(self._name).dtype]

    def read(self, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Elements [start, stop)."""
        return self._file.read(self._name, start, stop, into)

    def gather(self, positions: Tensor) -> Tensor:
        """The elements at ``positions``."""
        return self._file.gather(self._name, positions)


class TensorReader:
    """A tensor in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._flat = tensor.detach().reshape(-1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its elements."""
        return self._flat.dtype

    def read(self, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Elements [start, stop)."""
        return self._flat[start:stop].cpu()

    def gather(self, positions: Tensor) -> Tensor:
        """The elements at ``positions``."""
        return self._flat[positions.to(self._flat.device)].cpu()


def word_sum(elements: Tensor) -> int:
    """The sum of a chunk's 64-bit words modulo 2^64, the last one filled up with zeros.

    The sums of chunks, each but the last a multiple of 8 bytes, add up to the sum of the whole.

    >>> word_sum(torch.tensor([1, 2, 3], dtype=torch.int32)) == 1 + (2 << 32) + 3
    True
    """
    return streaming.word_sum(elements)
