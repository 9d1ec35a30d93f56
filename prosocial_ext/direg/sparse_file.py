"""Sparse tensors in one safetensors file: harm vectors and undo records (docs/harm_vector.md is the format).

Per tensor two arrays, "values.NAME" and "positions.NAME"; the list of tensors and the recipe are JSON in the metadata.
Writing and reading go by blocks of entries, so neither needs memory for more than one block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.safetensors_file import DTYPES, WORDS, SafetensorsFile
from prosocial_ext.checkpoints.safetensors_header import parse_json
from prosocial_ext.checkpoints.safetensors_writer import SafetensorsWriter
from prosocial_ext.direg.positions import bits_of, decode_gaps, encode_gaps, gap_bytes, positions_of
from prosocial_ext.ops import _stream as streaming

__all__ = ["Block", "Encoded", "Measure", "SparseReader", "SparseTensor", "SparseWriter", "encode"]

Block = tuple[Tensor, Tensor]  # ascending flat positions (int64) and their values, both on the CPU

VERSION = "1"
_MOST_ELEMENTS = 2**48
_BLOCK = 1 << 17  # bytes of positions read at once: 2^20 bits or some 2^17 gaps
_FLOATS = ("F64", "F32", "F16", "BF16")
_ENCODINGS = ("bitmap", "gaps")


@dataclass(frozen=True)
class SparseTensor:
    """One tensor of the file: name, shape, kept entries, encoding of their positions.

    ``numel``: the elements that took part, the first of the tensor (fewer than the shape's where only one side had a
    row of the vocabulary). ``energy``: the squared norm of all of them before selection, 0 where there is none.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    entries: int
    encoding: str
    energy: float = 0.0


