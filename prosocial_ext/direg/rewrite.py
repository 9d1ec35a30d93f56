"""Copies a checkpoint folder with some elements changed: a few stretches at once, each chunk by chunk.

Headers, metadata, index, dtypes and sharding stay byte for byte, up to what the outline changes; of the other files
only settings and texts come along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing
from fnmatch import fnmatchcase
from functools import partial
from itertools import cycle
from pathlib import Path
from threading import Event, Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from prosocial_ext.checkpoints.ahead import ahead
from prosocial_ext.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.hub import CARRIED
from prosocial_ext.checkpoints.outputs import new_descriptor
from prosocial_ext.checkpoints.raw_io import write_all
from prosocial_ext.checkpoints.safetensors_file import DTYPES, SafetensorsFile
from prosocial_ext.checkpoints.safetensors_header import TensorEntry
from prosocial_ext.direg.outline import Outline
from prosocial_ext.direg.sparse_file import Block
from prosocial_ext.direg.stretches import Stretch
from prosocial_ext.direg.widths import SIXTEEN, narrow, widen
from prosocial_ext.ops._stream import Buffers

__all__ = [
    "RECORDS", "CheckpointChange", "Cursor", "StretchEdit", "carry", "converted", "rewrite", "stretches_at_once",
    "write_json",
]  # fmt: skip

RECORDS = "direg"  # the folder of recipe and undo record: loaders that take every *.safetensors do not look there
_BYTES = 1 << 23
_MOST_AT_ONCE = 4
_PER_STRETCH = 128 << 20  # bytes of memory: three chunks, and the blocks of entries that meet them
_WAKES = 0.2  # seconds


class StretchEdit(Protocol):
    """What is done to the tensors of one stretch of a weight file, in the order that they lie in."""

    def wants(self, name: str) -> bool:
        """Whether the tensor is given to `edit_` at all; called once per tensor, before its first chunk."""

    def edit_(self, name: str, start: int, elements: Tensor) -> Tensor:
        """Edit a chunk, the flat elements from ``start`` on; return it, in any dtype that `converted` takes."""

    def facts(self) -> dict[str, Any]:
        """What was found in the stretch, as JSON."""


class CheckpointChange(Protocol):
    """What is done to the stretches of a checkpoint, several at once."""

    def stretch(self, stretch: Stretch) -> AbstractContextManager[StretchEdit]:
        """Begin a stretch, and complete what is written along with it; none is begun twice."""


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


def stretches_at_once(memory: int) -> int:
    """How many stretches are rewritten at once, with ``memory`` bytes and this process's cores.

    >>> stretches_at_once(64 << 20)
    1
    """
    return min(_MOST_AT_ONCE, torch.get_num_threads(), max(1, memory // _PER_STRETCH))


def rewrite(
    checkpoint: Checkpoint,
    share: Iterable[Stretch],
    folder: Path,
    change: CheckpointChange,
    chunk: int,
    at_once: int,
    progress: Callable[[int], object],
    outline: Outline,
    complete: Callable[[str, dict[str, Any]], object],
) -> None:
    """Write the edited stretches of ``share`` into the files in ``folder``, under the headers of ``outline``.

    ``complete`` is called with name and facts of each stretch that is done and synced, ``progress`` with the number of
    bytes just read; neither is called twice at once.
    """
    stopped, telling, failures = Event(), Lock(), list[BaseException]()

    def read(size: int) -> None:
        with telling:
            if stopped.is_set():
                raise CancelledError
            progress(size)

    def work(stretch: Stretch) -> None:
        if stopped.is_set():
            return
        try:
            facts = _rewrite(checkpoint.files[stretch.file], stretch, folder, change, chunk, read, outline)
            with telling:
                complete(stretch.name, facts)
        except BaseException as error:  # the first one tells why; those of the others follow from it
            failures.append(error)
            stopped.set()

    with ThreadPoolExecutor(at_once, "prosocial-rewrite") as pool:
        try:
            left = {pool.submit(work, stretch) for stretch in share}
            while left:  # a signal that came to another thread is handled when this one wakes
                left = wait(left, timeout=_WAKES).not_done
        finally:  # a signal, too
            stopped.set()
    if failures:
        raise failures[0]


def _rewrite(
    file: SafetensorsFile, stretch: Stretch, folder: Path, change: CheckpointChange, chunk: int,
    told: Callable[[int], None], outline: Outline,
) -> dict[str, Any]:  # fmt: skip
    """Read ahead of the edit and write behind it."""
    old, buffers = [file.entries[name] for name in stretch.tensors], Buffers()
    header, entries = outline.headers[stretch.file], outline.entries(stretch.file)

    def steps(entry: TensorEntry) -> range:
        return range(0, entry.stop - entry.start, chunk * entry.itemsize if entry.dtype in DTYPES else _BYTES)

    def reads() -> Iterator[Callable[[], Tensor]]:
        turns = cycle(range(3))  # of the piece being read, the one being edited and the one being written
        for entry in old:
            first, end = file.data_start + entry.start, file.data_start + entry.stop
            for begin in steps(entry):
                start, stop = first + begin, min(end, first + begin + steps(entry).step)
                buffer = buffers.take(f"piece {next(turns)}", stop - start, torch.uint8)
                yield partial(file.read_bytes, start, stop, buffer)

    with (
        change.stretch(stretch) as edit,
        new_descriptor(folder / stretch.file, may_exist=True) as descriptor,
        closing(ahead(reads())) as pieces,
        ThreadPoolExecutor(1, "prosocial-behind") as behind,
    ):
        os.ftruncate(descriptor, outline.size(stretch.file))  # as all stretches of the file do
        written = behind.submit(write_all, descriptor, 0, header)
        for entry in old:
            new = entries[entry.name]
            wanted = edit.wants(entry.name)
            for begin in steps(entry):
                elements = next(pieces)
                told(elements.nbytes)
                place = begin
                if wanted or new.dtype != entry.dtype:
                    elements, start = elements.view(DTYPES[entry.dtype]), begin // entry.itemsize
                    if wanted:
                        elements = edit.edit_(entry.name, start, elements)
                    elements = converted(elements, DTYPES[new.dtype], entry.name)
                    place = start * new.itemsize
                written.result()
                written = behind.submit(write_all, descriptor, len(header) + new.start + place, elements)
        written.result()
    return edit.facts()


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
