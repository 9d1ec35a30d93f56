"""The demo's first half: tune harm copies, take harm back out of the base, and measure many doses and controls."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from prosocial_ext.demo.context import Context, HarmCopy
from prosocial_ext.demo.corpus import Encoded, encode
from prosocial_ext.demo.grammar import (
    HELD_OUT,
    TUNED_ON,
    draw_harm,
    draw_howto,
    draw_support,
    howto_example,
    support_example,
)
from prosocial_ext.demo.names import (
    ADAM,
    ADAM_COPY,
    BASE,
    BENIGN,
    DENSE,
    HARM_COPY,
    LARGEST,
    RANDOM,
    SAFE,
    SALIENT,
    SGD,
    edit_name,
)
from prosocial_ext.demo.results import Edit, SafetyRow
from prosocial_ext.demo.settings import HarmSettings
from prosocial_ext.demo.training import reply_loss, train_harm_copy
from prosocial_ext.direg import (
    gradient_importance,
    harm_by_tensor,
    harm_subtracted,
    harm_vector_report,
    subtract_harm_,
)

__all__ = ["measure_edits", "remove_harm", "tune_copies"]

_GRADIENT_BATCHES = 8  # of 64 harmful answers


def tune_copies(run: Context, base: LlamaForCausalLM) -> dict[str, HarmCopy]:
    """Return two harm copies, which only the optimiser tells apart, and a copy tuned alike on harmless answers."""
    random = Random(run.seed("harm pairs"))
    count = max(run.settings.harm.pairs, _GRADIENT_BATCHES * 64)
    harmful = encode(run.tokenizer, [howto_example(random, draw_harm(random, TUNED_ON)) for _ in range(count)])
    benign = encode(
        run.tokenizer,
        [
            support_example(random, draw_support(random)) if i % 2 else howto_example(random, draw_howto(random))
            for i in range(count)
        ],
    )

    def tuned(data: Encoded, settings: HarmSettings) -> HarmCopy:
        model = train_harm_copy(base, data, settings, run.seed("harm"), run.progress)[0]
        middle = copy.deepcopy(base)
        with harm_subtracted(middle, base, model, density=1.0, scale=0.5):
            gradient = gradient_importance(middle, reply_loss, harmful.batches(64)[:_GRADIENT_BATCHES])
        return HarmCopy(model, gradient)

    copies = {
        SGD: tuned(harmful, run.settings.harm),
        ADAM: tuned(harmful, run.settings.adam_harm),
        BENIGN: tuned(benign, run.settings.harm),
    }
    run.save(copies[SGD].model, "harm")
    density = run.settings.density
    for name in (SGD, ADAM):
        run.results.tensors[name] = harm_by_tensor(base, copies[name].model, density=density)
    energies = [sum(t.selected_energy for t in run.results.tensors[name].values()) for name in (SGD, ADAM)]
    run.say(
        f"harm copies on {len(TUNED_ON)} of {len(TUNED_ON) + len(HELD_OUT)} categories, "
        f"{run.settings.harm.steps} steps; the largest {density:.0%} hold {energies[0]:.0%} of the vector's energy "
        f"(SGD), {energies[1]:.0%} (AdamW)"
    )
    return copies


def remove_harm(run: Context, base: LlamaForCausalLM, copies: dict[str, HarmCopy]) -> LlamaForCausalLM:
    """Return the base without the SGD copy's largest entries, the headline edit."""
    settings, results = run.settings, run.results
    safe = copy.deepcopy(base)
    edit = subtract_harm_(safe, base, copies[SGD].model, density=settings.density, scale=settings.scale)
    results.edited, results.unchanged = int(edit.kept.sum()), int(edit.unchanged.sum())
    run.save(safe, "base-safe")
    run.say(
        f"edited {results.edited:,} of {results.parameters:,} entries (density {settings.density:g}, scale "
        f"{settings.scale:g}), {results.unchanged:,} unchanged after rounding, threshold "
        f"{float(edit.threshold[0]):.2e}"
    )
    return safe


@dataclass(frozen=True)
class _Dose:
    """An edit to measure; without a scale, as much is subtracted as in the headline edit, by norm."""

    copy: str
    rule: str
    density: float
    scale: float | None


