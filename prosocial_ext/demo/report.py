"""The demo's results as one page: what each part of the method did, its controls, and where it does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from prosocial_ext.demo import figures
from prosocial_ext.demo.grammar import ATTRIBUTES, HELD_OUT, SENTENCES, TUNED_ON
from prosocial_ext.demo.names import ADAM, BASE, DENSE, LARGEST, RIGHT, SAFE, SALIENT, SGD, UNGUIDED, UNIFORM, ZERO
from prosocial_ext.demo.printing import guided_rows, rate_text
from prosocial_ext.demo.results import DemoResults, SafetyRow, SupportRow
from prosocial_ext.evaluation import Rate
from prosocial_ext.evaluation.report import Report, figure_style

__all__ = ["build_report"]

_COMMAND = "prosocial demo --seed {seed}{full}"


def build_report(runs: Sequence[DemoResults]) -> Report:
    """Return the report of one run, or of several seeds: the first in full, the others in their headlines.

    >>> build_report([])
    Traceback (most recent call last):
        ...
    ValueError: runs must hold at least one run, got 0.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got 0.")
    with figure_style():
        return _build(runs[0], runs)


def _build(results: DemoResults, runs: Sequence[DemoResults]) -> Report:
    report = Report(
        "ProSocialAlign on a small world",
        "A small language model answers harmful requests. The harm is subtracted from its weights, and a reward model "
        "that knows five attributes guides what it says, as each person prefers. "
        "Everything below was found in one run of one command; every rate has its 95 % interval.",
    )
    _head(report, results)
    _claims(report, runs)
    _world(report, results)
    _doses(report, results)
    _categories(report, results)
    _rules(report, results)
    _tensors(report, results)
    _conflicts(report, results)
    _attributes(report, results)
    _preferences(report, results)
    if len({row.guidance for row in results.mip}) > 1:
        _sweep(report, results)
    _guided_safety(report, results)
    if len(results.arms) > 1:
        _surgeries(report, results)
    _samples(report, results)
    _timings(report, results)
    _limits(report)
    return report


def _head(report: Report, results: DemoResults) -> None:
    settings, w = results.settings, results.settings.guidance
    report.code(_COMMAND.format(seed=settings.seed, full=" --full" if settings.full else ""))
    base, safe = results.safety_of(BASE), results.safety_of(SAFE)
    right, uniform = results.mip_of(RIGHT, w), results.mip_of(UNIFORM, w)
    report.tiles(
        [
            ("harmful requests answered", f"{base.harm.value:.2f} → {safe.harm.value:.2f}", f"n = {safe.harm.n}"),
            (
                "harmless requests refused",
                f"{base.over_refusal.value:.2f} → {safe.over_refusal.value:.2f}",
                f"n = {safe.over_refusal.n}",
            ),
            (
                "perplexity of harmless replies",
                f"{safe.perplexity / base.perplexity - 1:+.2%}",
                f"{base.perplexity:.4f} → {safe.perplexity:.4f}",
            ),
            (
                "preference served (MIP)",
                f"{uniform.value:.2f} → {right.value:.2f}",
                "uniform → own preference, same guidance",
            ),
        ]
    )


def _claims(report: Report, runs: Sequence[DemoResults]) -> None:
    report.heading("Claims")
    report.paragraph(
        "What the run is there to show, held against its figures. A claim that does not hold says so here."
    )
    header = ["claim"]
    for results in runs:
        header += [f"seed {results.settings.seed}", "figures"]
    rows: list[list[Any]] = []
    for index, check in enumerate(runs[0].checks):
        row: list[Any] = [check.claim]
        for results in runs:
            row += [results.checks[index].holds, results.checks[index].figures]
        rows.append(row)
    report.table(header, rows, text=True)


def _world(report: Report, results: DemoResults) -> None:
    settings = results.settings
    report.heading("The world")
    report.paragraph(
        f"A Llama of {results.parameters:,} parameters is trained for {settings.base.steps} steps on texts drawn from "
        f"a grammar. Half the prompts ask for support: a reply has exactly {SENTENCES} sentences, each of which may "
        f"serve one of {len(ATTRIBUTES)} attributes, so that the attributes compete. A quarter asks for something "
        f"harmful, in {len(TUNED_ON) + len(HELD_OUT)} categories of things that do not exist; the base answers most of "
        "them. The last quarter asks for something harmless in the same words and is always answered: a model that "
        "refuses too much shows it here. Replies are scored by parsing them against the grammar, without a judge."
    )
    rows = [
        [what, generation.prompt, generation.text]
        for what, index in (
            ("harmful request", 0),
            ("harmless request", settings.evaluation.harm + settings.evaluation.held_out),
        )
        for generation in [list(results.replies(BASE))[index]]
    ]
    unguided = next(results.replies(_cell_of(results, UNGUIDED, 0.0)))
    rows.append(["request for support", unguided.prompt, unguided.text])
    report.table(["", "prompt", "the model's reply, before guidance"], rows, text=True)


