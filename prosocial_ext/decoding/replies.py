"""Replies to requests, batch by batch: what lies between the user's prompts and `GuidedGenerator`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from prosocial_ext.decoding.generator import GuidedGenerator
from prosocial_ext.decoding.prompts import read_prompts
from prosocial_ext.decoding.requests import LARGEST, Request
from prosocial_ext.decoding.seeds import row_seeds
from prosocial_ext.decoding.special_tokens import eos_ids
from prosocial_ext.reference import check

__all__ = ["Reply", "Row", "Sampling", "draw_replies", "encode_rows", "reply_limit", "settle", "unknown_words"]

_UNKNOWN_SHOWN = 10


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; the fields are those of `GuidedGenerator.generate`, checked.

    ``max_new_tokens`` None leaves the choice to `reply_limit`. ``batch_size``: prompts at a time.

    Raises:
        ValueError, TypeError: a number out of range; the text names the field.

    >>> Sampling(temperature=0.0, batch_size=0)
    Traceback (most recent call last):
    ...
    ValueError: batch_size must be a count >= 1, got 0.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        check.number("temperature", self.temperature, 0.0, LARGEST, "be a number >= 0", "0 is greedy.")
        check.integer("top_k", self.top_k, 0, 2**31, "be a count >= 0", "0 keeps all tokens.")
        check.number("top_p", self.top_p, 0.0, 1.0, "be in (0, 1]", "1 keeps all tokens.")
        if self.top_p == 0:
            check.fail("top_p", "be in (0, 1]", self.top_p, "1 keeps all tokens.")
        check.number("min_p", self.min_p, 0.0, 1.0, "be in [0, 1]", "0 keeps all tokens.")
        if self.max_new_tokens is not None:
            check.integer("max_new_tokens", self.max_new_tokens, 1, 2**31, "be a count >= 1")
        check.integer("batch_size", self.batch_size, 1, 2**31, "be a count >= 1")


@dataclass
class Row:
    """A request with its preference, guidance and seed settled, and its prompt as the model reads it.

    ``text`` and ``ids`` are empty until `encode_rows`.
    """

    request: Request
    preference: dict[str, float] | None
    guidance: float
    seed: int
    text: str = ""
    ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Reply:
    """What was drawn for a row.

    ``tokens``: with the EOS that ended it. ``finish_reason``: "stop" where the model ended it, else "length".
    ``logprobs``: each token's, where asked for.
    """

    row: Row
    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None = None


def settle(
    requests: Sequence[Request],
    *,
    seed: int,
    preference: Mapping[str, float] | None = None,
    guidance: float = 1.0,
    alone: bool = False,
) -> list[Row]:
    """Return a row per request, with its own preference, guidance and seed, else those given.

    Args:
        requests: what was asked.
        seed: in [0, 2**63), from which `row_seeds` derives those of rows without one.
        preference: of rows without one.
        guidance: of rows without one; 0 drops the preference, which nothing would read.
        alone: the base alone, whatever the rows ask for.

    >>> settle([Request("here", "hello", seed=7)], seed=0, alone=True)[0].guidance
    0.0
    """
    rows = []
    for request, derived in zip(requests, row_seeds(seed, len(requests)).tolist(), strict=True):
        strength = 0.0 if alone else guidance if request.guidance is None else request.guidance
        wanted = preference if request.preference is None else request.preference
        rows.append(
            Row(
                request,
                None if strength == 0 or wanted is None else dict(wanted),
                strength,
                derived if request.seed is None else request.seed,
            )
        )
    return rows


def encode_rows(rows: Sequence[Row], tokenizer: Any, attributes: Sequence[str] | None = None) -> None:
    """Fill in every row's text and token ids; a conversation is rendered by the chat template.

    Args:
        rows: of `settle`.
        tokenizer: the model's.
        attributes: of a PBLoRA arm, against which the preferences of guided rows are checked; None: the arm takes none.

    Raises:
        ValueError: a conversation that the tokenizer cannot render, or a preference that is missing or does not fit.
    """
    for row in rows:
        if row.guidance != 0:
            _check_preference(row, attributes)
        row.text = _render(row.request, tokenizer)
        row.ids = read_prompts(row.text, None, tokenizer, None).ids[0].tolist()


def unknown_words(rows: Sequence[Row], tokenizer: Any) -> str | None:
    """Return a warning that lists the words that the tokenizer reads as its unknown token; None if there are none."""
    unknown = tokenizer.unk_token_id
    found: dict[str, str] = {}  # each with its first place
    for row in rows:
        if unknown is not None and unknown in row.ids:
            for word in row.text.split():
                if unknown in tokenizer(word, add_special_tokens=False).input_ids:
                    found.setdefault(word, row.request.where)
    if not found:
        return None
    shown = ", ".join(f"{word!r} ({where})" for word, where in list(found.items())[:_UNKNOWN_SHOWN])
    rest = f" and {len(found) - _UNKNOWN_SHOWN} more" if len(found) > _UNKNOWN_SHOWN else ""
    return f"the tokenizer does not know, and reads as {tokenizer.unk_token}: {shown}{rest}"


def reply_limit(rows: Sequence[Row], generator: GuidedGenerator, given: int | None, default: int = 128) -> int:
    """Return the most tokens of a reply: those given, else the default or half of a model's positions.

    The default depends on the models alone: a row must not depend on the others' prompts.

    Raises:
        ValueError: the longest prompt leaves no room for it; the generator would say so too, but only at its turn.
    """
    models = {"model": generator.model, "arm": generator.arm}
    configs = {name: getattr(model, "config", None) for name, model in models.items()}
    positions = {name: getattr(config, "max_position_embeddings", None) or 2**31 for name, config in configs.items()}
    limit = given if given is not None else min(default, *(most // 2 for most in positions.values()))
    longest = max(rows, key=lambda row: len(row.ids))
    for name, most in positions.items():
        if len(longest.ids) + limit - 1 > most:
            where = f"the {len(longest.ids)} tokens of {longest.request.where}"
            rule = f"fit the {most} positions of the {name} after {where}"
            check.fail("max_new_tokens", rule, limit, "Shorten the prompt or the reply.")
    return limit


def draw_replies(
    generator: GuidedGenerator, rows: Sequence[Row], limit: int, sampling: Sampling, *, logprobs: bool = False
) -> Iterator[list[Reply]]:
    """Yield the replies to the rows, in their order, a batch at a time.

    Args:
        generator: the models.
        rows: encoded.
        limit: of `reply_limit`.
        sampling: how.
        logprobs: also keep each token's log-prob.

    Raises:
        ValueError: a model that gives NaN or keeps no cache; the text names the batch's first row.
    """
    ends = set(eos_ids(None, generator.model, generator.tokenizer))
    conditioned = hasattr(generator.arm, "preference")
    for start in range(0, len(rows), sampling.batch_size):
        batch = rows[start : start + sampling.batch_size]
        try:
            output = generator.generate(
                [row.ids for row in batch],
                preference=[row.preference or {} for row in batch] if conditioned else None,
                guidance=torch.tensor([row.guidance for row in batch]),
                seed=torch.tensor([row.seed for row in batch]),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                max_new_tokens=limit,
                return_logprobs=logprobs,
            )
        except ValueError as error:
            raise ValueError(f"the batch from {batch[0].request.where} on: {error}") from error
        assert output.texts is not None  # the generator has a tokenizer
        replies = []
        for i, row in enumerate(batch):
            length = int(output.lengths[i])
            tokens = output.sequences[i, :length].tolist()
            kept = None if output.logprobs is None else output.logprobs[i, :length].tolist()
            replies.append(Reply(row, output.texts[i], tokens, "stop" if tokens[-1] in ends else "length", kept))
        yield replies


def _check_preference(row: Row, attributes: Sequence[str] | None) -> None:
    from prosocial_ext.arm import as_matrix

    where = row.request.where
    if attributes is None:
        if row.preference is not None:
            remedy = "The arm takes none: it is no PBLoRA adapter."
            check.fail("preference", f"be left out, for {where} too", row.preference, remedy)
    elif row.preference is None:
        raise ValueError(f"preference must be given for {where}. The arm's attributes are {', '.join(attributes)}.")
    else:
        try:
            as_matrix(row.preference, attributes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _render(request: Request, tokenizer: Any) -> str:
    if request.prompt is not None:
        return request.prompt
    if not tokenizer.chat_template:
        rule = "have a prompt, since the model's tokenizer has no chat template"
        check.fail(request.where, rule, "messages", "Write the prompt as text, as the model was trained to read it.")
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{request.where}: messages must suit the chat template, which says: {error}.") from error
