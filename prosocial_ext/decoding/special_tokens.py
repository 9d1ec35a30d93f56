"""Which tokens end a text, and what fills a row after its end."""

from __future__ import annotations

from typing import Any

from prosocial_ext.reference import check

__all__ = ["eos_ids", "pad_id", "padding_alone"]

_LAST = 2**63 - 1


def _configured(model: Any, name: str) -> Any:
    """The model's generation_config speaks first: chat models list all their end tokens there alone."""
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        if (value := getattr(source, name, None)) is not None:
            return value
    return None


def eos_ids(given: Any, model: Any, tokenizer: Any) -> list[int]:
    """Return every id that ends a text: ``given``, else the model's configuration, else the tokenizer's; may be empty.

    Raises:
        ValueError, TypeError: an id that is not an integer >= 0.

    >>> eos_ids([2, 3], None, None)
    [2, 3]
    """
    value = given if given is not None else _configured(model, "eos_token_id")
    if value is None:
        value = getattr(tokenizer, "eos_token_id", None)
    if value is None:
        return []
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    return [check.integer("eos_token_id", token, 0, _LAST, "be a token id >= 0, or a list of them") for token in listed]


def padding_alone(given: Any, model: Any, tokenizer: Any) -> int | None:
    """Return the padding id if it means nothing else (models often pad with EOS), else None."""
    value = _pad(given, model, tokenizer)
    others = {*eos_ids(None, model, tokenizer), getattr(tokenizer, "eos_token_id", None)}
    others |= {_configured(model, "bos_token_id"), getattr(tokenizer, "bos_token_id", None)}
    return None if value in others else value


def pad_id(given: Any, model: Any, tokenizer: Any, eos: list[int]) -> int:
    """Return what fills a row after its end: ``given``, else the configured padding, else the first EOS id, else 0.

    Raises:
        ValueError, TypeError: ``given`` is not an integer >= 0.
    """
    value = _pad(given, model, tokenizer)
    return value if value is not None else (eos[0] if eos else 0)


def _pad(given: Any, model: Any, tokenizer: Any) -> int | None:
    if given is not None:
        return check.integer("pad_token_id", given, 0, _LAST, "be a token id >= 0")
    value = getattr(tokenizer, "pad_token_id", None)
    return value if value is not None else _configured(model, "pad_token_id")
