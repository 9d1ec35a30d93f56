"""What users write today in torch: the peers that every benchmark times beside the ops."""

from __future__ import annotations

import torch

__all__ = ["gram_coefficients", "kthvalue_subtract_", "pairwise_pcgrad", "sampling_chain"]


def sampling_chain(
    base: torch.Tensor, guide: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """Combine, filter in transformers' order, softmax, multinomial: [B, V] logits to int64 [B]."""
    scores = base.float() + guide.float()
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        scores = scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    if min_p:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def kthvalue_subtract_(params: torch.Tensor, base: torch.Tensor, tuned: torch.Tensor, m: int, scale: float) -> None:
    """Threshold by kthvalue, mask, subtract; keeps more than m entries where ties meet the threshold."""
    delta = tuned.float() - base.float()
    threshold = delta.abs().flatten().kthvalue(delta.numel() - m + 1).values
    params.sub_(torch.where(delta.abs() >= threshold, delta * scale, 0).to(params.dtype))


def pairwise_pcgrad(gradients: torch.Tensor) -> torch.Tensor:
    """PCGrad as it is usually written: k (k - 1) dot products and updates over whole gradients [k, N]."""
    projected = gradients.clone()
    for i, v in enumerate(projected):
        for j in range(len(gradients)):
            if i != j and (dot := torch.dot(v, gradients[j])) < 0:
                v.sub_(gradients[j] * (dot / torch.dot(gradients[j], gradients[j])))
    return projected.sum(0)


def gram_coefficients(gram: torch.Tensor) -> torch.Tensor:
    """PCGrad in ascending order without a look at a value: from the Gram matrix the coefficients of the gradients.

    ``gram_coefficients(gradients @ gradients.T) @ gradients`` is all of it.
    """
    projected = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)  # row i: objective i, in gradients
    for j in range(len(gram)):
        step = (projected @ gram[j] / gram[j, j]).clamp(max=0)
        step[j] = 0  # none with itself
        projected[:, j] -= step
    return projected.sum(0)
