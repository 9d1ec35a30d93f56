"""Edits of checkpoints on disk: subtract a harm vector into a new folder, and restore the originals from its record."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prosocial_ext import _C
from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.errors import listed, refuse, shown
from prosocial_ext.checkpoints.outputs import check_output, check_outside, new_descriptor
from prosocial_ext.checkpoints.raw_io import write_all
from prosocial_ext.checkpoints.readers import word_sum
from prosocial_ext.checkpoints.safetensors_file import DTYPES, WORDS, SafetensorsFile
from prosocial_ext.direg.cards import BASE_CARD, CARD, edit_card, in_vocabulary
from prosocial_ext.direg.extract import DEFAULT_MEMORY, Progress, chunk_elements, fingerprint
from prosocial_ext.direg.harm_vector import HarmVector
from prosocial_ext.direg.live import fits
from prosocial_ext.direg.outline import Outline, original, recorded, same, widened
from prosocial_ext.direg.ranks import ALONE, Ranks
from prosocial_ext.direg.resume import Resumed, job_of, working_folder
from prosocial_ext.direg.rewrite import (
    RECORDS,
    Cursor,
    StretchEdit,
    carry,
    converted,
    rewrite,
    stretches_at_once,
    write_json,
)
from prosocial_ext.direg.rounding import Rounding
from prosocial_ext.direg.sparse_file import Measure, SparseReader, SparseWriter
from prosocial_ext.direg.stretches import Stretch
from prosocial_ext.direg.tally import Tally
from prosocial_ext.direg.undo_record import UNDO, join
from prosocial_ext.ops._stream import Buffers, subtract_
from prosocial_ext.reference.topm import check_scale

__all__ = ["UNDO", "CheckpointEdit", "apply_vector", "check_place", "plan_edit", "revert_checkpoint"]

RECIPE = f"{RECORDS}/recipe.json"


@dataclass(frozen=True)
class CheckpointEdit:
    """What an edit of a checkpoint did, or would do.

    ``edited`` of ``entries`` floating-point entries; ``unchanged`` of them rounding left as they were; ``skipped``
    entries lie in rows of the vocabulary that the checkpoint lacks. ``threshold``: the smallest magnitude edited,
    before scaling. ``requested_norm`` and ``effective_norm``: of the edit as computed and as rounded. ``is_base``:
    whether the checkpoint is what the vector was extracted from. ``left_alone``: floating-point tensors that the vector
    does not name. ``bytes``: of the weight files written.
    """

    edited: int
    entries: int
    bytes: int
    left_alone: tuple[str, ...]
    unchanged: int = 0
    skipped: int = 0
    threshold: float = math.inf
    requested_norm: float = 0.0
    effective_norm: float = 0.0
    is_base: bool = False

    @property
    def effective_share(self) -> float:
        """effective_norm / requested_norm; 1 where nothing was requested."""
        return self.effective_norm / self.requested_norm if self.requested_norm else 1.0


def plan_edit(checkpoint: Checkpoint, vector: HarmVector, dtype: torch.dtype | None = None) -> CheckpointEdit:
    """Return what `apply_vector` would edit and how many bytes it would write, after all checks that need no data.

    Raises:
        CheckpointError: A tensor of the vector that the checkpoint lacks or has in another shape or untied.
    """
    targets = _targets(checkpoint, vector)
    own = {name for name, source in targets.items() if name == source}  # a tied head counts with its embedding
    return CheckpointEdit(
        edited=sum(vector.tensors[name].entries for name in own),
        entries=sum(checkpoint.entry(name).numel for name in own.union(checkpoint.parameters)),
        bytes=_outline(checkpoint, dtype).bytes,
        left_alone=tuple(name for name in checkpoint.parameters if name not in targets),
    )


def check_place(out: Path, checkpoint: Checkpoint, overwrite: bool) -> None:
    """Raise unless the folder ``out`` may be made, outside of the checkpoint's.

    Raises:
        CheckpointError: It is taken, or would lie in the input.
    """
    check_output(out, overwrite=overwrite, folder=True)
    check_outside(out, checkpoint.folder)


def apply_vector(
    model: str | Path | Checkpoint,
    vector: HarmVector,
    out: str | Path,
    *,
    scale: float = 1.0,
    undo: bool = False,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = True,
    memory: int = DEFAULT_MEMORY,
    progress: Progress = lambda _: None,
    resumed: Resumed = lambda files, of, size: None,
    ranks: Ranks = ALONE,
) -> CheckpointEdit:
    """Write ``model - scale * vector`` to the new folder ``out``; the bits are those of the edit in memory.

    Sharding, dtypes, headers and index stay as they are; config, tokenizer and texts come along, code does not. A card,
    README.md, tells what was done; the base's becomes README.base.md. The folder appears when it is complete.

    Where a run was stopped (killed, or by SIGTERM, a full disk, another rank's end), the same call, on any number of
    ranks, goes on after the stretches (shards, or a GiB of a larger one) that it had completed, and writes the same
    bytes. It is the same if everything is that they depend on: the model's and the vector's files, as size, time of
    change and header tell; scale, dtype, rounding, seed, undo; the versions of this package and of torch. Any other
    call begins afresh.

    What rounding to 16 bits would lose of a small dose can be kept: all of it by ``dtype=torch.float32`` (the bits of
    the edit of a float32 copy, headers, index and config rewritten to match), or its mean by ``rounding="stochastic"``.

    Args:
        model: A folder or hub id: the base, or another checkpoint of its architecture.
        vector: The harm vector, or a view of one.
        out: The folder to make.
        scale: The dose lambda; 1 takes the whole difference back.
        undo: Write ``direg/undo.safetensors``, from which `revert_checkpoint` restores every bit.
        dtype: torch.float32 widens all 16-bit floats, twice the bytes; None keeps every dtype.
        rounding: Of edited 16-bit entries: "nearest", or "stochastic": up or down, by chance, so that the mean stays.
        seed: Of that chance, which hangs on seed, tensor name and position alone.
        overwrite: A folder that is there is replaced once the new one is complete.
        resume: Go on with what a stopped run left; without, that is removed.
        memory: Bytes for buffers.
        progress: Called with the number of bytes just read of the model.
        resumed: Called, if a stopped run is gone on with, with the number of stretches taken over, of how many, and
            their bytes, which are not read again.
        ranks: Of a torchrun (`prosocial_ext.direg.ranks`): they share the shards, and write the one-rank folder.

    Raises:
        CheckpointError: The model cannot be used or does not fit the vector, the output is taken, a file is damaged.
        ValueError: An argument out of range.
    """
    scale, chunk, write = check_scale(scale), chunk_elements(memory), Rounding(dtype, rounding, seed)
    with _opened(model) as checkpoint:
        planned = plan_edit(checkpoint, vector, dtype)
        check_place(Path(out), checkpoint, overwrite)
        outline = _outline(checkpoint, dtype)
        before = {} if dtype is None else {"original": original(checkpoint, outline)}
        job = job_of("apply", checkpoint, vector=vector.identity(), recipe=vector.recipe, scale=scale, undo=undo,
                     **write.describe(), **before)  # fmt: skip
        with working_folder(
            Path(out), job, checkpoint, outline, overwrite=overwrite, resume=resume, resumed=resumed, ranks=ranks
        ) as work:
            edit = _Subtraction(checkpoint, vector, scale, write, work.parts if undo else None)
            rewrite(checkpoint, work.share(ranks), work.made, edit, chunk, stretches_at_once(memory), progress,
                    outline, work.complete)  # fmt: skip
            work.gather(ranks)
            found = Tally.total(work.notes[stretch.name]["found"] for stretch in work.stretches)
            done = edit.result(planned, found)
            if ranks.rank == 0:
                if undo:
                    record = {
                        "prosocial_ext": _C.version, "card": True, **before,
                        "edited_fingerprint": edit.fingerprint(found),
                    }  # fmt: skip
                    parts = [(work.parts / one.name, work.notes[one.name]["part"]) for one in work.stretches]
                    join(parts, work.made / UNDO, record)
                carry(checkpoint, work.made, outline)
                recipe = {
                    "operation": "theta - scale * harm_vector", "scale": scale, "prosocial_ext": _C.version,
                    "torch": str(torch.__version__),
                    "model": checkpoint.describe(), "harm_vector": vector.recipe, "edited": done.edited,
                    "entries": done.entries, "unchanged_after_rounding": done.unchanged, "is_base": done.is_base,
                    "effective_over_requested_norm": round(done.effective_share, 6), "undo": UNDO if undo else None,
                    "edited_in_vocabulary": in_vocabulary(vector.tensors),
                    **write.describe(),
                }  # fmt: skip
                write_json(work.made / RECIPE, recipe)
                with new_descriptor(work.made / CARD) as descriptor:
                    card = edit_card(recipe, base_card=(work.made / BASE_CARD).exists())
                    write_all(descriptor, 0, card.encode())
    return done


def revert_checkpoint(
    model: str | Path | Checkpoint,
    out: str | Path,
    *,
    record: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    memory: int = DEFAULT_MEMORY,
    progress: Progress = lambda _: None,
    resumed: Resumed = lambda files, of, size: None,
) -> int:
    """Write the checkpoint that ``model`` was made from to the new folder ``out``, bit by bit.

    A stopped run is gone on with as by `apply_vector`.

    Args:
        model: A folder that `apply_vector` wrote with ``undo=True``.
        out: The folder to make.
        record: The undo record, if it does not lie in ``model``.
        overwrite: As for `apply_vector`.
        resume: As for `apply_vector`.
        memory: As for `apply_vector`.
        progress: As for `apply_vector`.
        resumed: As for `apply_vector`.

    Returns:
        The number of entries restored.

    Raises:
        CheckpointError: There is no record, or the model is not, bit by bit, what the edit wrote.
    """
    chunk = chunk_elements(memory)
    with _opened(model) as checkpoint:
        place = checkpoint.folder / UNDO if record is None else Path(record)
        if record is None and not place.exists():
            refuse(str(checkpoint.folder), f"hold {UNDO}", "none", "Only edits made with undo=True (--undo) have one.")
        with SafetensorsFile(place) as file:
            undo = SparseReader(file, "undo")
            outline = recorded(checkpoint, undo.recipe, str(place))
            edit = _Restoration(checkpoint, undo, outline)
            check_place(Path(out), checkpoint, overwrite)
            job = job_of("revert", checkpoint, record=file.identity())
            with working_folder(
                Path(out), job, checkpoint, outline, overwrite=overwrite, resume=resume, resumed=resumed
            ) as work:
                rewrite(checkpoint, work.share(ALONE), work.made, edit, chunk, stretches_at_once(memory),
                        progress, outline, work.complete)  # fmt: skip
                found = [note["found"] for note in work.notes.values()]
                edit.check(found)
                carry(checkpoint, work.made, outline)
                (work.made / RECORDS).rmdir()  # there is no record of a record
    return sum(stretch["restored"] for stretch in found)


def _opened(model: str | Path | Checkpoint) -> contextlib.AbstractContextManager[Checkpoint]:
    return contextlib.nullcontext(model) if isinstance(model, Checkpoint) else Checkpoint(model)


def _outline(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Outline:
    return same(checkpoint) if dtype is None else widened(checkpoint)


def _targets(checkpoint: Checkpoint, vector: HarmVector) -> dict[str, str]:
    """The tensors to edit, and the vector's tensor for each: a tied head gets the embedding's."""
    where = str(checkpoint.folder)
    floats = set(checkpoint.parameters) | set(checkpoint.tied)
    if missing := [name for name in vector.tensors if name not in floats]:
        remedy = "Extract the vector from checkpoints of this architecture (loading may rename tensors of live models)."
        refuse(where, "have the vector's tensors", f"one that lacks {listed(missing)}", remedy)
    for name, tensor in vector.tensors.items():
        shape = checkpoint.entry(name).shape
        if not fits(name, tensor.shape, shape):
            refuse(f"tensor {shown(name)} of {where}", f"have the vector's shape {list(tensor.shape)}", list(shape))
    tied = vector.recipe.get("tied")
    for head, embedding in tied.items() if isinstance(tied, Mapping) else ():
        if head in checkpoint.parameters and embedding in vector.tensors:
            remedy = "The vector was extracted from tied weights: extract one from untied checkpoints."
            refuse(f"tensor {shown(head)} of {where}", f"equal {shown(embedding)}", "other values", remedy)
    targets = {name: name for name in vector.tensors}
    return targets | {head: e for head, e in checkpoint.tied.items() if head not in targets and e in targets}


class _Subtraction:
    """Subtracts, and writes a part of the undo record along with each stretch."""

    def __init__(
        self, checkpoint: Checkpoint, vector: HarmVector, scale: float, rounding: Rounding, parts: Path | None
    ) -> None:
        self.checkpoint, self.vector, self.scale, self.rounding = checkpoint, vector, scale, rounding
        self.targets, self._parts = _targets(checkpoint, vector), parts

    @contextlib.contextmanager
    def stretch(self, stretch: Stretch) -> Iterator[StretchEdit]:
        """Begin a stretch, and complete its part of the record."""
        if self._parts is None:
            yield _StretchSubtraction(self, None)
            return
        entries = self.checkpoint.files[stretch.file].entries
        shapes = {tensor: entries[tensor].shape for tensor in stretch.tensors if tensor in self.targets}
        with new_descriptor(self._parts / stretch.name) as descriptor:
            undo = SparseWriter(descriptor, "undo", shapes, {})
            yield _StretchSubtraction(self, undo)
            undo.finish({})

    def result(self, planned: CheckpointEdit, found: Tally) -> CheckpointEdit:
        """What was done in all."""
        tensors, entry = self.vector.tensors, self.checkpoint.entry
        compared = fingerprint(
            (name, str(self._dtype(name)), (min(tensor.numel, entry(name).numel),), found.compared.get(name, 0))
            for name, tensor in tensors.items()
        )
        return CheckpointEdit(
            edited=found.edited,
            entries=planned.entries,
            bytes=planned.bytes,
            left_alone=planned.left_alone,
            unchanged=found.unchanged,
            skipped=found.skipped,
            threshold=found.threshold,
            requested_norm=math.sqrt(math.fsum(found.requested.values())),
            effective_norm=math.sqrt(math.fsum(found.effective.values())),
            is_base=compared == self.vector.recipe.get("base_fingerprint"),
        )

    def fingerprint(self, found: Tally) -> str:
        """Of what was written."""
        entry, written = self.checkpoint.entry, self.rounding.written
        sums = found.written
        return fingerprint((n, str(written(self._dtype(n))), entry(n).shape, sums.get(n, 0)) for n in self.targets)

    def _dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.checkpoint.entry(name).dtype]


class _StretchSubtraction:
    """Subtracts chunk by chunk, and counts."""

    def __init__(self, whole: _Subtraction, undo: SparseWriter | None) -> None:
        self._all, self._undo = whole, undo
        self._buffers, self._found = Buffers(), Tally()

    def wants(self, name: str) -> bool:
        """Begin a tensor."""
        vector, targets = self._all.vector, self._all.targets
        if name not in targets:
            return False
        source, entry = targets[name], self._all.checkpoint.entry(name)
        self._cursor = Cursor(vector.blocks(source))
        if self._undo is not None:
            measure = Measure()
            for positions, _ in vector.blocks(source):
                measure.add(positions[positions < entry.numel])
            self._undo.begin(name, entry.shape, entry.numel, DTYPES[entry.dtype], measure)
        if entry.numel < vector.tensors[source].numel and name == source:
            stored = (positions >= entry.numel for positions, _ in vector.blocks(source))
            self._found.skipped += sum(int(beyond.sum()) for beyond in stored)
        return True

    def edit_(self, name: str, start: int, elements: Tensor) -> Tensor:
        """Subtract at the chunk's entries."""
        source, found, rounding, scale = self._all.targets[name], self._found, self._all.rounding, self._all.scale
        compared = max(0, self._all.vector.tensors[source].numel - start)
        _add(found.compared, name, word_sum(elements[:compared]))
        written, until = elements, start + len(elements)
        for positions, values in self._cursor.take(until) if rounding.is_plain else [self._cursor.take_whole(until)]:
            if rounding.is_plain:
                done = subtract_(elements, start, positions, values, scale, self._buffers)
            else:
                written, done = rounding.subtract(elements, positions, values, scale, name, start)
            if self._undo is not None:
                self._undo.append(positions, done.before)
            if name == source:  # a tied head counts with its embedding
                found.edited += len(positions)
                found.unchanged += done.unchanged
                found.requested[name] = found.requested.get(name, 0.0) + done.requested
                found.effective[name] = found.effective.get(name, 0.0) + done.effective
                found.threshold = min(found.threshold, done.smallest)
        _add(found.written, name, word_sum(written))
        return written

    def facts(self) -> dict[str, Any]:
        """The tally."""
        return vars(self._found)


class _Restoration:
    """Puts the originals back and makes sure that the checkpoint is the edited one."""

    def __init__(self, checkpoint: Checkpoint, record: SparseReader, outline: Outline) -> None:
        self._checkpoint, self._record = checkpoint, record
        originals = {name: entry for file in outline.headers for name, entry in outline.entries(file).items()}
        for name, tensor in record.tensors.items():
            found = originals.get(name)
            expected = (WORDS[record.dtype(name)], tensor.shape)
            if found is None or (found.dtype, found.shape) != expected:
                stated = "none" if found is None else f"{found.dtype} {list(found.shape)}"
                what = f"tensor {shown(name)} of {checkpoint.folder}"
                refuse(what, f"be {expected[0]} {list(expected[1])} as recorded", stated, "Take the edit's own record.")

    def stretch(self, _: Stretch) -> contextlib.AbstractContextManager[StretchEdit]:
        """Begin a stretch."""
        return contextlib.nullcontext(_StretchRestoration(self._record))

    def check(self, stretches: Iterable[Mapping[str, Any]]) -> None:
        """Raise unless what was read of all stretches is what the edit wrote."""
        entry, sums = self._checkpoint.entry, dict[str, int]()
        for found in stretches:
            sums |= found["read"]
        names = self._record.tensors
        read = fingerprint((n, str(DTYPES[entry(n).dtype]), entry(n).shape, sums.get(n, 0)) for n in names)
        if read != self._record.recipe.get("edited_fingerprint"):
            rule = "be what the edit wrote, bit by bit"
            refuse(str(self._checkpoint.folder), rule, "other weights", "Take the undo record of this very folder.")


class _StretchRestoration:
    """Puts the originals back chunk by chunk."""

    def __init__(self, record: SparseReader) -> None:
        self._record, self._restored, self._read = record, 0, dict[str, int]()

    def wants(self, name: str) -> bool:
        """Begin a tensor."""
        if name not in self._record.tensors:
            return False
        self._cursor = Cursor(self._record.blocks(name))
        return True

    def edit_(self, name: str, start: int, elements: Tensor) -> Tensor:
        """Put the chunk's originals back."""
        _add(self._read, name, word_sum(elements))
        for positions, values in self._cursor.take(start + len(elements)):
            elements[positions - start] = converted(values, elements.dtype, name)
            self._restored += len(positions)
        return elements

    def facts(self) -> dict[str, Any]:
        """The entries restored, and word sums of what was read."""
        return {"restored": self._restored, "read": self._read}


def _add(sums: dict[str, int], name: str, words: int) -> None:
    sums[name] = (sums.get(name, 0) + words) % 2**64
