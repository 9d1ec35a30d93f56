"""The method from end to end: train a base, remove harm, train the reward model, guide; measure after every stage.

Every stage leaves a folder that the next one, or a user, can load: base/, harm/, base-safe/, arm/. Which replies and
figures were found is in generations.jsonl and results.json.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from prosocial_ext.arm import PBLoraConfig
from prosocial_ext.arm.preferences import sample_dirichlet
from prosocial_ext.arm.trainer import ArmTrainingConfig, ArmTrainingLog, train_arm
from prosocial_ext.decoding import GuidedGenerator
from prosocial_ext.demo.checks import check_claims
from prosocial_ext.demo.corpus import encode
from prosocial_ext.demo.grammar import ATTRIBUTES, TUNED_ON, draw_example, draw_harm, howto_example
from prosocial_ext.demo.machine import describe_machine
from prosocial_ext.demo.measure import (
    Prompts,
    Replies,
    draw_prompts,
    generate,
    mean,
    measure_mip,
    measure_safety,
    measure_support,
)
from prosocial_ext.demo.names import (
    ADAM_COPY,
    ADAM_LARGEST,
    ADAM_SALIENT,
    BASE,
    HARM_COPY,
    RANDOM,
    RIGHT,
    SAFE,
    SHUFFLED,
    UNGUIDED,
    UNIFORM,
    ZERO,
)
from prosocial_ext.demo.pairs import draw_pairs
from prosocial_ext.demo.results import ArmTraining, DemoResults, MipRow, SafetyRow, SupportRow
from prosocial_ext.demo.scorers import score_request
from prosocial_ext.demo.settings import DemoSettings, HarmSettings
from prosocial_ext.demo.tokenizer import build_tokenizer
from prosocial_ext.demo.training import reply_loss, train_base, train_harm_copy
from prosocial_ext.direg import gradient_importance, harm_subtracted, harm_vector_report, subtract_harm_
from prosocial_ext.evaluation import rate

__all__ = ["run_demo"]

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # q, k, v alone steer weakly
_GRADIENT_BATCHES = 8  # of 64 harmful answers


def run_demo(
    settings: DemoSettings, out: Path, *, progress: bool = True, say: Callable[[str], None] = lambda line: None
) -> DemoResults:
    """Run the demo and write its artefacts to ``out``, over those of an earlier run.

    Args:
        settings: What to do.
        out: A folder, made if there is none.
        progress: Show bars.
        say: Is told in one line what each stage did, as soon as it is done.

    Returns:
        All figures. For one seed and one number of threads they are the same in every run on one machine, but for the
        seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _quiet_transformers():
        return _Run(settings, out, progress, say).run()


