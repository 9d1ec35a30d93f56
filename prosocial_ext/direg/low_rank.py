"""Writes a harm vector whose matrices are replaced by their best approximations of low rank: an ablation.

With tau = harm - base, each matrix becomes tau V V', where the columns of V are the r leading right singular vectors of
tau: the nearest matrix of rank r (Eckart and Young), 0 in the rows where tau is. r is what the budget would pay for in
factors, r (rows + columns) numbers; stored are all entries, as whatever reads harm vectors wants them.

1. One read measures: energy, fingerprint, and that all is finite.
2. V: of small matrices by `torch.linalg.svd`. Of large ones by subspace iteration from a drawn start (Halko, Martinsson
   and Tropp 2011, arXiv 0909.4061, 4.5): X <- orth(tau' tau X) three times, a read each, then within the span of X the
   r columns that hold most, another read. tau goes by in blocks of rows: memory holds nothing but arrays of V's size.
3. One read writes tau V V', block by block.

Arithmetic is float64, rounded once to what is stored. The products are torch's: bits are promised on one machine with
one number of threads, for any memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.readers import word_sum
from prosocial_ext.direg.extract import DEFAULT_MEMORY, Progress, chunk_elements, fingerprint
from prosocial_ext.direg.pairing import Pair, Pairs
from prosocial_ext.direg.ranks import ALONE, Ranks
from prosocial_ext.direg.rules import choose_rule
from prosocial_ext.direg.sparse_file import Measure, SparseWriter
from prosocial_ext.ops._stream import sum_squares
from prosocial_ext.reference import check
from prosocial_ext.reference.topm import entry_count

__all__ = ["plan_ranks", "reads", "write_low_rank"]

_BLOCK = 1 << 18  # elements read at once, or a row
_EXACT = 1 << 19  # elements up to which a matrix is decomposed as a whole: some 40 MB, half a second
_OVERSAMPLING = 32  # with these two the norm of the error measured below 1 % above the optimum for pure noise,
_ITERATIONS = 3  # and 0.3 % where singular values fall like 1 / sqrt(k) (up to 2048 x 2048, density 0.1)


def plan_ranks(
    pairs: Pairs, *, m: int | None, density: float | None, scope: str = "global", memory: int = DEFAULT_MEMORY,
    ranks: Ranks = ALONE,
) -> dict[str, int]:  # fmt: skip
    """Return the rank of every tensor whose matrices are replaced; the others are kept whole.

    The last two dimensions are a matrix, those before count matrices. Its rank is floor(density * rows * columns /
    (rows + columns)), at least 1: the factors then take the share ``density`` of its numbers. Whole remain tensors with
    fewer dimensions, matrices of this rank or below by their shape, and all at density 1, which pays for all.

    Args:
        pairs: What is subtracted from what.
        m: None.
        density: In (0, 1].
        scope: "global": it has no meaning here.
        memory: Bytes for buffers.
        ranks: Of one process: with other numbers of threads products have other bits.

    Raises:
        ValueError: An argument out of range, or ``memory`` too small for a matrix, which the text names.

    >>> from prosocial_ext.direg.pairing import pair_models
    >>> layer = torch.nn.Linear(300, 100)
    >>> plan_ranks(pair_models(layer, layer), m=None, density=0.1)
    {'weight': 7}
    """
    chunk_elements(memory)  # checks it
    if m is not None:
        check.fail("m", "be None with the rule 'low_rank'", m, "Pass density: ranks follow from it.")
    if scope != "global":
        check.fail("scope", "be 'global' with the rule 'low_rank'", repr(scope), "Every matrix has a rank of its own.")
    if ranks.size > 1:
        check.fail("ranks", "be one process with the rule 'low_rank'", ranks.size, "Start it without torchrun.")
    found = {}
    for pair in pairs.pairs:
        size = entry_count(None, density, pair.numel, shown(pair.name))
        if size == pair.numel or len(pair.shape) < 2:
            continue
        rows, columns = _sizes(pair)
        rank = max(1, entry_count(None, density, rows * columns, shown(pair.name)) // (rows + columns))
        if rank >= min(rows, columns):
            continue
        found[pair.name] = rank
        if memory < (least := _bytes(rows, columns, rank)):
            rule = f"be at least {least} bytes for rank {rank} of {shown(pair.name)}"
            check.fail("memory", rule, memory, "Raise it, lower the density, or exclude the tensor.")
    return found


def reads(pair: Pair, rank: int | None) -> int:
    """How often a tensor is read, all its sides together; None: it is kept whole.

    >>> from prosocial_ext.direg.pairing import pair_models
    >>> layer = torch.nn.Linear(1024, 1024)
    >>> [reads(pair, rank) for pair, rank in zip(pair_models(layer, layer).pairs, (None, 51))]
    [2, 6]
    """
    if rank is None:
        return 2
    rows, columns = _sizes(pair)
    return 3 if rows * columns <= _EXACT else 3 + _ITERATIONS


def write_low_rank(
    pairs: Pairs, descriptor: int | None, *, m: int | None, density: float | None, scope: str,
    recipe: Mapping[str, Any], seed: int = 0, memory: int = DEFAULT_MEMORY, progress: Progress = lambda _: None,
    ranks: Ranks = ALONE,
) -> None:  # fmt: skip
    """Write the low-rank vector; ``recipe`` is completed by what was found.

    Args:
        pairs: What is subtracted from what.
        descriptor: Of the empty file that becomes the harm vector.
        m: None.
        density: In (0, 1]; `plan_ranks` has what ranks it gives.
        scope: "global".
        recipe: What is known before.
        seed: Of the drawn starts.
        memory: Bytes for buffers.
        progress: Called with the bytes read.
        ranks: Of one process.

    Raises:
        ValueError: As `plan_ranks`; a seed out of range, importance.
        CheckpointError: A difference that is not finite; the text names the tensor.
    """
    choose_rule("low_rank", seed, any(pair.importance is not None for pair in pairs.pairs))
    plan = plan_ranks(pairs, m=m, density=density, scope=scope, memory=memory, ranks=ranks)
    assert descriptor is not None
    total = sum(pair.numel for pair in pairs.pairs)
    full = {
        **recipe, "rank": "low_rank", "ranks": plan, "seed": seed, "scope": "per_matrix", "m": total, "n": total,
        "ties": "none", "tied": pairs.tied, "left_alone": pairs.left_alone, "base_fingerprint": "0" * 16,
        "energy_share": 0.0,
    }  # fmt: skip
    writer = SparseWriter(descriptor, "harm_vector", {pair.name: pair.shape for pair in pairs.pairs}, full)
    sums, energy, kept = [], [], []
    for pair in pairs.pairs:
        difference = _Difference(pair, progress)
        word_total, squares = difference.measured()
        sums.append((pair.name, str(pair.base.dtype), (pair.numel,), word_total))
        energy.append(squares)
        writer.begin(pair.name, pair.shape, pair.numel, pair.dtype, Measure.of_all(pair.numel), squares)
        place, rank = 0, plan.get(pair.name) if squares else None  # zeros have no direction
        for values in difference.flat() if rank is None else _approximated(difference, rank, seed):
            if not bool(values.isfinite().all()):
                refuse(f"the approximation of {shown(pair.name)}", "be finite", "Inf", "Scale the difference down.")
            writer.append(torch.arange(place, place + len(values), device="cpu"), values)
            place += len(values)
            kept.append(sum_squares(values))
    full["base_fingerprint"] = fingerprint(sums)
    full["energy_share"] = round(min(math.fsum(kept) / math.fsum(energy), 1.0), 6) if any(energy) else 0.0
    writer.finish(full)


@dataclass(frozen=True)
class _Difference:
    """What a pair gives, read by blocks."""

    pair: Pair
    progress: Progress

    def measured(self) -> tuple[int, float]:
        """The word sum of the base, and the squared norm of the difference, which is finite."""
        words, squares = 0, []
        for sides, values in self._blocks(0, self.pair.numel, _BLOCK):
            if not bool(values.isfinite().all()):
                refuse(f"the differences at {shown(self.pair.name)}", "be finite", "NaN or Inf",
                       "Repair the checkpoints.")  # fmt: skip
            words += word_sum(sides[0])
            squares.append(sum_squares(values))
        return words % 2**64, math.fsum(squares)

    def flat(self) -> Iterator[Tensor]:
        """All of it, flat."""
        return (values for _, values in self._blocks(0, self.pair.numel, _BLOCK))

    def matrices(self) -> Iterator[_Matrix]:
        """Its matrices, one after the other."""
        rows, columns = _sizes(self.pair)
        step = max(1, _BLOCK // columns) * columns
        for first in range(0, self.pair.numel, rows * columns):
            blocks = partial(self._blocks, first, first + rows * columns, step)
            yield _Matrix(rows, columns, blocks)

    def _blocks(self, start: int, stop: int, step: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Every side of some elements, and the difference."""
        for at in range(start, stop, step):
            sides = [side.read(at, min(stop, at + step)) for side in self.pair.sides]
            yield sides, self.pair.difference(*sides)
            self.progress(sum(side.nbytes for side in sides))


