"""The pairwise loss of an autoregressive reward model."""

from __future__ import annotations

import torch
from torch import Tensor

from prosocial_ext.reference import check

__all__ = ["pairwise_loss"]


def pairwise_loss(chosen: Tensor, rejected: Tensor, beta_r: float = 0.01, weight: Tensor | None = None) -> Tensor:
    """Return the mean of -log sigmoid(beta_r (log pi(chosen) - log pi(rejected))), a scalar.

    GenARM's and PARM's loss: DPO's without the reference model. ``beta_r`` 0.01 is the PARM default.

    Args:
        chosen: [B] summed log-probs of the preferred responses.
        rejected: [B] of the others.
        beta_r: > 0, scales the margin.
        weight: [B] factors of the pairs, such as each row's alpha of the attribute.

    >>> round(float(pairwise_loss(torch.zeros(2), torch.zeros(2))), 6)
    0.693147
    """
    if not beta_r > 0:
        check.fail("beta_r", "be > 0", beta_r)
    losses = -torch.nn.functional.logsigmoid(beta_r * (chosen - rejected))
    return (losses if weight is None else weight * losses).mean()
