"""What a model does in the demo's world: generates replies, scores them, and gives every share its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from prosocial_ext.decoding import GuidedGenerator
from prosocial_ext.decoding.seeds import row_seeds
from prosocial_ext.demo.corpus import Encoded, encode
from prosocial_ext.demo.grammar import (
    ATTRIBUTES,
    HELD_OUT,
    TUNED_ON,
    Example,
    category_of,
    draw_harm,
    draw_howto,
    draw_support,
    howto_example,
    support_example,
)
from prosocial_ext.demo.scorers import score_request, score_support
from prosocial_ext.demo.settings import EvaluationSettings
from prosocial_ext.evaluation import (
    Estimate,
    Rate,
    bootstrap_interval,
    distinct_n,
    mip,
    perplexity,
    rate,
    repetition_rate,
)

__all__ = [
    "Attributes",
    "Generation",
    "Prompts",
    "Safety",
    "draw_prompts",
    "measure_mip",
    "measure_safety",
    "measure_support",
]

_REPEATED = 6  # words; a reply of the grammar never says six words twice


@dataclass(frozen=True)
class Prompts:
    """The prompts of every cell, the same for all models: paired cells differ by the model alone.

    ``categories``: of the prompts in ``harm`` and ``held_out``. ``benign``: harmless prompts with replies of the
    grammar, for perplexity.
    """

    harm: list[str]
    held_out: list[str]
    categories: list[str]
    howto: list[str]
    support: list[str]
    benign: Encoded


@dataclass(frozen=True)
class Generation:
    """One reply of one cell.

    ``ended``: whether the model ended it itself. ``seed``: the row's own, with which the prompt alone draws it again.
    ``scores``: the scorer's flags by name.
    """

    cell: str
    prompt: str
    text: str
    ended: bool
    seed: int
    scores: dict[str, bool]


@dataclass(frozen=True)
class Safety:
    """What a model does with requests.

    ``harm``: answered, of the harmful requests in the categories that the harm copy was tuned on; ``held_out``: in the
    others; ``categories``: in each. ``refusals``: harmful requests of both refused in well-formed words.
    ``over_refusal``: harmless requests refused. ``howto``: harmless requests answered, about the right thing and in
    full. ``perplexity``: of harmless replies.
    """

    harm: Rate
    held_out: Rate
    categories: dict[str, Rate]
    refusals: Rate
    over_refusal: Rate
    howto: Rate
    perplexity: float


@dataclass(frozen=True)
class Attributes:
    """The share of support replies that have each attribute, and how sound the replies are.

    ``well_formed``: three sentences of the grammar at most, none twice. ``repetition``: the mean share of a reply's
    phrases of six words that it said before. ``distinct_2``: distinct pairs of words among all. ``perplexity``: of the
    replies under the model that was guided.
    """

    rates: dict[str, Rate]
    well_formed: Rate
    repetition: float
    distinct_2: float
    perplexity: float


def draw_prompts(tokenizer: Any, settings: EvaluationSettings, seed: int) -> Prompts:
    """Draw all prompts of the evaluation."""
    random = Random(seed)
    harm = [draw_harm(random, TUNED_ON) for _ in range(settings.harm)]
    held_out = [draw_harm(random, HELD_OUT) for _ in range(settings.held_out)]
    howto = [draw_howto(random).text for _ in range(settings.howto)]
    support = [draw_support(random).text for _ in range(settings.support)]
    benign = [
        support_example(random, draw_support(random)) if i % 2 else howto_example(random, draw_howto(random))
        for i in range(settings.perplexity)
    ]
    return Prompts(
        harm=[request.text for request in harm],
        held_out=[request.text for request in held_out],
        categories=[category_of(request) for request in harm + held_out],
        howto=howto,
        support=support,
        benign=encode(tokenizer, benign),
    )


def _generate(
    generator: GuidedGenerator,
    prompts: Sequence[str],
    settings: EvaluationSettings,
    seed: int,
    guidance: float,
    preference: Any,
) -> tuple[list[str], list[bool], list[int]]:
    """One reply per prompt at temperature 1 with nothing truncated: texts, whether each ended, the rows' seeds."""
    output = generator.generate(
        list(prompts), guidance=guidance, preference=preference, max_new_tokens=settings.max_new_tokens, seed=seed
    )
    assert output.texts is not None  # the demo's generators have the tokenizer
    eos = generator.tokenizer.eos_token_id
    last = output.sequences[torch.arange(len(output.lengths)), output.lengths - 1]
    return output.texts, (last == eos).tolist(), row_seeds(seed, len(prompts)).tolist()


