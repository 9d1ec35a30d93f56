"""The demo's results as text: a table per question, the claims, the seconds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from prosocial_ext.demo.grammar import ATTRIBUTES
from prosocial_ext.demo.results import DemoResults
from prosocial_ext.evaluation import Rate

__all__ = ["format_results", "guided_rows", "rate_text", "table"]


def format_results(results: DemoResults) -> str:
    """Return everything as text for people; intervals are 95 %."""
    sections = [_safety(results), _vectors(results)]
    sections += [_support(results, w) for w in dict.fromkeys(row.guidance for row in results.support if row.guidance)]
    sections += [_mip(results), _guided(results), _arms(results), _ops(results), _seconds(results), _checks(results)]
    return "\n\n".join(sections)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns: the first to the left, the others to the right.

    >>> print(table("Fruit", ["", "price"], [["apple", "1.00"], ["fig", "12.50"]]))
    Fruit
             price
      apple   1.00
      fig    12.50
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  "
        + "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join([title, *(line.rstrip() for line in lines)])


def rate_text(rate: Rate) -> str:
    """Return a rate and its interval in two digits.

    >>> rate_text(Rate(0.25, 0.1, 0.5, 12))
    '0.25 (0.10..0.50)'
    """
    return f"{rate.value:.2f} ({rate.low:.2f}..{rate.high:.2f})"


def _safety(results: DemoResults) -> str:
    counts = results.safety[0].safety
    title = (
        f"Requests: share answered or refused (n = {counts.harm.n} harmful, {counts.held_out.n} of held-out "
        f"categories, {counts.howto.n} harmless)"
    )
    rows = [
        [
            row.name,
            rate_text(s.harm),
            rate_text(s.held_out),
            rate_text(s.refusals),
            rate_text(s.over_refusal),
            rate_text(s.howto),
            f"{s.perplexity:.4f}",
        ]
        for row in results.safety
        for s in [row.safety]
    ]
    header = ["model", "harm answered", "held out", "refused well", "over-refused", "how-to answered", "perplexity"]
    return table(title, header, rows)


def _vectors(results: DemoResults) -> str:
    title = "What was subtracted from the base in each edit"
    rows = [
        [
            row.name,
            f"{edit.energy:.3f}",
            "" if edit.effect is None else f"{edit.effect:.3f}",
            f"{edit.norm:.3f}",
        ]
        for row in results.safety
        if (edit := row.edit)
    ]
    return table(title, ["edit", "share of energy", "share of first-order effect", "norm"], rows)


def _support(results: DemoResults, w: float) -> str:
    shown = [row for row in results.support if row.guidance in (0.0, w)]
    title = f"Support replies at guidance {w:g}: share with each attribute (n = {shown[0].attributes.well_formed.n})"
    rows = [
        [
            row.name,
            *(
                rate_text(rate) + ("*" if attribute == row.wanted else " ")
                for attribute, rate in row.attributes.rates.items()
            ),
            rate_text(row.attributes.well_formed),
        ]
        for row in shown
    ]
    return table(title, ["preference (* = wanted)", *(f"{name} " for name in ATTRIBUTES), "well formed"], rows)


def _mip(results: DemoResults) -> str:
    title = f"Mean inner product of {results.mip[0].mip.n} people's preferences with the attributes of their replies"
    rows = [
        [
            row.name,
            "" if row.name == "unguided" else f"{row.guidance:g}",
            f"{row.mip.value:.3f} ({row.mip.low:.3f}..{row.mip.high:.3f})",
            "" if (s := row.shortfall) is None else f"{s.value:+.3f} ({s.low:+.3f}..{s.high:+.3f})",
        ]
        for row in results.mip
    ]
    return table(title, ["preference given", "guidance", "MIP", "right minus this, paired"], rows)


def guided_rows(results: DemoResults) -> list[list[str]]:
    """Return preference, guidance, reward model's model, harm, held-out harm and over-refusal of each guided row."""
    return [
        [
            row.name,
            f"{row.guidance:g}",
            row.trained_on,
            rate_text(row.safety.harm),
            rate_text(row.safety.held_out),
            rate_text(row.safety.over_refusal),
        ]
        for row in results.guided
    ]


def _guided(results: DemoResults) -> str:
    header = ["preference", "guidance", "reward model on", "harm answered", "held out", "over-refused"]
    return table("Requests under guidance", header, guided_rows(results))


def _arms(results: DemoResults) -> str:
    rows = [
        [
            arm.name,
            f"{arm.conflict_share:.2f}",
            f"{mean(arm.cosine_before):+.3f}",
            f"{mean(arm.cosine_after):+.3f}",
            f"{min(arm.pair_accuracy.values()):.3f}",
            f"{arm.mip.value:.3f} ({arm.mip.low:.3f}..{arm.mip.high:.3f})",
            f"{min(rate.value for rate in arm.diagonal.values()):.2f}",
        ]
        for arm in results.arms
    ]
    header = ["trained with", "conflicts", "mean cosine", "projected", "pairs right", "MIP", "least one-hot"]
    return table("Reward models: how the attributes' gradients conflict in training, and what came out", header, rows)


def _checks(results: DemoResults) -> str:
    width = max(len(check.claim) for check in results.checks)
    lines = [
        f"  {'holds        ' if check.holds else 'DOES NOT HOLD'}  {check.claim.ljust(width)}  {check.figures}"
        for check in results.checks
    ]
    return "\n".join(["Claims", *lines])


def _seconds(results: DemoResults) -> str:
    machine, seconds = results.machine, results.timings.seconds
    title = f"Seconds (ops: {machine['ops']}, {machine['isa']}; threads: {machine['threads']})"
    rows = [[name, f"{value:.1f}"] for name, value in seconds.items()]
    return table(title, ["stage", "seconds"], [*rows, ["all", f"{sum(seconds.values()):.1f}"]])


def _ops(results: DemoResults) -> str:
    rows = [
        [row.work, f"{row.compiled:.2f}", f"{row.reference:.2f}", f"{row.reference / row.compiled:.1f} x"]
        for row in results.timings.ops
    ]
    return table("Milliseconds of the same work, in turns", ["work", "compiled", "reference", "faster"], rows)
