"""The place in the order (key descending, tensor and position ascending) up to which entries are selected.

The order has no ties, so a cut holds exactly as many entries as it is made for, whatever the data and the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, SupportsInt

import torch
from torch import Tensor

from prosocial_ext.direg.ranks import ALONE, Ranks
from prosocial_ext.ops import _streaming as streaming
from prosocial_ext.ops._stream import Edge, add_digits, find_ties

__all__ = ["Cut", "ScoredBlock", "find_cut", "keys", "nothing"]

_ALL = 1 << 62  # above every position


class Positions(Protocol):
    """Ascending positions of which one is looked up: a tensor, or what stands for one."""

    def __getitem__(self, place: int, /) -> SupportsInt:
        """The position at a place of the block."""


ScoredBlock = tuple[int, Positions, Tensor]  # tensor's number, ascending positions, scores


@dataclass(frozen=True)
class Cut:
    """Entries of a larger key than ``key``, and those of this key up to ``position`` of tensor number ``tensor``.

    ``wide``: keys are those of float64 scores.
    """

    key: int
    tensor: int
    position: int
    wide: bool

    def holds(self, scores: Tensor, tensor: int, positions: Tensor) -> Tensor:
        """Return which entries of a block are held; ``positions`` ascend.

        >>> two = Cut(key=0x40000001, tensor=0, position=1, wide=False)
        >>> two.holds(torch.tensor([2.0, -3.0, 2.0]), 0, torch.tensor([0, 1, 2]))
        tensor([ True,  True, False])
        """
        ranks = keys(scores, self.wide)
        if tensor != self.tensor:
            return ranks >= self.key if tensor < self.tensor else ranks > self.key
        return (ranks > self.key) | (ranks == self.key) & (positions <= self.position)

    def edge(self, tensor: int, start: int = 0) -> Edge:
        """Return the same for the kernels: as seen from element ``start`` of a tensor.

        >>> Cut(key=7, tensor=1, position=9, wide=False).edge(1, start=4)
        Edge(key=7, index=5, wide=False)
        """
        if tensor == self.tensor:
            return Edge(self.key, self.position - start, self.wide)
        return Edge(self.key, _ALL if tensor < self.tensor else -1, self.wide)


def keys(scores: Tensor, wide: bool) -> Tensor:
    """Return the kernels' key of finite scores (csrc/core/magnitude_key.h): the bits of the magnitude, plus one.

    ``wide``: the bits of float64, else of float32.

    >>> keys(torch.tensor([-0.0, 1.0, -1.0]), wide=False).tolist()
    [1, 1065353217, 1065353217]
    """
    magnitudes = scores.to(torch.float64 if wide else torch.float32).abs()
    return magnitudes.view(torch.int64 if wide else torch.int32).add_(1)


def nothing(wide: bool) -> Cut:
    """Return the cut that holds no entry.

    >>> bool(nothing(wide=False).holds(torch.tensor([1e38]), 0, torch.tensor([0])))
    False
    """
    return Cut((1 << (63 if wide else 31)) - 1, -1, -1, wide)


def find_cut(
    blocks: Callable[[], Iterable[ScoredBlock]], m: int, wide: bool, first_digits: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Cut:  # fmt: skip
    """Return the cut that holds exactly ``m`` of the entries that ``blocks`` yields, at every call in the global order.

    Args:
        blocks: Called two to five times.
        m: At most the number of entries.
        wide: A score is float64.
        first_digits: The histogram of the first round over all ranks, if it is known.
        ranks: Who hold the entries: each yields its own, all of them before those of the next rank in the order.

    >>> scores = torch.tensor([1.0, 3.0, 3.0, 2.0])
    >>> find_cut(lambda: [(0, torch.arange(4), scores)], 2, wide=False) == Cut(int(keys(scores, False)[1]), 0, 2, False)
    True
    """
    if m == 0:
        return nothing(wide)
    selection = streaming.Selection(m, wide)
    while not selection.settled:
        histogram = torch.zeros(streaming.BINS, dtype=torch.int64, device="cpu")
        if first_digits is not None and selection.rounds == 0:
            histogram = first_digits
        else:
            for _, _, scores in blocks():
                add_digits(histogram, scores, wide, selection.prefix, selection.rounds)
            ranks.sum_(histogram)
        selection = streaming.settle(histogram, selection)
    if selection.need == 0:
        return Cut(selection.prefix, -1, -1, wide)
    ties, found = 0, None
    if ranks.size > 1:  # those of the ranks before come first
        own = sum(find_ties(scores, wide, selection.prefix, _ALL)[0] for _, _, scores in blocks())
        ties = sum(ranks.gather(own)[: ranks.rank])
    for tensor, positions, scores in blocks() if ties < selection.need else ():
        here, place = find_ties(scores, wide, selection.prefix, selection.need - ties)
        ties += here
        if ties == selection.need:
            found = Cut(selection.prefix, tensor, int(positions[place]), wide)
            break
    for cut in ranks.gather(found):
        if cut is not None:
            return cut
    raise AssertionError(f"{ties} ties, {selection.need} needed: the blocks changed between two calls")
