"""The inner loops of harm vectors that are read and written piece by piece (csrc/cpu/stream.h), on flat CPU tensors.

Nothing is checked here: the callers in ``prosocial_ext.direg`` word the errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prosocial_ext import _C
from prosocial_ext.ops import _native

__all__ = [
    "EVERYTHING", "Buffers", "Candidates", "Collector", "Edge", "Looked", "Subtracted", "add_digits", "all_finite",
    "find_ties", "subtract_", "sum_squares", "word_sum",
]  # fmt: skip

_SLACK = 32  # elements that a kernel may write behind what it keeps


class Buffers:
    """Working memory that is used again and again: what a call returned is gone at the next one of that name."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, n: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of ``n`` elements, not initialised, aligned to 64 bytes.

        >>> Buffers().take("values", 3, torch.float32).shape
        torch.Size([3])
        """
        size = n * dtype.itemsize
        held = self._held.get(name)
        if held is None or len(held) < size:
            self._held[name] = held = torch.empty(size, dtype=torch.uint8, device="cpu")
        return held[:size].view(dtype)


@dataclass(frozen=True)
class Edge:
    """The place in the order through which a chunk's entries are kept.

    ``key``: of float64 scores where ``wide``. ``index``: entries of this very key are kept up to it.
    """

    key: int
    index: int
    wide: bool

    def widened(self, wide: bool) -> Edge:
        """The same place among keys of float64, if ``wide``."""
        if self.wide or not wide:
            return self
        if self.key == 0:
            return Edge(0, self.index, True)
        bits = torch.tensor(self.key - 1, dtype=torch.int32, device="cpu").view(torch.float32)
        return Edge(int(bits.double().view(torch.int64)) + 1, self.index, True)


EVERYTHING = Edge(0, -1, False)


@dataclass(frozen=True)
class Looked:
    """What one look at a chunk found.

    ``offsets`` (int32, from the chunk's start), ``values`` and ``effects`` (values times importance; None without) of
    the kept entries: views of buffers. ``bad_values``, ``bad_weights``, ``bad_effects``: entries that are not finite,
    or, of weights, negative. ``energy``: the sum of squared differences; ``effect``: of the effects' magnitudes.
    ``word_sum``: of base, 0 without.
    """

    offsets: Tensor
    values: Tensor
    effects: Tensor | None
    bad_values: int
    bad_weights: int
    bad_effects: int
    energy: float
    effect: float
    word_sum: int


class Collector:
    """Looks at chunks: counts magnitudes into ``histogram`` (int64 [65536]) and keeps what an edge holds.

    Args:
        wide: Some tensor of the stream is float64; the histogram's bins are then those of float64 keys.

    >>> base, tuned = torch.zeros(4), torch.tensor([3.0, 0.0, -4.0, 1.0])
    >>> looked = Collector(wide=False).look(base, tuned, None, torch.float32, Edge(0x40000001, -1, False))
    >>> looked.offsets.tolist(), looked.values.tolist(), looked.energy
    ([0, 2], [3.0, -4.0], 26.0)
    """

    def __init__(self, wide: bool) -> None:
        self.histogram = torch.zeros(1 << 16, dtype=torch.int64, device="cpu")
        self._wide, self._buffers = wide, Buffers()

    def look(
        self, base: Tensor | None, tuned: Tensor, importance: Tensor | None, dtype: torch.dtype, edge: Edge,
        by_effect: bool = True,
    ) -> Looked:  # fmt: skip
        """Look at one chunk.

        Args:
            base: Flat, [n]; None: ``tuned`` holds the differences.
            tuned: [n].
            importance: [n] or None.
            dtype: What differences and effects are computed in, float32 or float64.
            edge: What is kept.
            by_effect: Where there is importance, entries are ranked by their effects, else by their differences.
        """
        n, take = len(tuned), self._buffers.take
        base, tuned = None if base is None else base.contiguous(), tuned.contiguous()
        weights = None if importance is None else importance.contiguous()
        room = n + _SLACK
        offsets, values = take("offsets", room, torch.int32), take("values", room, dtype)
        effects = None if weights is None else take("effects", room, dtype)
        place = edge.widened(self._wide)
        chunk = _C.StreamChunk()
        if base is not None:
            chunk.base, chunk.base_dtype = base.data_ptr(), _native.DTYPE_TAG[base.dtype]
        chunk.tuned, chunk.tuned_dtype = tuned.data_ptr(), _native.DTYPE_TAG[tuned.dtype]
        if weights is not None and effects is not None:
            chunk.importance, chunk.importance_dtype = weights.data_ptr(), _native.DTYPE_TAG[weights.dtype]
            chunk.by_score, chunk.scores = by_effect, effects.data_ptr()
        chunk.n, chunk.wide, chunk.wide_keys = n, dtype == torch.float64, self._wide
        chunk.edge_key, chunk.edge_index = _key(place.key, place.wide), place.index
        chunk.histogram, chunk.offsets, chunk.values = (t.data_ptr() for t in (self.histogram, offsets, values))
        _C.stream_collect(chunk)
        return Looked(
            offsets[: chunk.kept],
            values[: chunk.kept],
            None if effects is None else effects[: chunk.kept],
            chunk.bad_values,
            chunk.bad_weights,
            chunk.bad_scores,
            chunk.energy,
            chunk.effect,
            chunk.word_sum,
        )


@dataclass(frozen=True)
class Candidates:
    """Some entries of a tensor, flat CPU tensors of one length.

    ``first``: the element that ``offsets`` (int32, ascending) count from. ``values`` (float32 or float64) are written,
    ``scores``, of their dtype, are what they are ranked by; ``effects``, if any, are added up.
    """

    first: int
    offsets: Tensor
    values: Tensor
    scores: Tensor
    effects: Tensor | None = None

    def _call(self, edge: Edge) -> Any:
        wide = self.values.dtype == torch.float64
        place = edge.widened(wide)
        call = _C.StreamEntries()
        call.offsets, call.values, call.scores = (t.data_ptr() for t in (self.offsets, self.values, self.scores))
        if self.effects is not None:
            call.effects = self.effects.data_ptr()
        call.first, call.n, call.wide, call.wide_keys = self.first, len(self.offsets), wide, place.wide
        call.key, call.index = _key(place.key, place.wide), place.index
        return call

    def measure(self, edge: Edge) -> Any:
        """Of those that ``edge``, as seen from ``first``, holds: what `StreamMeasure` of csrc/cpu/stream.h lists.

        >>> offsets, values = torch.tensor([1, 5, 9], dtype=torch.int32), torch.tensor([2.0, 3.0, -2.0])
        >>> found = Candidates(100, offsets, values, values).measure(Edge(0x40000001, 5, False))
        >>> found.held, found.first, found.last, found.gap_bytes, found.energy
        (2, 101, 105, 1, 13.0)
        """
        return _C.stream_measure(self._call(edge))

    def keep(self, edge: Edge, buffers: Buffers) -> tuple[Tensor, Tensor]:
        """Return positions (int64) and values of those that ``edge`` holds: views of ``buffers``.

        >>> offsets, values = torch.tensor([1, 5, 9], dtype=torch.int32), torch.tensor([2.0, 3.0, -2.0])
        >>> Candidates(100, offsets, values, values).keep(Edge(0x40000001, 5, False), Buffers())
        (tensor([101, 105]), tensor([2., 3.]))
        """
        room = len(self.offsets) + _SLACK
        positions = buffers.take("kept positions", room, torch.int64)
        values = buffers.take("kept values", room, self.values.dtype)
        kept = _C.stream_keep(self._call(edge), positions.data_ptr(), values.data_ptr())
        return positions[:kept], values[:kept]


def add_digits(histogram: Tensor, scores: Tensor, wide: bool, prefix: int, rounds: int) -> None:
    """Add to ``histogram`` (int64 [65536]) the digits of the keys that begin with ``prefix`` (`_streaming.Selection`).

    >>> histogram = torch.zeros(1 << 16, dtype=torch.int64)
    >>> add_digits(histogram, torch.tensor([2.0, -2.0, 1.0]), False, 0x40000000, rounds=1)
    >>> histogram.nonzero().tolist(), int(histogram[1])
    ([[1]], 2)
    """
    scores = scores.contiguous()
    _C.stream_add_digits(
        scores.data_ptr(), len(scores), scores.dtype == torch.float64, wide, prefix, rounds, histogram.data_ptr()
    )


def find_ties(scores: Tensor, wide: bool, key: int, most: int) -> tuple[int, int]:
    """Return how many scores have this key, up to ``most``, and the place of the last of these (-1: none).

    >>> find_ties(torch.tensor([2.0, -2.0, 1.0, 2.0]), False, 0x40000001, most=2)
    (2, 1)
    """
    scores = scores.contiguous()
    found, place = _C.stream_find_ties(scores.data_ptr(), len(scores), scores.dtype == torch.float64, wide, key, most)
    return found, place


def _key(key: int, wide: bool) -> int:
    """The key for the kernels, which add 1: the last one, above infinity's, holds nothing either way."""
    return min(key, (1 << (63 if wide else 31)) - 2)


def word_sum(elements: Tensor) -> int:
    """The sum of a flat tensor's 64-bit words modulo 2^64, the last one filled up with zeros."""
    elements = elements.contiguous()
    return int(_C.stream_word_sum(elements.data_ptr(), elements.nbytes))


def sum_squares(values: Tensor) -> float:
    """The sum of the squares of a flat tensor, float32 or float64, in float64.

    >>> sum_squares(torch.tensor([3.0, -4.0]))
    25.0
    """
    values = values.contiguous()
    return float(_C.stream_sum_squares(values.data_ptr(), values.dtype == torch.float64, len(values)))


def all_finite(elements: Tensor) -> bool:
    """Whether no element of a flat floating-point tensor is NaN or infinite."""
    elements = elements.contiguous()
    return bool(_C.stream_all_finite(elements.data_ptr(), _native.DTYPE_TAG[elements.dtype], len(elements)))


@dataclass(frozen=True)
class Subtracted:
    """What a subtraction did.

    ``before``: what was overwritten, a view of a buffer. ``unchanged``: entries that rounded to what they were.
    ``requested``, ``effective``: squared norms of the edit, as computed and as rounded. ``smallest``: the smallest
    magnitude of a value.
    """

    before: Tensor
    unchanged: int
    requested: float
    effective: float
    smallest: float


def subtract_(
    elements: Tensor, first: int, positions: Tensor, values: Tensor, scale: float, buffers: Buffers
) -> Subtracted:
    """Subtract ``scale * values`` at ``positions`` from the chunk ``elements`` that begins at element ``first``.

    The bits are those of `prosocial_ext.ops.sparse_subtract_`.

    >>> elements = torch.tensor([1.0, 2.0, 3.0])
    >>> done = subtract_(elements, 10, torch.tensor([11]), torch.tensor([0.5]), 2.0, Buffers())
    >>> elements.tolist(), done.before.tolist(), done.requested
    ([1.0, 1.0, 3.0], [2.0], 1.0)
    """
    n = len(positions)
    positions, values = positions.contiguous(), values.contiguous()
    before = buffers.take("before", n, elements.dtype)
    edit = _C.StreamSubtraction()
    edit.elements, edit.dtype, edit.first = elements.data_ptr(), _native.DTYPE_TAG[elements.dtype], first
    edit.positions, edit.values, edit.n = positions.data_ptr(), values.data_ptr(), n
    edit.wide_values, edit.scale = values.dtype == torch.float64, scale
    edit.before = before.data_ptr()
    _C.stream_subtract(edit)
    return Subtracted(before, edit.unchanged, edit.requested, edit.effective, edit.smallest)
