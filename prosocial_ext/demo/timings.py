"""The same work with the compiled ops and with the reference, at the demo's own sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM

from prosocial_ext import ops
from prosocial_ext.demo.context import Context, HarmCopy
from prosocial_ext.demo.grammar import ATTRIBUTES
from prosocial_ext.demo.results import OpTiming
from prosocial_ext.direg import harm_subtracted

__all__ = ["time_ops"]

_ROUNDS = 5


def time_ops(run: Context, base: LlamaForCausalLM, harm: HarmCopy, safe: LlamaForCausalLM, arm: Any) -> None:
    """Take the medians and keep them in the run's timings."""
    rows, words, k = len(run.prompts.support), len(run.tokenizer), len(ATTRIBUTES)
    generator = torch.Generator().manual_seed(run.seed("timings"))
    logits, guide = (torch.randn(rows, words, generator=generator) for _ in range(2))
    trainable = sum(p.numel() for p in arm.parameters() if p.requires_grad)
    gradients = torch.randn(k, trainable, generator=generator)
    guided = run.generator(safe, arm)

    def edit() -> None:
        with harm_subtracted(base, base, harm.model, density=run.settings.density):
            pass

    def reply() -> None:
        preference = run.people
        guided.generate(run.prompts.support, preference=preference, guidance=1.0, max_new_tokens=48, seed=0)

    work: list[tuple[str, Callable[[], Any], int]] = [
        (f"edit {run.results.parameters:,} weights and undo it", edit, 1),
        (f"project {k} gradients of {trainable:,}", lambda: ops.project_conflicts(gradients, seed=0), 1),
        (f"draw {rows} guided tokens of {words}", lambda: ops.guided_sample(logits, guide, seed=0), 10),
        (f"{rows} guided replies, models and all", reply, 1),
    ]
    for name, call, repeats in work:
        taken: dict[str, list[float]] = {"compiled": [], "reference": []}
        for _ in range(_ROUNDS if call is not reply else 1):
            for backend, times in taken.items():
                with ops.backend(backend):
                    start = time.perf_counter()
                    for _ in range(repeats):
                        call()
                    times.append(1e3 * (time.perf_counter() - start) / repeats)
        run.results.timings.ops.append(OpTiming(name, *(statistics.median(times) for times in taken.values())))
