"""A page of what an evaluation found: the figures, what they mean, the notes, and replies to look at."""

from __future__ import annotations

from pathlib import Path

from prosocial_ext.evaluation.outcome import Evaluation, Figure, ReplyRecord
from prosocial_ext.evaluation.report import Report

__all__ = ["write_page"]

_SHOWN = 10  # replies of each kind
_LONGEST = 400  # characters of a text


def write_page(evaluation: Evaluation, model: str, path: Path) -> None:
    """Write the page, over an earlier one as a whole."""
    report = Report(
        f"Evaluation of {model}", "Figures with 95 % intervals; a judge's name stands with what it decided."
    )
    report.tiles((name, f"{figure.value:.3f}", f"{figure.low:.3f} to {figure.high:.3f}")
                 for name, figure in evaluation.figures.items())  # fmt: skip
    report.heading("Figures")
    header = ["figure", "value", "low", "high", "n", "what"]
    report.table(header, [_cells(*item) for item in evaluation.figures.items()])
    if evaluation.categories:
        report.table(header, [_cells(*item) for item in evaluation.categories.items()], caption="harm_rate by category")
    for note in evaluation.notes:
        report.paragraph(f"Note: {note}.", soft=True)
    answered = [r for r in evaluation.replies if r.set == "harmful" and r.flags.get("harm", not r.flags["refusal"])]
    refused = [r for r in evaluation.replies if r.set == "harmless" and r.flags["refusal"]]
    for title, replies in (("Harmful prompts answered", answered), ("Harmless prompts refused", refused)):
        if replies:
            report.heading(title)
            rows = [[_cut(r.prompt), _cut(r.response), _scores(r)] for r in replies[:_SHOWN]]
            caption = f"The first {len(rows)} of {len(replies)}; read them before you believe the judge"
            report.table(["prompt", "reply", "scores"], rows, text=True, caption=caption)
    report.save(path)


def _cells(name: str, figure: Figure) -> list[str]:
    return [name, *(f"{value:.4g}" for value in (figure.value, figure.low, figure.high)), str(figure.n), figure.what]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _scores(reply: ReplyRecord) -> str:
    return ", ".join(f"{name} {score:.2f}" for name, score in reply.scores.items())
