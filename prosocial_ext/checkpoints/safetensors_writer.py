"""Writes a safetensors file of any size in pieces: room for the header first, then bodies, the header's text last."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from prosocial_ext.checkpoints.raw_io import write_all
from prosocial_ext.checkpoints.safetensors_header import BITS, TensorEntry, render_header

__all__ = ["SafetensorsWriter"]


class SafetensorsWriter:
    """Adds tensors to an open, empty file one after the other; their elements are written in any order.

    The header's length must be known before the bodies, its text only after them: ``room`` bytes are kept for it and
    filled up with spaces, which the format allows.

    Args:
        descriptor: Of the file, which stays the caller's.
        room: Bytes for the header, a multiple of 8, at least what `finish` will need.

    >>> import tempfile, torch, safetensors.torch
    >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
    ...     writer = SafetensorsWriter(file.fileno(), room=256)
    ...     at = writer.add("w", "F32", (2,))
    ...     writer.write(at, torch.tensor([1.0, 2.0]))
    ...     writer.finish({"made": "by hand"})
    ...     safetensors.torch.load_file(file.name)
    {'w': tensor([1., 2.])}
    """

    def __init__(self, descriptor: int, room: int) -> None:
        self._descriptor, self._room = descriptor, room
        self._entries: list[TensorEntry] = []
        self._end = 0

    def add(self, name: str, dtype: str, shape: tuple[int, ...]) -> int:
        """Place a tensor behind those before it; return its first byte's place in the file."""
        entry = TensorEntry(name, dtype, shape, self._end, self._end)
        stop = self._end + entry.numel * BITS[dtype] // 8
        self._entries.append(TensorEntry(name, dtype, shape, self._end, stop))
        start, self._end = self._end, stop
        return self._room + start

    def write(self, place: int, values: Tensor) -> None:
        """Write a flat tensor's bytes at ``place``; what is never written reads as zeros."""
        write_all(self._descriptor, place, values)

    def header_bytes(self, metadata: Mapping[str, str]) -> int:
        """The room that the header needs for the tensors added so far."""
        return len(render_header(self._entries, metadata))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header and give the file its size."""
        header = render_header(self._entries, metadata, self._room)
        assert len(header) == self._room, f"the header needs {len(header)} bytes, {self._room} were kept"
        write_all(self._descriptor, 0, header)
        os.ftruncate(self._descriptor, self._room + self._end)
