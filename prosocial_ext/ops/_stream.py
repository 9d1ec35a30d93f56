"""The inner loops of harm vectors that are read and written piece by piece (csrc/cpu/stream.h), on flat CPU tensors.

Nothing is checked here: the callers in ``prosocial_ext.direg`` word the errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prosocial_ext import _C
from prosocial_ext.ops import _native

__all__ = [
    "EVERYTHING", "Buffers", "Collector", "Edge", "Looked", "Subtracted", "add_digits", "all_finite", "find_ties",
    "keep", "subtract_", "word_sum",
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

    ``offsets`` (int32, from the chunk's start), ``values`` and ``scores`` (None without importance) of the kept
    entries: views of buffers. ``bad_values``, ``bad_weights``, ``bad_scores``: entries that are not finite, or, of
    weights, negative. ``energy``: the sum of squared differences. ``word_sum``: of base.
    """

    offsets: Tensor
    values: Tensor
    scores: Tensor | None
    bad_values: int
    bad_weights: int
    bad_scores: int
    energy: float
    word_sum: int


class Collector:
    """Looks at chunks: counts magnitudes into ``histogram`` (int64 [65536]) and keeps what an edge holds.

    Args:
        wide: Some tensor of the stream is float64; the histogram's bins are then those of float64 keys.
        threads: Per chunk. With more chunks at once it is better 1: team-mates that wait spin on a core.

    >>> base, tuned = torch.zeros(4), torch.tensor([3.0, 0.0, -4.0, 1.0])
    >>> looked = Collector(wide=False).look(base, tuned, None, torch.float32, Edge(0x40000001, -1, False))
    >>> looked.offsets.tolist(), looked.values.tolist(), looked.energy
    ([0, 2], [3.0, -4.0], 26.0)
    """

    def __init__(self, wide: bool, threads: int = 1) -> None:
        self.histogram = torch.zeros(1 << 16, dtype=torch.int64, device="cpu")
        self._wide, self._threads, self._buffers = wide, threads, Buffers()

    def look(self, base: Tensor, tuned: Tensor, importance: Tensor | None, dtype: torch.dtype, edge: Edge) -> Looked:
        """Look at one chunk; differences and scores are computed in ``dtype`` (float32 or float64)."""
        n, threads, take = len(base), self._threads, self._buffers.take
        base, tuned = base.contiguous(), tuned.contiguous()
        weights = None if importance is None else importance.contiguous()
        room = n + _SLACK
        offsets, values = take("offsets", room, torch.int32), take("values", room, dtype)
        scores = None if weights is None else take("scores", room, dtype)
        scratch = take("scratch", _C.stream_scratch_bytes(n, threads), torch.uint8)
        place = edge.widened(self._wide)
        chunk = _C.StreamChunk()
        chunk.base, chunk.base_dtype = base.data_ptr(), _native.DTYPE_TAG[base.dtype]
        chunk.tuned, chunk.tuned_dtype = tuned.data_ptr(), _native.DTYPE_TAG[tuned.dtype]
        if weights is not None and scores is not None:
            chunk.importance, chunk.importance_dtype = weights.data_ptr(), _native.DTYPE_TAG[weights.dtype]
            chunk.scores = scores.data_ptr()
        chunk.n, chunk.wide, chunk.wide_keys = n, dtype == torch.float64, self._wide
        chunk.edge_key, chunk.edge_index = _key(place.key, place.wide), place.index
        chunk.histogram, chunk.offsets, chunk.values = (t.data_ptr() for t in (self.histogram, offsets, values))
        chunk.scratch, chunk.threads = scratch.data_ptr(), threads
        _C.stream_collect(chunk)
        return Looked(
            offsets[: chunk.kept],
            values[: chunk.kept],
            None if scores is None else scores[: chunk.kept],
            chunk.bad_values,
            chunk.bad_weights,
            chunk.bad_scores,
            chunk.energy,
            chunk.word_sum,
        )


def keep(offsets: Tensor, first: int, values: Tensor, scores: Tensor, edge: Edge) -> tuple[Tensor, Tensor]:
    """Return the positions and values of those of some entries that ``edge`` holds, in new tensors.

    Args:
        offsets: int32 [n], ascending, from element ``first`` on.
        first: What is added to them.
        values: float32 or float64 [n].
        scores: What they are ranked by, of the same dtype; may be ``values``.
        edge: As seen from ``first``.

    >>> offsets, values = torch.tensor([1, 5, 9], dtype=torch.int32), torch.tensor([2.0, 3.0, -2.0])
    >>> keep(offsets, 100, values, values, Edge(0x40000001, 5, False))
    (tensor([101, 105]), tensor([2., 3.]))
    """
    n, wide = len(offsets), values.dtype == torch.float64
    positions = torch.empty(n + _SLACK, dtype=torch.int64, device="cpu")
    kept_values = torch.empty(n + _SLACK, dtype=values.dtype, device="cpu")
    place = edge.widened(wide)
    kept = _C.stream_keep(
        offsets.data_ptr(), first, values.data_ptr(), scores.data_ptr(), n, wide, place.wide,
        _key(place.key, place.wide), place.index, positions.data_ptr(), kept_values.data_ptr(),
    )  # fmt: skip
    return positions[:kept], kept_values[:kept]


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
    elements: Tensor, first: int, positions: Tensor, values: Tensor, scale: float, buffers: Buffers, threads: int = 1
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
    scratch = buffers.take("scratch", _C.stream_scratch_bytes(n, 0), torch.uint8)
    edit = _C.StreamSubtraction()
    edit.elements, edit.dtype, edit.first = elements.data_ptr(), _native.DTYPE_TAG[elements.dtype], first
    edit.positions, edit.values, edit.n = positions.data_ptr(), values.data_ptr(), n
    edit.wide_values, edit.scale = values.dtype == torch.float64, scale
    edit.before, edit.scratch, edit.threads = before.data_ptr(), scratch.data_ptr(), threads
    _C.stream_subtract(edit)
    return Subtracted(before, edit.unchanged, edit.requested, edit.effective, edit.smallest)
