"""What a job has completed, piece by piece, and what it found in each: notes for the run that goes on after a kill.

A note is written, and synced, after what it vouches for. It begins with a hash of job, piece and text: one that is
torn, damaged, of another piece or of another job counts as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.checkpoints.outputs import new_descriptor, sync_folder
from prosocial_ext.checkpoints.raw_io import write_all
from prosocial_ext.checkpoints.safetensors_header import MAX_HEADER, parse_json

__all__ = ["Journal"]


class Journal:
    """The notes of one job, a file each, so that several processes may add theirs.

    Args:
        folder: Where they lie.
        job: What the job is, down to everything that its result depends on.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> Journal(folder, "copy a").add("part 1", {"sum": 7})
    >>> Journal(folder, "copy a").read("part 1"), Journal(folder, "copy b").read("part 1")
    ({'sum': 7}, None)
    """

    def __init__(self, folder: Path, job: str) -> None:
        self._folder, self._job = folder, job

    def add(self, piece: str, facts: Mapping[str, Any]) -> None:
        """Vouch for a piece, which lies on the disk already.

        Args:
            piece: Its name, which is the note's.
            facts: JSON.
        """
        text = json.dumps(facts).encode()
        place = self._folder / piece
        place.unlink(missing_ok=True)  # one that counts as none
        with new_descriptor(place) as descriptor:
            write_all(descriptor, 0, self._seal(piece, text) + text)
        sync_folder(self._folder)

    def read(self, piece: str) -> dict[str, Any] | None:
        """What was added, or None."""
        place = self._folder / piece
        try:
            with open(place, "rb", opener=_regular) as file:
                content = file.read(MAX_HEADER)
        except OSError:
            return None
        seal = self._seal(piece, text := content[hashlib.sha256().digest_size :])
        try:
            return parse_json(text, str(place), floats=True) if content.startswith(seal) else None
        except CheckpointError:
            return None

    def _seal(self, piece: str, text: bytes) -> bytes:
        return hashlib.sha256(json.dumps([self._job, piece]).encode() + text).digest()


def _regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("no regular file")
    return descriptor
