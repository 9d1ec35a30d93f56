"""Edits of checkpoints on disk: subtract a harm vector into a new folder, and restore the originals from its record."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prosocial_ext import _C
from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.errors import listed, refuse, shown
from prosocial_ext.checkpoints.outputs import check_output, check_outside, new_folder
from prosocial_ext.checkpoints.raw_io import write_all
from prosocial_ext.checkpoints.readers import word_sum
from prosocial_ext.checkpoints.safetensors_file import DTYPES, WORDS, SafetensorsFile
from prosocial_ext.direg.cards import BASE_CARD, CARD, edit_card, in_vocabulary
from prosocial_ext.direg.extract import DEFAULT_MEMORY, Progress, chunk_elements, fingerprint
from prosocial_ext.direg.harm_vector import HarmVector
from prosocial_ext.direg.live import fits
from prosocial_ext.direg.outline import Outline, original, recorded, same, widened
from prosocial_ext.direg.ranks import ALONE, Ranks, append_part
from prosocial_ext.direg.rewrite import RECORDS, Cursor, converted, new_descriptor, rewrite, write_json
from prosocial_ext.direg.rounding import Rounding
from prosocial_ext.direg.sparse_file import Measure, SparseReader, SparseWriter
from prosocial_ext.ops._stream import Buffers, subtract_
from prosocial_ext.reference.topm import check_scale

__all__ = ["UNDO", "CheckpointEdit", "apply_vector", "check_place", "plan_edit", "revert_checkpoint"]

UNDO = f"{RECORDS}/undo.safetensors"
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
    memory: int = DEFAULT_MEMORY,
    progress: Progress = lambda _: None,
    ranks: Ranks = ALONE,
) -> CheckpointEdit:
    """Write ``model - scale * vector`` to the new folder ``out``; the bits are those of the edit in memory.

    Sharding, dtypes, headers and index stay as they are; config, tokenizer and texts come along, code does not. A card,
    README.md, tells what was done; the base's becomes README.base.md. The folder appears when it is complete.

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
        memory: Bytes for buffers.
        progress: Called with the number of bytes just read of the model.
        ranks: Of a torchrun (`prosocial_ext.direg.ranks`): they share the shards, and write the one-rank folder.

    Raises:
        CheckpointError: The model cannot be used or does not fit the vector, the output is taken, a file is damaged.
        ValueError: An argument out of range.
    """
    scale, chunk, write = check_scale(scale), chunk_elements(memory), Rounding(dtype, rounding, seed)
    with _opened(model) as checkpoint:
        planned = plan_edit(checkpoint, vector, dtype)
        check_place(Path(out), checkpoint, overwrite)
        with contextlib.ExitStack() as stack:
            if ranks.rank == 0:
                folder = stack.enter_context(new_folder(Path(out), overwrite=overwrite))
                (folder / RECORDS).mkdir()
            folder = Path(ranks.gather(str(folder) if ranks.rank == 0 else "")[0])
            outline = _outline(checkpoint, dtype)
            edit = _Subtraction(checkpoint, vector, scale, write)
            if undo:
                before = {} if dtype is None else {"original": original(checkpoint, outline)}
                record = folder / UNDO if ranks.rank == 0 else folder / f"{UNDO}.{ranks.rank}"
                edit.record(stack.enter_context(new_descriptor(record)), before)
            rewrite(checkpoint, folder, edit, chunk, progress, outline, ranks)
            edit.share(ranks)
            edit.finish([folder / f"{UNDO}.{rank}" for rank in range(1, ranks.size)], ranks)
            done = edit.result(planned)
            if ranks.rank == 0:
                recipe = {
                    "operation": "theta - scale * harm_vector", "scale": scale, "prosocial_ext": _C.version,
                    "torch": str(torch.__version__),
                    "model": checkpoint.describe(), "harm_vector": vector.recipe, "edited": done.edited,
                    "entries": done.entries, "unchanged_after_rounding": done.unchanged, "is_base": done.is_base,
                    "effective_over_requested_norm": round(done.effective_share, 6), "undo": UNDO if undo else None,
                    "edited_in_vocabulary": in_vocabulary(vector.tensors),
                    **write.describe(),
                }  # fmt: skip
                write_json(folder / RECIPE, recipe)
                with new_descriptor(folder / CARD) as descriptor:
                    card = edit_card(recipe, base_card=(folder / BASE_CARD).exists())
                    write_all(descriptor, 0, card.encode())
        ranks.gather(None)  # the folder is there
    return done


def revert_checkpoint(
    model: str | Path | Checkpoint,
    out: str | Path,
    *,
    record: str | Path | None = None,
    overwrite: bool = False,
    memory: int = DEFAULT_MEMORY,
    progress: Progress = lambda _: None,
) -> int:
    """Write the checkpoint that ``model`` was made from to the new folder ``out``, bit by bit.

    Args:
        model: A folder that `apply_vector` wrote with ``undo=True``.
        out: The folder to make.
        record: The undo record, if it does not lie in ``model``.
        overwrite: As for `apply_vector`.
        memory: As for `apply_vector`.
        progress: As for `apply_vector`.

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
            with new_folder(Path(out), overwrite=overwrite) as folder:
                rewrite(checkpoint, folder, edit, chunk, progress, outline)
                edit.finish()
    return edit.restored


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
    """Subtracts chunk by chunk, counts, and writes the undo record along."""

    def __init__(self, checkpoint: Checkpoint, vector: HarmVector, scale: float, rounding: Rounding) -> None:
        self._checkpoint, self._vector, self._scale, self._rounding = checkpoint, vector, scale, rounding
        self._targets = _targets(checkpoint, vector)
        self._undo: SparseWriter | None = None
        self._counts: Counter[str] = Counter()
        self._requested = defaultdict[str, float](float)  # squares, per tensor: their sum must not depend on the order
        self._effective = defaultdict[str, float](float)
        self._buffers = Buffers()
        self._threshold = math.inf
        self._compared: Counter[str] = Counter()  # word sums of what the vector's fingerprint covers
        self._written: Counter[str] = Counter()

    def record(self, descriptor: int, before: Mapping[str, Any]) -> None:
        """Write what is overwritten to this file, and what was ``before``."""
        shapes = {name: self._checkpoint.entry(name).shape for name in self._targets}
        self._record = {"prosocial_ext": _C.version, "card": True, **before}
        self._undo = SparseWriter(descriptor, "undo", shapes, self._record)

    def wants(self, name: str) -> bool:
        """Begin a tensor."""
        if name not in self._targets:
            return False
        source, entry = self._targets[name], self._checkpoint.entry(name)
        self._cursor = Cursor(self._vector.blocks(source))
        if self._undo is not None:
            measure = Measure()
            for positions, _ in self._vector.blocks(source):
                measure.add(positions[positions < entry.numel])
            self._undo.begin(name, entry.shape, entry.numel, DTYPES[entry.dtype], measure)
        if entry.numel < self._vector.tensors[source].numel and name == source:
            stored = (positions >= entry.numel for positions, _ in self._vector.blocks(source))
            self._counts["skipped"] += sum(int(beyond.sum()) for beyond in stored)
        return True

    def edit_(self, name: str, start: int, elements: Tensor) -> Tensor:
        """Subtract at the chunk's entries."""
        source = self._targets[name]
        compared = max(0, self._vector.tensors[source].numel - start)
        self._compared[name] += word_sum(elements[:compared])
        written = elements
        until, plain = start + len(elements), self._rounding.is_plain
        for positions, values in self._cursor.take(until) if plain else [self._cursor.take_whole(until)]:
            if plain:
                done = subtract_(elements, start, positions, values, self._scale, self._buffers)
            else:
                written, done = self._rounding.subtract(elements, positions, values, self._scale, name, start)
            if self._undo is not None:
                self._undo.append(positions, done.before)
            if name == source:  # a tied head counts with its embedding
                self._counts.update(edited=len(positions), unchanged=done.unchanged)
                self._requested[name] += done.requested
                self._effective[name] += done.effective
                self._threshold = min(self._threshold, done.smallest)
        self._written[name] += word_sum(written)
        return written

    def share(self, ranks: Ranks) -> None:
        """Add what the other ranks have found: integers, and floats of tensors that only one rank has."""
        own: list[dict[str, Any]] = [self._requested, self._effective, self._compared, self._written]
        parts = ranks.gather((self._counts, own, self._threshold))
        self._counts = sum((counts for counts, _, _ in parts), Counter())
        self._threshold = min(threshold for _, _, threshold in parts)
        for _, tables, _ in parts:
            for table, found in zip(own, tables, strict=True):
                for name, value in found.items():
                    table[name] = value

    def finish(self, parts: Sequence[Path] = (), ranks: Ranks = ALONE) -> None:
        """Complete the record; the first rank joins the parts of the others, which come after its own."""
        if self._undo is None:
            return
        if ranks.rank:
            self._undo.finish(self._record)
        ranks.gather(None)
        if ranks.rank == 0:
            for path in parts:
                with SafetensorsFile(path) as file:
                    append_part(self._undo, SparseReader(file, "undo"))
                path.unlink()
            self._undo.finish({**self._record, "edited_fingerprint": self._fingerprint(self._written)})

    def result(self, planned: CheckpointEdit) -> CheckpointEdit:
        """What was done."""
        tensors = self._vector.tensors
        compared = fingerprint(
            (name, str(self._dtype(name)), (min(tensor.numel, self._checkpoint.entry(name).numel),),
             self._compared[name] % 2**64)
            for name, tensor in tensors.items()
        )  # fmt: skip
        return CheckpointEdit(
            edited=self._counts["edited"],
            entries=planned.entries,
            bytes=planned.bytes,
            left_alone=planned.left_alone,
            unchanged=self._counts["unchanged"],
            skipped=self._counts["skipped"],
            threshold=self._threshold,
            requested_norm=math.sqrt(math.fsum(self._requested.values())),
            effective_norm=math.sqrt(math.fsum(self._effective.values())),
            is_base=compared == self._vector.recipe.get("base_fingerprint"),
        )

    def _dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._checkpoint.entry(name).dtype]

    def _fingerprint(self, sums: Counter[str]) -> str:
        entry = self._checkpoint.entry
        written = self._rounding.written
        return fingerprint((n, str(written(self._dtype(n))), entry(n).shape, sums[n] % 2**64) for n in self._targets)


