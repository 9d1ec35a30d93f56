"""Tiny models with random weights, in float64: cached and uncached forwards then agree far below fp32 rounding."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 48
PAD, BOS, EOS = 0, 1, 2
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
ATTRIBUTES = ("empathy", "truthfulness", "helpfulness")


def config(family: str, vocab: int = VOCAB, **changes: Any) -> Any:
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        return GPT2Config(**{"vocab_size": vocab, **sizes, **IDS, **changes})
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "mistral":
        changes = {"sliding_window": 4, **changes}  # narrower than the prompts
    kind = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[family]
    return kind(
        **{"vocab_size": vocab, **sizes, "num_key_value_heads": 1, "max_position_embeddings": 64, **IDS, **changes}
    )


def model(family: str, seed: int = 0, vocab: int = VOCAB, **changes: Any) -> PreTrainedModel:
    """Weights of scale 1/2 make logits of a few nats, so that models and contexts differ in what they draw."""
    torch.manual_seed(seed)
    kinds = {
        "gpt2": GPT2LMHeadModel,
        "llama": LlamaForCausalLM,
        "mistral": MistralForCausalLM,
        "qwen2": Qwen2ForCausalLM,
    }
    built = kinds[family](config(family, vocab, **changes)).double()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    return built.eval()


def tokenizer(words: int = VOCAB - 4) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    vocabulary = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": 3} | {f"w{i}": 4 + i for i in range(words)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


class PreferenceArm(nn.Module):
    """A language model whose logits move by preference @ table: what a row was steered by can be read off its text."""

    def __init__(self, lm: nn.Module, seed: int = 7) -> None:
        super().__init__()
        self.lm, self.config = lm, lm.config
        table = torch.randn(len(ATTRIBUTES), lm.config.vocab_size, generator=torch.Generator().manual_seed(seed)) * 4
        self.register_buffer("table", table.double())
        self._weights: torch.Tensor | None = None
        self.entered = 0

    @contextmanager
    def preference(self, preference: Any) -> Iterator[None]:
        if isinstance(preference, Mapping):
            preference = torch.tensor([float(preference.get(name, 0.0)) for name in ATTRIBUTES])
        elif isinstance(preference, list):
            preference = torch.tensor([[float(row.get(name, 0.0)) for name in ATTRIBUTES] for row in preference])
        self._weights, self.entered = preference.double(), self.entered + 1
        try:
            yield
        finally:
            self._weights = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self._weights is not None, "the arm ran without a preference"
        output = self.lm(*args, **kwargs)
        assert self._weights.dim() == 1 or len(self._weights) == len(output.logits)
        shift = self._weights @ self.table
        output.logits = output.logits + (shift if shift.dim() == 1 else shift[:, None])
        return output