def _doses(report: Report, results: DemoResults) -> None:
    report.heading("How much harm is removed, and what it costs")
    report.paragraph(
        "A copy of the base is tuned on harmful answers. The difference of the two is the harm vector; its largest "
        "entries, times the scale λ, are subtracted from the base. Two controls say whether it matters what is "
        "subtracted: as many entries at random, and the vector of a copy that was tuned on harmless answers instead, "
        "scaled until as much of it is subtracted."
    )
    report.figure(
        figures.dose_figure(results),
        "Rates with 95 % intervals over the scale; dotted: the base. Over-refusal moves long before perplexity does: "
        "watch the harmless requests when choosing λ. The table has the share of the vector's energy that the chosen "
        "entries hold: where few hold nearly all, as in this copy, density hardly matters.",
        "Three panels over the scale: harm rate falls, over-refusal rises, perplexity rises slightly.",
    )
    _edit_table(report, results, [row for row in results.safety if row.edit is None or row.edit.copy != ADAM])


def _categories(report: Report, results: DemoResults) -> None:
    report.heading("Harm by category")
    report.paragraph(
        f"The harm copy saw {', '.join(TUNED_ON)}; {' and '.join(HELD_OUT)} were held out. That these fall as well "
        "shows the transfer of one shared decision, to answer or not, rather than of knowledge: this base decides "
        "alike in all categories."
    )
    report.figure(
        figures.category_figure(results),
        "Share of harmful requests answered, by category.",
        "Bars by category before and after the edit, and under guidance.",
    )


def _rules(report: Report, results: DemoResults) -> None:
    report.heading("Which entries to subtract: the harm copy's optimiser decides")
    kept = {copy: sum(t.selected_energy for t in results.tensors[copy].values()) for copy in (SGD, ADAM)}
    largest, salient, dense = (results.edit_of(ADAM, rule).safety for rule in (LARGEST, SALIENT, DENSE))
    report.paragraph(
        "The method takes the largest entries. That is the right choice where the copy was tuned by SGD, whose steps "
        f"are proportional to the gradient: the largest tenth holds {kept[SGD]:.0%} of the vector's energy. AdamW "
        "moves every entry by about the learning rate, whatever it is good for: the largest tenth holds "
        f"{kept[ADAM]:.0%}, and leaves harm at {rate_text(largest.harm)}. Ranked by the product of entry and harm "
        "gradient, taken half-way between base and copy (its first-order effect), as many entries leave "
        f"{rate_text(salient.harm)}, and {rate_text(salient.over_refusal)} of the harmless requests are refused. The "
        f"whole vector leaves {rate_text(dense.harm)} and refuses {rate_text(dense.over_refusal)}."
    )
    report.figure(
        figures.rules_figure(results),
        "Both copies at λ = 1, and the share of the first-order effect that the chosen entries hold; dotted: the base. "
        "“All entries” subtracts the whole vector.",
        "Bars of harm and over-refusal for three rules on two harm copies.",
    )
    _edit_table(report, results, [row for row in results.safety if row.edit and row.edit.copy == ADAM])


def _tensors(report: Report, results: DemoResults) -> None:
    report.heading("Where the harm vector sits")
    inside = {
        copy: [sum(getattr(t, what) for n, t in tensors.items() if "embed" in n) for what in ("energy", "selected")]
        for copy, tensors in results.tensors.items()
    }
    chosen = sum(t.selected for t in results.tensors[ADAM].values())
    report.paragraph(
        "By kind of parameter, layers taken together. The embedding, which is also the head, holds "
        f"{inside[SGD][0]:.0%} of the SGD copy's energy. Of the AdamW copy's it holds {inside[ADAM][0]:.0%}, and yet "
        f"{inside[ADAM][1] / chosen:.0%} of its largest entries."
    )
    report.figure(
        figures.tensor_figure(results),
        "Shares of all entries, of the vector's squared norm, and of the largest tenth.",
        "Bars by kind of parameter for both harm copies.",
    )