@dataclass(frozen=True)
class _Matrix:
    """A matrix that is read by blocks of rows, as often as need be."""

    rows: int
    columns: int
    read: Callable[[], Iterator[tuple[list[Tensor], Tensor]]]

    def blocks(self) -> Iterator[Tensor]:
        """float64 [some rows, columns]."""
        for _, values in self.read():
            yield values.double().view(-1, self.columns)

    def leading(self, rank: int, generator: torch.Generator) -> Tensor:
        """Its leading right singular vectors, or nearly: float64 [columns, rank], orthonormal."""
        if self.rows * self.columns <= _EXACT:
            return torch.linalg.svd(torch.cat(list(self.blocks())), full_matrices=False).Vh[:rank].T
        width = min(rank + _OVERSAMPLING, self.rows, self.columns)
        basis = torch.randn(self.columns, width, generator=generator, dtype=torch.float64, device="cpu")
        for _ in range(_ITERATIONS):
            image = torch.zeros_like(basis)
            for block in self.blocks():
                image.addmm_(block.T, block @ basis)
            basis = torch.linalg.qr(image).Q
        gram = torch.zeros(width, width, dtype=torch.float64, device="cpu")
        for block in self.blocks():
            part = block @ basis
            gram.addmm_(part.T, part)
        return basis @ torch.linalg.eigh(gram).eigenvectors[:, -rank:]  # ascending


def _approximated(difference: _Difference, rank: int, seed: int) -> Iterator[Tensor]:
    """Every matrix of a difference projected on its leading right singular vectors, flat."""
    pair = difference.pair
    start = int.from_bytes(hashlib.sha256(f"{seed} {pair.name}".encode()).digest()[:8], "little")
    generator = torch.Generator("cpu").manual_seed(start >> 1)
    for matrix in difference.matrices():
        vectors = matrix.leading(rank, generator)
        for block in matrix.blocks():
            yield (block @ vectors @ vectors.T).to(pair.dtype).view(-1)


def _sizes(pair: Pair) -> tuple[int, int]:
    """Rows and columns of a pair's matrices; fewer rows than its shape has where one side lacks some."""
    columns = pair.shape[-1]
    return min(pair.shape[-2], pair.numel // columns), columns


def _bytes(rows: int, columns: int, rank: int) -> int:
    """What is held at once, at most."""
    block = 48 * max(columns, _BLOCK)
    if rows * columns <= _EXACT:
        return block + 64 * rows * columns
    width = min(rank + _OVERSAMPLING, rows, columns)
    return block + 32 * width * (columns + width)  # old and new basis, and two copies in torch.linalg.qr
