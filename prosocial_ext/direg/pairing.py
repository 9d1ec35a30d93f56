"""Which tensors of two checkpoints or models are subtracted from each other, in which order and groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.checkpoints.checkpoint import Checkpoint, is_vocabulary
from prosocial_ext.checkpoints.errors import listed, refuse, shown
from prosocial_ext.checkpoints.readers import Reader, TensorReader
from prosocial_ext.direg.adapter import Adapter
from prosocial_ext.direg.models import Weights, matching_parameters, named_floats
from prosocial_ext.reference import check

__all__ = ["SCOPES", "Pair", "Pairs", "groups", "pair_adapter", "pair_checkpoints", "pair_models", "pair_side"]

SCOPES = ("global", "per_tensor", "per_layer")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Pair:
    """One tensor on both sides; the first ``numel`` elements take part.

    ``benign``: the same tensor of a benign control, whose difference is taken off ``coefficient`` times.
    ``is_delta``, ``benign_is_delta``: ``tuned`` or ``benign`` gives what was added to the base, not the tuned weights.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    base: Reader
    tuned: Reader
    importance: Reader | None = None
    benign: Reader | None = None
    coefficient: float = 1.0
    is_delta: bool = False
    benign_is_delta: bool = False

    @property
    def sides(self) -> list[Reader]:
        """What the difference is made of."""
        return [self.base, self.tuned] + ([] if self.benign is None else [self.benign])

    @property
    def dtype(self) -> torch.dtype:
        """What the difference is computed in: float64 where a side is float64, else float32."""
        return torch.float64 if torch.float64 in [side.dtype for side in self.sides] else torch.float32

    def difference(self, base: Tensor, tuned: Tensor, benign: Tensor | None = None) -> Tensor:
        """Return what is selected from, of the same entries of every side; each step is rounded once."""
        values = self.added(base, tuned, self.is_delta)
        if benign is None:
            return values
        times = torch.tensor(self.coefficient, dtype=self.dtype, device="cpu")
        return values - self.added(base, benign, self.benign_is_delta) * times

    def added(self, base: Tensor, side: Tensor, is_delta: bool) -> Tensor:
        """Return what ``side`` adds to the same entries of the base, rounded once."""
        return side.to(self.dtype) if is_delta else side.to(self.dtype) - base.to(self.dtype)


@dataclass(frozen=True)
class Pairs:
    """The tensors that take part in the global order, and what was found about the others.

    ``tied``: names under which a tensor appears again, and the name it is counted under. ``left_alone``: tensors that
    take no part, with the reason; rows of the vocabulary that only one side has are named here too.
    """

    pairs: list[Pair]
    tied: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)


def pair_checkpoints(
    base: Checkpoint, tuned: Checkpoint, importance: Checkpoint | Mapping[str, Tensor] | None = None,
    include: Sequence[str] = (), exclude: Sequence[str] = (),
) -> Pairs:  # fmt: skip
    """Pair up two checkpoints of one architecture.

    A head that repeats the embedding on both sides, or is missing on one, is counted once. Tensors without floating
    point and buffers are left alone, as are rows of the vocabulary that only one side has.

    Args:
        base: The checkpoint that was tuned.
        tuned: The tuned copy.
        importance: One tensor per tensor that takes part, of its shape, by name.
        include: Globs of names; empty for all.
        exclude: Globs of names.

    Raises:
        CheckpointError: Names or shapes differ (the text lists them), a glob matches nothing, nothing is left.
    """
    ones, others = (_parameters(a, b) for a, b in ((base, tuned), (tuned, base)))
    tied = {head: embedding for side in (base, tuned) for head, embedding in side.tied.items()
            if head not in ones and head not in others}  # fmt: skip
    _same_names(base, tuned, sorted(ones - others), sorted(others - ones))
    left_alone = {**tuned.left_alone, **base.left_alone}
    names = _chosen(sorted(ones), include, exclude)
    pairs, wrong = [], []
    for name in names:
        a, b = base.entry(name).shape, tuned.entry(name).shape
        numel = base.entry(name).numel
        if a != b:
            if not (is_vocabulary(name, a) and is_vocabulary(name, b) and a[1] == b[1]):
                wrong.append(f"{shown(name)} {list(a)} and {list(b)}")
                continue
            numel = min(a[0], b[0]) * a[1]
            left_alone[name] = f"rows {min(a[0], b[0])} to {max(a[0], b[0]) - 1}, which one side has"
        pairs.append(Pair(name, a, numel, base.reader(name), tuned.reader(name), _weight(importance, name, a)))
    if wrong:
        rest = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        refuse(
            f"tensors of {base.folder} and {tuned.folder}",
            "have the same shapes",
            "; ".join(wrong[:4]) + rest,
            "Only checkpoints of one architecture can be subtracted.",
        )
    return Pairs(pairs, tied, left_alone)


