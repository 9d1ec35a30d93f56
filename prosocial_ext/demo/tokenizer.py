"""The demo's tokenizer: one token per word, as a tokenizer of transformers that is saved beside the models."""

from __future__ import annotations

import re
from dataclasses import astuple, is_dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prosocial_ext.demo import words

__all__ = ["build_tokenizer", "vocabulary"]

_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "sep_token": "<sep>", "eos_token": "<eos>"}


def vocabulary() -> list[str]:
    """Return the special tokens and then every word that the grammar can draw, sorted."""
    found: set[str] = set()
    for name in words.__all__:
        for text in _texts(getattr(words, name)):
            found.update(re.sub(r"\{\w+\}", " ", text).split())
    return [*_SPECIAL.values(), *sorted(found)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer. It writes a prompt as ``<bos> prompt <sep>``; a reply follows, closed by ``<eos>``.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer.decode(tokenizer("my dog died today").input_ids)
    '<bos> my dog died today <sep>'
    """
    tokens = vocabulary()
    # A word that the world lacks becomes padding: the model never sees it in training, so it carries nothing.
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos, sep = _SPECIAL["bos_token"], _SPECIAL["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {sep}", special_tokens=[(bos, tokens.index(bos)), (sep, tokens.index(sep))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **_SPECIAL,
        unk_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template="{{ bos_token }} {{ messages[-1]['content'] }} {{ sep_token }}",  # one turn is all it knows
    )


def _texts(value: Any) -> list[str]:
    """All strings in nested tuples, dicts and dataclasses but the names of attributes and categories."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, words.Aspect):
        value = (value.positive, value.negative)
    elif is_dataclass(value) and not isinstance(value, type):
        value = astuple(value)
    elif isinstance(value, dict):
        value = tuple(value.values())
    return [text for part in value for text in _texts(part)] if isinstance(value, tuple) else []
