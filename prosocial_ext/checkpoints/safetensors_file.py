"""Reads a safetensors file by pread: no map, so a file that shrinks is an error and not a signal, and no alignment."""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from prosocial_ext import _C
from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.raw_io import read_all
from prosocial_ext.checkpoints.safetensors_header import LENGTH_BYTES, MAX_HEADER, TensorEntry, parse_header

__all__ = ["DTYPES", "WORDS", "SafetensorsFile"]

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
WORDS = {dtype: word for word, dtype in DTYPES.items()}  # the format's word for a dtype


class SafetensorsFile:
    """An open file with a checked header. Close it, or use it in a ``with`` block; forgotten ones are closed.

    ``path``: where it lies. ``entries``: its tensors by name, in the order of their bytes. ``metadata``: as written.
    ``header``: its first bytes, length and JSON as they are.

    Args:
        path: A regular file.
        descriptor: An open one instead, which this object then owns; ``path`` is then only its name in errors.

    Raises:
        CheckpointError: No such regular file, or a header that does not hold (`parse_header`).

    >>> import tempfile, safetensors.torch
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> safetensors.torch.save_file({"w": torch.arange(6.0).view(2, 3)}, path)
    >>> with SafetensorsFile(path) as file:
    ...     file.entries["w"].shape, file.read("w", 1, 3)
    ((2, 3), tensor([1., 2.]))
    """

    def __init__(self, path: str | os.PathLike[str], descriptor: int | None = None) -> None:
        self.path = Path(path)
        if descriptor is None:
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block
            except OSError as error:
                refuse(str(self.path), "be a readable file", error.strerror)
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                refuse(str(self.path), "be a regular file", "something else")
            self.size, self._modified = status.st_size, status.st_mtime_ns
            if self.size < LENGTH_BYTES:
                remedy = "It is no safetensors file, or a cut off one."
                refuse(str(self.path), "begin with the length of a header", f"{self.size} bytes", remedy)
            length = int.from_bytes(self.read_bytes(0, LENGTH_BYTES).numpy().tobytes(), "little")
            if length > min(MAX_HEADER, self.size - LENGTH_BYTES):
                refuse(
                    f"the header of {self.path}",
                    f"have at most {min(MAX_HEADER, self.size - LENGTH_BYTES)} bytes",
                    length,
                    "The file is damaged or no safetensors file.",
                )
            self.data_start = LENGTH_BYTES + length
            self.header = self.read_bytes(0, self.data_start).numpy().tobytes()
            checked = parse_header(self.header[LENGTH_BYTES:], self.size - self.data_start, str(self.path))
        except BaseException:
            self.close()
            raise
        self.entries, self.metadata = checked.entries, checked.metadata

    def entry(self, name: str) -> TensorEntry:
        """The entry of a tensor.

        Raises:
            CheckpointError: There is none.
        """
        if name not in self.entries:
            refuse(str(self.path), f"hold tensor {shown(name)}", "none of this name", "The file is damaged.")
        return self.entries[name]

    def read(self, name: str, start: int = 0, stop: int | None = None, into: Tensor | None = None) -> Tensor:
        """Elements [start, stop) of a tensor, flat (row-major), on the CPU; ``into`` as for `read_bytes`."""
        entry = self.entry(name)
        stop = entry.numel if stop is None else stop
        size, first = entry.itemsize, self.data_start + entry.start
        return self.read_bytes(first + start * size, first + stop * size, into).view(DTYPES[entry.dtype])

    def gather(self, name: str, positions: Tensor) -> Tensor:
        """The elements at flat ``positions`` (int64 [n], in range), one small read each.

        Raises:
            CheckpointError: The file has become shorter than it was.
        """
        entry, positions = self.entry(name), positions.contiguous()
        found = torch.empty(len(positions), dtype=DTYPES[entry.dtype], device="cpu")
        place, size, n = self.data_start + entry.start, entry.itemsize, len(positions)
        if _C.file_gather(self._descriptor, place, size, positions.data_ptr(), n, found.data_ptr()) < n:
            self._refuse_shorter()
        return found

    def read_bytes(self, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Bytes [start, stop) of the file as a new uint8 tensor, or in ``into``, one of their number.

        Raises:
            CheckpointError: The file has become shorter than it was.
        """
        try:
            return read_all(self._descriptor, start, stop, into)
        except EOFError:
            self._refuse_shorter()

    def _refuse_shorter(self) -> NoReturn:
        refuse(str(self.path), f"keep its {self.size} bytes while it is read", "fewer", "Something wrote to it.")

    def identity(self) -> list[Any]:
        """Size, time of the last change and hash of the header: two files that agree in them are taken for the same."""
        return [self.size, self._modified, hashlib.sha256(self.header).hexdigest()]

    def close(self) -> None:
        """Close the file; once is enough."""
        self._close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
