"""The undo record in the making: a part per stretch, joined in their order, byte for byte, when all are there.

So no two processes write one file, and the bytes of the record depend on neither their number nor on stops. A part goes
when the record holds it on the disk: both together never take more than the record and its largest part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from prosocial_ext.checkpoints.errors import CheckpointError, refuse
from prosocial_ext.checkpoints.outputs import new_descriptor, sync_folder
from prosocial_ext.checkpoints.raw_io import write_all
from prosocial_ext.checkpoints.safetensors_file import SafetensorsFile
from prosocial_ext.checkpoints.safetensors_header import LENGTH_BYTES, Header, parse_header, parse_json, render_header
from prosocial_ext.direg.rewrite import RECORDS

__all__ = ["UNDO", "header_of", "holds", "join"]

UNDO = f"{RECORDS}/undo.safetensors"
_COPY = 8 << 20
_LIST = "prosocial_ext.tensors"


def header_of(part: Path) -> str:
    """The JSON in the header of a complete part, by which it is known when it has become part of the record."""
    with SafetensorsFile(part) as file:
        return file.header[LENGTH_BYTES:].decode().rstrip()


def holds(place: Path, header: str) -> bool:
    """Whether a part, or the record that it went into, is a whole file with the part's tensors in it."""
    if place.is_symlink():
        return False
    with suppress(CheckpointError), SafetensorsFile(place) as file:
        tensors = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        return all(tensors.get(entry.name) == (entry.dtype, entry.shape) for entry in _parsed(header).entries.values())
    return False


def join(parts: Sequence[tuple[Path, str]], record: Path, recipe: Mapping[str, Any]) -> None:
    """Write the record of the parts, which are removed; called again after a stop, it goes on.

    Args:
        parts: The place and `header_of` of each, in order; one that is not there any more lies in the record already.
        record: The file.
        recipe: The record's.
    """
    headers = [_parsed(header) for _, header in parts]
    sizes = [max((entry.stop for entry in header.entries.values()), default=0) for header in headers]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    entries = [
        replace(entry, start=start + entry.start, stop=start + entry.stop)
        for header, start in zip(headers, starts, strict=True)
        for entry in header.entries.values()
    ]
    tensors: dict[str, Any] = {}
    for header in headers:
        tensors |= parse_json(header.metadata[_LIST].encode(), "the list of a part", floats=True)
    told = {_LIST: json.dumps(tensors), "prosocial_ext.recipe": json.dumps(recipe)}
    text = render_header(entries, headers[0].metadata | told)
    with new_descriptor(record, may_exist=True) as descriptor:
        size = len(text) + sum(sizes)
        if os.fstat(descriptor).st_size != size and not all(place.exists() for place, _ in parts):
            refuse(str(record.parent), "keep its files while they are written", "fewer", "Start again.")
        write_all(descriptor, 0, text)
        os.ftruncate(descriptor, size)
        sync_folder(record.parent)
        for (place, _), start in zip(parts, starts, strict=True):
            if not place.exists():
                continue
            with SafetensorsFile(place) as part:
                for at in range(part.data_start, part.size, _COPY):
                    raw = part.read_bytes(at, min(part.size, at + _COPY))
                    write_all(descriptor, len(text) + start + at - part.data_start, raw)
            os.fsync(descriptor)
            place.unlink()


def _parsed(header: str) -> Header:
    return parse_header(header.encode(), None, "a part of the undo record")
