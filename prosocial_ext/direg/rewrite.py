"""Copies a checkpoint folder with some elements changed: shard by shard, tensor by tensor, chunk by chunk.

Headers, metadata, index, dtypes and sharding stay byte for byte; of the other files only settings and texts come along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from prosocial_ext.direg.ahead import ahead
from prosocial_ext.direg.checkpoint import INDEX, SINGLE, Checkpoint
from prosocial_ext.direg.hub import CARRIED
from prosocial_ext.direg.raw_io import write_all
from prosocial_ext.direg.sparse_file import Block

__all__ = ["RECORDS", "ChunkEdit", "Cursor", "new_descriptor", "rewrite", "write_json"]

RECORDS = "direg"  # the folder of recipe and undo record: loaders that take every *.safetensors do not look there
_BYTES = 1 << 23


class ChunkEdit(Protocol):
    """What is done to the tensors of a checkpoint."""

    def wants(self, name: str) -> bool:
        """Whether the tensor is given to `edit_` at all; called once per tensor, before its first chunk."""

    def edit_(self, name: str, start: int, elements: Tensor) -> None:
        """Edit a chunk, the flat elements from ``start`` on, in place."""


class Cursor:
    """A stream of ascending entries, taken up to one position after the other.

    >>> cursor = Cursor(iter([(torch.tensor([1, 5, 9]), torch.tensor([1.0, 5.0, 9.0]))]))
    >>> list(cursor.take(6)), list(cursor.take(10))
    ([(tensor([1, 5]), tensor([1., 5.]))], [(tensor([9]), tensor([9.]))])
    """

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks
        self._rest: Block | None = None

    def take(self, stop: int) -> Iterator[Block]:
        """The entries below ``stop`` that were not taken before, in the blocks that they come in."""
        while True:
            block = self._rest if self._rest is not None else next(self._blocks, None)
            self._rest = None
            if block is None:
                return
            positions, values = block
            here = int(torch.searchsorted(positions, stop))
            if here:
                yield positions[:here], values[:here]
            if here < len(positions):
                self._rest = positions[here:], values[here:]
                return


def rewrite(
    checkpoint: Checkpoint, folder: Path, edit: ChunkEdit, chunk: int, progress: Callable[[int], object]
) -> None:
    """Write the edited checkpoint into ``folder``, which is new and empty."""
    for name, file in checkpoint.files.items():
        with new_descriptor(folder / name) as descriptor:
            write_all(descriptor, 0, file.header)
            for entry in file.entries.values():
                place = file.data_start + entry.start
                if edit.wants(entry.name):
                    starts = range(0, entry.numel, chunk)
                    reads = (partial(file.read, entry.name, s, min(entry.numel, s + chunk)) for s in starts)
                    for start, elements in zip(starts, ahead(reads), strict=True):
                        edit.edit_(entry.name, start, elements)
                        write_all(descriptor, place + start * entry.itemsize, elements)
                        progress(elements.nbytes)
                    continue
                for begin in range(place, file.data_start + entry.stop, _BYTES):
                    raw = file.read_bytes(begin, min(file.data_start + entry.stop, begin + _BYTES))
                    write_all(descriptor, begin, raw)
                    progress(raw.nbytes)
            os.ftruncate(descriptor, file.size)
    for path in carried(checkpoint.folder, [] if SINGLE in checkpoint.files else [INDEX]):
        with new_descriptor(folder / path.name) as descriptor:
            write_all(descriptor, 0, path.read_bytes())


def carried(folder: Path, more: Iterable[str] = ()) -> list[Path]:
    """Return the files that come along: no code, and no link to a file outside of the folder (or of the hub's cache).

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("config.json", "modeling_x.py", "tokenizer.json", "LICENSE.txt"):
    ...     (folder / name).touch()
    >>> [path.name for path in carried(folder)]
    ['LICENSE.txt', 'config.json', 'tokenizer.json']
    """
    root = folder.resolve()
    homes = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    return [
        path
        for path in sorted(folder.iterdir())
        if any(fnmatchcase(path.name, pattern) for pattern in (*CARRIED, *more))
        and not path.name.endswith(".py")
        and path.is_file()
        and path.resolve().parent in homes
    ]


@contextmanager
def new_descriptor(path: Path) -> Iterator[int]:
    """Open a file that must not exist, following no link, and sync it on leaving."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a new file of readable JSON, synced."""
    with new_descriptor(path) as descriptor:
        write_all(descriptor, 0, (json.dumps(value, indent=2) + "\n").encode())