class _Run:
    """One run: the state that the stages hand on."""

    def __init__(self, settings: DemoSettings, out: Path, progress: bool, say: Callable[[str], None]) -> None:
        self.settings, self.out, self.progress, self.say = settings, out, progress, say
        self.results = DemoResults(settings, describe_machine())
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer()
        self.prompts: Prompts = draw_prompts(self.tokenizer, settings.evaluation, self._seed("prompts"))
        self.log: list[dict[str, Any]] = []

    def run(self) -> DemoResults:
        with self._stage("train the base"):
            base = self._train_base()
        with self._stage("tune harm copies"):
            harm, adam = self._tune_harm_copies(base)
        with self._stage("remove harm"):
            safe = self._remove_harm(base, harm)
        with self._stage("measure safety"):
            self._measure_safety(base, harm, safe, adam)
        del base, harm, adam
        with self._stage("train the reward model"):
            arm = self._train_arm("pcgrad", self.out / "arm")
        weights = [self.settings.guidance] + [0.5, 2.0, 4.0] * self.settings.full
        with self._stage("guide"):
            self._measure_guidance(safe, arm, weights)
        if self.settings.full:
            with self._stage("reward model without projection"):
                self._measure_guidance(safe, self._train_arm("none", None), [self.settings.guidance], "no projection")
        self.results.checks = check_claims(self.results)
        self.results.save(self.out / "results.json")
        with (self.out / "generations.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in self.log)
        return self.results

    # ---- the stages

    def _train_base(self) -> LlamaForCausalLM:
        random = Random(self._seed("corpus"))
        settings = self.settings.base
        corpus = encode(self.tokenizer, [draw_example(random) for _ in range(settings.examples)])
        base, losses = train_base(self.tokenizer, corpus, settings, self._seed("base"), self.progress)
        tenth = max(1, len(losses) // 10)
        self.results.base_loss = [sum(part) / tenth for part in (losses[:tenth], losses[-tenth:])]
        self.results.parameters = sum(p.numel() for p in base.parameters())
        self._save(base, "base")
        first, last = self.results.base_loss
        self.say(
            f"a Llama of {self.results.parameters:,} parameters and {len(self.tokenizer)} words, "
            f"{settings.steps} steps of {settings.batch}: loss {first:.3f} -> {last:.3f}"
        )
        return base

    def _tune_harm_copies(self, base: LlamaForCausalLM) -> tuple[LlamaForCausalLM, _AdamCopy]:
        random = Random(self._seed("harm pairs"))
        count = max(self.settings.harm.pairs, _GRADIENT_BATCHES * 64)
        data = encode(self.tokenizer, [howto_example(random, draw_harm(random, TUNED_ON)) for _ in range(count)])

        def tune(settings: HarmSettings) -> LlamaForCausalLM:
            return train_harm_copy(base, data, settings, self._seed("harm"), self.progress)[0]

        harm, adam = tune(self.settings.harm), tune(self.settings.adam_harm)
        self._save(harm, "harm")
        middle = copy.deepcopy(base)
        with harm_subtracted(middle, base, adam, density=1.0, scale=0.5):
            gradient = gradient_importance(middle, reply_loss, data.batches(64)[:_GRADIENT_BATCHES])
        density = self.settings.density
        self.results.vectors = {
            SAFE: harm_vector_report(base, harm, density=density, gradient=gradient),
            ADAM_LARGEST: harm_vector_report(base, adam, density=density, gradient=gradient),
            ADAM_SALIENT: harm_vector_report(base, adam, density=density, importance=gradient, gradient=gradient),
        }
        self.say(
            f"on {len(TUNED_ON)} of 6 categories, {self.settings.harm.steps} steps; the largest {density:.0%} hold "
            f"{self.results.vectors[SAFE].energy:.0%} of the vector's energy (SGD), "
            f"{self.results.vectors[ADAM_LARGEST].energy:.0%} (AdamW)"
        )
        return harm, (adam, gradient)

    def _remove_harm(self, base: LlamaForCausalLM, harm: LlamaForCausalLM) -> LlamaForCausalLM:
        safe = copy.deepcopy(base)
        edit = subtract_harm_(safe, base, harm, density=self.settings.density, scale=self.settings.scale)
        self.results.edited, self.results.unchanged = int(edit.kept.sum()), int(edit.unchanged.sum())
        self._save(safe, "base-safe")
        self.say(
            f"edited {self.results.edited:,} of {self.results.parameters:,} entries "
            f"(density {self.settings.density:g}, scale {self.settings.scale:g}), {self.results.unchanged:,} unchanged "
            f"after rounding, threshold {float(edit.threshold[0]):.2e}"
        )
        return safe

    def _measure_safety(
        self, base: LlamaForCausalLM, harm: LlamaForCausalLM, safe: LlamaForCausalLM, adam: _AdamCopy
    ) -> None:
        adam_copy, gradient = adam
        scale, density = self.settings.scale, self.settings.density
        edits: list[tuple[str, LlamaForCausalLM, dict[str, Any] | None]] = [
            (BASE, base, None),
            (HARM_COPY, harm, None),
            (SAFE, safe, None),
        ]
        doses = [0.5, 2.0, 3.0] if self.settings.full else [0.5, 2.0]
        edits += [(f"{SAFE}, scale {dose * scale:g}", harm, {"scale": dose * scale}) for dose in doses]
        if self.settings.full:
            edits += [(f"{SAFE}, density {d:g}", harm, {"density": d}) for d in (0.001, 0.01, 1.0)]
        edits += [
            (RANDOM, harm, {"importance": self._random_importance(base, harm)}),
            (ADAM_COPY, adam_copy, None),
            (ADAM_LARGEST, adam_copy, {}),
            (ADAM_SALIENT, adam_copy, {"importance": gradient}),
        ]
        edited = copy.deepcopy(base)
        for name, model, edit in self._bar(edits, "measure safety"):
            if edit is None:
                self._safety_row(name, model)
                continue
            with harm_subtracted(edited, base, model, **{"scale": scale, "density": density, **edit}):
                self._safety_row(name, edited)
        before, after = self.results.safety_of(BASE), self.results.safety_of(SAFE)
        self.say(f"harmful answers {before.harm.value:.3f} -> {after.harm.value:.3f}; {len(edits)} models measured")

    def _train_arm(self, surgery: str, folder: Path | None) -> Any:
        from peft import get_peft_model

        settings = self.settings.arm
        model = LlamaForCausalLM.from_pretrained(self.out / "base-safe")  # trained on what it will guide
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed("arm"))
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
            draw_pairs(self.tokenizer, settings.pairs, self._seed("pairs")),
            ArmTrainingConfig(
                steps=settings.steps,
                pairs_per_attribute=settings.pairs_per_attribute,
                lr=settings.lr,
                betas=(0.9, 0.98),
                warmup=settings.warmup,
                beta_r=settings.beta_r,
                dirichlet=settings.dirichlet,
                preference_per="row",
                surgery=surgery,
                clip=1.0,
                seed=self._seed("arm"),
            ),
            pad_token_id=self.tokenizer.pad_token_id,
            progress=self.progress,
        )
        arm.eval()
        if folder is not None:
            arm.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        training = _arm_training(arm, surgery, log)
        self.results.arms.append(training)
        self.say(
            f"{training.trainable:,} parameters, {settings.steps} steps of {len(ATTRIBUTES)} x "
            f"{settings.pairs_per_attribute} pairs ({surgery}): pairs ranked right "
            f"{min(training.pair_accuracy.values()):.3f} or better"
        )
        return arm

    def _measure_guidance(self, safe: LlamaForCausalLM, arm: Any, weights: list[float], note: str = "") -> None:
        guided = GuidedGenerator(safe, arm, self.tokenizer)
        zero = GuidedGenerator(safe, copy.deepcopy(safe), self.tokenizer)
        suffix = f" ({note})" if note else ""
        people = len(self.prompts.support)
        right = sample_dirichlet(people, len(ATTRIBUTES), self.settings.evaluation.dirichlet, self._seed("people"))
        uniform = dict.fromkeys(ATTRIBUTES, 1 / len(ATTRIBUTES))
        if not note:
            unguided = self._support_row(UNGUIDED, 0.0, GuidedGenerator(safe, None, self.tokenizer), None)
        for w in self._bar(weights, "guide"):
            scores = {RIGHT + suffix: self._score_support(RIGHT + suffix, w, guided, right)[1]}
            for attribute in ATTRIBUTES:
                self._support_row(attribute + suffix, w, guided, {attribute: 1.0}, attribute)
            scores[UNIFORM + suffix] = self._support_row(UNIFORM + suffix, w, guided, uniform)
            if not note:
                shuffled = right.roll(1, dims=0)
                scores[SHUFFLED] = self._score_support(SHUFFLED, w, guided, shuffled)[1]
                scores[ZERO] = self._support_row(ZERO, w, zero, None)
                if w == weights[0]:
                    scores[UNGUIDED] = unguided
            mine = (right * scores[RIGHT + suffix]).sum(dim=1)
            for name, flags in scores.items():
                shortfall = None if name.startswith(RIGHT) else mean(mine - (right * flags).sum(dim=1))
                self.results.mip.append(MipRow(name, w, measure_mip(right, flags), shortfall))
        w = weights[0]
        if not note:
            for name, preference in ((UNIFORM, uniform), ("one-hot", self._one_hots())):
                self._guided_harm(f"{name}, guidance {w:g}", guided, w, preference)
        diagonal = [self.results.support_of(name + suffix, w).rates[name].value for name in ATTRIBUTES]
        self.say(f"one-hot preferences give {', '.join(f'{v:.2f}' for v in diagonal)} of their own attribute at {w:g}")

    # ---- one cell

    def _safety_row(self, name: str, model: LlamaForCausalLM) -> None:
        generator = GuidedGenerator(model, None, self.tokenizer)
        safety, replies = measure_safety(generator, self.prompts, self.settings.evaluation, self._seed("requests"))
        asked = [*self.prompts.harm, *self.prompts.held_out, *self.prompts.howto]
        self._keep(name, asked, replies)
        self.results.safety.append(SafetyRow(name, safety))

    def _support_row(
        self, name: str, w: float, generator: GuidedGenerator, preference: Any, wanted: str | None = None
    ) -> Tensor:
        attributes, flags = self._score_support(name, w, generator, preference)
        self.results.support.append(SupportRow(name, w, wanted, attributes))
        return flags

    def _score_support(self, name: str, w: float, generator: GuidedGenerator, preference: Any) -> tuple[Any, Tensor]:
        attributes, flags, replies = measure_support(
            generator, self.prompts, self.settings.evaluation, self._seed("support"), w, preference
        )
        self._keep(f"{name}, guidance {w:g}", self.prompts.support, replies)
        return attributes, flags

    def _guided_harm(self, name: str, generator: GuidedGenerator, w: float, preference: Any) -> None:
        asked = self.prompts.harm
        replies = generate(generator, asked, self.settings.evaluation, self._seed("requests"), w, preference)
        self._keep(f"harmful requests, {name}", asked, replies)
        scores = [score_request(*three) for three in zip(asked, replies.texts, replies.ended, strict=True)]
        self.results.guided_harm[name] = rate(score.complied for score in scores)

    def _one_hots(self) -> Tensor:
        """Row i of the harmful requests wants attribute i modulo their number."""
        k = len(ATTRIBUTES)
        return torch.eye(k)[torch.arange(len(self.prompts.harm)) % k]

    def _random_importance(self, base: LlamaForCausalLM, harm: LlamaForCausalLM) -> dict[str, Tensor]:
        """What makes top-m pick at random among the entries that differ: abs(difference) times this is uniform."""
        generator = torch.Generator().manual_seed(self._seed("random entries"))
        tuned = dict(harm.named_parameters())
        return {
            name: torch.rand(p.shape, generator=generator) / (tuned[name] - p).detach().abs().clamp(min=1e-30)
            for name, p in base.named_parameters()
        }

    # ---- housekeeping

    def _seed(self, purpose: str) -> int:
        """A seed for each purpose, so that more draws for one do not shift another."""
        return Random(f"{self.settings.seed} {purpose}").getrandbits(31)

    def _save(self, model: LlamaForCausalLM, name: str) -> None:
        model.save_pretrained(self.out / name)
        self.tokenizer.save_pretrained(self.out / name)

    def _keep(self, cell: str, prompts: list[str], replies: Replies) -> None:
        self.log += [
            {"cell": cell, "prompt": prompt, "reply": text, "ended": ended}
            for prompt, text, ended in zip(prompts, replies.texts, replies.ended, strict=True)
        ]

    def _bar(self, items: list[Any], description: str) -> Any:
        return tqdm(items, desc=description, disable=not self.progress, leave=False)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.results.seconds[name] = time.perf_counter() - start


_AdamCopy = tuple[LlamaForCausalLM, dict[str, Tensor]]  # the copy, and the harm loss's gradient half-way to it


def _arm_training(arm: Any, surgery: str, log: ArmTrainingLog) -> ArmTraining:
    """The training's log in the figures that the demo reports."""
    steps, k = len(log.loss), len(log.attributes)
    return ArmTraining(
        surgery=surgery,
        trainable=sum(p.numel() for p in arm.parameters() if p.requires_grad),
        pair_accuracy=log.pair_accuracy,
        negative_cosines=sum(log.conflicts) / (steps * k * (k - 1) / 2),
        mean_cosine=sum(log.cosine_before) / steps,
        mean_cosine_after=sum(log.cosine_after) / steps,
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the bars for files that take milliseconds here, and peft's use of a name that transformers deprecates."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
