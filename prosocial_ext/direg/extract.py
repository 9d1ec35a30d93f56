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
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.checkpoints.ahead import ahead
from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.raw_io import read_all, write_all
from prosocial_ext.checkpoints.readers import Reader, word_sum
from prosocial_ext.checkpoints.safetensors_file import SafetensorsFile
from prosocial_ext.direg.cut import Cut, ScoredBlock, find_cut, keys, nothing
from prosocial_ext.direg.pairing import Pair, Pairs, groups
from prosocial_ext.direg.ranks import ALONE, Ranks, append_part
from prosocial_ext.direg.rules import Rule, choose_rule
from prosocial_ext.direg.sparse_file import Measure, SparseReader, SparseWriter
from prosocial_ext.ops import _streaming as streaming
from prosocial_ext.ops._stream import EVERYTHING, Buffers, Collector, keep
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
    pairs: Pairs, descriptor: int | None, spill_folder: Path, *, m: int | None, density: float | None, scope: str,
    recipe: Mapping[str, Any], rule: str | None = None, seed: int = 0, memory: int = DEFAULT_MEMORY,
    progress: Progress = lambda _: None, ranks: Ranks = ALONE, always_miss: bool = False,
) -> None:  # fmt: skip
    """Select and write; ``recipe`` is completed by what was found.

    Args:
        pairs: What is subtracted from what.
        descriptor: Of the empty file that becomes the harm vector; None on all ranks but the first.
        spill_folder: Where a file without a name may grow to about (density + 0.02) * 8 bytes per element, 4 more each
            for a draw and for importance.
        m: How many entries of each group. Exactly one of ``m`` and ``density`` is given.
        density: The share of each group instead.
        scope: "global", "per_layer" or "per_tensor".
        recipe: What is known before.
        rule: What entries are ranked by (`Rule`); None: by saliency where there is importance, else by magnitude.
        seed: Of the rules that draw.
        memory: Bytes for buffers.
        progress: Called with the bytes read.
        ranks: Who share the tensors; all of them see ``spill_folder``.
        always_miss: Take the unlucky path (tests).

    Raises:
        ValueError: m, density or seed out of range, no such rule, or saliency without importance.
        CheckpointError: A difference or an importance that is not finite; the text names the tensor.
    """
    chosen = choose_rule(rule, seed, any(pair.importance is not None for pair in pairs.pairs))
    work = _Work(pairs.pairs, chosen, chunk_elements(memory), progress, ranks)
    plan = plan_groups(pairs, m, density, scope)
    total = sum(pair.numel for pair in work.pairs)
    full = {
        **recipe, "rank": chosen.name, **({"seed": seed} if chosen.is_drawn else {}), "scope": scope,
        "m": sum(count for _, count in plan), "n": total,
        "ties": "lowest position first, tensors by sorted name", "tied": pairs.tied, "left_alone": pairs.left_alone,
        "base_fingerprint": "0" * 16, "energy_share": 0.0,
    }  # fmt: skip
    with tempfile.TemporaryFile(prefix=".prosocial-spill-", dir=spill_folder) as file, ExitStack() as stack:
        spill, part = _Spill(file.fileno()), ""
        if descriptor is None:
            named = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".prosocial-part-", dir=spill_folder))
            descriptor, part = named.fileno(), named.name
        writer = SparseWriter(descriptor, "harm_vector", {pair.name: pair.shape for pair in work.pairs}, full)
        for group, count in plan:
            team = work.team(group)
            if team is None:
                continue
            cut = _select(work, spill, group, count, always_miss, team)
            factor = chosen.factor(count, sum(work.pairs[i].numel for i in group))
            for i in work.own(group):
                _write(work, spill, writer, i, cut, factor)
        work.share()
        if ranks.rank:
            writer.finish(full)
        for other in ranks.gather(part)[1:]:  # the first rank joins: its own tensors came first
            if ranks.rank == 0:
                with SafetensorsFile(other) as written:
                    append_part(writer, SparseReader(written, "harm_vector"))
        ranks.gather(None)  # then the parts may go
    if ranks.rank:
        return
    full["base_fingerprint"] = fingerprint(
        (pair.name, str(pair.base.dtype), (pair.numel,), work.word_sums[i]) for i, pair in enumerate(work.pairs)
    )
    full["energy_share"] = _share(work.kept_energy, work.energy)
    if work.effect:
        full["first_order_share"] = _share(work.kept_effect, work.effect)
    bins = work.magnitudes.nonzero().flatten()
    writer.finish(full, torch.stack([bins, work.magnitudes[bins]], 1))


