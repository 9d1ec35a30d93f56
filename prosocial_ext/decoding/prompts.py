"""Prompts of any accepted form as one left-padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from prosocial_ext.reference import check

__all__ = ["Prompts", "read_prompts"]

_FORMS = "be a list of strings, a list of lists of token ids, or an integer tensor [B, S]"
_LEFT = "Prompts are padded on the left (tokenizer.padding_side = 'left'): the next token follows the last column."


class Prompts(NamedTuple):
    """``ids`` int64 [B, S], 0 at padding, and ``mask`` bool [B, S]: False on the left, True from the prompt on."""

    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens per prompt, int64 [B]."""
        return self.mask.sum(dim=1)


def read_prompts(prompts: Any, attention_mask: Any, tokenizer: Any, pad_token_id: int | None) -> Prompts:
    """Return the prompts as a left-padded batch.

    Args:
        prompts: a string or strings (encoded by ``tokenizer``, which adds its special tokens unless the text already
            begins with its BOS token, as a chat template's does), lists of token ids, or a tensor [B, S].
        attention_mask: [B, S] for a tensor that holds padding, 1 or True at prompt tokens; None where nothing is
            padding.
        tokenizer: needed for strings.
        pad_token_id: an id that is nothing but padding, to find a tensor whose mask was forgotten; None where there is
            none.

    Raises:
        TypeError: prompts of another form, or strings without a tokenizer.
        ValueError: no rows, an empty prompt, padding on the right or without a mask; the text names the row.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, torch.Tensor):
        return _from_tensor(prompts, attention_mask, pad_token_id)
    if attention_mask is not None:
        remedy = "Lists are padded here and need no mask."
        check.fail("attention_mask", "come with a tensor of input_ids", check.describe(prompts), remedy)
    if not isinstance(prompts, Sequence):
        check.fail("prompts", _FORMS, check.describe(prompts), error=TypeError)
    rows = [_encode(prompt, row, tokenizer) for row, prompt in enumerate(prompts)]
    if not rows:
        check.fail("prompts", "hold at least one prompt", "none")
    for row, ids in enumerate(rows):
        if not ids:
            check.fail(f"prompt {row}", "have at least one token", "none", "Begin it with the model's BOS token.")
    lengths = torch.tensor([len(ids) for ids in rows])
    mask = torch.arange(int(lengths.max())) >= (lengths.max() - lengths)[:, None]
    padded = torch.zeros(mask.shape, dtype=torch.int64)
    padded[mask] = torch.tensor([token for ids in rows for token in ids])
    return Prompts(padded, mask)


def _encode(prompt: Any, row: int, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            remedy = "Pass tokenizer= to GuidedGenerator, or token ids."
            check.fail(f"prompt {row}", "be token ids without a tokenizer", check.describe(prompt), remedy, TypeError)
        begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        return list(tokenizer(prompt, add_special_tokens=not begun)["input_ids"])
    if isinstance(prompt, torch.Tensor) and prompt.dim() == 1:
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or not all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
        check.fail(f"prompt {row}", "be a string or a list of token ids", check.describe(prompt), error=TypeError)
    return list(prompt)


def _from_tensor(ids: torch.Tensor, attention_mask: Any, pad_token_id: int | None) -> Prompts:
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        check.fail("prompts", _FORMS + " with B, S >= 1", check.describe(ids))
    ids = ids.to(torch.int64)
    if attention_mask is None:
        if pad_token_id is not None and bool((padding := (ids[:, [0, -1]] == pad_token_id).any(dim=1)).any()):
            row = int(padding.nonzero()[0])
            remedy = f"Pass attention_mask= (prompt {row} has token {pad_token_id}, the padding, at an end)."
            check.fail("attention_mask", "be given with padded input_ids", None, remedy)
        return Prompts(ids, torch.ones_like(ids, dtype=torch.bool))
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != ids.shape:
        rule = f"be a tensor of shape {tuple(ids.shape)}, as input_ids"
        check.fail("attention_mask", rule, check.describe(attention_mask))
    mask = attention_mask.to(ids.device) != 0
    wrong = (mask[:, :-1] & ~mask[:, 1:]).any(dim=1) | ~mask[:, -1]
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        check.fail(f"attention_mask[{row}]", "be zeros, then ones to the last column", mask[row].int().tolist(), _LEFT)
    return Prompts(torch.where(mask, ids, 0), mask)
