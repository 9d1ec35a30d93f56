"""How likely a model, guided or not, finds given responses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from prosocial_ext.decoding.stream import base_alone, evaluating
from prosocial_ext.reference import check

__all__ = ["document_losses", "perplexity", "perplexity_of"]

IGNORED = -100  # transformers' and torch's label of a token that is not scored


def perplexity(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """Return exp of the mean negative log-likelihood per response token, over all tokens of all batches.

    Every token weighs the same, whatever batch it is in. Dropout is off, and the modes are restored.

    Args:
        model: a causal language model. A conditioned one is called inside its ``preference`` context by the caller.
        batches: as in `document_losses`.

    Returns:
        A number >= 1; inf for a response that the model finds impossible.

    Raises:
        ValueError: no response token at all, and as in `document_losses`.

    >>> from types import SimpleNamespace
    >>> class Uniform(torch.nn.Module):
    ...     def forward(self, input_ids, **_):
    ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))
    >>> ids = torch.tensor([[1, 7, 8, 9]])
    >>> round(perplexity(Uniform(), [{"input_ids": ids, "labels": torch.tensor([[-100, -100, 8, 9]])}]), 4)
    50.0
    """
    return perplexity_of(document_losses(model, batches))


def perplexity_of(losses: torch.Tensor) -> float:
    """Return the perplexity of documents whose losses are known, [n, 2] of `document_losses`.

    Raises:
        ValueError: no response token at all.

    >>> round(perplexity_of(torch.tensor([[2 * math.log(8.0), 2.0], [0.0, 4.0]])), 6)
    2.0
    """
    total, tokens = check.double(losses).sum(dim=0).tolist() if len(losses) else (0.0, 0.0)
    if tokens == 0:
        remedy = f"Labels repeat input_ids at the response and are {IGNORED} elsewhere."
        check.fail("batches", "hold at least one response token", "none", remedy)
    return math.exp(total / tokens) if total / tokens < 700 else math.inf


def document_losses(
    model: Any, batches: Iterable[Mapping[str, torch.Tensor]], *, arm: Any = None, guidance: float = 1.0
) -> torch.Tensor:
    """Return the negative log-likelihood and the number of tokens of every response, float64 [n, 2].

    Args:
        model: a causal language model.
        batches: mappings with ``input_ids`` [B, T]; ``labels`` [B, T], the ids again with -100 outside the response
            (so -100 at prompts and padding); ``attention_mask`` [B, T] where there is padding, on either side.
        arm: what guides it, or None: the likelihood is then that of softmax(model + guidance * arm), from which
            `GuidedGenerator` draws. A conditioned one is called inside its ``preference`` context by the caller.
        guidance: the strength w = 1 / beta; 0 is the model alone, and the arm is not run.

    Returns:
        A row per document, in their order: nats, tokens.

    Raises:
        ValueError: a batch without the keys, or labels of another shape. A label in the first column cannot be
            predicted and counts as none.
    """
    rows = [torch.zeros(0, 2, dtype=torch.float64, device="cpu")]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), evaluating(model, arm):
        for index, batch in enumerate(batches):
            for name in ("input_ids", "labels"):
                if name not in batch:
                    check.fail(f"batch {index}", "hold input_ids and labels", sorted(batch))
            ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
            if ids.dim() != 2 or labels.shape != ids.shape:
                rule = "hold input_ids [B, T] and labels of their shape"
                check.fail(f"batch {index}", rule, f"{tuple(ids.shape)} and {tuple(labels.shape)}")
            scored = labels[:, 1:] != IGNORED
            with base_alone(model, arm):
                kept = _scored_logits(model, ids, batch.get("attention_mask"), scored)
            if arm is not None and guidance != 0:
                guide = _scored_logits(arm, ids, batch.get("attention_mask"), scored).to(kept.device)
                width = min(kept.shape[1], guide.shape[1])  # heads may be padded, each to its own width
                kept = kept[:, :width] + guidance * guide[:, :width]
            losses = check.double(torch.nn.functional.cross_entropy(kept, labels[:, 1:][scored], reduction="none"))
            found = losses.new_zeros(len(ids), 2)
            found[:, 0].index_add_(0, scored.nonzero()[:, 0].to(losses.device), losses)
            found[:, 1] = check.double(scored.sum(dim=1))
            rows.append(found.cpu())
    return torch.cat(rows)


def _scored_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, scored: torch.Tensor) -> torch.Tensor:
    """The logits that predict the scored tokens, fp32 [tokens, V]."""
    arguments = {}
    if mask is not None:
        mask = mask.to(ids.device)
        arguments = {"attention_mask": mask, "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0)}
    logits = model(input_ids=ids, **arguments).logits
    # selected before the cast: an fp32 copy of [B, T, V] is often larger than the model
    return logits[:, :-1][scored].float()
