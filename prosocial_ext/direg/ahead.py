"""Reads the next chunk while the last one is worked on; reading releases the GIL, and so do the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]

T = TypeVar("T")


def ahead(reads: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield what the calls return, in order, each made by a thread while the caller holds the one before.

    At most two results are alive. What a call raises is raised here, at its turn.

    >>> list(ahead([lambda: 1, lambda: 2]))
    [1, 2]
    """
    waiting: Future[T] | None = None
    with ThreadPoolExecutor(1, "prosocial-read") as thread:
        for read in reads:
            coming = thread.submit(read)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()
