"""A checkpoint on disk: one safetensors file or an index and its shards, in a folder with config and tokenizer.

The global order of its entries is that of the sorted tensor names, whatever the sharding.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.checkpoints.errors import listed, refuse, shown
from prosocial_ext.checkpoints.hub import fetch
from prosocial_ext.checkpoints.readers import FileReader
from prosocial_ext.checkpoints.safetensors_file import SafetensorsFile
from prosocial_ext.checkpoints.safetensors_header import MAX_HEADER, TensorEntry, parse_json

__all__ = ["FLOATS", "INDEX", "SINGLE", "Checkpoint", "is_vocabulary"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
_PLAIN_NAME = re.compile(r"[^/\\\x00]+\.safetensors")
_QUANTISED_NAME = re.compile(r"\.(qweight|qzeros|g_idx|weight_scale(_inv)?|SCB|absmax|quant_map|quant_state\..*)$")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "shared.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")
# Masks and tables that old checkpoints hold; models of today compute them.
_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)$")
_BLOCK = 1 << 20


class Checkpoint:
    """An open checkpoint of floating-point weights.

    ``folder``; ``hub_id`` and ``commit``, or None. ``files``: its weight files by name. ``places``: the file of every
    tensor. ``parameters``: the names of its floating-point tensors, sorted, a head that repeats the embedding left out.
    ``tied``: such heads and the embedding of each. ``left_alone``: tensors that are no parameters, with the reason.

    Args:
        source: A folder, a hub id, or a hub id@revision.

    Raises:
        CheckpointError: There is no such checkpoint; it is pickled, quantised, an adapter, damaged, or its index and
            its files disagree.

    >>> import tempfile, safetensors.torch
    >>> folder = tempfile.mkdtemp()
    >>> safetensors.torch.save_file({"b": torch.zeros(2), "a": torch.ones(3)}, f"{folder}/model.safetensors")
    >>> with Checkpoint(folder) as checkpoint:
    ...     checkpoint.parameters, checkpoint.read("a", 0, 2)
    (['a', 'b'], tensor([1., 1.]))
    """

    def __init__(self, source: str | Path) -> None:
        self.folder, self.commit = fetch(str(source))
        self.hub_id = None if self.commit is None else str(source).partition("@")[0]
        self.config = self.read_json("config.json")
        self._refuse_quantised_config()
        self.files: dict[str, SafetensorsFile] = {}
        self.places: dict[str, str] = {}
        try:
            self._open()
            entries = {name: self.entry(name) for name in self.places}
            self.left_alone = {name: reason for name, entry in entries.items() if (reason := self._reason(entry))}
            self.tied = self._tied([name for name in entries if name not in self.left_alone])
        except BaseException:
            self.close()
            raise
        self.parameters = sorted(set(self.places) - set(self.left_alone) - set(self.tied))

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor."""
        return self.files[self.places[name]].entry(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flat, on the CPU."""
        return self.files[self.places[name]].read(name, start, stop)

    def reader(self, name: str) -> FileReader:
        """A tensor as something to read from."""
        return FileReader(self.files[self.places[name]], name)

    def describe(self) -> dict[str, Any]:
        """Where it came from, for recipes: hub id and commit, or the folder's name (its path is nobody's business)."""
        return {"name": self.hub_id or self.folder.resolve().name, "commit": self.commit}

    def identity(self) -> list[Any]:
        """Where it lies and what its weight files are, as far as can be told without reading them."""
        return [str(self.folder.resolve()), {name: file.identity() for name, file in self.files.items()}]

    def close(self) -> None:
        """Close its files."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open(self) -> None:
        if (self.folder / "adapter_config.json").exists():
            remedy = "Merge it first: peft's merge_and_unload, then save_pretrained."
            refuse(str(self.folder), "be a full checkpoint", "a peft adapter", remedy)
        if (self.folder / SINGLE).exists():  # transformers looks for it first, too
            names: dict[str, list[str] | None] = {SINGLE: None}
        elif (self.folder / INDEX).exists():
            names = self._index()
        else:
            self._refuse_without_weights()
        for file_name, expected in names.items():
            file = self.files[file_name] = SafetensorsFile(self.folder / file_name)
            for tensor in file.entries if expected is None else expected:
                if tensor not in file.entries:
                    remedy = "Index and shards do not belong together: download both again."
                    refuse(
                        f"{file.path}", f"hold {shown(tensor)}, which {INDEX} places in it", "no such tensor", remedy
                    )
                self.places[tensor] = file_name
            if extra := [tensor for tensor in file.entries if self.places.get(tensor) != file_name]:
                refuse(str(file.path), f"hold the tensors that {INDEX} places in it", f"also {listed(extra)}")

    def _index(self) -> dict[str, list[str] | None]:
        index, where = self.read_json(INDEX), str(self.folder / INDEX)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            refuse(f"weight_map of {where}", "map tensors to files", shown(weight_map), "The index is damaged.")
        names: dict[str, list[str] | None] = {}
        for tensor, file_name in weight_map.items():
            if not isinstance(file_name, str) or not _PLAIN_NAME.fullmatch(file_name):
                what = f"the file of {shown(tensor)} in {where}"
                refuse(what, "be the plain name of a .safetensors file in that folder", shown(file_name))
            tensors = names.setdefault(file_name, [])
            assert tensors is not None
            tensors.append(tensor)
        return names

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the folder, checked; empty where there is no such file."""
        path = self.folder / name
        if not path.is_file():
            return {}
        if path.stat().st_size > MAX_HEADER:
            refuse(str(path), f"have at most {MAX_HEADER} bytes", path.stat().st_size)
        return parse_json(path.read_bytes(), str(path), floats=True)

    def _refuse_without_weights(self) -> None:
        pickled = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        remedy = f"Save the model with save_pretrained, which writes {SINGLE}."
        if pickled:
            remedy = (
                f"{shown(pickled[0])} is a pickle, which can run code and is never opened: if you trust it, load it "
                "with from_pretrained and write it with save_pretrained."
            )
        refuse(str(self.folder), f"hold {SINGLE} or {INDEX}", "neither", remedy)

    def _refuse_quantised_config(self) -> None:
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            quantised = config.get("quantization_config")
            if quantised:
                method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
                remedy = "Dequantise it, or take the checkpoint that it was made from."
                refuse(str(self.folder), "hold plain weights", f"some quantised by {shown(method)}", remedy)

    def _reason(self, entry: TensorEntry) -> str | None:
        """Why a tensor takes no part, or None."""
        remedy = "Quantised checkpoints cannot be subtracted: dequantise first."
        what = f"tensor {shown(entry.name)} of {self.files[self.places[entry.name]].path}"
        if entry.dtype.startswith(("F8_", "F6_", "F4")) or _QUANTISED_NAME.search(entry.name):
            refuse(what, "be a plain weight", f"a quantised one, {entry.dtype}", remedy)
        if entry.dtype == "C64":
            refuse(what, "be real", "complex numbers, C64")
        if entry.dtype not in FLOATS:
            return f"{entry.dtype}, no floating point"
        if _BUFFER.search(entry.name) and (not entry.name.endswith("attn.bias") or len(entry.shape) == 4):
            return "a buffer, no parameter"
        return None

    def _tied(self, names: list[str]) -> dict[str, str]:
        heads = [name for name in names if name.endswith(_HEADS)]
        embeddings = [name for name in sorted(names) if name.endswith(_EMBEDDINGS)]
        tied = {}
        for head in heads:
            with suppress(StopIteration):
                tied[head] = next(name for name in embeddings if self._equal(head, name))
        return tied

    def _equal(self, one: str, other: str) -> bool:
        a, b = self.entry(one), self.entry(other)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        start, size = 0, 1 << 10  # tensors that differ mostly do so at once
        while start < a.numel:
            stop = min(a.numel, start + size)
            left, right = (self.read(name, start, stop).view(torch.uint8) for name in (one, other))
            if not torch.equal(left, right):
                return False
            start, size = stop, min(2 * size, _BLOCK)
        return True


def is_vocabulary(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has one row per token, so that two checkpoints may differ in the number of rows.

    >>> is_vocabulary("model.embed_tokens.weight", (32064, 8)), is_vocabulary("model.norm.weight", (8,))
    (True, False)
    """
    return len(shape) == 2 and name.endswith(_EMBEDDINGS + _HEADS)
