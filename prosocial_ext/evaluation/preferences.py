"""How far the rewards of generated texts follow the preferences that they were generated under."""

from __future__ import annotations

from typing import Any

import torch

from prosocial_ext.reference import check

__all__ = ["mip", "preference_cosine"]


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
    p, r = _rows(preferences, rewards)
    return float((p * r).sum(dim=1).mean())


def preference_cosine(preferences: Any, rewards: Any, *, low: Any = 0.0, high: Any = 1.0) -> float:
    """Return the mean cosine of preferences and rewards: whether texts lean the way they were asked to.

    Unlike `mip` it does not grow with rewards that are high all over, only with their direction. A text without any
    reward has no direction and counts 0.

    Args:
        preferences: [n, k], a row per text, or [k] for all of them, none of them 0 throughout.
        rewards: [n, k] in the same order of attributes, n >= 1.
        low, high: the range of each attribute's rewards, a number or [k]; it is mapped to [0, 1], so that attributes
            of different scales weigh the same. Take both from a baseline, not from the texts that are compared.

    Returns:
        A number in [-1, 1]; 1 where every reward is proportional to its preference.

    Raises:
        ValueError: shapes that do not match, no rows, a value that is not finite, a preference of 0, or low >= high.

    >>> preference_cosine([1.0, 0.0], [[10.0, 0.0], [0.0, 5.0]], high=[10.0, 5.0])
    0.5
    """
    p, r = _rows(preferences, rewards)
    bottom, top = (check.double(end).to(r.device) for end in (low, high))
    for name, end in (("low", bottom), ("high", top)):
        if end.dim() and end.shape != r.shape[1:]:
            check.fail(name, f"be a number or have shape ({r.shape[1]},)", check.describe(end))
    if not bool((bottom < top).all() and (top - bottom).isfinite().all()):
        check.fail("high", "be finite and above low", f"low {bottom.tolist()} and high {top.tolist()}")
    norms = p.norm(dim=-1)
    if not bool((norms > 0).all()):
        check.fail("preferences", "weigh at least one attribute in every row", "a row of zeros")
    scaled = (r - bottom) / (top - bottom)
    lengths = scaled.norm(dim=1)
    cosines = (p * scaled).sum(dim=1) / (norms * torch.where(lengths > 0, lengths, 1.0))
    return float(cosines.mean())


def _rows(preferences: Any, rewards: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64, checked."""
    r = check.double(rewards)
    p = check.double(preferences).to(r.device)
    if r.dim() != 2 or r.numel() == 0:
        check.fail("rewards", "have shape [n, k] with n, k >= 1", check.describe(r))
    if p.shape not in (r.shape, r.shape[1:]):
        rule = f"have shape {tuple(r.shape)}, as rewards, or ({r.shape[1]},) for all rows"
        check.fail("preferences", rule, check.describe(p))
    for name, values in (("preferences", p), ("rewards", r)):
        if not bool(values.isfinite().all()):
            index = (~values.isfinite()).nonzero()[0].tolist()
            check.fail(f"{name}{index}", "be finite", values[tuple(index)].item(), "Leave failed rows out of both.")
    return p, r
