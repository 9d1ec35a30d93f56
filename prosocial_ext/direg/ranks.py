"""The processes of a torchrun, which share the tensors or the shards of one job and find the result of a single one.

Only integers are added across ranks, and floats are added in an order that does not depend on who computed them: that
is why the result is the one-rank result to the bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

from prosocial_ext.checkpoints.errors import StoppedError, refuse
from prosocial_ext.direg.sparse_file import Measure, SparseReader, SparseWriter

__all__ = ["ALONE", "Ranks", "append_part", "torchrun_ranks"]

T = TypeVar("T")


class Ranks:
    """This process's number among ``size``, and what they do together; every rank calls the same in the same order.

    Args:
        rank: This process, from 0.
        size: How many there are; more than one needs an initialised torch.distributed, gloo among its backends.

    >>> Ranks(0, 1).gather("x"), Ranks(1, 2).share([5, 1, 1, 3]), Ranks(0, 2).share([5, 1, 1, 3])
    (['x'], range(1, 4), range(0, 1))
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def share(self, sizes: Sequence[int]) -> range:
        """This rank's run of the items of these sizes: the ranks' runs follow each other and cover all."""
        return range(self._first(sizes, self.rank), self._first(sizes, self.rank + 1))

    def sum_(self, tensor: Tensor) -> None:
        """Add up an integer tensor over the ranks, in place.

        Raises:
            StoppedError: Another rank has stopped.
        """
        assert not tensor.is_floating_point(), "sums of floats depend on the order"
        if self.size > 1:
            import torch.distributed as dist

            with _together():
                dist.all_reduce(tensor)

    def gather(self, item: T) -> list[T]:
        """What every rank brought, in their order.

        Raises:
            StoppedError: Another rank has stopped.
        """
        if self.size == 1:
            return [item]
        import torch.distributed as dist

        found: list[T] = [item] * self.size
        with _together():
            dist.all_gather_object(found, item)
        return found

    def _first(self, sizes: Sequence[int], rank: int) -> int:
        """The first item of a rank: items whose middle lies in its part of the whole are its own."""
        total, done = sum(sizes), 0
        for i, size in enumerate(sizes):
            if (2 * done + size) * self.size >= 2 * total * rank and rank < self.size:
                return i
            done += size
        return len(sizes)


ALONE = Ranks(0, 1)
_PAUSE = 0.05  # seconds


@contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """Join the other processes if torchrun started this one; else there is one rank."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        leave()


def leave() -> None:
    """Leave torch.distributed.

    torch 2.6 joins gloo's threads with the GIL held, and that of the last collective may still want it, to let its
    tensors go: without a pause one of three groups hung.
    """
    import torch.distributed as dist

    time.sleep(_PAUSE)
    dist.destroy_process_group()


def append_part(writer: SparseWriter, part: SparseReader) -> None:
    """Append the tensors that another rank has written."""
    for name, tensor in part.tensors.items():
        measure = Measure()
        for positions, _ in part.blocks(name):
            measure.add(positions)
        writer.begin(name, tensor.shape, tensor.numel, part.dtype(name), measure, tensor.energy)
        for positions, values in part.blocks(name):
            writer.append(positions, values)


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's word for a closed connection
        what = str(error).splitlines()[0]
        refuse("the ranks", "all get this far", what, "The rank that stopped says why.", StoppedError)
