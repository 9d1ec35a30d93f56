"""Harmful prompts and responses from a file of JSON lines, as the token ids that a model reads and is asked for."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.safetensors_header import parse_json

__all__ = ["IGNORED", "EncodedPair", "encode_pairs", "right_padded"]

IGNORED = -100  # the label of a token that is not asked for, as in transformers
_MOST_BYTES = 1 << 28  # some dozens of pairs are enough


@dataclass(frozen=True)
class EncodedPair:
    """One pair as token ids. ``cut``: tokens of the response that were beyond the length allowed."""

    prompt: Sequence[int]
    response: Sequence[int]
    cut: int = 0


def encode_pairs(
    path: str | Path, tokenizer: Any, max_length: int, *, chat: bool = False, argument: str = "pairs"
) -> list[EncodedPair]:
    """Read a file with one JSON object per line and tokenise it.

    A line is ``{"prompt": ..., "response": ...}``, text that is taken as it is and closed by the tokenizer's EOS, or
    ``{"messages": [..., {"role": "assistant", "content": ...}]}``, which the chat template renders; the response is
    what the template writes from the last message's beginning on. Other keys are not looked at.

    The BOS token comes once, from the template or from the tokenizer. Prompt and response are tokenised together, and
    a token that holds letters of both belongs to the response; where the tokenizer closes the prompt with a token of
    its own, they are tokenised one after the other, as when a reply is generated.

    Args:
        path: The file, UTF-8.
        tokenizer: Of transformers.
        max_length: Tokens per pair; the response's end is cut.
        chat: Read prompt and response as a user's and the assistant's message.
        argument: What errors call the file.

    Raises:
        CheckpointError: A line of another form, a prompt that leaves no room, an empty file; the text names the line.
    """
    place = Path(path)
    if not place.is_file() or place.stat().st_size > _MOST_BYTES:
        refuse(argument, f"be a file of JSON lines, up to {_MOST_BYTES} bytes", str(path))
    pairs = []
    for number, line in enumerate(place.read_bytes().removeprefix(BOM_UTF8).splitlines(), start=1):
        if line.strip():
            where = f"line {number} of {path}"
            encoded = _encode(parse_json(line, where, floats=True), where, tokenizer, chat)
            pairs.append(_fitted(*encoded, max_length, where))
    if not pairs:
        refuse(argument, "hold at least one pair", f"none in {path}")
    return pairs


def right_padded(pairs: Sequence[EncodedPair], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Return one batch: ``input_ids``, ``attention_mask`` and ``labels``, int64 [B, T].

    >>> right_padded([EncodedPair([1, 2], [3]), EncodedPair([1], [4])])["labels"]
    tensor([[-100, -100,    3],
            [-100,    4, -100]])
    """
    longest = max(len(pair.prompt) + len(pair.response) for pair in pairs)
    ids = torch.full((len(pairs), longest), pad_token_id, device="cpu")
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, pair in enumerate(pairs):
        begin, end = len(pair.prompt), len(pair.prompt) + len(pair.response)
        ids[row, :end] = torch.tensor([*pair.prompt, *pair.response], device="cpu")
        labels[row, begin:end] = ids[row, begin:end]
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _encode(row: Mapping[str, Any], where: str, tokenizer: Any, chat: bool) -> tuple[list[int], list[int]]:
    if "messages" in row:
        return _split(*_rendered(row["messages"], where, tokenizer), tokenizer)
    prompt, response = row.get("prompt"), row.get("response")
    if not isinstance(prompt, str) or not isinstance(response, str) or not response:
        rule = "hold the texts prompt and response, or messages"
        refuse(where, rule, shown(dict(row)), "The response may not be empty.")
    if chat:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return _split(*_rendered(messages, where, tokenizer), tokenizer)
    before, after = _split(prompt, response, tokenizer)
    end = tokenizer.eos_token_id
    return before, after if end is None or after[-1:] == [end] else [*after, end]


def _rendered(messages: Any, where: str, tokenizer: Any) -> tuple[str, str]:
    """The prompt and the response that the chat template makes of messages."""
    fits = isinstance(messages, list) and len(messages) > 1 and all(isinstance(message, dict) for message in messages)
    if not fits or messages[-1].get("role") != "assistant":
        refuse(f"messages in {where}", "be two or more, the last one by the assistant", shown(messages))
    if not tokenizer.chat_template:
        refuse(where, "hold prompt and response where the tokenizer has no chat template", "messages")
    from jinja2 import TemplateError

    try:
        prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        refuse(f"messages in {where}", "suit the chat template", str(error))
    if not whole.startswith(prompt) or whole == prompt:
        remedy = "Write such pairs as prompt and response, rendered."
        refuse(f"the chat template at {where}", "begin the whole with the prompt alone", "another beginning", remedy)
    return prompt, whole[len(prompt) :]


def _split(prompt: str, response: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    from prosocial_ext.decoding.prompts import read_prompts

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before, alone = read_prompts([prompt], None, tokenizer, None).ids[0].tolist(), plain(prompt)
    lead = len(before) - len(alone)
    if before[lead:] != alone:  # closed by a token, so nothing can straddle the border
        return before, plain(response)
    both, shared = plain(prompt + response), 0
    while shared < min(len(alone), len(both)) and alone[shared] == both[shared]:
        shared += 1
    return [*before[:lead], *alone[:shared]], both[shared:]


def _fitted(prompt: list[int], response: list[int], max_length: int, where: str) -> EncodedPair:
    room = max_length - len(prompt)
    if room < 1:
        remedy = "Raise the length, or leave the pair out."
        refuse(f"the prompt in {where}", f"leave room for a response in {max_length} tokens", len(prompt), remedy)
    return EncodedPair(prompt, response[:room], max(0, len(response) - room))
