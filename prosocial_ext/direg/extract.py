"""Writes the m largest entries of tuned - base into a sparse file: one read of both sides, a fixed amount of memory.

1. A sample of positions gives an edge that holds a little more than m entries (12 sigma of the sampled rank).
2. One read of the data: what the edge holds goes to a spill file; counts, energy and fingerprint come along.
3. The exact cut is found among the spilled; `cut.py` leaves no ties, so the result depends on nothing but the data.
4. The spilled entries that the cut holds are written, tensor after tensor.
Unlucky, if the edge held fewer than m (below 1e-30): everything is spilled by a second read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.direg.ahead import ahead
from prosocial_ext.direg.cut import Cut, ScoredBlock, find_cut, keys, nothing
from prosocial_ext.direg.errors import refuse, shown
from prosocial_ext.direg.pairing import Pair, Pairs, groups
from prosocial_ext.direg.raw_io import read_all, write_all
from prosocial_ext.direg.sparse_file import Block, Measure, SparseWriter
from prosocial_ext.ops import _streaming as streaming
from prosocial_ext.ops._stream import EVERYTHING, Buffers, Collector, Edge, Looked, keep
from prosocial_ext.reference import check
from prosocial_ext.reference.topm import entry_count

__all__ = ["DEFAULT_MEMORY", "LEAST_MEMORY", "Progress", "chunk_elements", "extract", "fingerprint", "plan_groups"]

DEFAULT_MEMORY = 512 << 20
LEAST_MEMORY = 64 << 20
Progress = Callable[[int], object]  # called with the number of bytes just read

_CHUNK = 1 << 20  # elements; larger ones measure no faster
_BYTES_PER_ELEMENT = 256  # of all temporaries of one float64 chunk with importance, at density 1
_MOST_THREADS = 4  # so that their chunks, at 44 bytes an element, and the caller's stay below that
_MOST_SAMPLES = 1 << 16  # 12 sigma of the rank are 1.4 % of the entries
_SIGMAS = 12


def chunk_elements(memory: int) -> int:
    """Elements per chunk, so that the temporaries of one fit into ``memory`` bytes.

    >>> chunk_elements(DEFAULT_MEMORY), chunk_elements(LEAST_MEMORY)
    (1048576, 262144)
    """
    rule = f"be at least {LEAST_MEMORY} bytes"
    check.integer("memory", memory, LEAST_MEMORY, 1 << 62, rule, "512 << 20 is 512 MiB.")
    return min(_CHUNK, 1 << int(math.log2(memory / _BYTES_PER_ELEMENT)))


def fingerprint(parts: Iterable[tuple[str, str, Sequence[int], int]]) -> str:
    """Return a hash of names, dtypes, shapes and word sums: it tells checkpoints apart, but not against a forger.

    >>> fingerprint([("w", "torch.float32", (2,), 7)])
    'e96ef7be8bb024be'
    """
    text = json.dumps(sorted([name, dtype, list(shape), total] for name, dtype, shape, total in parts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_groups(pairs: Pairs, m: int | None, density: float | None, scope: str) -> list[tuple[range, int]]:
    """Return the groups of tensors that a selection is made in, and how many entries each gives.

    Raises:
        ValueError: m or density out of range.
    """
    plan = []
    for group in groups([pair.name for pair in pairs.pairs], scope):
        n = sum(pairs.pairs[i].numel for i in group)
        of = "all tensors" if scope == "global" else shown(pairs.pairs[group[0]].name)
        plan.append((group, entry_count(m, density, n, of)))
    return plan


def extract(
    pairs: Pairs, descriptor: int, spill_folder: Path, *, m: int | None, density: float | None, scope: str,
    recipe: Mapping[str, Any], memory: int = DEFAULT_MEMORY, progress: Progress = lambda _: None,
    always_miss: bool = False,
) -> None:  # fmt: skip
    """Select and write; ``recipe`` is completed by what was found.

    Args:
        pairs: What is subtracted from what.
        descriptor: Of the empty file that becomes the harm vector.
        spill_folder: Where a file without a name may grow to about (density + 0.02) * 8 bytes per element.
        m: How many entries of each group. Exactly one of ``m`` and ``density`` is given.
        density: The share of each group instead.
        scope: "global", "per_layer" or "per_tensor".
        recipe: What is known before.
        memory: Bytes for buffers.
        progress: Called with the bytes read.
        always_miss: Take the unlucky path (tests).

    Raises:
        ValueError: m or density out of range.
        CheckpointError: A difference or an importance that is not finite; the text names the tensor.
    """
    work = _Work(pairs.pairs, chunk_elements(memory), progress)
    plan = plan_groups(pairs, m, density, scope)
    total = sum(pair.numel for pair in work.pairs)
    full = {
        **recipe, "scope": scope, "m": sum(count for _, count in plan), "n": total,
        "ties": "lowest position first, tensors by sorted name", "tied": pairs.tied, "left_alone": pairs.left_alone,
        "base_fingerprint": "0" * 16,
    }  # fmt: skip
    writer = SparseWriter(descriptor, "harm_vector", {pair.name: pair.shape for pair in work.pairs}, full)
    with tempfile.TemporaryFile(prefix=".prosocial-spill-", dir=spill_folder) as file:
        spill = _Spill(file.fileno())
        for group, count in plan:
            cut = _select(work, spill, group, count, always_miss)
            for i in group:
                _write(work, spill, writer, i, cut)
    full["base_fingerprint"] = fingerprint(
        (pair.name, str(pair.base.dtype), (pair.numel,), work.word_sums[i]) for i, pair in enumerate(work.pairs)
    )
    bins = work.magnitudes.nonzero().flatten()
    writer.finish(full, torch.stack([bins, work.magnitudes[bins]], 1))


@dataclass
class _Work:
    """What is selected from, and what the read has found."""

    pairs: list[Pair]
    chunk: int
    progress: Progress
    magnitudes: Tensor = field(default_factory=lambda: torch.zeros(streaming.BINS, dtype=torch.int64, device="cpu"))
    energy: dict[int, float] = field(default_factory=dict)
    word_sums: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.wide = any(pair.dtype == torch.float64 for pair in self.pairs)


class _Spill:
    """Candidates on disk, a piece per chunk of data: offsets in the chunk, values, scores where they differ."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._buffers = descriptor, Buffers()
        self.clear()

    def clear(self) -> None:
        self.pieces: dict[int, list[tuple[int, int, int, torch.dtype, bool]]] = {}
        self.entries = self._end = 0
        os.ftruncate(self._descriptor, 0)

    def append(self, tensor: int, start: int, offsets: Tensor, values: Tensor, scores: Tensor | None) -> None:
        piece = (start, len(offsets), self._end, values.dtype, scores is not None)
        self.pieces.setdefault(tensor, []).append(piece)
        for part in (offsets.to(torch.int32), values, *([] if scores is None else [scores])):
            write_all(self._descriptor, self._end, part)
            self._end += part.numel() * part.element_size()
        self.entries += len(offsets)

    def blocks(self, tensor: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Starts, offsets from there, values and scores of a tensor's candidates, ascending; gone at the next one."""
        for start, count, place, dtype, has_scores in self.pieces.get(tensor, []):
            offsets = self._read("offsets", place, count, torch.int32)
            values = self._read("values", place + 4 * count, count, dtype)
            scores = values
            if has_scores:
                scores = self._read("scores", place + (4 + dtype.itemsize) * count, count, dtype)
            yield start, offsets, values, scores

    def _read(self, name: str, place: int, count: int, dtype: torch.dtype) -> Tensor:
        held = self._buffers.take(name, count, dtype)
        if count:  # numpy gives no buffer of nothing
            read_all(self._descriptor, place, place + held.nbytes, held.view(torch.uint8))
        return held


@dataclass(frozen=True)
class _Shifted:
    """Positions that count from a chunk's start: widening all to look up one would take longer than the search."""

    start: int
    offsets: Tensor

    def __getitem__(self, place: int) -> int:
        return self.start + int(self.offsets[place])


def _select(work: _Work, spill: _Spill, group: range, m: int, always_miss: bool) -> Cut:
    wide = any(work.pairs[i].dtype == torch.float64 for i in group)
    before = work.magnitudes.clone()
    edge = nothing(wide) if always_miss else _edge(work.pairs, group, m, wide)
    _gather(work, spill, group, edge)
    if spill.entries < m:
        work.magnitudes.copy_(before)
        _gather(work, spill, group, None)

    def blocks() -> Iterator[ScoredBlock]:
        for i in group:
            for start, offsets, _, scores in spill.blocks(i):
                yield i, _Shifted(start, offsets), scores

    ranked_by_size = all(work.pairs[i].importance is None for i in group) and wide == work.wide
    return find_cut(blocks, m, wide, work.magnitudes - before if ranked_by_size else None)


def _edge(pairs: Sequence[Pair], group: range, m: int, wide: bool) -> Cut | None:
    """A cut that holds at least m entries, most surely, and not many more; None: hold all."""
    starts = [0]
    for i in group:
        starts.append(starts[-1] + pairs[i].numel)
    n = starts[-1]
    samples = min(_MOST_SAMPLES, max(1 << 10, n >> 13))  # a read each, against 16 KB of bf16 looked at
    share = m / n if n else 1.0
    rank = math.ceil(samples * share + _SIGMAS * math.sqrt(samples * share * (1 - share)) + 64)
    if n <= _MOST_SAMPLES or rank > samples:
        return None
    drawn = torch.randint(n, (samples,), generator=torch.Generator("cpu").manual_seed(0), device="cpu").sort().values
    ends = torch.searchsorted(drawn, torch.tensor(starts, device="cpu")).tolist()
    ranks = []
    for k, i in enumerate(group):
        positions = drawn[ends[k] : ends[k + 1]] - starts[k]
        pair = pairs[i]
        weight = None if pair.importance is None else pair.importance.gather(positions)
        _, scores = _differ(pair, pair.base.gather(positions), pair.tuned.gather(positions), weight)
        ranks.append(keys(scores, wide).long())
    sampled = torch.cat(ranks)
    place = int(torch.sort(sampled, descending=True, stable=True).indices[rank - 1])
    k = max(k for k in range(len(group)) if ends[k] <= place)
    return Cut(int(sampled[place]), group[k], int(drawn[place]) - starts[k], wide)


def _gather(work: _Work, spill: _Spill, group: range, edge: Cut | None) -> None:
    spill.clear()
    threads = min(_MOST_THREADS, torch.get_num_threads())
    collectors = [Collector(work.wide) for _ in range(threads + 1)]  # one per chunk that is alive
    chunks = [(i, start) for i in group for start in range(0, work.pairs[i].numel, work.chunk)]
    looks = (
        partial(_look, collectors[k % len(collectors)], work.pairs[i], start, work.chunk,
                EVERYTHING if edge is None else edge.edge(i, start))
        for k, (i, start) in enumerate(chunks)
    )  # fmt: skip
    energy, total = dict.fromkeys(group, 0.0), dict.fromkeys(group, 0)
    for (i, start), (looked, size) in zip(chunks, ahead(looks, threads), strict=True):
        name = shown(work.pairs[i].name)
        if looked.bad_values:
            what = f"{looked.bad_values} NaN or Inf"
            refuse(f"the differences at {name}", "be finite", what, "Repair the checkpoints.")
        if looked.bad_weights:
            refuse(f"importance of {name}", "be finite and not negative", "other entries")
        if looked.bad_scores:
            refuse(f"difference times importance at {name}", "be finite", "Inf", "Scale it down.")
        energy[i] += math.sqrt(looked.energy) ** 2  # rounded as the kept energy that it is compared with
        total[i] += looked.word_sum
        spill.append(i, start, looked.offsets, looked.values, looked.scores)
        work.progress(size)
    for i in group:
        work.energy[i], work.word_sums[i] = float(f"{energy[i]:.9e}"), total[i] % 2**64
    for collector in collectors:
        work.magnitudes += collector.histogram


def _look(collector: Collector, pair: Pair, start: int, chunk: int, edge: Edge) -> tuple[Looked, int]:
    """What one chunk holds, and the number of bytes read."""
    stop = min(pair.numel, start + chunk)
    base, tuned = pair.base.read(start, stop), pair.tuned.read(start, stop)
    weight = None if pair.importance is None else pair.importance.read(start, stop)
    return collector.look(base, tuned, weight, pair.dtype, edge), base.nbytes + tuned.nbytes


def _differ(pair: Pair, base: Tensor, tuned: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The difference, and what its entries are ranked by."""
    values = tuned.to(pair.dtype) - base.to(pair.dtype)
    return values, values if weight is None else values * weight.to(pair.dtype)


def _write(work: _Work, spill: _Spill, writer: SparseWriter, i: int, cut: Cut) -> None:
    pair = work.pairs[i]

    def chosen() -> Iterator[Block]:
        for start, offsets, values, scores in spill.blocks(i):
            yield keep(offsets, start, values, scores, cut.edge(i, start))

    measure = Measure()
    for positions, _ in chosen():
        measure.add(positions)
    writer.begin(pair.name, pair.shape, pair.numel, pair.dtype, measure, work.energy[i])
    for positions, values in chosen():
        writer.append(positions, values)