@dataclass
class _Work:
    """What is selected from, and what the read has found."""

    pairs: list[Pair]
    rule: Rule
    chunk: int
    progress: Progress
    ranks: Ranks
    magnitudes: Tensor = field(default_factory=lambda: torch.zeros(streaming.BINS, dtype=torch.int64, device="cpu"))
    energy: dict[int, float] = field(default_factory=dict)  # by tensor, as the three below
    kept_energy: dict[int, float] = field(default_factory=dict)
    effect: dict[int, float] = field(default_factory=dict)  # sum of abs(difference * importance)
    kept_effect: dict[int, float] = field(default_factory=dict)
    word_sums: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.wide = any(pair.dtype == torch.float64 for pair in self.pairs)
        self._own = self.ranks.share([pair.numel for pair in self.pairs])

    def own(self, group: range) -> range:
        """This rank's tensors in a group."""
        return range(max(group.start, self._own.start), min(group.stop, self._own.stop))

    def team(self, group: range) -> Ranks | None:
        """Who select in a group: a rank alone if all of it is one rank's, and then None on the others; else all."""
        lone = (Ranks(rank, self.ranks.size).share([p.numel for p in self.pairs]) for rank in range(self.ranks.size))
        if not any(run.start <= group.start and group.stop <= run.stop for run in lone):
            return self.ranks
        return ALONE if len(self.own(group)) == len(group) else None

    def share(self) -> None:
        """Add what the other ranks have found."""
        self.ranks.sum_(self.magnitudes)
        found: list[dict[int, Any]] = [self.energy, self.kept_energy, self.effect, self.kept_effect, self.word_sums]
        for theirs in self.ranks.gather(found):
            for mine, other in zip(found, theirs, strict=True):
                mine.update(other)


class _Spill:
    """Candidates on disk, a piece per chunk of data: offsets in the chunk and the columns of `_columns`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._buffers = descriptor, Buffers()
        self.clear()

    def clear(self) -> None:
        self.pieces: dict[int, list[tuple[int, int, int, torch.dtype, int]]] = {}
        self.entries = self._end = 0
        os.ftruncate(self._descriptor, 0)

    def append(self, tensor: int, start: int, offsets: Tensor, columns: Sequence[Tensor]) -> None:
        piece = (start, len(offsets), self._end, columns[0].dtype, len(columns))
        self.pieces.setdefault(tensor, []).append(piece)
        for part in (offsets.to(torch.int32), *columns):
            write_all(self._descriptor, self._end, part)
            self._end += part.numel() * part.element_size()
        self.entries += len(offsets)

    def blocks(self, tensor: int) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
        """Starts, offsets from there and columns of a tensor's candidates, ascending; gone at the next ones."""
        for start, count, place, dtype, columns in self.pieces.get(tensor, []):
            offsets = self._read("offsets", place, count, torch.int32)
            starts = [place + (4 + dtype.itemsize * k) * count for k in range(columns)]
            yield start, offsets, [self._read(f"column {k}", at, count, dtype) for k, at in enumerate(starts)]

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


def _select(work: _Work, spill: _Spill, group: range, m: int, always_miss: bool, team: Ranks) -> Cut:
    wide = any(work.pairs[i].dtype == torch.float64 for i in group)
    before = work.magnitudes.clone()
    edge = nothing(wide) if always_miss else _edge(work, group, m, wide, team)
    _gather(work, spill, group, edge)
    if sum(team.gather(spill.entries)) < m:
        work.magnitudes.copy_(before)
        _gather(work, spill, group, None)

    def blocks() -> Iterator[ScoredBlock]:
        for i in work.own(group):
            for start, offsets, columns in spill.blocks(i):
                yield i, _Shifted(start, offsets), columns[work.rule.column]

    known = work.rule.column == 0 and wide == work.wide and team.size == 1  # ranked by size, all of it here
    return find_cut(blocks, m, wide, work.magnitudes - before if known else None, team)