def _conflicts(report: Report, results: DemoResults) -> None:
    arm = results.arms[0]
    report.heading("Five attributes pull against each other")
    report.paragraph(
        f"The reward model has {arm.trainable:,} trainable parameters and one gradient per attribute and step. "
        f"{arm.conflict_share:.0%} of all pairs conflict (their cosine is negative), since a reply has room for "
        f"{SENTENCES} sentences only. Projection takes from each gradient what opposes another: the mean cosine rises "
        f"from {mean(arm.cosine_before):+.3f} to {mean(arm.cosine_after):+.3f}."
    )
    report.figure(
        figures.cosine_figure(results),
        "Thin: every step; thick: running mean over nine.",
        "Mean cosines through training, before and after projection, and the number of conflicting pairs.",
    )
    report.table(
        ["attribute", *ATTRIBUTES],
        [["pairs ranked right under its one-hot preference", *(f"{arm.pair_accuracy[a]:.3f}" for a in ATTRIBUTES)]],
    )


def _attributes(report: Report, results: DemoResults) -> None:
    w = results.settings.guidance
    report.heading("What each preference gives")
    report.paragraph(
        "Every preference for one attribute alone should raise that attribute, the diagonal. The row of the zero "
        "adapter is there for honesty: a guide that equals the base only sharpens it, as temperature ½ would, and that "
        "alone raises some attributes."
    )
    report.figure(
        figures.attribute_figure(results),
        f"Share of support replies with each attribute, guidance {w:g}; bold: the attribute that was asked for.",
        "Matrix of attribute rates by preference; the diagonal is high.",
    )
    names = [*ATTRIBUTES, UNIFORM, ZERO, UNGUIDED]
    rows = []
    for name in names:
        found = results.support_of(name, 0.0 if name == UNGUIDED else w)
        rows.append([name, *(rate_text(found.rates[a]) for a in ATTRIBUTES), rate_text(found.well_formed)])
    report.table(["preference", *ATTRIBUTES, "well formed"], rows)


def _preferences(report: Report, results: DemoResults) -> None:
    w = results.settings.guidance
    report.heading("Does it matter whose preference guides?")
    report.paragraph(
        f"{results.mip_of(RIGHT, w).n} people have preferences drawn from a Dirichlet distribution. The mean inner "
        "product (MIP) of each one's preference with the attributes of the reply says how well they are served. "
        "Guidance alone raises it, so the fair rivals are those at the same guidance: somebody else's preference "
        "(nobody keeps their own), the uniform one, and a zero adapter."
    )
    report.figure(
        figures.mip_figure(results),
        "Mean inner products with 95 % intervals.",
        "Points with intervals: the own preference is clearly highest.",
    )
    rows = [
        [
            row.name,
            f"{row.guidance:g}" if row.name != UNGUIDED else "",
            f"{row.mip.value:.3f} ({row.mip.low:.3f}..{row.mip.high:.3f})",
            "" if (s := row.shortfall) is None else f"{s.value:+.3f} ({s.low:+.3f}..{s.high:+.3f})",
        ]
        for row in sorted(results.mip, key=lambda row: row.guidance)  # stable: the own preference first
    ]
    report.table(["preference given", "guidance", "MIP", "own minus this, paired"], rows)


def _sweep(report: Report, results: DemoResults) -> None:
    report.heading("How strong may guidance be?")
    weights = sorted({row.guidance for row in results.mip})
    text = (
        "The strength w is the exponent of the reward model, and how much it takes depends on how that was trained. "
        + _onset(results.support, results.arms[0].beta_r)
    )
    if results.sharp:
        sharp = next(arm.beta_r for arm in results.arms if arm.beta_r != results.arms[0].beta_r)
        text += (
            f" {_onset(results.sharp, sharp)} A small beta_r asks for large margins between the replies of a pair, and "
            "a reward model of large margins steers hard already at small w: it repeats the sentence that it was "
            "rewarded for."
        )
    report.paragraph(text)
    report.figure(
        figures.guidance_figure(results),
        "Left: how well people are served. Middle and right, under one-hot preferences: replies of three sentences of "
        "the grammar at most, none twice, and the mean share of six-word phrases that a reply says again. Solid: the "
        "reward model of this page; dashed: one trained with a tenth of its beta_r. The table's distinct-2, distinct "
        "pairs of words among all, falls as replies grow alike.",
        "Three panels over guidance.",
    )
    rows = []
    for w in weights:
        for name in (RIGHT, UNIFORM):
            cell = results.support_of(name, w)
            rows.append(
                [
                    f"{w:g}",
                    name,
                    rate_text(cell.well_formed),
                    f"{cell.repetition:.3f}",
                    f"{cell.distinct_2:.3f}",
                    f"{cell.perplexity:.3f}",
                ]
            )
    report.table(
        ["guidance", "preference", "well formed", "phrases said again", "distinct-2", "perplexity under the base"], rows
    )


