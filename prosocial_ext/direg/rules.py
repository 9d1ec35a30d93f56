"""What the entries of a harm vector are ranked by: their size, their effect, or a draw (for ablations)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.direg.subtract import SAFETY_ARITHMETIC_DENSITY
from prosocial_ext.reference import check

__all__ = ["RULES", "Rule", "choose_rule", "default_density"]

RULES = ("magnitude", "saliency", "random", "dare", "low_rank")

_GAMMA, _MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # SplitMix64
_LEAST, _LEVELS = 0x00800000, 0x7E800000  # bits of the float32 numbers that are normal and below 2^127


@dataclass(frozen=True)
class Rule:
    """A rule and the seed of its draw.

    "magnitude": abs(value), the paper's. "saliency": abs(value * importance), the first-order effect. "random": a draw
    per entry from the seed, the tensor's name and the position, so that neither sharding nor chunks can change it.
    "dare": the same entries as "random", with values times entries over kept entries: the expectation of what is
    subtracted is then the whole vector (DARE, arXiv 2311.03099). "low_rank" ranks no entries: it replaces matrices by
    their best approximations (`prosocial_ext.direg.low_rank`), the seed being that of drawn starts.

    >>> int(Rule("random", seed=1).draw("w", torch.tensor([0, 1])).argmax())
    1
    """

    name: str
    seed: int = 0

    @property
    def is_drawn(self) -> bool:
        """Whether the seed matters."""
        return self.name in ("random", "dare")

    @property
    def column(self) -> int:
        """What entries are ranked by: 0 for their values, 1 for what comes next, a draw or the effects."""
        return 0 if self.name == "magnitude" else 1

    def draw(self, tensor: str, positions: Tensor) -> Tensor:
        """Return what the entries at flat ``positions`` (int64) of a tensor are ranked by where the rule is drawn.

        float32; the bits are uniform over some 2^31 levels: the words of a SplitMix64 sequence of seed and tensor.
        """
        start = int.from_bytes(hashlib.sha256(f"{self.seed} {tensor}".encode()).digest()[:8], "little")
        words = (positions + 1) * _signed(_GAMMA) + _signed(start)
        for shift, factor in zip((30, 27), _MIX, strict=True):
            words = (words ^ _shifted(words, shift)) * _signed(factor)
        words = _shifted(words ^ _shifted(words, 31), 33)  # 31 bits
        return ((words * _LEVELS >> 31) + _LEAST).to(torch.int32).view(torch.float32)

    def factor(self, kept: int, entries: int) -> float:
        """What the kept values of a group are multiplied by."""
        return entries / kept if self.name == "dare" and kept else 1.0


def choose_rule(name: Any, seed: Any, has_importance: bool) -> Rule:
    """Return the rule asked for; None is "saliency" where there is importance, else "magnitude".

    Raises:
        ValueError: No such rule, a seed out of range, saliency without importance, low_rank with it.

    >>> choose_rule(None, 0, has_importance=True)
    Rule(name='saliency', seed=0)
    """
    if name is None:
        name = "saliency" if has_importance else "magnitude"
    check.choice("rule", name, RULES)
    check.integer("seed", seed, 0, 2**63 - 1, "be an integer in [0, 2**63)")
    if name == "saliency" and not has_importance:
        remedy = "Make it with prosocial direg importance, or gradient_importance."
        check.fail("importance", "be given for the rule 'saliency'", None, remedy)
    if name == "low_rank" and has_importance:
        check.fail("importance", "be None for the rule 'low_rank'", "one", "It ranks entries: here none is left out.")
    return Rule(name, seed)


def default_density(density: float | None, m: int | None) -> float | None:
    """Return the density asked for: the Safety Arithmetic default where neither it nor a count is given.

    >>> default_density(None, None), default_density(None, 7), default_density(0.5, None)
    (0.1, None, 0.5)
    """
    return SAFETY_ARITHMETIC_DENSITY if density is None and m is None else density


def _shifted(words: Tensor, by: int) -> Tensor:
    """Shift to the right, zeros coming in."""
    return words >> by & (1 << 64 - by) - 1


def _signed(word: int) -> int:
    """The int64 of these 64 bits."""
    return word - (1 << 64) if word >> 63 else word