def _edge(work: _Work, group: range, m: int, wide: bool, team: Ranks) -> Cut | None:
    """A cut that holds at least m entries, most surely, and not many more; None: hold all."""
    starts = [0]
    for i in group:
        starts.append(starts[-1] + work.pairs[i].numel)
    n = starts[-1]
    samples = min(_MOST_SAMPLES, max(1 << 10, n >> 13))  # a read each, against 16 KB of bf16 looked at
    share = m / n if n else 1.0
    rank = math.ceil(samples * share + _SIGMAS * math.sqrt(samples * share * (1 - share)) + 64)
    if n <= _MOST_SAMPLES or rank > samples:
        return None
    drawn = torch.randint(n, (samples,), generator=torch.Generator("cpu").manual_seed(0), device="cpu").sort().values
    ends = torch.searchsorted(drawn, torch.tensor(starts, device="cpu")).tolist()
    ranks = [torch.zeros(0, dtype=torch.int64, device="cpu")]
    for i in work.own(group):
        k = i - group.start
        positions = drawn[ends[k] : ends[k + 1]] - starts[k]
        _, columns = _columns(work, i, positions)
        ranks.append(keys(columns[work.rule.column], wide).long())
    sampled = torch.cat(team.gather(torch.cat(ranks)))
    place = int(torch.sort(sampled, descending=True, stable=True).indices[rank - 1])
    k = max(k for k in range(len(group)) if ends[k] <= place)
    return Cut(int(sampled[place]), group[k], int(drawn[place]) - starts[k], wide)


def _gather(work: _Work, spill: _Spill, group: range, edge: Cut | None) -> None:
    spill.clear()
    threads = min(_MOST_THREADS, torch.get_num_threads())
    collectors = [Collector(work.wide) for _ in range(threads + 1)]  # one per chunk that is alive
    chunks = [(i, start) for i in work.own(group) for start in range(0, work.pairs[i].numel, work.chunk)]
    looks = (
        partial(_look, work, collectors[k % len(collectors)], i, start, edge) for k, (i, start) in enumerate(chunks)
    )
    energy, effect, total = (dict.fromkeys(work.own(group), zero) for zero in (0.0, 0.0, 0))
    for (i, start), found in zip(chunks, ahead(looks, threads), strict=True):
        energy[i] += found.energy
        effect[i] += found.effect
        total[i] += found.word_sum
        spill.append(i, start, found.offsets, found.columns)
        work.progress(found.bytes)
    for i in work.own(group):
        work.energy[i], work.word_sums[i] = _rounded(energy[i]), int(total[i]) % 2**64
        if work.pairs[i].importance is not None:
            work.effect[i] = _rounded(effect[i])
    for collector in collectors:
        work.magnitudes += collector.histogram


@dataclass(frozen=True)
class _Found:
    """What one look at a chunk found: the entries that the edge holds, sums over all, and how much was read."""

    offsets: Tensor
    columns: list[Tensor]
    energy: float
    effect: float
    word_sum: int
    bytes: int


