"""The folder that an edit writes, or the file of an extraction, gone on with where a stopped run of it has left it.

A stretch of a weight file is taken over if the journal of the same job vouches for it, which it does once it is on the
disk, and if the file is a regular one of the right size; of all others nothing is believed. What an extraction
takes over is what it has read (`prosocial_ext.direg.read_notes`); its output is written in one go.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from prosocial_ext import _C
from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.journal import Journal
from prosocial_ext.checkpoints.outputs import (
    Partial,
    clean_folder,
    is_folder,
    joined_folder,
    resumable_file,
    resumable_folder,
    sync_folder,
)
from prosocial_ext.direg.outline import Outline
from prosocial_ext.direg.ranks import ALONE, Ranks
from prosocial_ext.direg.read_notes import ReadNotes
from prosocial_ext.direg.rewrite import RECORDS
from prosocial_ext.direg.stretches import Stretch, stretches
from prosocial_ext.direg.undo_record import UNDO, header_of, holds

__all__ = ["Resumed", "Work", "job_of", "working_file", "working_folder"]

# Called with the stretches, or tensors, taken over, of how many, and the bytes not read again.
Resumed = Callable[[int, int, int], object]


class Work:
    """What the ranks write together: the folder ``made``, and what is known of each stretch that is complete.

    ``stretches``: all of the checkpoint's. ``parts``: where a part of the undo record lies, by stretch. ``notes``: what
    the journal says, by stretch.
    """

    def __init__(self, folder: Partial, job: str, checkpoint: Checkpoint) -> None:
        self.stretches = stretches(checkpoint)
        self.made, self.parts = folder.made, folder.aside / "parts"
        self.notes: dict[str, dict[str, Any]] = {}
        self._notes = folder.aside / "notes"
        self._journal = Journal(self._notes, job)

    def share(self, ranks: Ranks) -> list[Stretch]:
        """This rank's part of what is not complete, whole files: machines that share a disk may not share a page."""
        rest: dict[str, list[Stretch]] = {}
        for stretch in self.stretches:
            if stretch.name not in self.notes:
                rest.setdefault(stretch.file, []).append(stretch)
        files = list(rest.values())
        return [one for i in ranks.share([sum(one.bytes for one in file) for file in files]) for one in files[i]]

    def complete(self, stretch: str, found: dict[str, Any]) -> None:
        """Vouch for a stretch that is synced, as is its part of the undo record, if there is one."""
        part = self.parts / stretch
        self.notes[stretch] = {"found": found, "part": header_of(part) if part.exists() else None}
        sync_folder(self.made)
        sync_folder(self.parts)
        self._journal.add(stretch, self.notes[stretch])

    def gather(self, ranks: Ranks) -> None:
        """Add the notes of the other ranks."""
        for notes in ranks.gather(self.notes):
            self.notes |= notes

    def look(self, outline: Outline) -> int:
        """Note what is complete, and return how many stretches that is."""
        self.notes = {}
        if not all(is_folder(folder) or not os.path.lexists(folder) for folder in self._folders()):
            return 0
        whole = {file for file in outline.headers if _is_file(self.made / file, outline.size(file))}
        notes = {one.name: self._journal.read(one.name) for one in self.stretches if one.file in whole}
        self.notes = {name: note for name, note in notes.items() if note and self._is_recorded(name, note["part"])}
        return len(self.notes)

    def tidy(self) -> None:
        """Remove what is not complete, and make the folders that are written into."""
        joined = any(note["part"] and not (self.parts / name).exists() for name, note in self.notes.items())
        files = {one.file for one in self.stretches if one.name in self.notes}
        keep = [{*files, RECORDS}, {Path(UNDO).name} if joined else set(), self.notes, self.notes]
        for folder, kept in zip(self._folders(), keep, strict=True):
            clean_folder(folder, kept)

    def _is_recorded(self, stretch: str, part: str | None) -> bool:
        """Whether the undo record has its part, or already is what that went into."""
        return part is None or any(holds(place, part) for place in (self.parts / stretch, self.made / UNDO))

    def _folders(self) -> list[Path]:
        return [self.made, self.made / RECORDS, self.parts, self._notes]


def job_of(operation: str, checkpoint: Checkpoint, **arguments: Any) -> str:
    """Return a hash of everything that the bits of a result depend on, as far as can be told without reading it.

    Args:
        operation: Its name.
        checkpoint: What is edited, or was tuned.
        arguments: The others, as JSON. Of an edit ranks and buffers are none: they change no bit of what is written.
    """
    versions = [str(_C.version), str(torch.__version__)]
    facts = [operation, versions, checkpoint.describe(), checkpoint.identity(), arguments]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def working_folder(
    out: Path,
    job: str,
    checkpoint: Checkpoint,
    outline: Outline,
    *,
    overwrite: bool,
    resume: bool,
    resumed: Resumed,
    ranks: Ranks = ALONE,
) -> Iterator[Work]:
    """Yield the folder to write, which becomes ``out`` if the block succeeds on the first rank.

    Args:
        out: The folder to make.
        job: Of `job_of`; that of the first rank counts.
        checkpoint: What is edited.
        outline: Of the weight files that are written.
        overwrite: A folder that is there is replaced.
        resume: Take over what a stopped run of the same job has completed; without, it is removed.
        resumed: Called if there is any.
        ranks: Who write it.
    """
    with ExitStack() as stack:
        if ranks.rank == 0:
            folder = stack.enter_context(
                resumable_folder(out, lambda left: Work(left, job, checkpoint).look(outline), overwrite=overwrite,
                                 resume=resume)
            )  # fmt: skip
            work = Work(folder, job, checkpoint)
            if work.look(outline):
                read = sum(one.bytes for one in work.stretches if one.name in work.notes)
                resumed(len(work.notes), len(work.stretches), read)
            work.tidy()
            ranks.gather((folder.place, job, work.notes))
        else:
            ours: Any = None
            place, job, notes = ranks.gather(ours)[0]
            work = Work(stack.enter_context(joined_folder(place)), job, checkpoint)
            work.notes = notes
        yield work
    ranks.gather(None)  # the folder is there


@contextmanager
def working_file(
    out: Path, job: str | None, *, overwrite: bool, resume: bool, ranks: Ranks = ALONE
) -> Iterator[tuple[Partial, ReadNotes | None]]:
    """Yield where a file is made, which becomes ``out`` if the block succeeds on the first rank, and this rank's notes.

    Args:
        out: The file to make.
        job: Of `job_of`; that of the first rank counts. None: there are no notes.
        overwrite: A file that is there is replaced.
        resume: Take over what a stopped run of the same job has noted, on as many ranks; without, it is removed.
        ranks: Who make it.
    """

    def notes(partial: Partial, rank: int) -> ReadNotes:
        return ReadNotes(partial.aside / str(rank), f"{job}, rank {rank} of {ranks.size}")

    def worth(partial: Partial) -> int:
        return 0 if job is None else sum(notes(partial, rank).look() for rank in range(ranks.size))

    with ExitStack() as stack:
        if ranks.rank == 0:
            partial = stack.enter_context(resumable_file(out, worth, overwrite=overwrite, resume=resume))
            clean_folder(partial.aside, set(map(str, range(ranks.size))))
            ranks.gather((partial.place, job))
        else:
            ours: Any = None
            place, job = ranks.gather(ours)[0]
            partial = stack.enter_context(joined_folder(place))
        yield partial, None if job is None else notes(partial, ranks.rank)
    ranks.gather(None)  # the file is there


def _is_file(place: Path, size: int) -> bool:
    try:
        status = os.lstat(place)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size
