"""The demo's second half: train reward models, and measure what guidance by them does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from prosocial_ext.arm import PBLoraConfig
from prosocial_ext.arm.trainer import ArmTrainingConfig, ArmTrainingLog, train_arm
from prosocial_ext.decoding import GuidedGenerator
from prosocial_ext.demo.context import Context
from prosocial_ext.demo.grammar import ATTRIBUTES
from prosocial_ext.demo.measure import measure_mip
from prosocial_ext.demo.names import BASE, RIGHT, SAFE, SHUFFLED, UNGUIDED, UNIFORM, ZERO
from prosocial_ext.demo.pairs import draw_pairs
from prosocial_ext.demo.results import ArmRow, GuidedRow, MipRow, SupportRow
from prosocial_ext.evaluation import Estimate, Rate, bootstrap_difference

__all__ = ["compare_surgeries", "guide", "measure_arm_of_base", "measure_sharp_arm", "train_reward_model"]

_ARM = "reward model"  # the headline's
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # q, k, v alone steer weakly
_EVEN = dict.fromkeys(ATTRIBUTES, 1 / len(ATTRIBUTES))
_STRONG = (4.0,)  # times the headline's guidance, for requests
_SURGERIES = (  # beside the headline's: PCGrad with a preference per pair
    ("none", "row"),
    ("none", "step"),
    ("pcgrad", "step"),
    ("pcgrad_active", "step"),
    ("unit_norm", "step"),
)


def train_reward_model(
    run: Context,
    folder: Path,
    surgery: str = "pcgrad",
    preference_per: str = "row",
    beta_r: float | None = None,
) -> tuple[Any, ArmTrainingLog]:
    """Train PBLoRA adapters on the model in ``folder``; the same pairs, preferences and first weights every time.

    Without ``beta_r`` the settings' one is taken.
    """
    from peft import get_peft_model

    settings = run.settings.arm
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed("arm"))
        arm = get_peft_model(
            model,
            PBLoraConfig(
                task_type="CAUSAL_LM",
                r1=settings.r1,
                r2=settings.r2,
                lora_alpha=settings.lora_alpha,
                lora_dropout=0.0,
                target_modules=_LINEAR,
                attributes=list(ATTRIBUTES),
            ),
        )
    log = train_arm(
        arm,
        draw_pairs(run.tokenizer, settings.pairs, run.seed("pairs")),
        ArmTrainingConfig(
            steps=settings.steps,
            pairs_per_attribute=settings.pairs_per_attribute,
            lr=settings.lr,
            betas=(0.9, 0.98),
            warmup=settings.warmup,
            beta_r=settings.beta_r if beta_r is None else beta_r,
            dirichlet=settings.dirichlet,
            preference_per=preference_per,
            surgery=surgery,
            clip=1.0,
            seed=run.seed("arm"),
        ),
        pad_token_id=run.tokenizer.pad_token_id,
        progress=run.progress,
    )
    arm.eval()
    run.say(
        f"a reward model of {sum(p.numel() for p in arm.parameters() if p.requires_grad):,} parameters on "
        f"{folder.name}/ ({surgery}, a preference per {preference_per}), {settings.steps} steps: pairs ranked right "
        f"{min(log.pair_accuracy.values()):.3f} or better"
    )
    return arm, log


def guide(run: Context, safe: LlamaForCausalLM, arm: Any, log: ArmTrainingLog) -> None:
    """Measure the headline's reward model: every preference, its controls, and requests under guidance."""
    results, w = run.results, run.settings.guidance
    guided, zero = run.generator(safe, arm), run.generator(safe, copy.deepcopy(safe))
    unguided = _support(run, UNGUIDED, 0.0, run.generator(safe), None)
    weights = [w, *(x * w for x in (0.5, 2.0, 4.0, 8.0, 16.0) if run.settings.full)]
    for weight in run.bar(weights, "guide"):
        scores = {RIGHT: _support(run, RIGHT, weight, guided, run.people)}
        for attribute in ATTRIBUTES:
            _support(run, attribute, weight, guided, {attribute: 1.0}, attribute)
        scores[UNIFORM] = _support(run, UNIFORM, weight, guided, _EVEN)
        scores[SHUFFLED] = _support(run, SHUFFLED, weight, guided, run.people.roll(1, dims=0))  # nobody keeps their own
        scores[ZERO] = _support(run, ZERO, weight, zero, None)
        if weight == w:
            scores[UNGUIDED] = unguided
        mine = (run.people * scores[RIGHT]).sum(dim=1)
        for name, flags in scores.items():
            theirs = (run.people * flags).sum(dim=1)
            shortfall = None if name == RIGHT else bootstrap_difference(mine, theirs)
            at = 0.0 if name == UNGUIDED else weight
            results.mip.append(MipRow(name, weight, _cell(name, at), measure_mip(run.people, flags), shortfall))
    diagonal = {name: results.support_of(name, w).rates[name] for name in ATTRIBUTES}
    _arm_row(run, _ARM, SAFE, arm, log, results.mip_of(RIGHT, w), results.mip_of(UNIFORM, w), diagonal)
    for name, preference, weight in (
        (UNIFORM, _EVEN, w),
        ("one-hot", run.one_hots(), w),
        *((UNIFORM, _EVEN, x * w) for x in _STRONG if run.settings.full),
    ):
        _guided_requests(run, name, SAFE, guided, weight, preference)
    rates = ", ".join(f"{rate.value:.2f}" for rate in diagonal.values())
    run.say(f"one-hot preferences give {rates} of their own attribute at guidance {w:g}")