class Measure:
    """Counts entries and the bytes of their gaps before a tensor is written.

    >>> measure = Measure()
    >>> measure.add(torch.tensor([0, 1, 200]))
    >>> measure.entries, measure.gap_bytes
    (3, 4)
    """

    def __init__(self) -> None:
        self.entries, self.gap_bytes, self._last = 0, 0, -1

    @classmethod
    def of_all(cls, numel: int) -> Measure:
        """That of every position: gaps of 0, a byte each."""
        measure = cls()
        measure.add_run(numel, 0, numel - 1, numel - 1)
        return measure

    def add(self, positions: Tensor) -> None:
        """Count one block of ascending positions that follow the blocks before."""
        if len(positions):
            self.entries += len(positions)
            self.gap_bytes += gap_bytes(positions, self._last)
            self._last = int(positions[-1])

    def add_run(self, entries: int, first: int, last: int, bytes_between: int) -> int:
        """Count a block of which this is known; return the last position before it, -1 where there is none."""
        previous = self._last
        if entries:
            self.entries += entries
            self.gap_bytes += bytes_between + max(1, -(-(first - previous - 1).bit_length() // 7))
            self._last = last
        return previous

    def encoding(self, numel: int) -> str:
        """The smaller one of a tensor of ``numel`` elements."""
        return "bitmap" if -(-numel // 8) <= self.gap_bytes else "gaps"


class Encoded(NamedTuple):
    """A block of entries as it goes to the file: bytes of positions, each run with its first byte (0 for gaps)."""

    values: Tensor
    positions: list[tuple[int, Tensor]]
    last: int


def encode(encoding: str, positions: Tensor, values: Tensor, previous: int) -> Encoded:
    """Encode a block that is not empty; ``previous``: the last position before it, or -1.

    >>> encode("bitmap", torch.tensor([1, 3]), torch.tensor([0.5, 0.5]), -1).positions
    [(0, tensor([10], dtype=torch.uint8))]
    """
    last = int(positions[-1])
    if encoding == "gaps":
        return Encoded(values, [(0, encode_gaps(positions, previous))], last)
    runs = []
    while len(positions):
        first = int(positions[0]) // 8
        here = int(torch.searchsorted(positions, 8 * (first + _BLOCK)))  # the rest may be far away
        runs.append((first, bits_of(positions[:here], 8 * first, int(positions[here - 1]) // 8 - first + 1)))
        positions = positions[here:]
    return Encoded(values, runs, last)


class SparseWriter:
    """Writes a sparse file: `begin` a tensor, `append` its blocks, and so on, then `finish`.

    Args:
        descriptor: Of an empty file, which stays the caller's.
        kind: "harm_vector" or "undo".
        shapes: All tensors that will come, by name.
        recipe: What the recipe will be, up to 4096 bytes more.
    """

    def __init__(self, descriptor: int, kind: str, shapes: Mapping[str, tuple[int, ...]], recipe: Mapping[str, Any]):
        most = _MOST_ELEMENTS
        self._kind, self._tensors = kind, list[SparseTensor]()
        self._value_place = self._position_place = self._written = 0
        self._last, self._last_byte = -1, (-1, 0)
        rehearsal = SafetensorsWriter(-1, 0)
        worst = [
            SparseTensor(name, shape, most, most, "bitmap", -1.2345678901234567e-300) for name, shape in shapes.items()
        ]
        for tensor in worst:
            rehearsal.add(f"positions.{tensor.name}", "BF16", (most,))
            rehearsal.add(f"values.{tensor.name}", "BF16", (most,))
        rehearsal.add("magnitudes", "I64", (most, 2))
        room = rehearsal.header_bytes(_metadata(kind, worst, {**recipe, "more": " " * 4096}))
        self._writer = SafetensorsWriter(descriptor, room)

    def begin(self, name: str, shape: tuple[int, ...], numel: int, dtype: torch.dtype, measure: Measure,
              energy: float = 0.0) -> None:  # fmt: skip
        """Begin a tensor with the entries that ``measure`` has counted."""
        assert not self._tensors or self._written == self._tensors[-1].entries, "a tensor before got other blocks"
        encoding = measure.encoding(numel)
        self._tensors.append(SparseTensor(name, shape, numel, measure.entries, encoding, energy))
        self._value_place = self._writer.add(f"values.{name}", WORDS[dtype], (measure.entries,))
        taken = measure.entries * dtype.itemsize
        size = -(-numel // 8) if encoding == "bitmap" else measure.gap_bytes
        size += -(taken + size) % 8  # so that the next tensor's values are aligned
        self._position_place = self._writer.add(f"positions.{name}", "U8", (size,))
        self._written, self._last, self._last_byte = 0, -1, (-1, 0)

    def append(self, positions: Tensor, values: Tensor) -> None:
        """Write one block of the tensor begun last."""
        if len(positions):
            self.write(encode(self._tensors[-1].encoding, positions, values, self._last))

    def write(self, block: Encoded) -> None:
        """Write one block of the tensor begun last, encoded after the block before it."""
        self._writer.write(self._value_place, block.values)
        self._value_place += block.values.numel() * block.values.element_size()
        for first, encoded in block.positions:
            if self._tensors[-1].encoding == "gaps":
                self._writer.write(self._position_place, encoded)
                self._position_place += len(encoded)
                continue
            if self._last_byte[0] == first:  # two blocks meet in one byte
                encoded[0] |= self._last_byte[1]
            self._writer.write(self._position_place + first, encoded)
            self._last_byte = first + len(encoded) - 1, int(encoded[-1])
        self._written += len(block.values)
        self._last = block.last

    def end(self, energy: float) -> None:
        """State the energy of the tensor begun last, where it was not known before."""
        self._tensors[-1] = replace(self._tensors[-1], energy=energy)

    def finish(self, recipe: Mapping[str, Any], magnitudes: Tensor | None = None) -> None:
        """Write what is known at the end; ``magnitudes``: int64 [n, 2], bins and counts."""
        if magnitudes is not None:
            place = self._writer.add("magnitudes", "I64", tuple(magnitudes.shape))
            self._writer.write(place, magnitudes.flatten())
        self._writer.finish(_metadata(self._kind, self._tensors, recipe))


class SparseReader:
    """Reads a sparse file by blocks; list and recipe are checked on opening, entries while they are read.

    ``tensors``: by name. ``recipe``: JSON. ``magnitudes``: int64 [n, 2] or None.

    Raises:
        CheckpointError: Not a sparse file of this kind, or one that contradicts itself.
    """

    def __init__(self, file: SafetensorsFile, kind: str) -> None:
        self.file, where = file, str(file.path)
        self._finite = kind == "harm_vector"  # originals in an undo record are what they are
        metadata = file.metadata
        if metadata.get("prosocial_ext.kind") != kind or metadata.get("prosocial_ext.version") != VERSION:
            found = [shown(metadata.get(f"prosocial_ext.{key}")) for key in ("kind", "version")]
            rule = f"be a file of prosocial_ext of kind {kind!r}, version {VERSION}"
            refuse(where, rule, f"kind {found[0]}, version {found[1]}", "See docs/harm_vector.md.")
        if set(metadata) != {f"prosocial_ext.{key}" for key in ("kind", "version", "tensors", "recipe")}:
            refuse(f"the metadata of {where}", "have kind, version, tensors and recipe", shown(sorted(metadata)))
        self.recipe = parse_json(metadata["prosocial_ext.recipe"].encode(), f"the recipe of {where}", floats=True)
        table = parse_json(metadata["prosocial_ext.tensors"].encode(), f"the tensor list of {where}", floats=True)
        self.tensors = {name: _tensor(name, row, file) for name, row in table.items()}
        expected = {f"{part}.{name}" for name in table for part in ("values", "positions")}
        self.magnitudes: Tensor | None = None
        if "magnitudes" in file.entries:
            expected.add("magnitudes")
            self.magnitudes = _magnitudes(file)
        if extra := sorted(set(file.entries) - expected):
            refuse(where, "hold the arrays of its tensor list", f"also {shown(extra[0])}", "The file is damaged.")

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor's values."""
        return DTYPES[self.file.entry(f"values.{name}").dtype]

    def blocks(self, name: str) -> Iterator[Block]:
        """Yield a tensor's entries in ascending order.

        Raises:
            CheckpointError: Positions out of range or order, other counts than stated, differences that are not finite.
        """
        tensor = self.tensors[name]
        what = f"tensor {shown(name)} of {self.file.path}"
        damaged = "The file is damaged."
        done = 0
        for positions, inside in self._positions(tensor, what):  # both encodings ascend whatever the bytes
            if not inside:
                refuse(f"positions of {what}", f"ascend inside [0, {tensor.numel})", "others", damaged)
            if len(positions) == 0:
                continue
            if done + len(positions) > tensor.entries:
                refuse(f"positions of {what}", f"be {tensor.entries} as stated", "more", damaged)
            values = self.file.read(f"values.{name}", done, done + len(positions))
            if self._finite and not streaming.all_finite(values):
                refuse(f"values of {what}", "be finite", "NaN or Inf", damaged)
            done += len(positions)
            yield positions, values
        if done != tensor.entries:
            refuse(f"positions of {what}", f"be {tensor.entries} as stated", done, damaged)

    def _positions(self, tensor: SparseTensor, what: str) -> Iterator[tuple[Tensor, bool]]:
        """Blocks of ascending positions, and whether all of a block lie inside the tensor."""
        array = f"positions.{tensor.name}"
        size = self.file.entry(array).numel
        if tensor.encoding == "bitmap":
            for start in range(0, size, _BLOCK):
                positions = positions_of(self.file.read(array, start, min(size, start + _BLOCK)), 8 * start)
                yield positions, len(positions) == 0 or int(positions[-1]) < tensor.numel
            return
        start, last, found = 0, -1, 0
        while found < tensor.entries:
            block = self.file.read(array, start, min(size, start + _BLOCK))
            try:
                positions, used, inside = decode_gaps(block, tensor.entries - found, last, tensor.numel)
            except OverflowError:
                refuse(f"gaps of {what}", f"lie below {tensor.numel}", "longer ones", "The file is damaged.")
            if len(positions) == 0:
                refuse(f"gaps of {what}", f"be {tensor.entries} as stated", found, "The file is damaged.")
            yield positions, inside
            start, last, found = start + used, int(positions[-1]), found + len(positions)


def _metadata(kind: str, tensors: Sequence[SparseTensor], recipe: Mapping[str, Any]) -> dict[str, str]:
    table = {tensor.name: {k: v for k, v in asdict(tensor).items() if k != "name"} for tensor in tensors}
    return {
        "prosocial_ext.kind": kind,
        "prosocial_ext.version": VERSION,
        "prosocial_ext.tensors": json.dumps(table),
        "prosocial_ext.recipe": json.dumps(recipe),
    }


def _tensor(name: str, row: Any, file: SafetensorsFile) -> SparseTensor:
    what = f"tensor {shown(name)} in the list of {file.path}"
    keys = ("shape", "numel", "entries", "encoding", "energy")
    damaged = "The file is damaged."
    if not isinstance(row, dict) or set(row) != set(keys):
        refuse(what, "have " + ", ".join(keys), shown(row), damaged)
    shape, numel, entries, encoding, energy = (row[key] for key in keys)
    if not isinstance(shape, list) or len(shape) > 64 or not all(type(n) is int and n >= 0 for n in shape):
        refuse(f"the shape of {what}", "be a list of sizes", shown(shape), damaged)
    if type(numel) is not int or not 0 <= numel <= min(math.prod(shape), _MOST_ELEMENTS):
        refuse(f"numel of {what}", f"be in [0, {min(math.prod(shape), _MOST_ELEMENTS)}]", shown(numel), damaged)
    if type(entries) is not int or not 0 <= entries <= numel:
        refuse(f"entries of {what}", f"be in [0, {numel}]", shown(entries), damaged)
    if encoding not in _ENCODINGS:
        refuse(f"the encoding of {what}", "be bitmap or gaps", shown(encoding), damaged)
    if type(energy) not in (int, float) or not 0 <= energy < math.inf:
        refuse(f"the energy of {what}", "be a finite number >= 0", shown(energy), damaged)
    values, positions = file.entry(f"values.{name}"), file.entry(f"positions.{name}")
    if values.dtype not in _FLOATS or values.shape != (entries,):
        refuse(f"values of {what}", f"be {entries} floats", f"{values.dtype} {values.shape}", damaged)
    least = -(-numel // 8) if encoding == "bitmap" else entries
    if positions.dtype != "U8" or len(positions.shape) != 1 or positions.numel < least:
        rule = f"be at least {least} bytes"
        refuse(f"positions of {what}", rule, f"{positions.dtype} {positions.shape}", damaged)
    if encoding == "bitmap" and positions.numel >= least + 8:
        refuse(f"positions of {what}", f"be {least} bytes and at most 7 more", positions.numel, damaged)
    return SparseTensor(name, tuple(shape), numel, entries, encoding, float(energy))


def _magnitudes(file: SafetensorsFile) -> Tensor:
    entry = file.entry("magnitudes")
    if entry.dtype != "I64" or len(entry.shape) != 2 or entry.shape[1] != 2 or entry.shape[0] > 1 << 16:
        refuse(f"magnitudes of {file.path}", "be I64 [n, 2]", f"{entry.dtype} {entry.shape}", "The file is damaged.")
    return file.read("magnitudes").view(-1, 2)
