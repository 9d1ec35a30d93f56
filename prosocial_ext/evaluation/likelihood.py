"""How likely a model finds given responses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from prosocial_ext.decoding.stream import evaluating
from prosocial_ext.reference import check

__all__ = ["perplexity"]

IGNORED = -100  # transformers' and torch's label of a token that is not scored


def perplexity(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """Return exp of the mean negative log-likelihood per response token, over all tokens of all batches.

    Every token weighs the same, whatever batch it is in. Dropout is off, and the modes are restored.

    Args:
        model: a causal language model. A conditioned one is called inside its ``preference`` context by the caller.
        batches: mappings with ``input_ids`` [B, T]; ``labels`` [B, T], the ids again with -100 outside the response
            (so -100 at prompts and padding); ``attention_mask`` [B, T] where there is padding, on either side.

    Returns:
        A number >= 1; inf for a response that the model finds impossible.

    Raises:
        ValueError: a batch without the keys, labels of another shape, or no response token at all. A label in the
            first column cannot be predicted and counts as none.

    >>> from types import SimpleNamespace
    >>> class Uniform(torch.nn.Module):
    ...     def forward(self, input_ids, **_):
    ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))
    >>> ids = torch.tensor([[1, 7, 8, 9]])
    >>> round(perplexity(Uniform(), [{"input_ids": ids, "labels": torch.tensor([[-100, -100, 8, 9]])}]), 4)
    50.0
    """
    total, tokens = 0.0, 0
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), evaluating(model):
        for index, batch in enumerate(batches):
            for name in ("input_ids", "labels"):
                if name not in batch:
                    check.fail(f"batch {index}", "hold input_ids and labels", sorted(batch))
            ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
            if ids.dim() != 2 or labels.shape != ids.shape:
                rule = "hold input_ids [B, T] and labels of their shape"
                check.fail(f"batch {index}", rule, f"{tuple(ids.shape)} and {tuple(labels.shape)}")
            arguments = {}
            if (mask := batch.get("attention_mask")) is not None:
                mask = mask.to(device)
                arguments = {"attention_mask": mask, "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0)}
            logits = model(input_ids=ids, **arguments).logits
            scored = labels[:, 1:] != IGNORED
            # selected before the cast: an fp32 copy of [B, T, V] is often larger than the model
            kept = logits[:, :-1][scored].float()
            total += float(torch.nn.functional.cross_entropy(kept, labels[:, 1:][scored], reduction="sum").double())
            tokens += int(scored.sum())
    if tokens == 0:
        remedy = f"Labels repeat input_ids at the response and are {IGNORED} elsewhere."
        check.fail("batches", "hold at least one response token", "none", remedy)
    return math.exp(total / tokens) if total / tokens < 700 else math.inf
