"""Makes the next chunks while one is worked on; reads release the GIL, and so do the kernels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]

T = TypeVar("T")


def ahead(calls: Iterable[Callable[[], T]], threads: int = 1) -> Generator[T]:
    """Yield what the calls return, in order; ``threads`` threads make the next ones while the caller holds one.

    At most ``threads + 1`` results are alive, the caller's included. What a call raises is raised here, at its turn.

    >>> list(ahead([lambda: 1, lambda: 2, lambda: 3], threads=2))
    [1, 2, 3]
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, "prosocial-ahead") as pool:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