def compare_surgeries(run: Context, safe: LlamaForCausalLM) -> None:
    """Train reward models that differ from the headline's by their surgery alone, and measure how well each guides."""
    for surgery, preference_per in run.bar(list(_SURGERIES), "surgeries"):
        name = f"{surgery}, a preference per {preference_per}"
        arm, log = train_reward_model(run, run.out / "base-safe", surgery, preference_per)
        _measured_arm(run, name, SAFE, run.generator(safe, arm), log)


def measure_arm_of_base(run: Context, safe: LlamaForCausalLM) -> None:
    """Train a reward model on the base as it was, harm and all, and let it guide the edited model."""
    arm, log = train_reward_model(run, run.out / "base")
    guided = run.generator(safe, arm)
    _measured_arm(run, "trained on the base", BASE, guided, log)
    for weight in (1.0, *_STRONG):
        _guided_requests(run, UNIFORM, BASE, guided, weight * run.settings.guidance, _EVEN)


def measure_sharp_arm(run: Context, safe: LlamaForCausalLM) -> None:
    """Train a reward model with large margins, which a small beta_r asks for, and guide with it until replies break."""
    beta_r = run.settings.arm.beta_r / 10
    arm, log = train_reward_model(run, run.out / "base-safe", beta_r=beta_r)
    guided = run.generator(safe, arm)
    name = f"beta_r {beta_r:g}"
    _measured_arm(run, name, SAFE, guided, log)
    for weight in run.bar([x * run.settings.guidance for x in (0.25, 0.5, 1.0, 2.0, 4.0)], "guide sharply"):
        for attribute in ATTRIBUTES:
            cell = f"{_cell(attribute, weight)}, {name}, sweep"
            attributes, _ = run.support(cell, guided, weight, {attribute: 1.0})
            run.results.sharp.append(SupportRow(attribute, weight, attribute, cell, attributes))


def _support(
    run: Context, name: str, w: float, generator: GuidedGenerator, preference: Any, wanted: str | None = None
) -> Tensor:
    """Add one row of the attribute table; return its flags, float64 [n, k]."""
    cell = _cell(name, w)
    attributes, flags = run.support(cell, generator, w, preference)
    run.results.support.append(SupportRow(name, w, wanted, cell, attributes))
    return flags


def _guided_requests(
    run: Context, name: str, trained_on: str, generator: GuidedGenerator, w: float, preference: Any
) -> None:
    cell = f"requests, {_cell(name, w)}, reward model on {trained_on}"
    safety = run.requests(cell, generator, w, preference)
    run.results.guided.append(GuidedRow(name, trained_on, w, cell, safety))


def _measured_arm(run: Context, name: str, trained_on: str, generator: GuidedGenerator, log: ArmTrainingLog) -> None:
    w = run.settings.guidance
    mips = {}
    for whose, preference in ((RIGHT, run.people), (UNIFORM, _EVEN)):
        _, flags = run.support(f"{_cell(whose, w)}, {name}", generator, w, preference)
        mips[whose] = measure_mip(run.people, flags)
    diagonal = {a: run.support(f"{_cell(a, w)}, {name}", generator, w, {a: 1.0})[0].rates[a] for a in ATTRIBUTES}
    _arm_row(run, name, trained_on, generator.arm, log, mips[RIGHT], mips[UNIFORM], diagonal)


def _arm_row(
    run: Context,
    name: str,
    trained_on: str,
    arm: Any,
    log: ArmTrainingLog,
    mip: Estimate,
    uniform: Estimate,
    diagonal: dict[str, Rate],
) -> None:
    run.results.arms.append(
        ArmRow(
            name=name,
            trained_on=trained_on,
            surgery=log.config["surgery"],
            preference_per=log.config["preference_per"],
            beta_r=log.config["beta_r"],
            trainable=sum(p.numel() for p in arm.parameters() if p.requires_grad),
            pair_accuracy=log.pair_accuracy,
            loss=log.loss,
            cosine_before=log.cosine_before,
            cosine_after=log.cosine_after,
            conflicts=log.conflicts,
            mip=mip,
            uniform=uniform,
            diagonal=diagonal,
        )
    )


def _cell(name: str, w: float) -> str:
    return f"{name}, guidance {w:g}"
