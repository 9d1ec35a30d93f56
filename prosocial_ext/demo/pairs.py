"""Preference pairs from the demo's world: two replies of the grammar to one prompt, told apart by one attribute."""

from __future__ import annotations

from random import Random
from typing import Any

from prosocial_ext.arm.data import PreferencePair
from prosocial_ext.demo.grammar import ATTRIBUTES, Example, draw_support, support_example
from prosocial_ext.demo.scorers import score_support

__all__ = ["draw_pairs"]

_TRIES = 1_000  # two replies differ in an attribute about every second time; never to differ means a broken grammar


def draw_pairs(tokenizer: Any, per_attribute: int, seed: int) -> dict[str, list[PreferencePair]]:
    """Return ``per_attribute`` pairs for every attribute; the chosen reply has it, the rejected one has not.

    Raises:
        RuntimeError: The grammar draws no two replies that differ in an attribute.
    """
    random = Random(seed)
    return {
        attribute: [_pair(tokenizer, random, index) for _ in range(per_attribute)]
        for index, attribute in enumerate(ATTRIBUTES)
    }


def _pair(tokenizer: Any, random: Random, attribute: int) -> PreferencePair:
    prompt = draw_support(random)
    for _ in range(_TRIES):
        one, other = support_example(random, prompt), support_example(random, prompt)
        has, has_too = _has(one, attribute), _has(other, attribute)
        if has != has_too:
            chosen, rejected = (one, other) if has else (other, one)
            eos = [tokenizer.eos_token_id]
            return PreferencePair(
                prompt_ids=tokenizer(prompt.text).input_ids,
                chosen_ids=tokenizer(chosen.reply, add_special_tokens=False).input_ids + eos,
                rejected_ids=tokenizer(rejected.reply, add_special_tokens=False).input_ids + eos,
            )
    raise RuntimeError(f"No two replies of {_TRIES} differ in {ATTRIBUTES[attribute]}.")


def _has(example: Example, attribute: int) -> bool:
    return score_support(example.prompt, example.reply, ended=True).attributes[attribute]
