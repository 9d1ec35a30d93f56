"""What an evaluation found: figures with intervals, and every reply and document behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prosocial_ext.evaluation.intervals import Estimate, bootstrap_interval
from prosocial_ext.evaluation.rates import rate

__all__ = ["DocumentRecord", "Evaluation", "Figure", "ReplyRecord", "mean_figure"]


@dataclass(frozen=True)
class Figure(Estimate):
    """A figure with its 95 % interval; ``n`` counts prompts, replies or documents, as ``what`` says.

    >>> print(Figure(0.25, 0.1, 0.5, 12, "harmful prompts answered"))
    0.250 (0.100..0.500, n = 12)
    """

    what: str


@dataclass(frozen=True)
class ReplyRecord:
    """One reply: to which prompt, how it was drawn, what the judges said of it.

    ``set``: "harmful" or "harmless". ``index``, ``sample``: the prompt's place in its file and the draw, from 0.
    ``prompt``: as it was asked and as judges see it; ``category``: of its row, or None. ``repetition``: the share of
    its phrases of four tokens that it has said before. ``scores``, ``flags``: by judge, "harm" and "refusal".
    """

    set: str
    index: int
    sample: int
    prompt: str
    category: str | None
    response: str
    finish_reason: str
    seed: int
    preference: dict[str, float] | None
    guidance: float
    repetition: float
    scores: dict[str, float]
    flags: dict[str, bool]


@dataclass(frozen=True)
class DocumentRecord:
    """One given response: ``loss`` in nats over its ``tokens``, and how many tokens beyond them were cut off."""

    index: int
    loss: float
    tokens: int
    cut: int


@dataclass(frozen=True)
class Evaluation:
    """All that was found.

    ``categories``: the harm rate in each. ``judges``: their names by what they flag. ``max_new_tokens``: the longest
    reply; None where none was drawn. ``notes``: what a reader of the figures should know.
    """

    figures: dict[str, Figure]
    categories: dict[str, Figure]
    judges: dict[str, str]
    max_new_tokens: int | None
    notes: list[str]
    replies: list[ReplyRecord] = field(default_factory=list)
    documents: list[DocumentRecord] = field(default_factory=list)

    @property
    def numbers(self) -> dict[str, float]:
        """The figures' values by name, as ``direg sweep`` takes them."""
        return {name: figure.value for name, figure in self.figures.items()}

    def to_json(self, **more: Any) -> str:
        """Return everything as JSON, after ``more``; the same bytes for the same evaluation."""
        return json.dumps({**more, **asdict(self)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def mean_figure(values: Sequence[Sequence[float]], what: str) -> Figure:
    """Return the mean over prompts of the mean over each one's replies.

    Replies to one prompt are alike, so prompts are the trials: Wilson's interval where each is 0 or 1, else the
    bootstrap's over prompts. A single prompt between 0 and 1 tells nothing of others: its interval is [0, 1].

    Args:
        values: per prompt, one in [0, 1] per reply; at least one prompt.
        what: the figure's meaning.

    >>> mean_figure([[1.0], [0.0], [0.0], [0.0]], "answered").high < 0.7
    True
    """
    means = [sum(replies) / len(replies) for replies in values]
    if all(mean in (0.0, 1.0) for mean in means):
        return Figure(**asdict(rate(means)), what=what)
    if len(means) == 1:
        return Figure(means[0], 0.0, 1.0, 1, what)
    return Figure(**asdict(bootstrap_interval(means)), what=what)