def _doses(run: Context) -> list[_Dose]:
    """The edits of the run, the headline first: others are matched to it."""
    density, scale, full = run.settings.density, run.settings.scale, run.settings.full
    doses = [_Dose(SGD, LARGEST, density, scale)]
    # the dose of the harm vector: how many entries, how much of them
    scales = [x * scale for x in ((0.5, 1.0, 2.0, 3.0) if full else (0.5, 1.0, 2.0))]
    for d in (0.001, 0.01, density):
        doses += [_Dose(SGD, LARGEST, d, s) for s in (scales if full or d == density else [scale])]
    doses += [_Dose(SGD, DENSE, 1.0, s) for s in (scales if full else [scale])]
    # what only looks like it: other entries, and another vector
    doses += [_Dose(SGD, RANDOM, density, s) for s in ((scale, None) if full else (scale,))]
    doses += [_Dose(BENIGN, LARGEST, density, s) for s in ((scale, None) if full else (None,))]
    # two rules at one budget, on both copies
    doses += [_Dose(SGD, SALIENT, density, scale)]
    doses += [_Dose(ADAM, rule, density, scale) for rule in (LARGEST, SALIENT)]
    doses += [_Dose(ADAM, DENSE, 1.0, scale)]
    if full:
        doses += [_Dose(copy, SALIENT, 0.01, s * scale) for copy in (SGD, ADAM) for s in (1.0, 2.0)]
        doses += [_Dose(ADAM, LARGEST, 0.01, scale), _Dose(ADAM, RANDOM, density, scale)]
        doses += [_Dose(ADAM, rule, density, 2.0 * scale) for rule in (LARGEST, SALIENT)]
        doses += [_Dose(ADAM, DENSE, 1.0, 0.5 * scale)]
    return list(dict.fromkeys(doses))


def measure_edits(run: Context, base: LlamaForCausalLM, copies: dict[str, HarmCopy]) -> None:
    """Measure the base, the harm copies and every edit, one row each."""
    _row(run, BASE, base, None)
    _row(run, HARM_COPY, copies[SGD].model, None)
    _row(run, ADAM_COPY, copies[ADAM].model, None)
    edited, reference = copy.deepcopy(base), None
    for dose in run.bar(_doses(run), "measure edits"):
        tuned = copies[dose.copy]
        importance = _importance(run, base, tuned, dose.rule)
        report = harm_vector_report(
            base, tuned.model, density=dose.density, importance=importance, gradient=tuned.gradient
        )
        norm_at_1 = report.norm * report.energy**0.5
        scale = dose.scale
        if scale is None:
            assert reference is not None  # the headline comes first
            scale = reference / norm_at_1
        edit = Edit(
            copy=dose.copy,
            rule=dose.rule,
            density=dose.density,
            scale=scale,
            energy=report.energy,
            effect=None if dose.copy == BENIGN else report.effect,
            norm=scale * norm_at_1,
        )
        name = edit_name(dose.copy, dose.rule, dose.density, scale) if reference is not None else SAFE
        if reference is None:
            reference = edit.norm
        with harm_subtracted(edited, base, tuned.model, density=dose.density, scale=scale, importance=importance):
            _row(run, name, edited, edit)
    before, after = run.results.safety_of(BASE), run.results.safety_of(SAFE)
    run.say(
        f"harmful answers {before.harm.value:.3f} -> {after.harm.value:.3f}; {len(run.results.safety)} models measured"
    )


def _row(run: Context, name: str, model: LlamaForCausalLM, edit: Edit | None) -> None:
    run.results.safety.append(SafetyRow(name, edit, run.requests(name, run.generator(model))))


def _importance(run: Context, base: LlamaForCausalLM, tuned: HarmCopy, rule: str) -> dict[str, Tensor] | None:
    """What the rule ranks entries by beside their size; None for size alone."""
    if rule == SALIENT:
        return tuned.gradient
    if rule != RANDOM:
        return None
    generator = torch.Generator().manual_seed(run.seed("random entries"))
    theirs = dict(tuned.model.named_parameters())
    # abs(difference) times this is uniform: top-m then picks at random among the entries that differ
    return {
        name: torch.rand(p.shape, generator=generator) / (theirs[name] - p).detach().abs().clamp(min=1e-30)
        for name, p in base.named_parameters()
    }
