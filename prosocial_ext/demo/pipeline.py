"""The method from end to end: train a base, remove harm, train the reward model, guide; measure after every stage.

Every stage leaves a folder that the next one, or a user, can load: base/, harm/, base-safe/, arm/. All figures and the
replies behind them are in results.json, what differs from run to run in timings.json.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

from transformers import LlamaForCausalLM

from prosocial_ext.demo.checks import check_claims
from prosocial_ext.demo.context import Context
from prosocial_ext.demo.corpus import encode
from prosocial_ext.demo.grammar import draw_example
from prosocial_ext.demo.guiding import (
    compare_surgeries,
    guide,
    measure_arm_of_base,
    measure_sharp_arm,
    train_reward_model,
)
from prosocial_ext.demo.names import SGD
from prosocial_ext.demo.removal import measure_edits, remove_harm, tune_copies
from prosocial_ext.demo.results import DemoResults
from prosocial_ext.demo.settings import DemoSettings
from prosocial_ext.demo.timings import time_ops
from prosocial_ext.demo.training import train_base
from prosocial_ext.quiet import quiet_transformers

__all__ = ["run_demo"]


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
        timings.
    """
    out.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        run = Context(settings, out, progress, say)
        with run.stage("train the base"):
            base = _train_base(run)
        with run.stage("tune harm copies"):
            copies = tune_copies(run, base)
        with run.stage("remove harm"):
            safe = remove_harm(run, base, copies)
        with run.stage("measure edits"):
            measure_edits(run, base, copies)
        with run.stage("train the reward model"):
            arm, log = train_reward_model(run, out / "base-safe")
            arm.save_pretrained(out / "arm")
            run.tokenizer.save_pretrained(out / "arm")
        with run.stage("guide"):
            guide(run, safe, arm, log)
        with run.stage("time the ops"):
            time_ops(run, base, copies[SGD], safe, arm)
        if settings.full:
            with run.stage("compare surgeries"):
                compare_surgeries(run, safe)
            with run.stage("reward model of the base"):
                measure_arm_of_base(run, safe)
            with run.stage("reward model of large margins"):
                measure_sharp_arm(run, safe)
    run.results.checks = check_claims(run.results)
    run.results.save(out)
    return run.results


def _train_base(run: Context) -> LlamaForCausalLM:
    random = Random(run.seed("corpus"))
    settings, results = run.settings.base, run.results
    corpus = encode(run.tokenizer, [draw_example(random) for _ in range(settings.examples)])
    base, losses = train_base(run.tokenizer, corpus, settings, run.seed("base"), run.progress)
    tenth = max(1, len(losses) // 10)
    results.base_loss = [sum(part) / tenth for part in (losses[:tenth], losses[-tenth:])]
    results.parameters = sum(p.numel() for p in base.parameters())
    run.save(base, "base")
    first, last = results.base_loss
    run.say(
        f"a Llama of {results.parameters:,} parameters and {len(run.tokenizer)} words, "
        f"{settings.steps} steps of {settings.batch}: loss {first:.3f} -> {last:.3f}"
    )
    return base
