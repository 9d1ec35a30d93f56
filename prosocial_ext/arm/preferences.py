"""Preferences over named attributes: never positional, since a wrong order goes unnoticed until the results are in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch

from prosocial_ext.reference import check

__all__ = ["ATTRIBUTES", "Preference", "as_matrix", "one_hot", "sample_dirichlet"]

ATTRIBUTES = ("empathy", "sensitivity", "non_judgmental", "truthfulness", "helpfulness")

Preference = Mapping[str, float] | Sequence[Mapping[str, float]] | torch.Tensor


def as_matrix(preference: Preference, attributes: Sequence[str]) -> torch.Tensor:
    """Return a preference as fp32 in the attributes' order: [k] for one, [B, k] for one per row.

    Args:
        preference: ``{"empathy": 0.6, "truthfulness": 0.4}`` (attributes left out weigh 0), a list of such dicts, one
            per row, or a tensor [k] or [B, k] already in order.
        attributes: the k names, in order.

    Raises:
        ValueError: an unknown attribute (the nearest name is given), a wrong shape, or a value that is not finite.
        TypeError: neither a mapping, a list of mappings nor a tensor.

    >>> as_matrix({"truthfulness": 1.0}, ["empathy", "truthfulness"])
    tensor([0., 1.])
    """
    k = len(attributes)
    if isinstance(preference, torch.Tensor):
        if preference.dim() not in (1, 2) or preference.shape[-1] != k:
            check.fail("preference", f"have shape [{k}] or [B, {k}]", check.describe(preference))
        matrix = preference.to(torch.float32)
    elif isinstance(preference, Mapping):
        matrix = torch.tensor(_row(preference, attributes))
    elif isinstance(preference, Sequence) and all(isinstance(row, Mapping) for row in preference):
        matrix = torch.tensor([_row(row, attributes) for row in preference]).reshape(len(preference), k)
    else:
        rule = "be a dict of attributes, a list of such dicts, or a tensor"
        check.fail("preference", rule, check.describe(preference), error=TypeError)
    if not bool(matrix.isfinite().all()):
        check.fail("preference", "be finite", "NaN or infinity")
    return matrix


def _row(preference: Mapping[str, float], attributes: Sequence[str]) -> list[float]:
    for name in preference:
        if name not in attributes:
            nearest = difflib.get_close_matches(str(name), attributes, n=1)
            remedy = f"Did you mean {nearest[0]!r}?" if nearest else ""
            check.fail("preference", "name attributes among " + ", ".join(attributes), repr(name), remedy)
    return [float(preference.get(name, 0.0)) for name in attributes]


def one_hot(attribute: str) -> dict[str, float]:
    """Return the preference for one attribute alone.

    >>> one_hot("empathy")
    {'empathy': 1.0}
    """
    return {attribute: 1.0}


def sample_dirichlet(n: int, k: int, concentration: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Return n preferences drawn from Dirichlet(concentration * ones), fp32 [n, k]; 0.5 is the PARM default.

    >>> preferences = sample_dirichlet(3, 5)
    >>> preferences.shape, torch.allclose(preferences.sum(dim=1), torch.ones(3))
    (torch.Size([3, 5]), True)
    """
    generator = torch.Generator().manual_seed(seed)
    gamma = torch._standard_gamma(torch.full((n, k), concentration, dtype=torch.float64), generator=generator)
    gamma = gamma.clamp(min=torch.finfo(torch.float64).tiny)
    return (gamma / gamma.sum(dim=1, keepdim=True)).to(torch.float32)
