"""Preference pairs of one attribute, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prosocial_ext.reference import check

__all__ = ["IGNORED", "PreferencePair", "collate", "sequence_logprobs"]

IGNORED = -100  # the label that takes no part, as in transformers


@dataclass(frozen=True)
class PreferencePair:
    """One prompt and two responses as token ids; the responses end with EOS where they end."""

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]


def collate(pairs: Sequence[PreferencePair], pad_token_id: int) -> dict[str, Tensor]:
    """Return one right-padded batch [2 B, T]: the B chosen sequences, then the B rejected ones.

    ``labels`` are -100 outside the response, so that the prompt and the padding take no part.

    Raises:
        ValueError: no pairs, or an empty prompt or response.
    """
    if not pairs:
        check.fail("pairs", "hold at least one pair", "none")
    sequences = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    sequences += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.full((len(sequences), longest), pad_token_id)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(sequences):
        if not prompt or not response:
            check.fail(f"pairs[{row % len(pairs)}]", "have a prompt and two responses", "an empty one")
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        labels[row, len(prompt) : end] = torch.tensor(list(response))
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sequence_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log pi(response | prompt), summed over the response's tokens without length normalisation, fp32 [B].

    The reward of an autoregressive reward model (GenARM, ICLR 2025; PARM keeps it).

    Args:
        logits: [B, T, V]; position t predicts token t + 1.
        labels: [B, T], -100 where a token takes no part.
    """
    targets = labels[:, 1:]
    logprobs = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return -logprobs.sum(dim=1)
