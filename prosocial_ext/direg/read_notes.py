"""What the read of an extraction has found, on the disk, so that a run that goes on need not read it again.

A spill file holds what was kept, and a chain of notes says what of it is sure: each vouches for the spill's next bytes,
which were synced before, by their word sum, and tells what was found in the tensors that they came from. The chain ends
before the first note that is missing, or that the spill does not bear out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prosocial_ext.checkpoints.journal import Journal
from prosocial_ext.checkpoints.outputs import clean_folder, is_folder, sync_folder
from prosocial_ext.checkpoints.raw_io import read_all
from prosocial_ext.checkpoints.readers import word_sum

__all__ = ["ReadNotes"]

_SPILL, _NOTES = "spill", "notes"
_BLOCK = 8 << 20  # bytes


class ReadNotes:
    """The spill and the notes of one process of a job.

    ``taken``: what `add` was given by the runs before, once `opened`.

    Args:
        folder: Where they lie, made if need be; this user's alone.
        job: What the job and the process are, down to everything that the notes depend on.

    >>> import tempfile
    >>> place, notes = Path(tempfile.mkdtemp()) / "0", []
    >>> for _ in range(2):
    ...     log = ReadNotes(place, "a job")
    ...     with log.opened() as spill:
    ...         notes.append(log.taken)
    ...         _ = os.pwrite(spill, (7).to_bytes(8, "little"), 8 * len(log.taken))
    ...         log.add(8 * len(log.taken) + 8, 7, {"tensors": 1})
    >>> notes, ReadNotes(place, "a job").look(), ReadNotes(place, "another").look()
    ([[], [{'tensors': 1}]], 2, 0)
    """

    def __init__(self, folder: Path, job: str) -> None:
        self._folder = folder
        self._journal = Journal(folder / _NOTES, job)
        self.taken: list[dict[str, Any]] = []
        self._count = self._end = 0

    def look(self) -> int:
        """How many notes hold, as far as can be told without reading the spill."""
        return len(self._chain())

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Yield the spill, whose end is that of what was taken over; what is not sure is removed."""
        chain = self._chain()
        clean_folder(self._folder, {_SPILL, _NOTES} if chain else ())
        spill = os.open(self._folder / _SPILL, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            for note in chain:
                if _sum(spill, self._end, note["end"]) != note["sum"]:
                    break
                self.taken.append(note["found"])
                self._end = note["end"]
            self._count = len(self.taken)
            clean_folder(self._folder / _NOTES, set(map(str, range(self._count))))
            sync_folder(self._folder / _NOTES)
            os.ftruncate(spill, self._end)
            sync_folder(self._folder)
            yield spill
        finally:
            os.close(spill)

    def add(self, end: int, total: int, found: Mapping[str, Any]) -> None:
        """Vouch for the spill up to ``end``, which lies on the disk.

        Args:
            end: Of what is vouched for.
            total: The word sum of what was not before.
            found: JSON.
        """
        self._journal.add(str(self._count), {"start": self._end, "end": end, "sum": total, "found": dict(found)})
        self._count, self._end = self._count + 1, end

    def _chain(self) -> list[dict[str, Any]]:
        if not (is_folder(self._folder) and is_folder(self._folder / _NOTES)):
            return []
        try:
            spill = os.lstat(self._folder / _SPILL)
        except OSError:
            return []
        found: list[dict[str, Any]] = []
        end = 0
        while stat.S_ISREG(spill.st_mode) and (note := self._journal.read(str(len(found)))) is not None:
            if note["start"] != end or note["end"] > spill.st_size:
                break
            found.append(note)
            end = note["end"]
        return found


def _sum(descriptor: int, start: int, stop: int) -> int:
    blocks = (read_all(descriptor, at, min(stop, at + _BLOCK)) for at in range(start, stop, _BLOCK))
    return sum(word_sum(block) for block in blocks) % 2**64
