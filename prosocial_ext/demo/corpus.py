"""Examples as tensors: encoding, padding, and batches in a seeded order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prosocial_ext.demo.grammar import Example

__all__ = ["Encoded", "encode", "shuffled_batches"]


@dataclass(frozen=True)
class Encoded:
    """Examples as ``<bos> prompt <sep> reply <eos>``, padded on the right.

    ``input_ids``: int64 [N, T]. ``labels``: int64 [N, T], input_ids in the reply, else -100. ``lengths``: int64 [N].
    """

    input_ids: Tensor
    labels: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """The rows as input_ids, attention_mask and labels, no longer than their longest."""
        width = int(self.lengths[rows].max())
        mask = torch.arange(width) < self.lengths[rows, None]
        return {
            "input_ids": self.input_ids[rows, :width],
            "attention_mask": mask.long(),
            "labels": self.labels[rows, :width],
        }

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """All rows in order, ``size`` at a time."""
        return [self.batch(rows) for rows in torch.arange(len(self)).split(size)]


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Encoded:
    """Encode examples, the loss falling on the reply only."""
    prompts = tokenizer([example.prompt for example in examples]).input_ids
    replies = tokenizer([example.reply for example in examples], add_special_tokens=False).input_ids
    lengths = torch.tensor([len(p) + len(r) + 1 for p, r in zip(prompts, replies, strict=True)])
    input_ids = torch.full((len(examples), int(lengths.max())), tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, -100)
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        row = torch.tensor([*prompt, *reply, tokenizer.eos_token_id])
        input_ids[i, : len(row)] = row
        labels[i, len(prompt) : len(row)] = row[len(prompt) :]
    return Encoded(input_ids, labels, lengths)


def shuffled_batches(data: Encoded, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches for ever, every epoch in a new order; the seed decides all orders."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data), generator=generator).split(min(size, len(data))):
            if len(rows) == min(size, len(data)):
                yield data.batch(rows)
