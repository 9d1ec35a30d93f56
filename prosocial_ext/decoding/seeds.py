"""A seed per row, so that what a row draws depends on its own seed and step alone."""

from __future__ import annotations

import torch

from prosocial_ext.reference import check
from prosocial_ext.reference.philox import uniform_u64

__all__ = ["row_seeds", "sample_seeds"]


def row_seeds(seed: int, rows: int) -> torch.Tensor:
    """Return the seeds that ``GuidedGenerator.generate(..., seed=seed)`` gives to its rows, int64 [rows].

    Row i's seed is the top 63 bits of the Philox word of key ``seed`` and counter (0, i). To draw some rows of a batch
    again on their own, pass their part of this tensor as ``seed``.

    Args:
        seed: the seed of the batch, in [0, 2**63).
        rows: how many rows, >= 0.

    Raises:
        ValueError, TypeError: ``seed`` or ``rows`` is not an integer of that range.

    >>> row_seeds(0, 2).tolist() == row_seeds(0, 3)[:2].tolist()
    True
    """
    check.integer("seed", seed, 0, 2**63 - 1, "be an integer in [0, 2**63), or an int64 tensor [B]")
    check.integer("rows", rows, 0, 2**63 - 1, "be a count >= 0")
    return torch.tensor([uniform_u64(seed, 0, row) >> 1 for row in range(rows)], dtype=torch.int64)


def sample_seeds(seed: int, samples: int) -> list[int]:
    """Return the seeds of several draws for one row: its own for the first, then one derived from it for each.

    Args:
        seed: the row's, in [0, 2**63).
        samples: how many, >= 1.

    >>> sample_seeds(7, 1), sample_seeds(7, 3)[:2] == sample_seeds(7, 2)
    ([7], True)
    """
    check.integer("seed", seed, 0, 2**63 - 1, "be an integer in [0, 2**63)")
    check.integer("samples", samples, 1, 2**63 - 1, "be a count >= 1")
    return [seed, *(uniform_u64(seed, sample, 0) >> 1 for sample in range(1, samples))]
