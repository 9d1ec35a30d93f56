"""How far the rewards of generated texts follow the preferences that they were generated under."""

from __future__ import annotations

from typing import Any

import torch

from prosocial_ext.reference import check

__all__ = ["mip"]


def mip(preferences: Any, rewards: Any) -> float:
    """Return the mean inner product of preferences and rewards, the mean over rows of sum_i p_i * r_i (PARM's MIP).

    Rewards of different scales must be normalised first, or the widest decides.

    Args:
        preferences: [n, k], a row per text, or [k] for all of them; a tensor or nested lists.
        rewards: [n, k] in the same order of attributes, n >= 1.

    Raises:
        ValueError: shapes that do not match, no rows, or a value that is not finite.

    >>> mip([[1.0, 0.0], [0.5, 0.5]], [[0.75, 0.25], [0.25, 0.75]])
    0.625
    """
    r = torch.as_tensor(rewards, dtype=torch.float64)
    p = torch.as_tensor(preferences, dtype=torch.float64, device=r.device)
    if r.dim() != 2 or r.numel() == 0:
        check.fail("rewards", "have shape [n, k] with n, k >= 1", check.describe(r))
    if p.shape not in (r.shape, r.shape[1:]):
        rule = f"have shape {tuple(r.shape)}, as rewards, or ({r.shape[1]},) for all rows"
        check.fail("preferences", rule, check.describe(p))
    for name, values in (("preferences", p), ("rewards", r)):
        if not bool(values.isfinite().all()):
            index = (~values.isfinite()).nonzero()[0].tolist()
            check.fail(f"{name}{index}", "be finite", values[tuple(index)].item(), "Leave failed rows out of both.")
    return float((p * r).sum(dim=1).mean())
