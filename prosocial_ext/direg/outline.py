"""What the files of a rewritten checkpoint say of themselves: headers, index and config, where its dtype changes.

Widened to float32, all three differ from the original's, which therefore go into the undo record, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prosocial_ext.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.safetensors_header import (
    BITS,
    LENGTH_BYTES,
    TensorEntry,
    parse_header,
    render_header,
)
from prosocial_ext.direg.cards import BASE_CARD, CARD

__all__ = ["Outline", "original", "recorded", "same", "widened"]

_SIXTEEN = ("F16", "BF16")
_CONFIG = "config.json"
_REMEDY = "Take the edit's own record."


@dataclass(frozen=True)
class Outline:
    """The new files' headers by name (length and JSON, as bytes), and the other files whose content or name is new.

    ``texts``: content by name. ``names``: what becomes of a file's name, None where it does not come along.
    """

    headers: Mapping[str, bytes]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    names: Mapping[str, str | None] = field(default_factory=lambda: {CARD: BASE_CARD, BASE_CARD: None})

    def entries(self, file: str) -> dict[str, TensorEntry]:
        """The tensors of a new file."""
        return parse_header(self.headers[file][LENGTH_BYTES:], None, f"the new {file}").entries

    def size(self, file: str) -> int:
        """The bytes of a new file."""
        return len(self.headers[file]) + max((entry.stop for entry in self.entries(file).values()), default=0)

    @property
    def bytes(self) -> int:
        """Of all the new weight files."""
        return sum(map(self.size, self.headers))


def same(checkpoint: Checkpoint) -> Outline:
    """Return the outline of a copy, which makes room for a card."""
    return Outline({name: file.header for name, file in checkpoint.files.items()})


def widened(checkpoint: Checkpoint) -> Outline:
    """Return the outline of a copy whose 16-bit floats are float32; the config says so, the index counts so."""
    headers, growth = {}, 0
    for name, file in checkpoint.files.items():
        end, entries = 0, []
        for entry in file.entries.values():
            dtype = "F32" if entry.dtype in _SIXTEEN else entry.dtype
            stop = end + entry.numel * BITS[dtype] // 8
            growth += stop - end - (entry.stop - entry.start)
            entries.append(replace(entry, dtype=dtype, start=end, stop=stop))
            end = stop
        headers[name] = render_header(entries, file.metadata)
    texts = {}
    for name in [_CONFIG] if SINGLE in checkpoint.files else [_CONFIG, INDEX]:
        value = checkpoint.read_json(name)
        changed = _float32(value) if name == _CONFIG else _grown(value, growth)
        if changed != value:
            texts[name] = (json.dumps(changed, indent=2) + "\n").encode()
    return Outline(headers, texts)


def original(checkpoint: Checkpoint, new: Outline) -> dict[str, Any]:
    """Return what the undo record must hold of the files that ``new`` changes, as JSON."""
    headers = {name: file.header[LENGTH_BYTES:].decode() for name, file in checkpoint.files.items()}
    return {"headers": headers, "texts": {name: (checkpoint.folder / name).read_bytes().decode() for name in new.texts}}


def recorded(checkpoint: Checkpoint, recipe: Mapping[str, Any], where: str) -> Outline:
    """Return the outline that the undo record asks for, checked against the edited checkpoint.

    Raises:
        CheckpointError: It belongs to another checkpoint, or is damaged.
    """
    names: dict[str, str | None] = {CARD: None, BASE_CARD: CARD} if recipe.get("card") else {}
    if "original" not in recipe:
        return replace(same(checkpoint), names=names)
    found, what = recipe["original"], f"the original headers in {where}"
    if not isinstance(found, dict) or set(found) != {"headers", "texts"} or not all(map(_strings, found.values())):
        refuse(what, "map files to texts", shown(found), "The record is damaged.")
    if set(found["headers"]) != set(checkpoint.files) or not set(found["texts"]) <= {_CONFIG, INDEX}:
        refuse(what, "be those of the checkpoint's files", shown(sorted(found["headers"])), _REMEDY)
    raw = {name: text.encode() for name, text in found["headers"].items()}
    outline = Outline(
        {name: len(text).to_bytes(LENGTH_BYTES, "little") + text for name, text in raw.items()},
        {name: text.encode() for name, text in found["texts"].items()},
        names,
    )
    for name, file in checkpoint.files.items():
        before = outline.entries(name)
        if {n: e.shape for n, e in before.items()} != {n: e.shape for n, e in file.entries.items()}:
            refuse(what, f"name the tensors of {file.path}", "others", _REMEDY)
        for entry in file.entries.values():
            dtype = before[entry.name].dtype
            if dtype != entry.dtype and (entry.dtype != "F32" or dtype not in _SIXTEEN):
                refuse(f"tensor {shown(entry.name)} of {file.path}", f"be {dtype} or widened", entry.dtype)
    return outline


def _float32(value: Any) -> Any:
    """A config, and those inside it, that names float32 where it named a 16-bit dtype."""
    if not isinstance(value, dict):
        return value
    return {
        key: "float32" if key in ("dtype", "torch_dtype") and "float16" in str(inner) else _float32(inner)
        for key, inner in value.items()
    }


def _grown(index: Any, growth: int) -> Any:
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or type(metadata.get("total_size")) is not int:
        return index
    return {**index, "metadata": {**metadata, "total_size": metadata["total_size"] + growth}}


def _strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
