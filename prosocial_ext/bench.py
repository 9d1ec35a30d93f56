"""Timing with one line format and one JSON schema: ours, the limit of this machine, and the peer, in one run.

``benchmarks/`` builds on this under pytest-benchmark; ``prosocial bench`` times the three op families of an installed
wheel.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from prosocial_ext import _C
from prosocial_ext.ops import _native


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, tenth and ninetieth percentile over ``rounds``."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Row:
    """One measured case. ``limit`` and ``peer`` were measured in the same run; ratios are what to compare.

    ``bytes`` is what the limit moves; ``limit_name`` and ``peer_name`` say what they are.
    """

    family: str
    case: str
    ours: Timing
    bytes: int
    limit: Timing
    limit_name: str
    peer: Timing | None = None
    peer_name: str = ""

    def line(self) -> str:
        """The row as one aligned line."""
        text = (
            f"{self.family:<11}{self.case:<44}{self.ours.median * 1e3:10.3f} ms "
            f"({self.ours.low * 1e3:.3f}..{self.ours.high * 1e3:.3f}) "
            f"{self.bytes / self.ours.median / 1e9:7.1f} GB/s {self.ours.median / self.limit.median:7.2f} x "
            f"{self.limit_name} ({self.limit.median * 1e3:.3f} ms)"
        )
        if self.peer is not None:
            text += f"  {self.peer.median / self.ours.median:.1f} x faster than {self.peer_name}"
        return text

    def as_json(self) -> dict[str, Any]:
        """The row under the JSON schema of ``benchmarks/results``."""
        return asdict(self)


def time_call(call: Callable[[], object], *, seconds: float = 1.0, rounds: int = 200) -> Timing:
    """Time ``call`` until ``seconds`` have passed or ``rounds`` are done, at least five times after one warm-up."""
    call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 5 or (len(taken) < rounds and time.perf_counter() < end):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    taken.sort()
    pick = lambda q: taken[min(len(taken) - 1, int(q * len(taken)))]  # noqa: E731
    return Timing(statistics.median(taken), pick(0.1), pick(0.9), len(taken))


def time_read(*tensors: torch.Tensor) -> Timing:
    """Time one pass of loads over the (contiguous) tensors: the least that any op reading them can take."""
    threads = _native.threads()

    def read() -> None:
        for tensor in tensors:
            _C.limit_read(tensor.data_ptr(), tensor.numel() * tensor.element_size() // 8 * 8, threads)

    return time_call(read)


def time_axpy(params: torch.Tensor, base: torch.Tensor, tuned: torch.Tensor) -> Timing:
    """Time one dense ``params -= scale * (tuned - base)`` (float32 or bfloat16, contiguous); params are changed."""
    pointers = params.data_ptr(), base.data_ptr(), tuned.data_ptr()
    tag, threads = _native.DTYPE_TAG[params.dtype], _native.threads()
    return time_call(lambda: _C.limit_axpy(*pointers, tag, params.numel(), 1e-6, threads))


def machine() -> dict[str, Any]:
    """What a figure must be read with: processor, instruction set, threads, versions."""
    return {
        "machine": platform.processor() or platform.machine(),
        "isa": _C.isa(),
        "threads": _native.threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "prosocial_ext": _C.version,
    }
