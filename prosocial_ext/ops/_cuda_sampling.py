"""The sampling ops on CUDA tensors (csrc/cuda/sampling*.cu): allocate, launch, return; nothing waits for the device.

Tokens are drawn in one of two forms, with the same result: by a cluster of blocks per row, in one launch, where the GPU
has clusters and the row fits their shared memory; else in chunks, in two launches, or three with filters.
A row without a distribution, or with a parameter out of range, gives token -1 and NaN log-probs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from prosocial_ext.ops import _cuda
from prosocial_ext.ops._knobs import spread
from prosocial_ext.ops._logits import unit_columns, view
from prosocial_ext.reference import sampling as definition
from prosocial_ext.reference import sampling_arguments as arguments

__all__ = ["logprobs", "sample", "sample_rows"]

block_threads = 0  # of the kernels' blocks: 64 or 256 (512 in clusters), 0 for the launchers' choice (tests)
in_clusters: bool | None = None  # whether tokens are drawn by clusters; None: wherever they can be (tests)


@functools.cache
def _fits_cluster(launchers: Any, vocab: int, threads: int, device: int) -> bool:
    return bool(launchers.sampling_fits_cluster(vocab, threads, device))


def _by_cluster(base: torch.Tensor, vocab: int) -> bool:
    if in_clusters is not None:
        return in_clusters
    return _fits_cluster(_cuda.launchers, vocab, block_threads, base.get_device() if base.is_cuda else 0)


def _scratch(base: torch.Tensor, vocab: int, filters: bool) -> torch.Tensor:
    """Memory for one call. Its contents do not matter: the first launch prepares what the others rely on."""
    size = _cuda.launchers.sampling_scratch_bytes(base.shape[0], vocab, filters, block_threads)
    return torch.empty(size, dtype=torch.uint8, device=base.device)


def sample(
    base: torch.Tensor,
    guide: torch.Tensor | None,
    vocab: int,
    seed: int,
    offset: int,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """Draw with one set of parameters: in chunks two launches, three with top-k or top-p."""
    base = unit_columns(base)
    guide = None if guide is None else unit_columns(guide)
    (base_view, _), (guide_view, guides) = view(base), view(guide)
    tokens = torch.empty(base.shape[0], dtype=torch.int64, device=base.device)
    filters = temperature > 0 and (0 < top_k < vocab or top_p < 1)
    clusters = _by_cluster(base, vocab)
    scratch = None if clusters else _scratch(base, vocab, filters)
    error = _cuda.launchers.guided_sample(
        *(base_view, guide_view, guides, base.shape[0], vocab),
        *(guidance, temperature, top_k, top_p, min_p, seed, offset, filters),
        *(tokens.data_ptr(), 0 if scratch is None else scratch.data_ptr(), clusters, block_threads),
        *_cuda.target(base),
    )
    _cuda.checked(error)
    return tokens


class _RowKnobs:
    """Knobs of `_knobs.py` for a launcher: what all rows have as numbers, the others where they lie."""

    _SAME = (1.0, 1.0, 0.0, 0.0, 0, 0, 0)  # no filter, no guide, no draw

    def __init__(self, *knobs: torch.Tensor | None) -> None:
        """Temperature, top-p, min-p, guidance, top-k, seed, offset; None where the kernels do not ask."""
        self.kept: list[torch.Tensor] = []
        self.same = list(self._SAME)
        self.rows = [(0, 0)] * len(self._SAME)  # address and stride; 0 is the same in all rows
        for i, knob in enumerate(knobs):
            if knob is None or knob.numel() == 0:
                continue
            knob = knob if i > 3 else knob.to(torch.float32)
            guides = knob.shape[1] if knob.dim() == 2 else 1
            if knob.device.type == "cpu" and knob.shape[0] == 1 and (guides == 1 or knob.stride(1) == 0):
                self.same[i] = knob.flatten()[0].item()
                continue
            if guides > 1 and knob.stride(1) != 1:
                knob = knob.contiguous()
            self.kept.append(knob)
            self.rows[i] = knob.data_ptr(), 0 if knob.shape[0] == 1 else knob.stride(0)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.same, self.rows

    def may_filter(self, vocab: int) -> bool:
        """Whether any row may have top-k or top-p, which the device alone knows where it is per row."""
        heat, top_p, _, _, top_k, _, _ = self.same
        per_row = [address != 0 for address, _ in self.rows]
        return per_row[1] or per_row[4] or ((per_row[0] or heat > 0) and (0 < top_k < vocab or top_p < 1))


def sample_rows(
    base: torch.Tensor,
    guide: torch.Tensor | None,
    vocab: int,
    row_in_counter: bool,
    logprobs: bool,
    *knobs: torch.Tensor,
    words: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw with parameters per row: in chunks two launches, three with log-probs or where a row may have a filter.

    ``words`` [B] replaces the random words (tests). Returns tokens and log-probs, the latter empty unless asked for.
    """
    rows, device = base.shape[0], base.device
    base = unit_columns(base)
    guide = None if guide is None else unit_columns(guide)
    (base_view, _), (guide_view, guides) = view(base), view(guide)
    asked = _RowKnobs(*knobs)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    drawn = torch.empty(rows if logprobs else 0, dtype=torch.float32, device=device)
    clusters, filters = _by_cluster(base, vocab), logprobs or asked.may_filter(vocab)
    scratch = None if clusters else _scratch(base, vocab, filters)
    error = _cuda.launchers.guided_sample_rows(
        *(base_view, guide_view, guides, rows, vocab, *asked.arguments, row_in_counter, filters),
        *(0 if words is None else words.data_ptr(), tokens.data_ptr(), drawn.data_ptr() if logprobs else 0),
        *(0 if scratch is None else scratch.data_ptr(), clusters, block_threads, *_cuda.target(base)),
    )
    _cuda.checked(error)
    return tokens, drawn


