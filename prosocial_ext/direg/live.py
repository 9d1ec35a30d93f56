"""A harm vector subtracted from a model in memory, with the original bits kept to take it back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prosocial_ext import ops
from prosocial_ext.checkpoints.checkpoint import is_vocabulary
from prosocial_ext.checkpoints.errors import listed, refuse, shown
from prosocial_ext.direg.shards import local_part, reshard
from prosocial_ext.direg.sparse_file import Block, SparseTensor
from prosocial_ext.ops import SparseDelta, TopmEdit
from prosocial_ext.reference import check

__all__ = ["LiveEdit", "fits", "subtract_live"]


class Vector(Protocol):
    """What a harm vector shows of itself here."""

    @property
    def tensors(self) -> Mapping[str, SparseTensor]:
        """Names and shapes."""

    def blocks(self, name: str) -> Iterator[Block]:
        """A tensor's entries."""


@dataclass(frozen=True)
class LiveEdit:
    """What an edit of a live model did, and the originals.

    ``scale``: the dose. ``edits``: a `TopmEdit` per parameter, by name, with its undo record (10 to 12 bytes an entry).
    Of a sharded model all of it is about this rank's shards.
    """

    scale: float
    edits: dict[str, TopmEdit]
    _params: dict[str, Tensor]
    _model: weakref.ref[torch.nn.Module]

    @property
    def kept(self) -> int:
        """The number of entries edited."""
        return sum(int(edit.kept.sum()) for edit in self.edits.values())

    @property
    def unchanged(self) -> int:
        """How many of them rounding left as they were."""
        return sum(int(edit.unchanged.sum()) for edit in self.edits.values())

    def revert_(self) -> None:
        """Restore every bit."""
        if (model := self._model()) is not None:
            reshard(model)
        for name, edit in self.edits.items():
            edit.revert_(local_part(name, self._params[name])[0])


def subtract_live(model: torch.nn.Module, vector: Vector, scale: float) -> LiveEdit:
    """Subtract ``scale * vector`` from the parameters of ``model``; all or nothing.

    Parameters are looked up by name, those of a peft model by the name that they have in its base model. Each stays on
    its device; of one that FSDP2 or DTensor has sharded by rows, every rank edits its own, without communication.

    Raises:
        CheckpointError: A tensor of the vector that the model lacks or has in another shape or kind; a damaged vector.
    """
    reshard(model)
    params = _parameters(model)
    names = [name for name in vector.tensors if vector.tensors[name].entries]
    remedy = "Where loading renames or merges tensors, edit the checkpoint on disk: prosocial direg apply."
    if missing := [name for name in vector.tensors if name not in params]:
        refuse("model", "have the vector's tensors", f"one that lacks {listed(missing)}", remedy)
    seen: dict[int, str] = {}
    for name in names:
        param, shape = params[name], vector.tensors[name].shape
        if not fits(name, shape, tuple(param.shape)):
            refuse(f"parameter {shown(name)}", f"have the vector's shape {list(shape)}", list(param.shape), remedy)
        local_part(name, param)
        if other := seen.get(id(param)):
            refuse(f"parameter {shown(name)}", "be untied, as it was for the vector", f"one tied to {shown(other)}")
        seen[id(param)] = name
    edits: dict[str, TopmEdit] = {}
    edit = LiveEdit(scale, edits, params, weakref.ref(model))
    try:
        for name in names:
            local, first = local_part(name, params[name])
            edits[name] = ops.sparse_subtract_(local, _delta(vector, name, local, first), scale=scale, undo=True)
    except BaseException:
        edit.revert_()
        raise
    return edit


def fits(name: str, shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Whether a vector's tensor can be subtracted from one of shape ``own``: the same, up to rows of the vocabulary.

    >>> fits("lm_head.weight", (10, 4), (12, 4)), fits("norm.weight", (4,), (5,))
    (True, False)
    """
    return shape == own or (is_vocabulary(name, shape) and is_vocabulary(name, own) and shape[1] == own[1])


def _parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters by their name in a checkpoint, tied ones under every name."""
    found: dict[str, Tensor] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".") if _is_peft(model) else name
        found[plain] = param
    return found


def _is_peft(model: torch.nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def _delta(vector: Vector, name: str, local: Tensor, first: int) -> SparseDelta:
    """The entries of the flat positions from ``first`` on that ``local`` holds."""
    found = []
    for positions, values in vector.blocks(name):
        here = (positions >= first) & (positions < first + local.numel())
        found.append((positions[here] - first, values[here]))
    real = found[0][1].dtype
    if real == torch.float64 and not check.has_float64(local.device):
        remedy = "Move the model to the CPU, or edit the checkpoint on disk."
        refuse(f"parameter {shown(name)}", "be where float64 is, as the vector's values are", local.device, remedy)
    positions = torch.cat([p for p, _ in found]).to(local.device)
    values = torch.cat([v for _, v in found]).to(local.device)
    counts = torch.tensor([len(positions)], device=local.device)
    smallest = values.abs().min() if len(values) else torch.tensor(torch.inf, dtype=real, device=local.device)
    return SparseDelta(positions, values, counts, smallest.reshape(1), (tuple(local.shape),), (real,))
