"""What to answer, and how: prompts with a preference, strength and seed each, from arguments, text or JSON lines."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prosocial_ext.reference import check

__all__ = [
    "LARGEST", "Request", "parse_preference", "parse_requests", "read_file", "read_json_lines", "read_requests",
    "read_text_lines",
]  # fmt: skip

_KEYS = ("prompt", "messages", "preference", "guidance", "seed")
LARGEST = 3.4e38  # the models compute in float32


@dataclass(frozen=True)
class Request:
    """One prompt and what it asks for; None leaves a choice to the caller.

    Attributes:
        where: what errors call it, such as "line 3 of prompts.jsonl".
        prompt: a text, or None where ``messages`` are given.
        messages: a conversation for the tokenizer's chat template.
        preference: weights by attribute.
        guidance: the strength w = 1 / beta.
        seed: of this row alone, in [0, 2**63).
        extra: what else stood in the JSON object, such as an id.
    """

    where: str
    prompt: str | None
    messages: list[dict[str, Any]] | None = None
    preference: dict[str, float] | None = None
    guidance: float | None = None
    seed: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def parse_preference(text: str) -> dict[str, float]:
    """Return the weights that a text such as "empathy=0.7,truthfulness=0.3" writes.

    Raises:
        ValueError: no "name=number", a name twice, or a number that is not finite.

    >>> parse_preference("empathy=0.7, truthfulness=0.3")
    {'empathy': 0.7, 'truthfulness': 0.3}
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (name and equals and math.isfinite(weight)):
            remedy = "Write empathy=0.7,truthfulness=0.3."
            check.fail("preference", "be a list of attribute=number", repr(part.strip()), remedy)
        if name in weights:
            check.fail("preference", "name each attribute once", f"{name!r} twice")
        weights[name] = weight
    return weights


def read_requests(argument: str, path: str | Path) -> list[Request]:
    """Return the requests in a file: JSON lines if it ends in .jsonl, else one prompt per line.

    Args:
        argument: what errors call it.
        path: the file.

    Raises:
        ValueError, TypeError: it cannot be read, holds none, or as in `read_json_lines`.
    """
    return parse_requests(argument, read_file(argument, path), str(path), str(path).endswith(".jsonl"))


def read_file(argument: str, path: str | Path) -> bytes:
    """Return the bytes of a file that the user named.

    Args:
        argument: what errors call it.
        path: the file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{argument} must be a file that can be read, got {path}: {error.strerror}.") from error


def parse_requests(argument: str, data: bytes, source: str, json_lines: bool) -> list[Request]:
    """Return the requests in the bytes of a file.

    Args:
        argument: what errors call it.
        data: the bytes, UTF-8.
        source: where they are from.
        json_lines: one object per line, else one prompt.

    Raises:
        ValueError, TypeError: other bytes, no request, or as in `read_json_lines`.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"{source} with byte {error.start} that is not"
        raise ValueError(f"{argument} must be UTF-8, got {found}. Convert it.") from error
    requests = (read_json_lines if json_lines else read_text_lines)(text.split("\n"), source)
    if not requests:
        check.fail("the prompts", "be at least one", f"none that is not blank from {source}")
    return requests


def read_text_lines(lines: Iterable[str], source: str) -> list[Request]:
    """Return one request per line that is not blank.

    >>> read_text_lines(["how are you ?", ""], "hello.txt")[0].where
    'line 1 of hello.txt'
    """
    texts = ((f"line {number} of {source}", line.rstrip("\r\n")) for number, line in enumerate(lines, start=1))
    return [Request(where, text) for where, text in texts if text.strip()]


def read_json_lines(lines: Iterable[str], source: str) -> list[Request]:
    """Return one request per line that is not blank, each a JSON object.

    Keys: ``prompt`` (a text) or ``messages`` (a list of {"role", "content"}); ``preference`` (an object of numbers),
    ``guidance``, ``seed``, each of which may be missing or null. Other keys are kept in ``extra``.

    Raises:
        ValueError, TypeError: a line that is no such object, or a key that seems to be misspelt; the text names the
            line.

    >>> read_json_lines(['{"prompt": "hello", "seed": 7, "id": "a"}'], "in.jsonl")
    [Request(where='line 1 of in.jsonl', prompt='hello', ..., seed=7, extra={'id': 'a'})]
    """
    located = ((f"line {number} of {source}", line) for number, line in enumerate(lines, start=1))
    return [_from_json(where, line) for where, line in located if line.strip()]


def _from_json(where: str, line: str) -> Request:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        remedy = 'Write one object per line, such as {"prompt": "hello"}.'
        check.fail(where, "be a JSON object", f"a text with {error.msg!r} at column {error.colno}", remedy)
    if not isinstance(entry, dict):
        check.fail(where, "be a JSON object", f"{line.strip()[:40]!r}", 'Write it as {"prompt": "hello"}.')
    for key in entry.keys() - set(_KEYS):
        if meant := difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.85):
            check.fail(f"{where}: a key", f"be {meant[0]!r}, or nothing like it", repr(key), "Correct or rename it.")
    prompt, messages = entry.get("prompt"), entry.get("messages")
    if (prompt is None) == (messages is None):
        found = "both" if prompt is not None else "neither"
        check.fail(where, 'have either "prompt" or "messages"', found)
    if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
        check.fail(f"{where}: prompt", "be a text that is not blank", _shown(prompt))
    if messages is not None and not _is_conversation(messages):
        rule = 'be a list of {"role": ..., "content": ...}, at least one'
        check.fail(f"{where}: messages", rule, _shown(messages))
    guidance = entry.get("guidance")
    return Request(
        where=where,
        prompt=prompt,
        messages=messages,
        preference=_preference(where, entry.get("preference")),
        guidance=None if guidance is None else _number(f"{where}: guidance", guidance),
        seed=_seed(where, entry.get("seed")),
        extra={key: value for key, value in entry.items() if key not in _KEYS},
    )


def _is_conversation(messages: Any) -> bool:
    turns = isinstance(messages, list) and bool(messages)
    return turns and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in messages)


def _preference(where: str, value: Any) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        remedy = 'Write {"empathy": 0.7, "truthfulness": 0.3}.'
        check.fail(f"{where}: preference", "be an object of numbers by attribute", _shown(value), remedy)
    return {name: _number(f"{where}: preference[{name!r}]", number) for name, number in value.items()}


def _number(argument: str, value: Any) -> float:
    return float(check.number(argument, value, -LARGEST, LARGEST, "be a finite number"))


def _seed(where: str, value: Any) -> int | None:
    if value is None:
        return None
    return check.integer(f"{where}: seed", value, 0, 2**63 - 1, "be an integer in [0, 2**63)")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
