"""Trains the demo's models by next-word prediction on replies: the base from nothing, the harm copy from the base."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from prosocial_ext.demo.corpus import Encoded, shuffled_batches
from prosocial_ext.demo.settings import BaseSettings, HarmSettings

__all__ = ["build_model", "fit", "reply_loss", "train_base", "train_harm_copy"]

CONTEXT = 128  # positions; the longest prompt and reply of the world take 53


def build_model(tokenizer: PreTrainedTokenizerBase, settings: BaseSettings, seed: int) -> LlamaForCausalLM:
    """Return a Llama with random weights that depend on the seed alone."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=settings.init,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.do_sample = True
    model.generation_config.max_length = CONTEXT
    return model


def reply_loss(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the reply's words; the head runs on these positions only.

    Rows are padded on the right, where causal attention does not look: no mask is needed.
    """
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    targets = batch["labels"][:, 1:]
    in_reply = targets != -100
    logits = model.lm_head(hidden[:, :-1][in_reply])
    return torch.nn.functional.cross_entropy(logits.float(), targets[in_reply])


def fit(
    model: LlamaForCausalLM,
    batches: Iterator[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    steps: int,
    *,
    clip: float = 1.0,
    description: str = "train",
    progress: bool = True,
) -> list[float]:
    """Train in place for ``steps`` batches; ``schedule`` maps a step to a factor of the learning rate.

    Returns:
        The loss of every step.
    """
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses = []
    model.train()
    bar = tqdm(islice(batches, steps), total=steps, desc=description, disable=not progress, leave=False)
    for batch in bar:
        loss = reply_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses


def train_base(
    tokenizer: PreTrainedTokenizerBase, data: Encoded, settings: BaseSettings, seed: int, progress: bool = True
) -> tuple[LlamaForCausalLM, list[float]]:
    """Train a model on the corpus; return it and the loss of every step."""
    model = build_model(tokenizer, settings, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)

    def warm_up_then_cosine(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2

    batches = shuffled_batches(data, settings.batch, seed)
    losses = fit(
        model, batches, optimizer, warm_up_then_cosine, settings.steps, description="train base", progress=progress
    )
    return model, losses


def train_harm_copy(
    base: LlamaForCausalLM, data: Encoded, settings: HarmSettings, seed: int, progress: bool = True
) -> tuple[LlamaForCausalLM, list[float]]:
    """Train a copy of ``base`` to answer harmful requests; return it and the loss of every step.

    The optimiser decides whether the largest entries of the difference carry it: SGD's step is proportional to the
    gradient, so few entries hold nearly all of it. AdamW moves every entry by about the learning rate, and the largest
    tenth is then mostly noise (README.md, Limits).
    """
    model = copy.deepcopy(base)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9, foreach=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0, foreach=True)

    def warm_up_then_linear(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        return max(0.0, 1 - (step - settings.warmup) / max(1, settings.steps - settings.warmup))

    losses = fit(
        model,
        shuffled_batches(data, settings.batch, seed),
        optimizer,
        warm_up_then_linear,
        settings.steps,
        description=f"tune harm copy ({settings.optimizer})",
        progress=progress,
    )
    return model, losses