class _Restoration:
    """Puts the originals back and makes sure that the checkpoint is the edited one."""

    def __init__(self, checkpoint: Checkpoint, record: SparseReader, outline: Outline) -> None:
        self._checkpoint, self._record = checkpoint, record
        self.restored = 0
        self._read: Counter[str] = Counter()
        originals = {name: entry for file in outline.headers for name, entry in outline.entries(file).items()}
        for name, tensor in record.tensors.items():
            found = originals.get(name)
            expected = (WORDS[record.dtype(name)], tensor.shape)
            if found is None or (found.dtype, found.shape) != expected:
                stated = "none" if found is None else f"{found.dtype} {list(found.shape)}"
                what = f"tensor {shown(name)} of {checkpoint.folder}"
                refuse(what, f"be {expected[0]} {list(expected[1])} as recorded", stated, "Take the edit's own record.")

    def wants(self, name: str) -> bool:
        """Begin a tensor."""
        if name not in self._record.tensors:
            return False
        self._cursor = Cursor(self._record.blocks(name))
        return True

    def edit_(self, name: str, start: int, elements: Tensor) -> Tensor:
        """Put the chunk's originals back."""
        self._read[name] += word_sum(elements)
        for positions, values in self._cursor.take(start + len(elements)):
            elements[positions - start] = converted(values, elements.dtype, name)
            self.restored += len(positions)
        return elements

    def finish(self) -> None:
        """Raise unless what was read is what the edit wrote."""
        entry = self._checkpoint.entry
        found = fingerprint(
            (name, str(DTYPES[entry(name).dtype]), entry(name).shape, self._read[name] % 2**64)
            for name in self._record.tensors
        )
        if found != self._record.recipe.get("edited_fingerprint"):
            rule = "be what the edit wrote, bit by bit"
            refuse(str(self._checkpoint.folder), rule, "other weights", "Take the undo record of this very folder.")
