"""What a model does in the demo's world: generates replies, scores them, and gives every share its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.decoding import GuidedGenerator
from prosocial_ext.demo.corpus import Encoded, encode
from prosocial_ext.demo.grammar import (
    ATTRIBUTES,
    HELD_OUT,
    TUNED_ON,
    draw_harm,
    draw_howto,
    draw_support,
    howto_example,
    support_example,
)
from prosocial_ext.demo.scorers import score_request, score_support
from prosocial_ext.demo.settings import EvaluationSettings
from prosocial_ext.evaluation import Rate, mip, perplexity, rate

__all__ = [
    "Attributes",
    "Mean",
    "Prompts",
    "Replies",
    "Safety",
    "draw_prompts",
    "generate",
    "mean",
    "measure_mip",
    "measure_safety",
    "measure_support",
]


@dataclass(frozen=True)
class Prompts:
    """The prompts of every cell, the same for all models: paired cells differ by the model alone.

    ``benign``: harmless prompts with replies of the grammar, for perplexity.
    """

    harm: list[str]
    held_out: list[str]
    howto: list[str]
    support: list[str]
    benign: Encoded


@dataclass(frozen=True)
class Replies:
    """What a model wrote, and whether it ended each reply itself."""

    texts: list[str]
    ended: list[bool]


@dataclass(frozen=True)
class Mean:
    """A mean of ``n`` values with its 95 % interval by the normal approximation."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Safety:
    """What a model does with requests.

    ``harm``: answered, of the harmful requests in the categories that the harm copy was tuned on; ``held_out``: in the
    others. ``refusals``: harmful requests of both refused in well-formed words. ``over_refusal``: harmless requests
    refused. ``howto``: harmless requests answered, about the right thing and in full. ``perplexity``: of harmless
    replies.
    """

    harm: Rate
    held_out: Rate
    refusals: Rate
    over_refusal: Rate
    howto: Rate
    perplexity: float


@dataclass(frozen=True)
class Attributes:
    """The share of support replies that have each attribute, and that are well formed."""

    rates: dict[str, Rate]
    well_formed: Rate


def draw_prompts(tokenizer: Any, settings: EvaluationSettings, seed: int) -> Prompts:
    """Draw all prompts of the evaluation."""
    random = Random(seed)
    harm = [draw_harm(random, TUNED_ON).text for _ in range(settings.harm)]
    held_out = [draw_harm(random, HELD_OUT).text for _ in range(settings.held_out)]
    howto = [draw_howto(random).text for _ in range(settings.howto)]
    support = [draw_support(random).text for _ in range(settings.support)]
    benign = [
        support_example(random, draw_support(random)) if i % 2 else howto_example(random, draw_howto(random))
        for i in range(settings.perplexity)
    ]
    return Prompts(harm, held_out, howto, support, encode(tokenizer, benign))


def generate(
    generator: GuidedGenerator,
    prompts: Sequence[str],
    settings: EvaluationSettings,
    seed: int,
    guidance: float = 0.0,
    preference: Any = None,
) -> Replies:
    """Sample one reply per prompt at temperature 1 with nothing truncated."""
    output = generator.generate(
        list(prompts), guidance=guidance, preference=preference, max_new_tokens=settings.max_new_tokens, seed=seed
    )
    assert output.texts is not None  # the demo's generators have the tokenizer
    eos = generator.tokenizer.eos_token_id
    last = output.sequences[torch.arange(len(output.lengths)), output.lengths - 1]
    return Replies(output.texts, (last == eos).tolist())


def measure_safety(
    generator: GuidedGenerator,
    prompts: Prompts,
    settings: EvaluationSettings,
    seed: int,
    guidance: float = 0.0,
    preference: Any = None,
) -> tuple[Safety, Replies]:
    """Measure what the model does with requests; perplexity is that of the generator's base alone."""
    asked = [*prompts.harm, *prompts.held_out, *prompts.howto]
    replies = generate(generator, asked, settings, seed, guidance, preference)
    scores = [score_request(*three) for three in zip(asked, replies.texts, replies.ended, strict=True)]
    harmful = len(prompts.harm) + len(prompts.held_out)
    bad, good = scores[:harmful], scores[harmful:]
    safety = Safety(
        harm=rate(score.complied for score in bad[: len(prompts.harm)]),
        held_out=rate(score.complied for score in bad[len(prompts.harm) :]),
        refusals=rate(score.refused and score.clean for score in bad),
        over_refusal=rate(score.refused for score in good),
        howto=rate(score.complied and score.clean for score in good),
        perplexity=perplexity(generator.model, prompts.benign.batches(200)),
    )
    return safety, replies


def measure_support(
    generator: GuidedGenerator,
    prompts: Prompts,
    settings: EvaluationSettings,
    seed: int,
    guidance: float = 0.0,
    preference: Any = None,
) -> tuple[Attributes, Tensor, Replies]:
    """Measure which attributes the support replies have; also return the flags, float64 [n, k]."""
    replies = generate(generator, prompts.support, settings, seed, guidance, preference)
    scores = [score_support(*three) for three in zip(prompts.support, replies.texts, replies.ended, strict=True)]
    flags = torch.tensor([score.attributes for score in scores], dtype=torch.float64)
    rates = {name: rate(flags[:, i].tolist()) for i, name in enumerate(ATTRIBUTES)}
    return Attributes(rates, rate(score.well_formed for score in scores)), flags, replies


def measure_mip(preferences: Tensor, scores: Tensor) -> Mean:
    """Return the mean inner product of preferences [n, k] and scores [n, k] with its interval."""
    return replace(mean((preferences * scores).sum(dim=1)), value=mip(preferences, scores))


def mean(values: Tensor) -> Mean:
    """Return the mean of values [n], n >= 2, with its 95 % interval by the normal approximation."""
    value = float(values.double().mean())
    reach = NormalDist().inv_cdf(0.975) * float(values.double().std()) / len(values) ** 0.5
    return Mean(value, value - reach, value + reach, len(values))
