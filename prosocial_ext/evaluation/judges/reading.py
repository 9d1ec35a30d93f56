"""How a judge that is a model reads a prompt and its response: in which form, and what is cut where it is too long."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prosocial_ext.reference import check

__all__ = ["FORMS", "Reading", "default_length"]

FORMS = ("response", "pair", "template", "chat", "conversation")
_SIDES = ("right", "left")
_SLOT = re.compile(r"\{(prompt|response)\}")
_LONGEST = 4096  # tokens, unless asked otherwise: what a batch may cost should not depend on a model's boast

_OFFSET = ("roberta", "camembert", "longformer", "mpnet")  # whose positions begin after that of padding


def default_length(tokenizer: Any, config: Any) -> int:
    """Return the most tokens that a judge reads unless told: all that it can, up to 4096."""
    positions = getattr(config, "max_position_embeddings", None) or _LONGEST
    if any(name in config.model_type for name in _OFFSET):
        positions -= config.pad_token_id + 1
    return int(min(_LONGEST, positions, tokenizer.model_max_length))


@dataclass(frozen=True)
class Reading:
    """The form of what a judge reads.

    Args:
        tokenizer: the judge's.
        reads: "response" alone; "pair", the tokenizer's own form of two texts; "template", a text with {prompt} and
            {response} in it; "chat", that text as a user's message in the judge's chat template; "conversation", the
            pair as user and assistant in it.
        template: for "template" and "chat" alone.
        max_length: tokens in all, special ones included.
        truncation: the end at which a response that is too long loses text: "right" or "left". Prompt and template are
            never cut, or the question would be lost.
        answers: whether the judge is to answer: the chat template then opens its turn.
        closing: text after all that, such as what comes before the answer.

    Raises:
        ValueError: a form or side that is none, a template that is missing, too much or without {response}, or no chat
            template where one is needed.
    """

    tokenizer: Any
    reads: str
    template: str | None
    max_length: int
    truncation: str = "right"
    answers: bool = False
    closing: str = ""

    def __post_init__(self) -> None:
        check.choice("reads", self.reads, FORMS)
        check.choice("truncation", self.truncation, _SIDES)
        check.integer("max_length", self.max_length, 1, 2**31, "be a count >= 1")
        templated = self.reads in ("template", "chat")
        if templated and not (isinstance(self.template, str) and "{response}" in self.template):
            remedy = "Write {prompt} and {response} where they belong."
            check.fail("template", f"be a text with {{response}} in it for reads: {self.reads}", self.template, remedy)
        if not templated and self.template is not None:
            check.fail("template", f"be left out for reads: {self.reads}", repr(self.template))
        if self.reads in ("chat", "conversation") and not self.tokenizer.chat_template:
            rule = "be response, pair or template, since the judge's tokenizer has no chat template"
            check.fail("reads", rule, repr(self.reads))

    def encode(self, prompt: str, response: str) -> tuple[dict[str, list[int]], bool]:
        """Return what the model is given (input_ids, perhaps token_type_ids) and whether the response was cut.

        Raises:
            ValueError: the prompt leaves no room for a response.
        """
        whole = self._tokens(prompt, response)
        if self._fits(whole):
            return whole, False
        if not self._fits(best := self._tokens(prompt, "")):
            remedy = "Raise max_length, or leave the prompt out."
            check.fail(f"the prompt {prompt[:40]!r}", f"leave room in {self.max_length} tokens",
                       f"{len(best['input_ids'])} with an empty response", remedy)  # fmt: skip
        kept, most = 0, len(response)  # characters: `kept` fit; tokens need not grow with every one, but nearly do
        while most - kept > 1:
            middle = (kept + most) // 2
            text = response[:middle] if self.truncation == "right" else response[-middle:]
            if self._fits(tokens := self._tokens(prompt, text)):
                kept, best = middle, tokens
            else:
                most = middle
        return best, True

    def encode_all(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[dict[str, list[int]]], str]:
        """Return all of them, and a note on how many were cut, empty where none was."""
        encoded = [self.encode(*pair) for pair in zip(prompts, responses, strict=True)]
        cut = sum(shortened for _, shortened in encoded)
        side = "end" if self.truncation == "right" else "beginning"
        note = f"{cut} of {len(responses)} replies lost their {side} to fit the judge's {self.max_length} tokens"
        return [tokens for tokens, _ in encoded], note if cut else ""

    def first_tokens(self, answers: Sequence[str]) -> set[int]:
        """Return the tokens with which the answers begin, where they follow what the judge was given.

        An answer whose beginning the tokenizer does not know, or merges with what stands before it, has none.
        """
        before = self._text("a", "b")
        ids = self._plain(before)
        after = [self._plain(before + answer) for answer in answers]
        found = {more[len(ids)] for more in after if more[: len(ids)] == ids and len(more) > len(ids)}
        return found - {self.tokenizer.unk_token_id}

    def _fits(self, tokens: dict[str, list[int]]) -> bool:
        return len(tokens["input_ids"]) <= self.max_length

    def _tokens(self, prompt: str, response: str) -> dict[str, list[int]]:
        if self.reads == "pair":
            given = self.tokenizer(prompt, response, verbose=False)
        elif self.reads == "response":
            given = self.tokenizer(response, verbose=False)
        else:
            return {"input_ids": self._plain(self._text(prompt, response))}
        return {name: list(given[name]) for name in ("input_ids", "token_type_ids") if name in given}

    def _text(self, prompt: str, response: str) -> str:
        slots = {"prompt": prompt, "response": response}
        text = _SLOT.sub(lambda slot: slots[slot[1]], self.template or "")  # in one pass: a response may hold {prompt}
        if self.reads in ("chat", "conversation"):
            messages = [{"role": "user", "content": text}]
            if self.reads == "conversation":
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=self.answers)
        return text + self.closing

    def _plain(self, text: str) -> list[int]:
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return list(self.tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"])