def _onset(rows: Sequence[SupportRow], beta_r: float) -> str:
    """From which guidance on the replies under some one-hot preference break."""
    asked = [row for row in rows if row.wanted]
    broken = [row for row in asked if row.attributes.well_formed.value < 0.9]
    if not broken:
        strongest = max(row.guidance for row in asked)
        return f"With beta_r = {beta_r:g} at least nine replies in ten stay well formed up to w = {strongest:g}."
    first = min(row.guidance for row in broken)
    worst = min((row for row in broken if row.guidance == first), key=lambda row: row.attributes.well_formed.value)
    return (
        f"With beta_r = {beta_r:g} replies begin to break at w = {first:g}, where "
        f"{worst.attributes.well_formed.value:.0%} of those under {worst.name} are well formed."
    )


def _guided_safety(report: Report, results: DemoResults) -> None:
    report.heading("Does guidance bring the harm back?")
    own, w = results.guided[0], results.settings.guidance
    text = (
        "The reward model multiplies its own probabilities in, so whatever it would say counts. Trained on the edited "
        f"model, it leaves harmful answers at {rate_text(own.safety.harm)} at guidance {w:g}; the edited model alone "
        f"gives {rate_text(results.safety_of(SAFE).harm)}."
    )
    leaks = [row for row in results.guided if row.trained_on == BASE]
    if leaks:
        found = " and ".join(f"{rate_text(row.safety.harm)} at guidance {row.guidance:g}" for row in leaks)
        text += f" Trained on the base as it was, it brings the base's willingness with it: {found}."
    report.paragraph(text)
    safe = results.safety_of(SAFE)
    rows = [["none", "", "", rate_text(safe.harm), rate_text(safe.held_out), rate_text(safe.over_refusal)]]
    rows += guided_rows(results)
    report.table(
        ["preference", "guidance", "reward model trained on", "harm answered", "held out", "over-refused"], rows
    )


def _surgeries(report: Report, results: DemoResults) -> None:
    report.heading("Does projection help?")
    arms = [arm for arm in results.arms if (arm.trained_on, arm.beta_r) == (SAFE, results.arms[0].beta_r)]
    best = max(arms, key=lambda arm: arm.mip.value)

    def mip_of(surgery: str, preference_per: str) -> str:
        found = next(arm.mip for arm in arms if (arm.surgery, arm.preference_per) == (surgery, preference_per))
        return f"{found.value:.3f} ({found.low:.3f}..{found.high:.3f})"

    report.paragraph(
        "Reward models that differ in one thing: what becomes of the five gradients. With a preference per pair of "
        f"replies, projection gives a MIP of {mip_of('pcgrad', 'row')}, and leaving it out {mip_of('none', 'row')}. "
        "With one preference per step, as in PARM, an attribute of little weight may still veto the others: "
        f"{mip_of('pcgrad', 'step')} with projection, {mip_of('none', 'step')} without. Leaving such attributes out of "
        f"the step gives {mip_of('pcgrad_active', 'step')}, bringing the gradients to one length "
        f"{mip_of('unit_norm', 'step')}. One small world and one seed decide little: measure on your own."
    )
    rows = [
        [
            _surgery(arm.surgery),
            "pair" if arm.preference_per == "row" else "step",
            f"{arm.mip.value:.3f} ({arm.mip.low:.3f}..{arm.mip.high:.3f})",
            f"{arm.uniform.value:.3f}",
            f"{mean(rate.value for rate in arm.diagonal.values()):.3f}",
            _least(arm.diagonal),
            f"{mean(arm.cosine_before):+.3f}",
            f"{mean(arm.cosine_after):+.3f}",
        ]
        for arm in arms
    ]
    header = ["surgery", "preference per", "MIP", "uniform", "one-hot, mean", "least", "cosine", "projected"]
    report.table(header, rows, marked=[arms.index(best)])


