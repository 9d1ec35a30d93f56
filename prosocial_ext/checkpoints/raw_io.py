"""Reads and writes at a place of an open file, all of it or an error."""

from __future__ import annotations

import os

import torch
from torch import Tensor

__all__ = ["read_all", "write_all"]


def read_all(descriptor: int, start: int, stop: int, into: Tensor | None = None) -> Tensor:
    """Return bytes [start, stop) of a file as a new uint8 tensor, or in ``into``, one of their number.

    Raises:
        EOFError: The file ends before.
    """
    buffer = torch.empty(stop - start, dtype=torch.uint8, device="cpu") if into is None else into
    view, done = buffer.numpy().data, 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], start + done)
        if got == 0:
            raise EOFError
        done += got
    return buffer


def write_all(descriptor: int, place: int, content: Tensor | bytes) -> None:
    """Write bytes, or those of a flat CPU tensor, at ``place`` of a file.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     write_all(file.fileno(), 2, torch.tensor([1, 2], dtype=torch.uint8))
    ...     read_all(file.fileno(), 1, 4)
    tensor([0, 1, 2], dtype=torch.uint8)
    """
    if len(content) == 0:
        return  # numpy gives no buffer of nothing
    raw = content.contiguous().view(torch.uint8).numpy().data if isinstance(content, Tensor) else content
    view, done = memoryview(raw), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], place + done)
