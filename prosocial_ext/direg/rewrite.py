"""Copies a checkpoint folder with some elements changed: shard by shard, tensor by tensor, chunk by chunk.

Headers, metadata, index, dtypes and sharding stay byte for byte, up to what the outline changes; of the other files
only settings and texts come along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from prosocial_ext.checkpoints.ahead import ahead
from prosocial_ext.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.hub import CARRIED
from prosocial_ext.checkpoints.outputs import new_descriptor
from prosocial_ext.checkpoints.raw_io import write_all
from prosocial_ext.checkpoints.safetensors_file import DTYPES
from prosocial_ext.direg.outline import Outline
from prosocial_ext.direg.sparse_file import Block
from prosocial_ext.direg.widths import SIXTEEN, narrow, widen

__all__ = ["RECORDS", "ChunkEdit", "Cursor", "carry", "converted", "rewrite", "write_json"]

RECORDS = "direg"  # the folder of recipe and undo record: loaders that take every *.safetensors do not look there
_BYTES = 1 << 23


class ChunkEdit(Protocol):
    """What is done to the tensors of a checkpoint."""

    def file(self, name: str) -> AbstractContextManager[object]:
        """Enclose what is done to the tensors of one weight file; a file is never begun twice."""

    def wants(self, name: str) -> bool:
        """Whether the tensor is given to `edit_` at all; called once per tensor, before its first chunk."""

    def edit_(self, name: str, start: int, elements: Tensor) -> Tensor:
        """Edit a chunk, the flat elements from ``start`` on; return it, in any dtype that `converted` takes."""


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

    def take_whole(self, stop: int) -> Block:
        """The same as one block."""
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu"), torch.zeros(0, device="cpu")
        parts = list(self.take(stop)) or [nothing]
        return torch.cat([positions for positions, _ in parts]), torch.cat([values for _, values in parts])


def rewrite(
    checkpoint: Checkpoint,
    files: Iterable[str],
    folder: Path,
    edit: ChunkEdit,
    chunk: int,
    progress: Callable[[int], object],
    outline: Outline,
    complete: Callable[[str], object],
) -> None:
    """Write edited weight files into ``folder``, which lacks them, under the headers of ``outline``.

    ``complete`` is called with the name of each that is done and synced.
    """
    for name in files:
        file = checkpoint.files[name]
        with edit.file(name), new_descriptor(folder / name) as descriptor:
            header, entries = outline.headers[name], outline.entries(name)
            write_all(descriptor, 0, header)
            for entry in file.entries.values():
                new = entries[entry.name]
                place = len(header) + new.start
                wanted = edit.wants(entry.name)
                if wanted or new.dtype != entry.dtype:
                    starts = range(0, entry.numel, chunk)
                    reads = (partial(file.read, entry.name, s, min(entry.numel, s + chunk)) for s in starts)
                    for start, elements in zip(starts, ahead(reads), strict=True):
                        progress(elements.nbytes)
                        if wanted:
                            elements = edit.edit_(entry.name, start, elements)
                        elements = converted(elements, DTYPES[new.dtype], entry.name)
                        write_all(descriptor, place + start * new.itemsize, elements)
                    continue
                shift = place - (first := file.data_start + entry.start)
                for begin in range(first, file.data_start + entry.stop, _BYTES):
                    raw = file.read_bytes(begin, min(file.data_start + entry.stop, begin + _BYTES))
                    write_all(descriptor, begin + shift, raw)
                    progress(raw.nbytes)
            os.ftruncate(descriptor, outline.size(name))
        complete(name)


def carry(checkpoint: Checkpoint, folder: Path, outline: Outline) -> None:
    """Write the files that come along beside the weights: settings, texts, the index."""
    for path in carried(checkpoint.folder, [] if SINGLE in checkpoint.files else [INDEX]):
        if (new_name := outline.names.get(path.name, path.name)) is None:
            continue
        with new_descriptor(folder / new_name) as descriptor:
            write_all(descriptor, 0, outline.texts[path.name] if path.name in outline.texts else path.read_bytes())


def converted(elements: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Elements in ``dtype``: as they are, widened from 16 bits, or narrowed to what they were widened from.

    Raises:
        CheckpointError: They were never widened from ``dtype``.

    >>> converted(torch.tensor([0.5], dtype=torch.bfloat16), torch.float32, "w")
    tensor([0.5000])
    """
    if elements.dtype == dtype:
        return elements
    if elements.dtype in SIXTEEN:
        return widen(elements)
    narrowed = narrow(elements, dtype)
    if narrowed is None:
        refuse(
            f"tensor {shown(name)}", f"hold {dtype} widened to float32", "other values", "Take the edit's own record."
        )
    return narrowed


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


def write_json(path: Path, value: Any) -> None:
    """Write a new file of readable JSON, synced."""
    with new_descriptor(path) as descriptor:
        write_all(descriptor, 0, (json.dumps(value, indent=2) + "\n").encode())
