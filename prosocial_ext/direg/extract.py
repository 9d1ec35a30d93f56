"""Writes the m largest entries of tuned - base into a sparse file: one read of both sides, a fixed amount of memory.

1. A sample of positions gives an edge that holds a little more than m entries (12 sigma of the sampled rank).
2. One read of the data: what the edge holds is kept, in memory first, then in a file; counts, energy and fingerprint
   come along.
3. The exact cut is found among the kept; `cut.py` leaves no ties, so the result depends on nothing but the data.
4. The kept entries that the cut holds are written, tensor after tensor.
Where all entries are wanted, they are written as they are read. Unlucky, if the edge held fewer than m (below 1e-30):
everything is kept by a second read.

A run that was killed leaves notes of 2, one after every 8 GiB or so; the next one reads only the rest, and repeats 1, 3
and 4.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from prosocial_ext.checkpoints.ahead import ahead
from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.readers import Reader, word_sum
from prosocial_ext.checkpoints.safetensors_file import DTYPES, WORDS, SafetensorsFile
from prosocial_ext.direg.cut import Cut, ScoredBlock, find_cut, keys, nothing
from prosocial_ext.direg.kept import Kept, Piece
from prosocial_ext.direg.pairing import Pair, Pairs, groups
from prosocial_ext.direg.ranks import ALONE, Ranks, append_part
from prosocial_ext.direg.read_notes import ReadNotes
from prosocial_ext.direg.resume import Resumed
from prosocial_ext.direg.rules import Rule, choose_rule
from prosocial_ext.direg.sparse_file import Encoded, Measure, SparseReader, SparseWriter, encode
from prosocial_ext.ops import _streaming as streaming
from prosocial_ext.ops._stream import EVERYTHING, Buffers, Candidates, Collector, Edge
from prosocial_ext.reference import check
from prosocial_ext.reference.topm import entry_count

__all__ = ["DEFAULT_MEMORY", "LEAST_MEMORY", "Progress", "chunk_elements", "extract", "fingerprint", "plan_groups"]

DEFAULT_MEMORY = 512 << 20
LEAST_MEMORY = 64 << 20
T = TypeVar("T")
Progress = Callable[[int], object]  # called with the number of bytes just read

_CHUNK = 1 << 20  # elements; larger ones measure no faster
_BYTES_PER_ELEMENT = 512  # of memory: half for what is kept, half for the temporaries of the chunks that are alive
_MOST_THREADS = 4  # so that their chunks, at 52 bytes an element, and the caller's stay below that
_MOST_SAMPLES = 1 << 16  # 12 sigma of the rank are 1.4 % of the entries
_SIGMAS = 12
_NOTE_BYTES = 8 << 30  # read between two notes, each of which syncs some 2 GB at density 0.10


def chunk_elements(memory: int) -> int:
    """Elements per chunk, so that the temporaries of one fit into ``memory`` bytes.

    >>> chunk_elements(DEFAULT_MEMORY), chunk_elements(LEAST_MEMORY)
    (1048576, 131072)
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
    progress: Progress = lambda _: None, ranks: Ranks = ALONE, notes: ReadNotes | None = None,
    resumed: Resumed = lambda tensors, of, size: None, always_miss: bool = False,
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
        notes: Of this rank, where a run that is killed is to be gone on with; they hold the spill file then, if there
            is enough to read. The other arguments, and what is read, must be the same.
        resumed: Called on the first rank, if notes are taken over, with the number of tensors and of all tensors, and
            the bytes that are not read again.
        always_miss: Take the unlucky path (tests).

    Raises:
        ValueError: m, density or seed out of range, no such rule, or saliency without importance.
        CheckpointError: A difference or an importance that is not finite; the text names the tensor. The notes are of
            other values.
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
    with ExitStack() as stack:
        if notes is not None and sum(map(work.bytes, work.own(range(len(work.pairs))))) > _NOTE_BYTES:
            kept = Kept(stack.enter_context(notes.opened()), memory // 2, lasting=True)
            log = _Log(work, kept, notes)
        else:
            spill = stack.enter_context(tempfile.TemporaryFile(prefix=".prosocial-spill-", dir=spill_folder))
            kept, log = Kept(spill.fileno(), memory // 2), None
        if notes is not None:
            taken = ranks.gather([] if log is None else list(log.edges))
            if ranks.rank == 0 and any(taken):
                over = [i for tensors in taken for i in tensors]
                resumed(len(over), len(work.pairs), sum(map(work.bytes, over)))
        part = ""
        if descriptor is None:
            descriptor, part = tempfile.mkstemp(prefix=".prosocial-part-", dir=spill_folder)
            stack.callback(os.close, descriptor)
            stack.callback(Path(part).unlink, missing_ok=True)  # where the first rank has failed, its folder is gone
        writer = SparseWriter(descriptor, "harm_vector", {pair.name: pair.shape for pair in work.pairs}, full)
        for group, count in plan:
            team = work.team(group)
            if team is None:
                continue
            numel = sum(work.pairs[i].numel for i in group)
            if count == numel:
                _write_all(work, writer, group)
                continue
            cut = _select(work, kept, group, count, always_miss, team, log)
            _write(work, kept, writer, group, cut, chosen.factor(count, numel))
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

    def bytes(self, tensor: int) -> int:
        """How much is read of a tensor, importance aside."""
        pair = self.pairs[tensor]
        return pair.numel * sum(side.dtype.itemsize for side in pair.sides)

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


class _Log:
    """Notes of what `_gather` has found: makes them, and takes over those of the runs before.

    ``edges``: what held the candidates of each tensor that was taken over, None where all were kept.
    """

    def __init__(self, work: _Work, kept: Kept, notes: ReadNotes) -> None:
        self._work, self._kept, self._notes = work, kept, notes
        self._gathered: list[tuple[int, Cut | None]] = []  # since the last note
        self._magnitudes, self._bytes = torch.zeros_like(work.magnitudes), 0  # of these
        self.edges: dict[int, Cut | None] = {}
        for found in notes.taken:
            bins, counts = (torch.tensor(row, dtype=torch.int64, device="cpu") for row in found["magnitudes"])
            work.magnitudes[bins] += counts
            for row in found["tensors"]:
                self._take(row)

    def stretches(self, group: range, edge: Cut | None) -> Iterator[range]:
        """Yield the tensors of a group to read and keep, those of one note at a time."""
        work, own = self._work, self._work.own(group)
        taken = [i for i in own if i in self.edges]  # the first ones
        if any(self.edges[i] != edge for i in taken):
            remedy = "Something wrote to a checkpoint. The next run begins anew."
            refuse("the checkpoints", "keep their values while a stopped run waits", "others", remedy)
        first = own.start + len(taken)
        for i in range(first, own.stop):
            self._bytes += work.bytes(i)
            if self._bytes >= _NOTE_BYTES or i + 1 == own.stop:
                before = work.magnitudes.clone()
                yield range(first, i + 1)
                self._magnitudes += work.magnitudes - before
                self._gathered += [(j, edge) for j in range(first, i + 1)]
                first = i + 1
            if self._bytes >= _NOTE_BYTES:
                self.note()

    def note(self) -> None:
        """Vouch for what was gathered since the last note."""
        bins = self._magnitudes.nonzero().flatten()
        magnitudes = [bins.tolist(), self._magnitudes[bins].tolist()]
        end, total = self._kept.settle()
        self._notes.add(end, total, {"tensors": [self._row(i, edge) for i, edge in self._gathered],
                                     "magnitudes": magnitudes})  # fmt: skip
        self._gathered, self._bytes = [], 0
        self._magnitudes.zero_()

    def _row(self, i: int, edge: Cut | None) -> dict[str, Any]:
        pieces, work = self._kept.pieces.get(i, []), self._work
        return {
            "tensor": i, "edge": None if edge is None else astuple(edge), "energy": work.energy[i],
            "effect": work.effect.get(i), "word_sum": work.word_sums[i],
            "pieces": [(piece.start, piece.n, piece.place, WORDS[piece.dtype], piece.columns) for piece in pieces],
        }  # fmt: skip

    def _take(self, row: Mapping[str, Any]) -> None:
        i, work = row["tensor"], self._work
        self.edges[i] = None if row["edge"] is None else Cut(*row["edge"])
        work.energy[i], work.word_sums[i] = row["energy"], row["word_sum"]
        if row["effect"] is not None:
            work.effect[i] = row["effect"]
        self._kept.pieces[i] = [
            Piece(start, n, False, place, DTYPES[word], columns) for start, n, place, word, columns in row["pieces"]
        ]


class _Desk:
    """What one chunk that is alive needs: buffers and counters, to be used again by a later one."""

    def __init__(self, wide: bool) -> None:
        self.collector, self.buffers = Collector(wide), Buffers()

    def read(self, name: str, side: Reader, start: int, stop: int) -> Tensor:
        """Elements of a side, gone when the desk is used again."""
        found = side.read(start, stop, self.buffers.take(name, (stop - start) * side.dtype.itemsize, torch.uint8))
        assert found.device.type == "cpu", f"{name} was read on {found.device}"  # the kernels follow bare addresses
        return found


@dataclass(frozen=True)
class _Shifted:
    """Positions that count from a chunk's start: widening all to look up one would take longer than the search."""

    start: int
    offsets: Tensor

    def __getitem__(self, place: int) -> int:
        return self.start + int(self.offsets[place])


def _select(
    work: _Work, kept: Kept, group: range, m: int, always_miss: bool, team: Ranks, log: _Log | None
) -> Cut:  # fmt: skip
    wide = any(work.pairs[i].dtype == torch.float64 for i in group)
    before = work.magnitudes.clone()
    edge = nothing(wide) if always_miss else _edge(work, group, m, wide, team)
    own = work.own(group)
    kept.forget(())
    _gather(work, kept, edge, [own] if log is None else log.stretches(group, edge))
    if sum(team.gather(kept.count(own))) < m:
        if log is not None:
            log.note()  # before the pieces go
        kept.forget(own)
        after = work.magnitudes.clone()
        _gather(work, kept, None, [own])
        work.magnitudes.copy_(after)
    buffers = Buffers()

    def blocks() -> Iterator[ScoredBlock]:
        for i in own:
            for piece in kept.pieces.get(i, []):
                offsets, columns = kept.read(piece, buffers)
                yield i, _Shifted(piece.start, offsets), columns[work.rule.column]

    known = work.rule.column == 0 and wide == work.wide and team.size == 1  # ranked by size, all of it here
    known = known and (log is None or log.edges.keys().isdisjoint(own))  # and read after ``before``
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


def _gather(work: _Work, kept: Kept, edge: Cut | None, stretches: Iterable[range]) -> None:
    """Look at everything once, stretch by stretch of tensors, and keep what the edge holds."""
    look = _look_drawn if work.rule.is_drawn else _look
    for tensors in stretches:
        for i, found in _looked(work, tensors, partial(look, work, edge)):
            kept.append(i, found.start, found.offsets, found.columns)


def _looked(work: _Work, tensors: range, look: Callable[[_Desk, int, int], _Found]) -> Iterator[tuple[int, _Found]]:
    """Yield the tensor and what was found of every chunk, in order, and note the sums."""
    desks = [_Desk(work.wide) for _ in range(_threads() + 1)]  # one per chunk that is alive
    chunks = [(i, start) for i in tensors for start in range(0, work.pairs[i].numel, work.chunk)]
    looks = (partial(look, desks[k % len(desks)], i, start) for k, (i, start) in enumerate(chunks))
    energy, effect, total = (dict.fromkeys(tensors, zero) for zero in (0.0, 0.0, 0))
    for (i, _), found in zip(chunks, ahead(looks, len(desks) - 1), strict=True):
        energy[i] += found.energy
        effect[i] += found.effect
        total[i] += found.word_sum
        yield i, found
        work.progress(found.bytes)
    for i in tensors:
        work.energy[i], work.word_sums[i] = _rounded(energy[i]), int(total[i]) % 2**64
        if work.pairs[i].importance is not None:
            work.effect[i] = _rounded(effect[i])
    for desk in desks:
        work.magnitudes += desk.collector.histogram


def _threads() -> int:
    return min(_MOST_THREADS, torch.get_num_threads())


@dataclass(frozen=True)
class _Found:
    """What one look at a chunk found: the entries that the edge holds, sums over all, and how much was read."""

    start: int
    offsets: Tensor
    columns: list[Tensor]
    energy: float
    effect: float
    word_sum: int
    bytes: int
    encoded: Encoded | None = None  # of all entries, where all are written


def _look(work: _Work, edge: Cut | None, desk: _Desk, i: int, start: int) -> _Found:
    """Look at one chunk whose entries are ranked by size or effect."""
    pair, stop = work.pairs[i], min(work.pairs[i].numel, start + work.chunk)
    sides = [desk.read(f"side {k}", side, start, stop) for k, side in enumerate(pair.sides)]
    plain = pair.benign is None and not pair.is_delta  # else the difference itself is looked at
    base, tuned = (sides[0], sides[1]) if plain else (None, pair.difference(*sides))
    weights = None if pair.importance is None else desk.read("importance", pair.importance, start, stop)
    place = EVERYTHING if edge is None else edge.edge(i, start)
    looked = desk.collector.look(base, tuned, weights, pair.dtype, place, by_effect=work.rule.column == 1)
    if looked.bad_weights:
        _refuse_weights(pair)
    if looked.bad_values:
        _refuse_values(pair, looked.bad_values)
    if looked.bad_effects:
        _refuse_effects(pair)
    return _Found(
        start,
        looked.offsets,
        [looked.values] + ([] if looked.effects is None else [looked.effects]),
        looked.energy,
        looked.effect,
        looked.word_sum if plain else word_sum(sides[0]),
        sum(side.nbytes for side in sides),
    )


def _look_drawn(work: _Work, edge: Cut | None, desk: _Desk, i: int, start: int) -> _Found:
    """Look at one chunk whose entries are ranked by a draw, step by step."""
    pair, stop = work.pairs[i], min(work.pairs[i].numel, start + work.chunk)
    sides, columns = _columns(work, i, range(start, stop))
    looked = desk.collector.look(None, columns[0], None, pair.dtype, nothing(work.wide).edge(i))  # for its sums
    if looked.bad_values:
        _refuse_values(pair, looked.bad_values)
    effect = 0.0
    if pair.importance is not None:
        if not bool(columns[-1].isfinite().all()):
            _refuse_effects(pair)
        effect = float(torch.linalg.vector_norm(columns[-1], 1, dtype=torch.float64))
    positions = torch.arange(start, stop, device="cpu")
    held = slice(None) if edge is None else edge.holds(columns[work.rule.column], i, positions)
    offsets = positions[held] - start
    return _Found(
        start,
        offsets.to(torch.int32),
        [column[offsets] for column in columns],
        looked.energy,
        effect,
        word_sum(sides[0]),
        sum(side.nbytes for side in sides),
    )


def _refuse_values(pair: Pair, bad: int) -> NoReturn:
    refuse(f"the differences at {shown(pair.name)}", "be finite", f"{bad} NaN or Inf", "Repair the checkpoints.")


def _refuse_weights(pair: Pair) -> NoReturn:
    refuse(f"importance of {shown(pair.name)}", "be finite and not negative", "other entries")


def _refuse_effects(pair: Pair) -> NoReturn:
    refuse(f"difference times importance at {shown(pair.name)}", "be finite", "Inf", "Scale it down.")


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
            _refuse_weights(pair)
        columns.append(values * weight.to(pair.dtype))
    return sides, columns


def _rounded(total: float) -> float:
    """Ten digits: the last bits of a sum depend on the chunks."""
    return float(f"{total:.9e}")


def _share(kept: Mapping[int, float], of: Mapping[int, float]) -> float:
    """What the kept entries hold of the whole; 0 of nothing."""
    total = math.fsum(of.values())
    return round(min(math.fsum(kept.values()) / total, 1.0), 6) if total else 0.0


def _write(work: _Work, kept: Kept, writer: SparseWriter, group: range, cut: Cut, factor: float) -> None:
    """Write what the cut holds of the kept entries: measured first, since a tensor takes its smaller encoding."""
    own = work.own(group)
    pieces = [(i, piece) for i in own for piece in kept.pieces.get(i, [])]
    buffers = [Buffers() for _ in range(_threads() + 1)]  # one per piece that is alive

    def candidates(i: int, piece: Piece, room: Buffers) -> tuple[Candidates, Edge]:
        offsets, columns = kept.read(piece, room)
        effects = columns[-1] if work.pairs[i].importance is not None else None
        ranked = columns[work.rule.column]
        return Candidates(piece.start, offsets, columns[0], ranked, effects), cut.edge(i, piece.start)

    def measured(i: int, piece: Piece, room: Buffers) -> Any:
        found, edge = candidates(i, piece, room)
        return found.measure(edge)

    def encoded(i: int, piece: Piece, room: Buffers, previous: int) -> tuple[int, Encoded]:
        found, edge = candidates(i, piece, room)
        positions, values = found.keep(edge, room)
        if factor != 1.0:
            values = (values.double() * factor).to(values.dtype)
        return i, encode(encodings[i], positions, values, previous)

    looks = (partial(measured, *piece, buffers[k % len(buffers)]) for k, piece in enumerate(pieces))
    measures = {i: Measure() for i in own}
    filled = []
    for i in own:
        work.kept_energy[i] = work.kept_effect[i] = 0.0
    for (i, piece), found in zip(pieces, ahead(looks, _threads()), strict=True):
        if found.held:
            filled.append((i, piece, measures[i].add_run(found.held, found.first, found.last, found.gap_bytes)))
        work.kept_energy[i] += found.energy
        work.kept_effect[i] += found.effect
    encodings = {i: measure.encoding(work.pairs[i].numel) for i, measure in measures.items()}
    calls = (partial(encoded, i, p, buffers[k % len(buffers)], last) for k, (i, p, last) in enumerate(filled))
    for i, blocks in _in_turn(own, ahead(calls, _threads())):
        pair = work.pairs[i]
        writer.begin(pair.name, pair.shape, pair.numel, pair.dtype, measures[i], _rounded(work.energy[i] * factor**2))
        for block in blocks:
            if factor != 1.0 and not bool(block.values.isfinite().all()):
                what = f"rescaled differences at {shown(pair.name)}"
                refuse(what, "be finite", "Inf", "Keep more entries.")
            writer.write(block)


def _write_all(work: _Work, writer: SparseWriter, group: range) -> None:
    """Write every entry as it is read."""

    def look(desk: _Desk, i: int, start: int) -> _Found:
        found = _look(work, None, desk, i, start)
        return replace(found, encoded=encode("bitmap", found.offsets.long() + start, found.columns[0], start - 1))

    own = work.own(group)
    for i, chunks in _in_turn(own, _looked(work, own, look)):
        pair, energy = work.pairs[i], 0.0
        writer.begin(pair.name, pair.shape, pair.numel, pair.dtype, Measure.of_all(pair.numel))
        for found in chunks:
            assert found.encoded is not None
            writer.write(found.encoded)
            energy += found.energy
        writer.end(_rounded(energy))
    work.kept_energy.update({i: work.energy[i] for i in own})
    work.kept_effect.update({i: work.effect[i] for i in own if i in work.effect})


def _in_turn(tensors: Iterable[int], blocks: Iterable[tuple[int, T]]) -> Iterator[tuple[int, Iterator[T]]]:
    """Yield every tensor with its blocks, which come in the order of the tensors; some have none."""
    found = groupby(blocks, key=itemgetter(0))
    following = next(found, None)
    for i in tensors:
        if following is None or following[0] != i:
            yield i, iter(())
            continue
        yield i, (block for _, block in following[1])
        following = next(found, None)