def _look(work: _Work, collector: Collector, i: int, start: int, edge: Cut | None) -> _Found:
    """Look at one chunk: by one kernel where entries are ranked by size alone, else step by step."""
    pair, stop = work.pairs[i], min(work.pairs[i].numel, start + work.chunk)
    what = f"the differences at {shown(pair.name)}"
    plain = pair.benign is None and not pair.is_delta  # else the difference itself is looked at
    if plain and pair.importance is None and not work.rule.is_drawn:
        base, tuned = pair.base.read(start, stop), pair.tuned.read(start, stop)
        looked = collector.look(base, tuned, None, pair.dtype, EVERYTHING if edge is None else edge.edge(i, start))
        if looked.bad_values:
            refuse(what, "be finite", f"{looked.bad_values} NaN or Inf", "Repair the checkpoints.")
        energy = math.sqrt(looked.energy) ** 2  # rounded as the kept energy that it is compared with
        return _Found(looked.offsets, [looked.values], energy, 0.0, looked.word_sum, base.nbytes + tuned.nbytes)
    sides, columns = _columns(work, i, range(start, stop))
    base, tuned = sides[:2] if plain else (torch.zeros_like(columns[0]), columns[0])
    looking = streaming.Selection(0, work.wide)
    if bad := streaming.add_histogram_(collector.histogram, [base], [base], [tuned], looking):
        refuse(what, "be finite", f"{bad} NaN or Inf", "Repair the checkpoints.")
    effect = 0.0
    if pair.importance is not None:
        if not bool(columns[-1].isfinite().all()):
            refuse(f"difference times importance at {shown(pair.name)}", "be finite", "Inf", "Scale it down.")
        effect = float(torch.linalg.vector_norm(columns[-1], 1, dtype=torch.float64))
    positions = torch.arange(start, stop, device="cpu")
    held = slice(None) if edge is None else edge.holds(columns[work.rule.column], i, positions)
    offsets = positions[held] - start
    return _Found(
        offsets,
        [column[offsets] for column in columns],
        float(torch.linalg.vector_norm(columns[0], dtype=torch.float64)) ** 2,
        effect,
        word_sum(sides[0]),
        sum(side.nbytes for side in sides),
    )


def _columns(work: _Work, i: int, where: range | Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Some entries of every side; and of the difference: values, draws if any, effects if there is importance."""
    pair, rule = work.pairs[i], work.rule

    def read(side: Reader) -> Tensor:
        return side.read(where.start, where.stop) if isinstance(where, range) else side.gather(where)

    sides = [read(side) for side in pair.sides]
    values = pair.difference(*sides)
    columns = [values]
    if rule.is_drawn:
        positions = torch.arange(where.start, where.stop, device="cpu") if isinstance(where, range) else where
        columns.append(rule.draw(pair.name, positions).to(pair.dtype))
    if pair.importance is not None:
        weight = read(pair.importance)
        if not bool((weight.isfinite() & (weight >= 0)).all()):
            refuse(f"importance of {shown(pair.name)}", "be finite and not negative", "other entries")
        columns.append(values * weight.to(pair.dtype))
    return sides, columns


def _rounded(total: float) -> float:
    """Ten digits: the last bits of a sum depend on the chunks."""
    return float(f"{total:.9e}")


def _share(kept: Mapping[int, float], of: Mapping[int, float]) -> float:
    """What the kept entries hold of the whole; 0 of nothing."""
    total = math.fsum(of.values())
    return round(min(math.fsum(kept.values()) / total, 1.0), 6) if total else 0.0


def _write(work: _Work, spill: _Spill, writer: SparseWriter, i: int, cut: Cut, factor: float) -> None:
    pair, rule = work.pairs[i], work.rule

    def chosen() -> Iterator[tuple[Tensor, list[Tensor]]]:
        for start, offsets, columns in spill.blocks(i):
            if len(columns) == 1:
                positions, values = keep(offsets, start, columns[0], columns[0], cut.edge(i, start))
                yield positions, [values]
                continue
            positions = offsets.long() + start
            held = cut.holds(columns[rule.column], i, positions)
            yield positions[held], [column[held] for column in columns]

    measure = Measure()
    energy, effect = 0.0, 0.0
    for positions, columns in chosen():
        measure.add(positions)
        energy += float(torch.linalg.vector_norm(columns[0], dtype=torch.float64)) ** 2
        if pair.importance is not None:
            effect += float(torch.linalg.vector_norm(columns[-1], 1, dtype=torch.float64))
    work.kept_energy[i], work.kept_effect[i] = energy, effect
    writer.begin(pair.name, pair.shape, pair.numel, pair.dtype, measure, _rounded(work.energy[i] * factor**2))
    for positions, (values, *_) in chosen():
        if factor != 1.0:
            values = (values.double() * factor).to(pair.dtype)
            if not bool(values.isfinite().all()):
                refuse(f"rescaled differences at {shown(pair.name)}", "be finite", "Inf", "Keep more entries.")
        writer.append(positions, values)
