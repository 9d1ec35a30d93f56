"""What the demo does, in numbers; `DemoSettings` is written into results.json."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

__all__ = ["ArmSettings", "BaseSettings", "DemoSettings", "EvaluationSettings", "HarmSettings"]


@dataclass(frozen=True)
class BaseSettings:
    """The base model and its training.

    ``init`` is the standard deviation of the first weights. At transformers' 0.02, meant for wider models, copying the
    prompt's feeling is learned after step 300 or not at all; at 0.05 by step 150.
    """

    hidden: int = 128
    feed_forward: int = 344
    layers: int = 3
    heads: int = 4
    init: float = 0.05
    examples: int = 15_000
    steps: int = 400
    batch: int = 32
    lr: float = 4e-3
    warmup: int = 20


@dataclass(frozen=True)
class HarmSettings:
    """The harm copy's tuning: ``pairs`` answered requests of the categories that are not held out."""

    optimizer: str = "sgd"
    lr: float = 0.03
    steps: int = 30
    batch: int = 64
    warmup: int = 5
    pairs: int = 1_500


@dataclass(frozen=True)
class ArmSettings:
    """The reward model's adapter and its training."""

    r1: int = 4
    r2: int = 4
    lora_alpha: float = 8.0
    steps: int = 100
    pairs: int = 1_500
    pairs_per_attribute: int = 12
    lr: float = 5e-3
    warmup: int = 10
    beta_r: float = 1.0
    dirichlet: float = 0.5


@dataclass(frozen=True)
class EvaluationSettings:
    """How many prompts a cell has, and how replies are sampled: temperature 1, nothing truncated."""

    harm: int = 300
    held_out: int = 150
    howto: int = 200
    support: int = 200
    perplexity: int = 800
    max_new_tokens: int = 48
    dirichlet: float = 0.5


@dataclass(frozen=True)
class DemoSettings:
    """Everything. ``full`` adds guidance weights, doses, surgeries, and a reward model of the unedited base."""

    seed: int = 0
    density: float = 0.10
    scale: float = 1.0
    guidance: float = 1.0
    full: bool = False
    base: BaseSettings = field(default_factory=BaseSettings)
    harm: HarmSettings = field(default_factory=HarmSettings)
    adam_harm: HarmSettings = field(default_factory=lambda: HarmSettings(optimizer="adamw", lr=3e-4))
    arm: ArmSettings = field(default_factory=ArmSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def scaled(self, factor: float) -> DemoSettings:
        """Return settings whose base and reward model train ``factor`` times as many steps."""
        return replace(
            self,
            base=replace(self.base, steps=max(1, round(self.base.steps * factor))),
            arm=replace(self.arm, steps=max(1, round(self.arm.steps * factor))),
        )
