"""The exact top-m select in pieces, for streams of chunks and for ranks that hold different tensors.

The order of work: `Selection(m, wide)`; then until ``selection.settled``: every chunk through `add_histogram_` into one
int64 tensor [65536] (ranks all-reduce it), and `settle`; then every chunk, in the global order, through `apply_`. Any
chunking in the global order gives the bits of `topm_subtract_` on the whole. A rank's budget of ties is what is left
after the ranks before it: its own ties are ``histogram[selection.digit]`` of its last histogram.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prosocial_ext import _C
from prosocial_ext.ops._in_place import copy_back
from prosocial_ext.ops.topm import Prepared, bump_versions
from prosocial_ext.reference import TopmEdit, check

__all__ = ["BINS", "Selection", "add_histogram_", "apply_", "settle"]

BINS = 1 << 16


@dataclass(frozen=True)
class Selection:
    """The key of the last selected entry as far as it is known, and how many entries are needed from here on.

    ``wide``: a tensor of the whole stream is float64, so keys have four 16-bit digits, else two. Once settled, entries
    with a larger key are selected, and ``need`` (the ties to keep) of those whose key is ``prefix``.
    """

    need: int
    wide: bool
    prefix: int = 0
    rounds: int = 0
    digit: int = 0

    @property
    def settled(self) -> bool:
        """Whether the key is known in full."""
        return self.rounds == (4 if self.wide else 2)


def add_histogram_(
    histogram: Tensor,
    params: Sequence[Tensor],
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    selection: Selection,
    importance: Sequence[Tensor] = (),
) -> int:
    """Add one chunk's counts to ``histogram`` (int64 [65536], contiguous, on the CPU).

    ``params`` give only their dtype. Returns, in the first round, how many entries may not be selected.

    Raises:
        TypeError, ValueError: ``histogram`` is not of this form.
    """
    check.tensor("histogram", histogram)
    if histogram.dtype != torch.int64:
        check.fail("histogram", "be torch.int64", histogram.dtype, error=TypeError)
    on_host = histogram.device.type == "cpu" and not check.abstract(histogram)
    if not on_host or tuple(histogram.shape) != (BINS,) or not histogram.is_contiguous():
        check.fail("histogram", f"have shape [{BINS}] and be contiguous, on the CPU", check.describe(histogram))
    prepared = Prepared(params, base, tuned, importance, wide=selection.wide)
    _C.topm_histogram(prepared.call, selection.prefix, selection.rounds, histogram.data_ptr())
    return int(prepared.nonfinite.sum())


def settle(histogram: Tensor, selection: Selection) -> Selection:
    """Turn the histogram of all chunks into the selection with one more digit known."""
    need = min(selection.need, int(histogram.sum()))  # fewer entries than wanted may be eligible
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, max(need, 1)))
    digit = max(BINS - 1 - place, 0)
    above = int(from_top[place - 1]) if 0 < place < BINS else 0
    shift = 16 * ((4 if selection.wide else 2) - 1 - selection.rounds)
    return replace(
        selection,
        need=need - above if need else 0,
        prefix=selection.prefix | digit << shift,
        rounds=selection.rounds + 1,
        digit=digit,
    )


def apply_(
    params: Sequence[Tensor],
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    selection: Selection,
    *,
    scale: float = 1.0,
    importance: Sequence[Tensor] = (),
) -> tuple[TopmEdit, Selection]:
    """Edit one chunk in place; return what was done and the selection for the next chunk in the global order."""
    prepared = Prepared(params, base, tuned, importance, scale=scale, wide=selection.wide)
    assert prepared.params is not None
    index, ties = -1, 0
    if selection.need > 0:
        index, ties = _C.topm_tie_index(prepared.call, selection.prefix, selection.need)
    _C.topm_apply(prepared.call, selection.prefix, index)
    copy_back(params, prepared.params)
    bump_versions(params)
    edit = TopmEdit(prepared.threshold, prepared.kept, prepared.unchanged, prepared.nonfinite)
    return edit, replace(selection, need=selection.need - ties)
