"""Statistics of gradient surgery from a Gram matrix and projection coefficients, on any device."""

from __future__ import annotations

import torch

from prosocial_ext.reference.projection import Form, make_stats

__all__ = ["stats"]


def stats(
    form: Form, gram: torch.Tensor, projected: torch.Tensor, weights: torch.Tensor | None, finite: torch.Tensor
) -> list[torch.Tensor]:
    """Return the fields of `ProjectionStats` in order.

    ``gram`` [groups, k, k]; ``projected`` [groups, k, k], row i the coefficients of projected gradient i; ``weights``
    [groups, k]; ``finite`` [groups].
    """
    norms = gram.diagonal(dim1=-2, dim2=-1)
    # An objective that takes no part can be non-finite; 0 * NaN must not carry it into the others' dots.
    bad = ~norms.isfinite()
    bad_pair = bad[:, :, None] | bad[:, None, :]
    dots = projected @ torch.where(bad_pair, 0, gram)
    norms_after = torch.where(bad, norms, (projected * dots).sum(-1))
    dots = torch.where(bad_pair, torch.nan, dots)
    active = None if weights is None else weights != 0
    return list(vars(make_stats(form, gram, dots, norms_after, active, finite)).values())
