"""One causal language model that reads a batch token by token, with its cache: all that decoding knows of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from prosocial_ext.decoding.prompts import Prompts
from prosocial_ext.reference import check

__all__ = ["Stream", "base_alone", "evaluating", "head_width"]


@contextmanager
def evaluating(*models: torch.nn.Module | None) -> Iterator[None]:
    """Put the models into evaluation mode (no dropout), and every module back as it was at the end."""
    training = {module for model in models if model is not None for module in model.modules() if module.training}
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def base_alone(model: Any, arm: Any) -> AbstractContextManager[Any]:
    """Return a context in which ``model`` reads without ``arm``, which may be an adapter on its very weights."""
    shared = hasattr(arm, "disable_adapter") and any(module is model for module in arm.modules())
    return arm.disable_adapter() if shared else nullcontext()


def head_width(model: Any) -> int | None:
    """Return how many logits the model gives per position, None where it does not say."""
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if getattr(head, "weight", None) is not None:
        return int(head.weight.shape[0])
    width = getattr(getattr(model, "config", None), "vocab_size", None)
    return None if width is None else int(width)


def _accepted(model: Any) -> set[str]:
    """Which arguments the forward takes. A transformers model names them; a wrapper may pass them all on.

    The cache was ``past_key_values`` until transformers 5.24, and still is in models that bring their own code.
    """
    from transformers import GenerationMixin, PreTrainedModel

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(inner.forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {"position_ids", "logits_to_keep"}
    if not (passes_on and not isinstance(inner, PreTrainedModel)):
        named &= set(parameters)
    for source in (parameters, inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters):
        if cache := {"cache", "past_key_values"} & set(source):
            return named | cache
    return named | {"past_key_values"}


class Stream:
    """A model, its cache and what it has read.

    Args:
        model: a causal language model of transformers' calling convention, on any device.
        prompts: what it reads first.
        max_new_tokens: how many tokens may follow; mask and positions are made for all of them at once.
        name: "model" or "arm", for errors.

    Raises:
        ValueError: prompts outside the model's vocabulary, or longer than its positions.
    """

    def __init__(self, model: Any, prompts: Prompts, max_new_tokens: int, name: str) -> None:
        from transformers import DynamicCache

        config = getattr(model, "config", None)
        embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        vocab = getattr(embeddings, "num_embeddings", None)
        low, high = (int(extreme) for extreme in prompts.ids.aminmax())
        if low < 0 or (vocab is not None and high >= vocab):
            rule = f"hold token ids of the {name}, in [0, {vocab})"
            check.fail("prompts", rule, low if low < 0 else high, "Encode them with the model's own tokenizer.")
        longest, most = int(prompts.lengths.max()), getattr(config, "max_position_embeddings", None)
        if most is not None and longest + max_new_tokens - 1 > most:  # the last token is drawn, not read
            rule = f"fit the {most} positions of the {name} after a prompt of {longest} tokens"
            check.fail("max_new_tokens", rule, max_new_tokens, "Shorten the prompts or the answer.")
        self._model, self._name, self._taken = model, name, _accepted(model)
        self.device = embeddings.weight.device if embeddings is not None else next(model.parameters()).device
        self._cache = DynamicCache(config=config) if config is not None else DynamicCache()
        self._ids: torch.Tensor | None = prompts.ids.to(self.device)
        self._read = prompts.ids.shape[1]
        self._mask: torch.Tensor | None = None  # without padding the models need none, and build none
        mask = prompts.mask.to(self.device)
        if not bool(mask.all()):
            self._mask = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], dim=1).to(torch.int64)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        after = positions[:, -1:] + torch.arange(1, max_new_tokens + 1, device=self.device)
        self._positions = torch.cat([positions, after], dim=1)

    def next_logits(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Read the prompts, at later calls one more token per row [B], and return the next token's logits [B, V]."""
        first, end = (0, self._read) if tokens is None else (self._read, self._read + 1)
        ids = self._ids if tokens is None else tokens.to(self.device)[:, None]
        arguments: dict[str, Any] = {
            "position_ids": self._positions[:, first:end],
            "logits_to_keep": 1,
            "cache": self._cache,
            "past_key_values": self._cache,
        }
        logits = self._model(
            input_ids=ids,
            attention_mask=None if self._mask is None else self._mask[:, :end],
            use_cache=True,
            **{name: value for name, value in arguments.items() if name in self._taken},
        ).logits[:, -1]
        if tokens is None:
            self._ids = None
            if self._cache.get_seq_length() != end:
                rule = "fill the cache that it is given"
                remedy = "Switch gradient checkpointing off; models without a key-value cache cannot be decoded here."
                check.fail(self._name, rule, f"{self._cache.get_seq_length()} of {end} tokens", remedy)
        self._read = end
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, int64 [b]."""
        rows = rows.to(self.device)
        self._cache.batch_select_indices(rows)
        self._positions = self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]