def logprobs(
    base: torch.Tensor, guide: torch.Tensor | None, temperature: torch.Tensor, guidance: torch.Tensor, vocab: int
) -> torch.Tensor:
    """Return the log-probs of whole rows: three launches."""
    if torch.float64 in (base.dtype, guide.dtype if guide is not None else None):
        return _logprobs_double(base, guide, temperature, guidance, vocab)
    rows, columns = base.shape
    base = unit_columns(base)
    guide = None if guide is None else unit_columns(guide)
    (base_view, _), (guide_view, guides) = view(base), view(guide)
    asked = _RowKnobs(temperature, None, None, guidance)
    out = torch.empty(rows, columns, dtype=torch.float32, device=base.device)
    scratch = _scratch(base, vocab, False)
    error = _cuda.launchers.guided_logprobs(
        *(base_view, guide_view, guides, rows, vocab, columns, *asked.arguments, out.data_ptr()),
        *(scratch.data_ptr(), block_threads, *_cuda.target(base)),
    )
    _cuda.checked(error)
    return out


def _logprobs_double(
    base: torch.Tensor, guide: torch.Tensor | None, temperature: torch.Tensor, guidance: torch.Tensor, vocab: int
) -> torch.Tensor:
    """fp64 is a float softmax: the reference's own steps, with NaN for the rows that it would refuse."""
    with torch.no_grad():
        guides = guide[None] if guide is not None and guide.dim() == 2 else guide
        heat, strength = (spread(knob, base.shape[0], base.device).double() for knob in (temperature, guidance))
        heat = heat.unsqueeze(1)
        z = definition.combine(arguments.Logits(base, guides, vocab), strength)
        out = torch.log_softmax(z / heat, dim=-1)
        good = (heat > 0) & heat.isfinite() & strength.isfinite().all(-1, keepdim=True)
        good &= ~(z.isnan() | (z == math.inf)).any(-1, keepdim=True) & (z > -math.inf).any(-1, keepdim=True)
        return torch.where(good, out, math.nan)
