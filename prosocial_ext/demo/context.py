"""What the stages of a run share: settings, prompts, the results so far, and the housekeeping around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prosocial_ext.arm.preferences import sample_dirichlet
from prosocial_ext.decoding import GuidedGenerator
from prosocial_ext.demo.grammar import ATTRIBUTES
from prosocial_ext.demo.machine import describe_machine
from prosocial_ext.demo.measure import Attributes, Safety, draw_prompts, measure_safety, measure_support
from prosocial_ext.demo.results import DemoResults
from prosocial_ext.demo.settings import DemoSettings
from prosocial_ext.demo.tokenizer import build_tokenizer

__all__ = ["Context", "HarmCopy"]


@dataclass(frozen=True)
class HarmCopy:
    """A tuned copy of the base. ``gradient``: magnitudes of the harm loss's gradient half-way back from it, by name."""

    model: LlamaForCausalLM
    gradient: dict[str, Tensor]


class Context:
    """The state of one run."""

    def __init__(self, settings: DemoSettings, out: Path, progress: bool, say: Callable[[str], None]) -> None:
        self.settings, self.out, self.progress, self.say = settings, out, progress, say
        self.results = DemoResults(settings, describe_machine())
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer()
        self.prompts = draw_prompts(self.tokenizer, settings.evaluation, self.seed("prompts"))
        people = len(self.prompts.support)
        self.people = sample_dirichlet(people, len(ATTRIBUTES), settings.evaluation.dirichlet, self.seed("people"))
        self.results.preferences = self.people.tolist()

    def seed(self, purpose: str) -> int:
        """Return a seed for each purpose, so that more draws for one do not shift another."""
        return Random(f"{self.settings.seed} {purpose}").getrandbits(31)

    def save(self, model: LlamaForCausalLM, name: str) -> None:
        """Leave a model with its tokenizer in a folder of the run."""
        model.save_pretrained(self.out / name)
        self.tokenizer.save_pretrained(self.out / name)

    def bar(self, items: list[Any], description: str) -> Any:
        """Return the items, with a bar on the way through them."""
        return tqdm(items, desc=description, disable=not self.progress, leave=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the seconds of a stage."""
        start = time.perf_counter()
        yield
        self.results.timings.seconds[name] = time.perf_counter() - start

    def generator(self, model: Any, arm: Any = None) -> GuidedGenerator:
        """Return the guided loop for these two models."""
        return GuidedGenerator(model, arm, self.tokenizer)

    def requests(self, cell: str, generator: GuidedGenerator, guidance: float = 0.0, preference: Any = None) -> Safety:
        """Let a model answer the requests, keep its replies under ``cell``, and return the figures."""
        safety, generations = measure_safety(
            generator,
            self.prompts,
            self.settings.evaluation,
            self.seed("requests"),
            cell,
            guidance,
            preference,
        )
        self.results.generations += generations
        return safety

    def support(
        self, cell: str, generator: GuidedGenerator, guidance: float = 0.0, preference: Any = None
    ) -> tuple[Attributes, Tensor]:
        """Let a model answer the support prompts, keep its replies, and return figures and flags, float64 [n, k]."""
        attributes, flags, generations = measure_support(
            generator,
            self.prompts,
            self.settings.evaluation,
            self.seed("support"),
            cell,
            guidance,
            preference,
        )
        self.results.generations += generations
        return attributes, flags

    def one_hots(self) -> Tensor:
        """Preferences for the requests: row i wants attribute i modulo their number."""
        k, rows = len(ATTRIBUTES), len(self.prompts.categories) + len(self.prompts.howto)
        return torch.eye(k)[torch.arange(rows) % k]