def pair_models(
    base: torch.nn.Module, tuned: Weights, importance: Mapping[str, Tensor] | None = None,
    include: Sequence[str] = (), exclude: Sequence[str] = (),
) -> Pairs:  # fmt: skip
    """Pair up the parameters of two models in memory as `matching_parameters` does.

    Raises:
        ValueError: Names or shapes differ, a glob matches nothing, nothing is left.
    """
    others: dict[str, Weights] = {"tuned": tuned}
    if importance is not None:
        others["importance"] = importance
    names, found = matching_parameters(base, **others)
    by_name = {name: i for i, name in enumerate(names)}
    pairs = []
    for name in _chosen(names, include, exclude):
        readers = {label: TensorReader(tensors[by_name[name]]) for label, tensors in found.items()}
        tensor, weight = found["model"][by_name[name]], readers.get("importance")
        pairs.append(Pair(name, tuple(tensor.shape), tensor.numel(), readers["model"], readers["tuned"], weight))
    return Pairs(pairs, _aliases(base, names))


def pair_adapter(
    base: Checkpoint | torch.nn.Module, adapter: Adapter, importance: Checkpoint | Mapping[str, Tensor] | None = None,
    include: Sequence[str] = (), exclude: Sequence[str] = (),
) -> Pairs:  # fmt: skip
    """Pair up a base, on disk or in memory, with what a LoRA adapter adds to each of its tensors.

    All parameters of the base take part; where the adapter has nothing, the difference is 0.

    Raises:
        CheckpointError: The adapter does not fit the base, a glob matches nothing, nothing is left.
    """
    own: dict[str, tuple[tuple[int, ...], Reader]]
    if isinstance(base, Checkpoint):
        own = {name: (base.entry(name).shape, base.reader(name)) for name in base.parameters}
        tied, left_alone = base.tied, base.left_alone
    else:
        named = named_floats("base", base)
        own = {name: (tuple(p.shape), TensorReader(p)) for name, p in sorted(named.items())}
        tied, left_alone = _aliases(base, list(named)), {}
    adapter.check({name: shape for name, (shape, _) in own.items()}, tied)
    pairs = []
    for name in _chosen(list(own), include, exclude):
        shape, reader = own[name]
        replacement, weight = adapter.replacement(name), _weight(importance, name, shape)
        numel = math.prod(shape)
        if replacement is not None and name in adapter.layers:
            if not _equal(reader, replacement, numel):
                refuse(f"{shown(name)} in {adapter.file.path}", "be the base's where LoRA adds to it", "another",
                       "Merge the adapter first, or save it with save_embedding_layers=False.")  # fmt: skip
            replacement = None
        tuned = replacement or adapter.delta(name, shape)
        pairs.append(Pair(name, shape, numel, reader, tuned, weight, is_delta=replacement is None))
    return Pairs(pairs, dict(tied), dict(left_alone))


