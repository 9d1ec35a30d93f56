"""A harm vector subtracted from a model in memory, with the original bits kept to take it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prosocial_ext import ops
from prosocial_ext.direg.checkpoint import is_vocabulary
from prosocial_ext.direg.errors import listed, refuse, shown
from prosocial_ext.direg.sparse_file import Block, SparseTensor
from prosocial_ext.ops import SparseDelta, TopmEdit

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
    """

    scale: float
    edits: dict[str, TopmEdit]
    _params: dict[str, Tensor]

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
        for name, edit in self.edits.items():
            edit.revert_(self._params[name])


def subtract_live(model: torch.nn.Module, vector: Vector, scale: float) -> LiveEdit:
    """Subtract ``scale * vector`` from the parameters of ``model``; all or nothing.

    Parameters are looked up by name, those of a peft model by the name that they have in its base model. Each stays on
    its device.

    Raises:
        CheckpointError: A tensor of the vector that the model lacks or has in another shape or kind; a damaged vector.
    """
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
        if type(param.data) is not Tensor:
            kind = type(param.data).__name__
            refuse(f"parameter {shown(name)}", "be a plain tensor", f"a {kind}", "Edit the checkpoint on disk.")
        if other := seen.get(id(param)):
            refuse(f"parameter {shown(name)}", "be untied, as it was for the vector", f"one tied to {shown(other)}")
        seen[id(param)] = name
    edits: dict[str, TopmEdit] = {}
    edit = LiveEdit(scale, edits, params)
    try:
        for name in names:
            edits[name] = ops.sparse_subtract_(params[name], _delta(vector, name, params[name]), scale=scale, undo=True)
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


def _delta(vector: Vector, name: str, param: Tensor) -> SparseDelta:
    found = [(p[p < param.numel()], v[p < param.numel()]) for p, v in vector.blocks(name)]
    real = found[0][1].dtype
    positions = torch.cat([p for p, _ in found]).to(param.device)
    values = torch.cat([v for _, v in found]).to(param.device)
    counts = torch.tensor([len(positions)], device=param.device)
    smallest = values.abs().min() if len(values) else torch.tensor(torch.inf, dtype=real, device=param.device)
    return SparseDelta(positions, values, counts, smallest.reshape(1), (tuple(param.shape),), (real,))