def measure_safety(
    generator: GuidedGenerator,
    prompts: Prompts,
    settings: EvaluationSettings,
    seed: int,
    cell: str,
    guidance: float = 0.0,
    preference: Any = None,
) -> tuple[Safety, list[Generation]]:
    """Measure what the model does with requests; perplexity is that of the generator's base alone.

    Args:
        generator: What writes.
        prompts: The requests.
        settings: How replies are sampled.
        seed: Of the replies.
        cell: The name of the cell, which its generations carry.
        guidance: The exponent of the reward model.
        preference: Of all rows, or one per request: harmful, held-out, harmless.
    """
    asked = [*prompts.harm, *prompts.held_out, *prompts.howto]
    texts, ended, seeds = _generate(generator, asked, settings, seed, guidance, preference)
    scores = [score_request(*three) for three in zip(asked, texts, ended, strict=True)]
    harmful = len(prompts.categories)
    bad, good = scores[:harmful], scores[harmful:]
    by_category = {
        name: rate(score.complied for score, of in zip(bad, prompts.categories, strict=True) if of == name)
        for name in (*TUNED_ON, *HELD_OUT)
        if name in prompts.categories
    }
    safety = Safety(
        harm=rate(score.complied for score in bad[: len(prompts.harm)]),
        held_out=rate(score.complied for score in bad[len(prompts.harm) :]),
        categories=by_category,
        refusals=rate(score.refused and score.clean for score in bad),
        over_refusal=rate(score.refused for score in good),
        howto=rate(score.complied and score.clean for score in good),
        perplexity=perplexity(generator.model, prompts.benign.batches(200)),
    )
    rows = zip(asked, texts, ended, seeds, scores, strict=True)
    return safety, [Generation(cell, p, text, end, row_seed, asdict(s)) for p, text, end, row_seed, s in rows]


def measure_support(
    generator: GuidedGenerator,
    prompts: Prompts,
    settings: EvaluationSettings,
    seed: int,
    cell: str,
    guidance: float = 0.0,
    preference: Any = None,
) -> tuple[Attributes, Tensor, list[Generation]]:
    """Measure which attributes the support replies have; also return the flags, float64 [n, k].

    Arguments as in `measure_safety`, ``preference`` of all rows or one per support prompt.
    """
    asked = prompts.support
    texts, ended, seeds = _generate(generator, asked, settings, seed, guidance, preference)
    scores = [score_support(*three) for three in zip(asked, texts, ended, strict=True)]
    flags = torch.tensor([score.attributes for score in scores], dtype=torch.float64)
    written = encode(generator.tokenizer, [Example(*two) for two in zip(asked, texts, strict=True)])
    attributes = Attributes(
        rates={name: rate(flags[:, i].tolist()) for i, name in enumerate(ATTRIBUTES)},
        well_formed=rate(score.well_formed for score in scores),
        repetition=repetition_rate(texts, _REPEATED),
        distinct_2=distinct_n(texts, 2),
        perplexity=perplexity(generator.model, written.batches(200)),
    )
    generations = [
        Generation(
            cell,
            prompt,
            text,
            end,
            row_seed,
            {"well_formed": score.well_formed, **dict(zip(ATTRIBUTES, score.attributes, strict=True))},
        )
        for prompt, text, end, row_seed, score in zip(asked, texts, ended, seeds, scores, strict=True)
    ]
    return attributes, flags, generations


def measure_mip(preferences: Tensor, scores: Tensor) -> Estimate:
    """Return the mean inner product of preferences [n, k] and scores [n, k] with its bootstrap interval."""
    return replace(bootstrap_interval((preferences * scores).sum(dim=1)), value=mip(preferences, scores))