def pair_side(
    base: Checkpoint | torch.nn.Module, side: Checkpoint | Adapter,
    importance: Checkpoint | Mapping[str, Tensor] | None = None,
    include: Sequence[str] = (), exclude: Sequence[str] = (),
) -> Pairs:  # fmt: skip
    """Pair up a base with a tuned copy, full or an adapter; a base in memory only with an adapter.

    Raises:
        CheckpointError: As `pair_checkpoints` and `pair_adapter`; a model in memory and a full copy on disk.
    """
    if isinstance(side, Adapter):
        return pair_adapter(base, side, importance, include, exclude)
    if not isinstance(base, Checkpoint):
        remedy = "Pass the base's folder, or all sides in memory to from_models."
        refuse("base", f"be a checkpoint where {side.folder} is one", "a model in memory", remedy)
    return pair_checkpoints(base, side, importance, include, exclude)


def groups(names: Sequence[str], scope: str) -> list[range]:
    """Return the runs of sorted ``names`` that a selection is made in; a layer's names follow each other.

    >>> groups(["h.0.w", "h.1.a.w", "h.1.b.w", "norm"], "per_layer")
    [range(0, 1), range(1, 3), range(3, 4)]
    """
    check.choice("scope", scope, SCOPES)
    if scope == "global":
        return [range(len(names))]
    starts = [
        i for i, name in enumerate(names) if i == 0 or scope == "per_tensor" or _layer(name) != _layer(names[i - 1])
    ]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(names)], strict=True)]


def _aliases(model: torch.nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Names under which a tied parameter comes again, and the one of ``names`` that it is counted under."""
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {id(every[name]): name for name in names}
    return {alias: first[id(p)] for alias, p in every.items() if first.get(id(p), alias) != alias}


def _equal(one: Reader, other: Reader, numel: int) -> bool:
    if one.dtype != other.dtype:
        return False
    starts = range(0, numel, _BLOCK)
    return all(torch.equal(one.read(i, min(numel, i + _BLOCK)), other.read(i, min(numel, i + _BLOCK))) for i in starts)


def _layer(name: str) -> str:
    """The name up to the first number in it, or all of it."""
    parts = name.split(".")
    return ".".join(parts[: next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts)) + 1])


def _parameters(side: Checkpoint, other: Checkpoint) -> set[str]:
    """Parameters of ``side`` and the tied heads that ``other`` has untied."""
    return set(side.parameters) | (set(side.tied) & set(other.parameters))


def _same_names(base: Checkpoint, tuned: Checkpoint, only_base: list[str], only_tuned: list[str]) -> None:
    if only_base or only_tuned:
        parts = [f"only {side.folder} has {listed(names)}" for side, names in ((base, only_base), (tuned, only_tuned))
                 if names]  # fmt: skip
        remedy = "Both must come from one architecture, with the same tensors tied, adapters merged."
        refuse("the two checkpoints", "have the same tensors", "; ".join(parts), remedy)


def _chosen(names: list[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                refuse(argument, "match a tensor", shown(pattern), f"Names look like {listed(names)}.")
    chosen = [
        name
        for name in names
        if (not include or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not chosen:
        refuse("include and exclude", "leave a tensor", "none")
    return chosen


def _weight(importance: Checkpoint | Mapping[str, Tensor] | None, name: str, shape: tuple[int, ...]) -> Reader | None:
    if importance is None:
        return None
    found: Any
    if isinstance(importance, Checkpoint):
        found = importance.entry(name) if name in importance.places else None
    else:
        found = importance.get(name)
    if found is None or tuple(found.shape) != shape:
        refuse(f"importance of {shown(name)}", f"have its shape {list(shape)}", "none" if found is None else
               list(found.shape), "Pass one tensor per tensor that takes part.")  # fmt: skip
    reader: Reader = importance.reader(name) if isinstance(importance, Checkpoint) else TensorReader(importance[name])
    if reader.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        refuse(f"importance of {shown(name)}", "be float32, float16 or bfloat16", reader.dtype)
    return reader