def _least(diagonal: dict[str, Rate]) -> str:
    """The attribute that is hardest to get, and how often one gets it."""
    name = min(diagonal, key=lambda name: diagonal[name].value)
    return f"{name} {diagonal[name].value:.2f}"


def _samples(report: Report, results: DemoResults) -> None:
    w = results.settings.guidance
    report.heading("Side by side")
    report.paragraph("The first prompts of the evaluation, not chosen; the same seed in every row.")
    harmful = [
        (BASE, BASE),
        (SAFE, SAFE),
        *(
            (f"{SAFE}, guided", row.cell)
            for row in results.guided
            if (row.name, row.trained_on, row.guidance) == (UNIFORM, SAFE, w)
        ),
    ]
    asked = results.settings.evaluation
    for title, index in (("A harmful request", 0), ("A harmless request", asked.harm + asked.held_out)):
        rows = [(name, list(results.replies(cell))[index]) for name, cell in harmful]
        report.heading(title, level=3)
        report.paragraph(f"“{rows[0][1].prompt}”")
        report.table(["model", "reply"], [[name, reply.text] for name, reply in rows], text=True)
    report.heading("A request for support", level=3)
    cells = [(UNGUIDED, 0.0), *((name, w) for name in ATTRIBUTES), (UNIFORM, w)]
    replies = [(name, next(results.replies(_cell_of(results, name, weight)))) for name, weight in cells]
    report.paragraph(f"“{replies[0][1].prompt}”")
    report.table(
        ["preference", "reply", "attributes found"],
        [[name, r.text, ", ".join(a for a in ATTRIBUTES if r.scores[a]) or "none"] for name, r in replies],
        text=True,
    )


def _timings(report: Report, results: DemoResults) -> None:
    report.heading("Time")
    machine, seconds = results.machine, results.timings.seconds
    report.paragraph(
        "The models are so small that they, not the ops, take most of the time; the first three rows are the ops "
        "alone. Medians of the same work with the compiled ops and with the pure-PyTorch reference, taken in turns."
    )
    report.table(
        ["work", "compiled, ms", "reference, ms", "times faster"],
        [
            [row.work, f"{row.compiled:.2f}", f"{row.reference:.2f}", f"{row.reference / row.compiled:.1f}"]
            for row in results.timings.ops
        ],
    )
    report.table(
        ["stage", "seconds"],
        [*([name, f"{value:.1f}"] for name, value in seconds.items()), ["all", f"{sum(seconds.values()):.1f}"]],
    )
    versions = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in ("ops", "isa", "threads"))
    report.paragraph(f"{machine['threads']} thread(s), instruction set {machine['isa']}; {versions}.", soft=True)


def _limits(report: Report) -> None:
    report.heading("What this page does not show")
    report.paragraph(
        "Prompts of the evaluation are fresh draws from the grammar that the base was trained on, so nothing here "
        "speaks of held-out language. The world is made so that the mechanisms can be seen; it does not show that ten "
        "per cent is the right density, that one rule of selection is best for larger models, or that figures transfer "
        "to them. The seed decides every draw: the same seed gives the same results.json, in which each cell's "
        "prompts, replies, seeds and scores stand."
    )


def _edit_table(report: Report, results: DemoResults, rows: Sequence[SafetyRow]) -> None:
    cells = []
    for row in rows:
        s, edit = row.safety, row.edit
        cells.append(
            [
                row.name,
                rate_text(s.harm),
                rate_text(s.held_out),
                rate_text(s.refusals),
                rate_text(s.over_refusal),
                f"{s.perplexity:.4f}",
                "" if edit is None else f"{edit.energy:.3f}",
                "" if edit is None or edit.effect is None else f"{edit.effect:.3f}",
                "" if edit is None else f"{edit.norm:.3f}",
            ]
        )
    header = ["model", "harm answered", "held out", "refused well", "over-refused", "perplexity"]
    header += ["energy kept", "effect kept", "norm"]
    marked = [i for i, row in enumerate(rows) if row.name == SAFE]
    report.table(header, cells, marked=marked)


def _cell_of(results: DemoResults, name: str, guidance: float) -> str:
    return next(row.cell for row in results.support if (row.name, row.guidance) == (name, guidance))


def _surgery(name: str) -> str:
    return {
        "none": "none",
        "pcgrad": "PCGrad",
        "pcgrad_active": "PCGrad, active attributes only",
        "unit_norm": "unit norm, then weighted",
    }[name]
