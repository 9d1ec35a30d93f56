"""How the difference meets the stored numbers: rounded to nearest, by chance, or kept whole in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prosocial_ext import ops
from prosocial_ext.direg.widths import SIXTEEN, round_stochastic, widen
from prosocial_ext.ops import SparseDelta
from prosocial_ext.ops._stream import Subtracted
from prosocial_ext.reference import check

__all__ = ["ROUNDINGS", "Rounding"]

ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Rounding:
    """What becomes of 16-bit floats; wider ones are subtracted from as they are.

    ``dtype``: torch.float32 to widen them, or None. ``rounding``: "nearest" or "stochastic". ``seed``: of the latter.

    Raises:
        ValueError: An argument out of range, or chance asked for where nothing is rounded to 16 bits.

    >>> half = torch.ones(2, dtype=torch.bfloat16)
    >>> written, done = Rounding(torch.float32).subtract(half, torch.tensor([1]), torch.tensor([1e-3]), 1.0, "w", 0)
    >>> written, done.unchanged
    (tensor([1.0000, 0.9990]), 0)
    """

    dtype: torch.dtype | None = None
    rounding: str = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float32):
            check.fail("dtype", "be torch.float32 or None", self.dtype, "Narrower outputs would lose bits.")
        check.choice("rounding", self.rounding, ROUNDINGS)
        check.integer("seed", self.seed, 0, (1 << 63) - 1, "be in [0, 2^63)")
        if self.dtype is not None and self.rounding != "nearest":
            check.fail("rounding", "be 'nearest' for float32 outputs", repr(self.rounding), "Leave one of the two out.")

    def written(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that one of this dtype is written in."""
        return torch.float32 if self.dtype is not None and dtype in SIXTEEN else dtype

    @property
    def is_plain(self) -> bool:
        """Whether elements keep their dtype and are rounded to the nearest."""
        return self.dtype is None and self.rounding == "nearest"

    def describe(self) -> dict[str, Any]:
        """For recipes."""
        seed = {"seed": self.seed} if self.rounding == "stochastic" else {}
        return {"dtype": None if self.dtype is None else "float32", "rounding": self.rounding, **seed}

    def subtract(
        self, elements: Tensor, positions: Tensor, values: Tensor, scale: float, name: str, start: int
    ) -> tuple[Tensor, Subtracted]:
        """Return a chunk with ``scale * values`` taken off at ``positions``, and what was done.

        Args:
            elements: The chunk, flat, which may be edited in place; its first element is the tensor's ``start``-th.
            positions: int64 [n], ascending, in the tensor.
            values: float32 or float64 [n].
            scale: The dose.
            name: Of the tensor.
            start: The chunk's place in it.
        """
        by_chance = self.rounding == "stochastic" and elements.dtype in SIXTEEN
        wide = widen(elements) if by_chance or self.written(elements.dtype) != elements.dtype else elements
        place = positions - start
        before = elements[place]
        written, unchanged = (elements if by_chance else wide), 0
        if len(place):
            count = torch.tensor([len(place)], device="cpu")
            delta = SparseDelta(place, values, count, values[:1], ((len(elements),),), (values.dtype,))
            edit = ops.sparse_subtract_(wide, delta, scale=scale)
            unchanged = int(edit.unchanged.sum())
            if by_chance:
                after = round_stochastic(wide[place], elements.dtype, seed=self.seed, name=name, positions=positions)
                elements[place] = after
                unchanged = int((after == before).sum())
        moved = written[place].double() - before.double()
        return written, Subtracted(
            before=before,
            unchanged=unchanged,
            requested=float((values.double() * scale).square().sum()),
            effective=float(moved.square().sum()),
            smallest=float(values.abs().min()) if len(values) else math.inf,
        )
