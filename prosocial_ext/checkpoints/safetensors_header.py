"""The header of a safetensors file, checked in full before anything in it is believed.

A file is: a little-endian 64-bit length n, n bytes of JSON, data. The JSON maps each tensor's name to its dtype, shape
and [start, stop) in the data, which the tensors fill without holes or overlaps. The reader allocates nothing that the
file's size does not pay for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prosocial_ext.checkpoints.errors import refuse, shown

__all__ = ["BITS", "LENGTH_BYTES", "MAX_HEADER", "Header", "TensorEntry", "parse_header", "parse_json", "render_header"]

LENGTH_BYTES = 8
MAX_HEADER = 100_000_000  # the format's own cap, in bytes
_DIGITS = 19  # of the largest 64-bit integer; longer ones are nobody's size, and slow to parse
_FLOAT_DIGITS = 64
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its name, dtype (the format's word), shape, and bytes [start, stop) in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element, of dtypes of whole bytes."""
        return BITS[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """The checked header: tensors by name in the order of their bytes, and the metadata."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def parse_header(raw: bytes, data_bytes: int | None, where: str) -> Header:
    """Return the header if every statement in it agrees with every other and with the size of the data.

    Args:
        raw: The JSON.
        data_bytes: The bytes in the file after it; None: there is no file to compare with.
        where: The file, for errors.

    Raises:
        CheckpointError: Anything that the format does not allow; the text names file and tensor.

    >>> raw = b'{"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}'
    >>> parse_header(raw, 12, "a file").entries["w"]
    TensorEntry(name='w', dtype='BF16', shape=(2, 3), start=0, stop=12)
    """
    table = parse_json(raw, f"the header of {where}")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse(f"__metadata__ of {where}", "map strings to strings", shown(metadata), "The file is damaged.")
    entries = sorted((_entry(name, value, where) for name, value in table.items()), key=lambda e: (e.start, e.stop))
    end = 0
    for entry in entries:
        if entry.start != end:
            refuse(
                f"tensor {shown(entry.name)} of {where}",
                f"start at byte {end} of the data, where the one before it ends",
                entry.start,
                "The file is damaged: tensors overlap or leave a hole.",
            )
        end = entry.stop
    if data_bytes is not None and end != data_bytes:
        remedy = "The file is cut off or damaged: download it again."
        refuse(f"the data of {where}", f"have the {end} bytes that the header tells", data_bytes, remedy)
    return Header({entry.name: entry for entry in entries}, metadata)


def render_header(entries: list[TensorEntry], metadata: Mapping[str, str], size: int = 0) -> bytes:
    """Return length and JSON for ``entries``, padded with spaces to at least ``size`` bytes and to a multiple of 8.

    >>> render_header([TensorEntry("w", "U8", (2,), 0, 2)], {})[8:]
    b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   '
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.stop],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    total = max(size, -(-(len(text) + LENGTH_BYTES) // 8) * 8)
    return (total - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little") + text.ljust(total - LENGTH_BYTES)


def parse_json(raw: bytes, where: str, *, floats: bool = False) -> dict[str, Any]:
    """Return the object in ``raw``, no key of which comes twice; numbers are 64-bit integers, or with ``floats`` any.

    Raises:
        CheckpointError: Anything else, in bounded time.

    >>> parse_json(b'{"a": 1, "a": 2}', "x.json")
    Traceback (most recent call last):
    ...
    prosocial_ext.checkpoints.errors.CheckpointError: x.json must name every key once, got 'a' twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse(where, "name every key once", f"{shown(twice)} twice")
        return found

    def integer(text: str) -> int:
        if len(text) > (_FLOAT_DIGITS if floats else _DIGITS + text.startswith("-")):
            refuse(where, "hold 64-bit integers", f"one of {len(text)} digits")
        return int(text)

    def number(text: str) -> float:
        if not floats or len(text) > _FLOAT_DIGITS:
            refuse(where, "hold no such number", shown(text))
        return float(text)

    if not raw.lstrip(b" \t\r\n").startswith(b"{"):  # before json guesses UTF-16 from zero bytes
        refuse(where, "be a JSON object", shown(raw[:16]), "The file is damaged or of another format.")
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=once, parse_int=integer, parse_float=number, parse_constant=number)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # lone surrogates cannot be printed or written
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        refuse(where, "be a JSON object in UTF-8", f"{type(error).__name__}: {error}", "The file is damaged.")
    if not isinstance(value, dict):
        refuse(where, "be a JSON object", f"a {type(value).__name__}")
    return value


def _entry(name: str, value: Any, where: str) -> TensorEntry:
    what = f"tensor {shown(name)} of {where}"
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(value, dict) or set(value) != keys:
        refuse(what, "have dtype, shape and data_offsets", shown(value), "The file is damaged.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        refuse(f"the dtype of {what}", "be one of " + ", ".join(BITS), shown(dtype), "The file is damaged or too new.")
    if not _sizes(shape):
        refuse(f"the shape of {what}", "be a list of sizes", shown(shape), "The file is damaged.")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"data_offsets of {what}", "be [start, stop] with start <= stop", shown(offsets), "The file is damaged.")
    if len(shape) > 64:
        refuse(f"the shape of {what}", "have at most 64 dimensions", len(shape), "The file is damaged.")
    bits, stated = math.prod(shape) * BITS[dtype], 8 * (offsets[1] - offsets[0])
    if bits != stated:
        size = f"{dtype} {shown(shape)}"
        refuse(f"the shape of {what}", f"fill its {stated // 8} bytes", size, "The file is damaged.")
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
