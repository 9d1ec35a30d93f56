"""A LoRA adapter on disk as the harm side: what it adds to each tensor of its base, one tensor at a time.

peft computes every dW: a module tree that holds nothing but one layer, without weights, gets the adapter's A and B, and
its own `get_delta_weight` is called. What an adapter may be and this is not is refused by name.
"""

from __future__ import annotations

import math
import platform
import re
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.errors import listed, refuse, shown
from prosocial_ext.checkpoints.hub import fetch
from prosocial_ext.checkpoints.readers import FileReader, Reader
from prosocial_ext.checkpoints.safetensors_file import SafetensorsFile
from prosocial_ext.checkpoints.safetensors_header import MAX_HEADER, TensorEntry, parse_json

__all__ = ["CONFIG", "Adapter", "ConstantReader", "is_adapter", "open_side"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "Merge it first: peft's merge_and_unload, then save_pretrained."
_NOT_ADDED = (  # settings under which the tuned weight is more than base + scaling * B A
    "use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip
_STARTS_FROM_THE_BASE = (
    None,
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # other initialisations change the base itself
_KEY = re.compile(r"base_model\.model\.(.+)")
_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
_FLOATS = ("F64", "F32", "F16", "BF16")
_ONE_AT_A_TIME = threading.Lock()  # of all adapters: a dW may be large, and peft does not say what it does in threads


def is_adapter(source: str | Path) -> bool:
    """Whether a folder, or what the hub gives, is a peft adapter.

    Raises:
        CheckpointError: Neither a folder nor something that the hub can give.

    >>> is_adapter(".")
    False
    """
    return (fetch(str(source))[0] / CONFIG).exists()


def open_side(source: str | Path, stack: ExitStack) -> Adapter | Checkpoint:
    """Open a tuned copy until ``stack`` is left: an adapter if its folder holds one's config, else a full checkpoint.

    Raises:
        CheckpointError: It is neither, or one that cannot be used.

    >>> import tempfile, safetensors.torch
    >>> folder = tempfile.mkdtemp()
    >>> safetensors.torch.save_file({"w": torch.zeros(2)}, f"{folder}/model.safetensors")
    >>> with ExitStack() as stack:
    ...     type(open_side(folder, stack)).__name__
    'Checkpoint'
    """
    return stack.enter_context(Adapter(source)) if is_adapter(source) else stack.enter_context(Checkpoint(source))


class Adapter:
    """An open LoRA adapter.

    ``folder``; ``name``: the folder's, or the hub id; ``commit``: of the hub, or None. ``base_name``: what it says that
    it was trained on, or None.
    ``layers``: by the name of a base tensor, the two factors of what is added to it. ``replaced``: by the name of a
    base tensor, the tensor of the adapter that takes its place (modules_to_save, trained biases).

    Args:
        source: A folder, a hub id, or a hub id@revision.

    Raises:
        CheckpointError: There is no such adapter; it is no LoRA; it is one that does more than add B A, such as DoRA;
            it is pickled or damaged.

    >>> import json, tempfile, safetensors.torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    >>> factors = {"A": torch.tensor([[1.0, 0.0, 3.0]]), "B": torch.tensor([[1.0], [2.0]])}
    >>> factors = {f"base_model.model.fc.lora_{side}.weight": factor for side, factor in factors.items()}
    >>> safetensors.torch.save_file(factors, folder / WEIGHTS)
    >>> with Adapter(folder) as adapter:
    ...     list(adapter.layers), adapter.delta("fc.weight", (2, 3)).read(0, 6)
    (['fc.weight'], tensor([ 2.,  0.,  6.,  4.,  0., 12.]))
    """

    def __init__(self, source: str | Path) -> None:
        self.folder, self.commit = fetch(str(source))
        self.name = self.folder.resolve().name if self.commit is None else str(source).partition("@")[0]
        self._config = self._settings()
        stated = self._config.get("base_model_name_or_path")
        self.base_name = stated if isinstance(stated, str) and stated else None
        if not (self.folder / WEIGHTS).exists():
            remedy = "Save it with peft's save_pretrained; adapter_model.bin is a pickle and is never opened."
            refuse(str(self.folder), f"hold {WEIGHTS}", "none", remedy)
        self.file = SafetensorsFile(self.folder / WEIGHTS)
        try:
            self._sort_keys()
        except BaseException:
            self.close()
            raise
        self._last: tuple[str, Tensor] | None = None

    def describe(self) -> dict[str, Any]:
        """Where it came from, for recipes."""
        return {"name": self.name, "commit": self.commit, "adapter_of": self.base_name}

    def identity(self) -> list[Any]:
        """Where it lies and what else its dW depend on, as far as can be told without reading it: also the machine."""
        versions = [metadata.version("peft"), platform.node(), torch.get_num_threads()]
        return [str(self.folder.resolve()), self._config, self.file.identity(), versions]

    def names_another_base(self, folder: Path) -> bool:
        """Whether its config names another base than the one in ``folder``: the last parts of their names differ."""
        if self.base_name is None:
            return False
        place = folder.resolve()
        own = place.parent.parent.name.split("--")[-1] if place.parent.name == "snapshots" else place.name
        return self.base_name.rstrip("/").rsplit("/", 1)[-1] != own

    def check(self, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> None:
        """Raise unless the adapter fits a base with these parameters.

        Args:
            shapes: Of the base's parameters, by name.
            tied: Heads that repeat an embedding, by name, and the embedding.

        Raises:
            CheckpointError: A tensor that the base lacks, has in another shape or holds twice.
        """
        for name in (*self.layers, *self.replaced):
            if name in tied:
                found = f"{shown(name)}, which repeats {shown(tied[name])}"
                refuse(str(self.folder), "change no tied tensor", found, "Untie the base, or merge the adapter.")
        if missing := [name for name in (*self.layers, *self.replaced) if name not in shapes]:
            remedy = "Take the base that it was trained on" + (f": {shown(self.base_name)}." if self.base_name else ".")
            refuse(f"the base of {self.folder}", "have the adapter's tensors", f"none of {listed(missing)}", remedy)
        turned, square = set(), False
        for name, (a, b) in self.layers.items():
            plain = (b.shape[0], a.shape[1])
            if name in self._embeddings:
                plain = (plain[1], plain[0])
            elif plain[0] == plain[1]:
                square = True
            elif shapes[name] in (plain, plain[::-1]):
                turned.add(shapes[name] != plain)
            if shapes[name] != plain and (name in self._embeddings or shapes[name] != plain[::-1]):
                rule = f"have the shape {list(plain)} of the adapter's {shown(name)}"
                refuse("the base", rule, list(shapes[name]), "Take the base that it was trained on.")
        if square and turned - {self._turned}:
            rule = f"be stored as fan_in_fan_out={self._turned} in {CONFIG} says"
            refuse(f"the base's layers under {self.folder}", rule, "some that are not", _MERGE)
        for name, entry in self.replaced.items():
            if entry.shape != shapes[name]:
                refuse(f"{shown(entry.name)} of {self.file.path}", f"have the base's shape {list(shapes[name])}",
                       list(entry.shape), "Take the base that it was trained on.")  # fmt: skip

    def delta(self, name: str, shape: tuple[int, ...]) -> Reader:
        """What is added to the base tensor ``name`` of this shape; 0 where the adapter has nothing for it."""
        if name not in self.layers:
            return ConstantReader(0.0)
        return _DeltaReader(self, name, shape)

    def replacement(self, name: str) -> Reader | None:
        """What takes the place of the base tensor ``name``, or None."""
        return FileReader(self.file, self.replaced[name].name) if name in self.replaced else None

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """peft's dW of one base tensor, flat; the last one is kept, as threads ask for it by chunks."""
        with _ONE_AT_A_TIME:
            if self._last is None or self._last[0] != name:
                self._last = None  # before the next one is made: they may be large
                self._last = name, self._delta_weight(name, shape).reshape(-1)
            return self._last[1]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a dW: as peft loads an adapter, 16-bit factors are widened to float32."""
        wide = any(entry.dtype == "F64" for entry in self.layers[name])
        return torch.float64 if wide else torch.float32

    def close(self) -> None:
        """Close its file."""
        self.file.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _settings(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        if not path.is_file() or path.stat().st_size > MAX_HEADER:
            refuse(str(self.folder), f"hold {CONFIG} of at most {MAX_HEADER} bytes", "none")
        config = parse_json(path.read_bytes(), str(path), floats=True)
        kind = config.get("peft_type")
        if kind != "LORA":
            refuse(str(path), "describe a LoRA adapter (peft_type LORA)", shown(kind), _MERGE)
        for setting in _NOT_ADDED:
            if config.get(setting):
                refuse(f"{setting} of {path}", "be unset: such an adapter does more than add B A", "a value", _MERGE)
        start = config.get("init_lora_weights", True)
        if start not in _STARTS_FROM_THE_BASE:
            remedy = f"Convert it to a plain LoRA as peft's documentation of {shown(start)} says, or merge it."
            refuse(f"init_lora_weights of {path}", "be one that leaves the base as it is", shown(start), remedy)
        for setting in ("use_rslora", "fan_in_fan_out"):
            if not isinstance(config.get(setting, False), bool):
                refuse(f"{setting} of {path}", "be true or false", shown(config[setting]))
        for setting, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            pattern = config.get(setting) or {}
            if not isinstance(pattern, dict) or not all(map(_is_positive, [*pattern.values(), config.get(default)])):
                refuse(f"{default} and {setting} of {path}", "be positive numbers, and map names to them", "others")
            for name in pattern:
                if not _is_tame(name):
                    refuse(f"{setting} of {path}", "map names or simple regular expressions", shown(name), _MERGE)
        return config

    @property
    def _turned(self) -> bool:
        return bool(self._config.get("fan_in_fan_out", False))

    def _sort_keys(self) -> None:
        self.layers: dict[str, tuple[TensorEntry, TensorEntry]] = {}
        self.replaced: dict[str, TensorEntry] = {}
        self._embeddings: set[str] = set()
        factors: dict[str, dict[str, TensorEntry]] = {}
        for key, entry in self.file.entries.items():
            match = _KEY.fullmatch(key)
            if not match or entry.dtype not in _FLOATS:
                self._refuse_key(key)
            part = _PART.fullmatch(match[1])
            if part is None:
                if "lora_" in key:
                    self._refuse_key(key)
                self.replaced[match[1].replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = entry
                continue
            if len(entry.shape) != 2 or 0 in entry.shape:
                refuse(f"{shown(key)} of {self.file.path}", "be a matrix", list(entry.shape), _MERGE)
            name, side = f"{part[1]}.weight", part[2].removesuffix(".weight")[-1]
            factors.setdefault(name, {})[side] = entry
            if "embedding" in part[2]:
                self._embeddings.add(name)
        for name, pair in factors.items():
            if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                refuse(f"{shown(name)} in {self.file.path}", "have A [r, in] and B [out, r]", "others",
                       "The file is damaged.")  # fmt: skip
            if pair["A"].shape[0] != (rank := self._setting("rank_pattern", "r", name)):
                refuse(f"{shown(name)} in {self.file.path}", f"have the rank {rank} of {CONFIG}", pair["A"].shape[0],
                       "Config and weights do not belong together.")  # fmt: skip
            self.layers[name] = pair["A"], pair["B"]

    def _refuse_key(self, key: str) -> NoReturn:
        refuse(str(self.file.path), "hold factors of LoRA and whole tensors of floats", shown(key), _MERGE)

    def _setting(self, pattern: str, default: str, name: str) -> Any:
        """A layer's own rank or alpha, as peft finds it."""
        from peft.utils.other import get_pattern_key

        own = self._config.get(pattern) or {}
        return own.get(get_pattern_key(own.keys(), name.removesuffix(".weight")), self._config[default])

    def _delta_weight(self, name: str, shape: tuple[int, ...]) -> Tensor:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.pytorch_utils import Conv1D

        a, b = self.layers[name]
        embedding, plain = name in self._embeddings, (b.shape[0], a.shape[1])
        turned = not embedding and (self._turned if plain[0] == plain[1] else shape != plain)
        config = LoraConfig(
            r=a.shape[0],
            lora_alpha=self._setting("alpha_pattern", "lora_alpha", name),
            use_rslora=self._config.get("use_rslora", False),
            fan_in_fan_out=turned,
            target_modules=["layer"],
        )
        with torch.device("meta"):  # makes no weights; peft's low_cpu_mem_usage patches nn.Module for all threads
            layer: nn.Module
            if embedding:
                layer = nn.Embedding(shape[0], shape[1])
            elif turned:
                layer = Conv1D(shape[1], shape[0])
            else:
                layer = nn.Linear(plain[1], plain[0], bias=False)
            holder = nn.ModuleDict({"layer": layer})
            inject_adapter_in_model(config, holder)
        lora: Any = holder["layer"]
        with torch.no_grad():
            for side, entry in (("A", a), ("B", b)):
                read = self.file.read(entry.name).view(entry.shape)
                factor = nn.Parameter(read.to(self.dtype(name)), requires_grad=False)
                if embedding:
                    getattr(lora, f"lora_embedding_{side}")["default"] = factor
                else:
                    getattr(lora, f"lora_{side}")["default"].weight = factor
            found: Tensor = lora.get_delta_weight("default")
        return found


class ConstantReader:
    """A tensor of one float32 value that takes no memory.

    >>> ConstantReader(0.0).read(3, 5), ConstantReader(0.0).gather(torch.tensor([7]))
    (tensor([0., 0.]), tensor([0.]))
    """

    dtype = torch.float32

    def __init__(self, value: float) -> None:
        self._value = value

    def read(self, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Elements [start, stop)."""
        return torch.full((stop - start,), self._value, device="cpu")

    def gather(self, positions: Tensor) -> Tensor:
        """The elements at ``positions``."""
        return torch.full((len(positions),), self._value, device="cpu")


class _DeltaReader:
    """One dW; computed when it is first read, given up when another one is."""

    def __init__(self, adapter: Adapter, name: str, shape: tuple[int, ...]) -> None:
        self._adapter, self._name, self._shape = adapter, name, shape

    @property
    def dtype(self) -> torch.dtype:
        return self._adapter.dtype(self._name)

    def read(self, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        return self._adapter.dense(self._name, self._shape)[start:stop].clone()

    def gather(self, positions: Tensor) -> Tensor:
        return self._adapter.dense(self._name, self._shape)[positions]


def _is_tame(pattern: str) -> bool:
    """Whether matching a stranger's regular expression ends soon: short, and nothing is repeated that repeats."""
    if len(pattern) > 200 or re.search(r"\)[*+?{]", pattern) or sum(map(pattern.count, "*+{")) > 3:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
