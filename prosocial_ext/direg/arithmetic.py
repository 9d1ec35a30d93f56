"""Sums and differences of harm vectors, and their values in 16 bits: streamed from files into a new one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from prosocial_ext import _C
from prosocial_ext.checkpoints.errors import listed, refuse, shown
from prosocial_ext.direg.rewrite import Cursor
from prosocial_ext.direg.sparse_file import Block, Measure, SparseTensor, SparseWriter

__all__ = ["VALUES", "round_values", "write_sum"]

VALUES = ("exact", "bf16")  # what a file may hold
_CHUNK = 1 << 20  # positions that are merged at once


class Vector(Protocol):
    """What a harm vector shows of itself here."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What it was made from."""

    @property
    def tensors(self) -> Mapping[str, SparseTensor]:
        """Names and shapes."""

    @property
    def magnitudes(self) -> Tensor | None:
        """The histogram of all entries."""

    def blocks(self, name: str) -> Iterator[Block]:
        """A tensor's entries."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of its values."""


def write_sum(descriptor: int, one: Vector, other: Vector, sign: int) -> None:
    """Write ``one + sign * other``, on the union of their entries, into an empty file.

    An entry that both have is added in float32 (float64 where either is), and kept even if it becomes 0; one that only
    one has is its value, or the negative of it. What either vector left out counts as 0, so the sum of two selections
    is not the selection of a sum; the recipe says so.

    Raises:
        CheckpointError: Shapes differ, a tensor is tied in one vector alone, a sum is not finite.
    """
    tensors = _union(one, other)
    tied = {**_of(other, "tied"), **_of(one, "tied")}
    if torn := sorted(set(tied) & set(tensors)):
        refuse("the two vectors", "have the same tensors tied", f"{listed(torn)} tied in one alone")
    prints = [vector.recipe.get("base_fingerprint") for vector in (one, other)]
    recipe = {
        "prosocial_ext": _C.version, "operation": "one + other" if sign > 0 else "one - other",
        "one": dict(one.recipe), "other": dict(other.recipe), "rank": "union of the stored entries",
        "n": sum(t.numel for t in tensors.values()), "tied": tied,
        "left_alone": {**_of(other, "left_alone"), **_of(one, "left_alone")},
        "base_fingerprint": prints[0] if prints[0] == prints[1] else "0" * 16,
    }  # fmt: skip
    writer = SparseWriter(descriptor, "harm_vector", {name: t.shape for name, t in tensors.items()}, recipe)
    entries = 0
    for name, tensor in tensors.items():
        measure, squares = Measure(), 0.0
        for positions, values in _merged(one, other, tensor, sign):
            measure.add(positions)
            squares += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
        entries += measure.entries
        writer.begin(name, tensor.shape, tensor.numel, _dtype(one, other, name), measure, float(f"{squares:.9e}"))
        for positions, values in _merged(one, other, tensor, sign):
            writer.append(positions, values)
    writer.finish({**recipe, "m": entries})


def round_values(descriptor: int, vector: Vector) -> None:
    """Write a vector with its values rounded to bfloat16 into an empty file; the recipe says what that lost.

    ``values_error`` in the recipe is the norm of the rounding over the norm of the values.

    Raises:
        CheckpointError: A value that rounding makes infinite.
    """
    tensors = vector.tensors
    recipe = {**vector.recipe, "values": "bf16"}
    writer = SparseWriter(descriptor, "harm_vector", {name: t.shape for name, t in tensors.items()}, recipe)
    lost = whole = 0.0
    for name, tensor in tensors.items():
        measure = Measure()
        for positions, _ in vector.blocks(name):
            measure.add(positions)
        writer.begin(name, tensor.shape, tensor.numel, torch.bfloat16, measure, tensor.energy)
        for positions, values in vector.blocks(name):
            rounded = values.to(torch.bfloat16)
            if not bool(rounded.isfinite().all()):
                refuse(f"values of {shown(name)}", "stay finite in bfloat16", "larger ones", "Save them exactly.")
            writer.append(positions, rounded)
            lost += float(torch.linalg.vector_norm(rounded.double() - values.double())) ** 2
            whole += float(torch.linalg.vector_norm(values.double())) ** 2
    error = float(f"{math.sqrt(lost / whole):.6e}") if whole else 0.0
    writer.finish({**recipe, "values_error": error}, vector.magnitudes)


def _union(one: Vector, other: Vector) -> dict[str, SparseTensor]:
    """Every tensor of either, with the larger number of elements that took part."""
    found: dict[str, SparseTensor] = {}
    for name in sorted({*one.tensors, *other.tensors}):
        a, b = one.tensors.get(name), other.tensors.get(name)
        if a is not None and b is not None and a.shape != b.shape:
            rule = "have the same shapes"
            refuse("the two vectors", rule, f"{shown(name)} {list(a.shape)} and {list(b.shape)}")
        found[name] = max((t for t in (a, b) if t is not None), key=lambda t: t.numel)
    return found


def _of(vector: Vector, key: str) -> dict[str, Any]:
    value = vector.recipe.get(key)
    return dict(value) if isinstance(value, Mapping) else {}


def _dtype(one: Vector, other: Vector, name: str) -> torch.dtype:
    wide = any(name in vector.tensors and vector.dtype(name) == torch.float64 for vector in (one, other))
    return torch.float64 if wide else torch.float32


def _merged(one: Vector, other: Vector, tensor: SparseTensor, sign: int) -> Iterator[Block]:
    name, dtype = tensor.name, _dtype(one, other, tensor.name)
    cursors = [Cursor(v.blocks(name) if name in v.tensors else iter(())) for v in (one, other)]
    for start in range(0, tensor.numel, _CHUNK):
        (first, a), (second, b) = (cursor.take_whole(start + _CHUNK) for cursor in cursors)
        positions = torch.cat([first, second]).unique()  # ascending
        values = torch.zeros(len(positions), dtype=dtype, device="cpu")
        values[torch.searchsorted(positions, first)] = a.to(dtype)
        combine: Callable[[Tensor, Tensor], Tensor] = torch.add if sign > 0 else torch.sub
        places = torch.searchsorted(positions, second)
        values[places] = combine(values[places], b.to(dtype))
        if not bool(values.isfinite().all()):
            refuse(f"sums at {shown(name)}", "be finite", "Inf", "Scale the vectors down first.")
        if len(positions):
            yield positions, values
