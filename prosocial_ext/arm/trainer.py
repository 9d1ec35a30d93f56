"""Training a PV-ARM: k attributes, k gradients per step, conflicts projected away, one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prosocial_ext.arm.data import PreferencePair, collate, sequence_logprobs
from prosocial_ext.arm.loss import pairwise_loss
from prosocial_ext.arm.preferences import one_hot, sample_dirichlet
from prosocial_ext.arm.surgery import SURGERIES, combine_gradients
from prosocial_ext.reference import check

__all__ = ["ArmTrainingConfig", "ArmTrainingLog", "pair_accuracy", "train_arm"]


@dataclass(frozen=True)
class ArmTrainingConfig:
    """How a reward model is trained. Defaults are PARM's where it has them (lr, beta_r, Dirichlet, warm-up).

    Attributes:
        steps: optimiser steps.
        pairs_per_attribute: fresh pairs of every attribute per step.
        lr, betas, weight_decay, warmup, clip: AdamW, linear warm-up, cosine to zero, gradient-norm clip.
        beta_r: scale of the margin in the loss.
        dirichlet: concentration of the sampled preferences.
        preference_per: "row" draws a preference per pair, "step" one for the whole step (PARM's way). With one per
            step the weights alpha_i apply after projection, so an attribute of little weight still has its veto.
        surgery: what becomes of the k gradients, of `arm.surgery.SURGERIES`. "pcgrad_active" and "unit_norm" need one
            preference per step.
        active: the least alpha of an attribute that takes part, in [0, 1/k).
        seed: of batches, preferences and projection orders; step s uses (seed, s) alone.
    """

    steps: int = 100
    pairs_per_attribute: int = 12
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    warmup: int = 20
    clip: float = 1.0
    beta_r: float = 0.01
    dirichlet: float = 0.5
    preference_per: str = "row"
    surgery: str = "pcgrad"
    active: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check.choice("preference_per", self.preference_per, ("row", "step"))
        check.choice("surgery", self.surgery, SURGERIES)
        if self.surgery in ("pcgrad_active", "unit_norm") and self.preference_per != "step":
            remedy = "With a preference per row every attribute's gradient already carries its own weights."
            check.fail("preference_per", f'be "step" with surgery="{self.surgery}"', self.preference_per, remedy)
        check.integer("steps", self.steps, 1, 1 << 40, "be an int >= 1")
        check.integer("pairs_per_attribute", self.pairs_per_attribute, 1, 1 << 40, "be an int >= 1")


@dataclass
class ArmTrainingLog:
    """What happened in training.

    Per step: the weighted loss, the mean cosine of the attribute pairs before and after projection, the conflicting
    pairs. At the end: each attribute's pair accuracy under its own one-hot preference.
    """

    config: dict[str, Any]
    attributes: list[str]
    loss: list[float] = field(default_factory=list)
    cosine_before: list[float] = field(default_factory=list)
    cosine_after: list[float] = field(default_factory=list)
    conflicts: list[int] = field(default_factory=list)
    pair_accuracy: dict[str, float] = field(default_factory=dict)


def train_arm(
    model: Any,
    datasets: Mapping[str, Sequence[PreferencePair]],
    config: ArmTrainingConfig,
    *,
    pad_token_id: int,
    progress: bool = True,
) -> ArmTrainingLog:
    """Train the adapter of a PBLoRA PeftModel in place.

    Args:
        model: ``get_peft_model(lm, PBLoraConfig(attributes=[...]))``, on any device.
        datasets: for every attribute of the adapter its own preference pairs.
        config: how.
        pad_token_id: fills up batches; never attended to.
        progress: show a bar.

    Returns:
        The log of the training.

    Raises:
        ValueError: the datasets' attributes are not the adapter's, or one is empty; ``active`` is 1/k or more.
    """
    attributes = model.base_model.attributes
    if sorted(datasets) != sorted(attributes) or not all(datasets.values()):
        check.fail("datasets", f"have pairs for each of {', '.join(attributes)}", sorted(datasets))
    if config.surgery == "pcgrad_active" and not 0 <= config.active < 1 / len(attributes):
        rule = f"be in [0, 1/k) = [0, {1 / len(attributes):g})"
        check.fail("active", rule, config.active, "Above, a step may have no attribute at all.")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, foreach=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, config))
    log = ArmTrainingLog(asdict(config), list(attributes))
    device = parameters[0].device
    model.train()
    bar = tqdm(range(config.steps), desc="PV-ARM", disable=not progress, leave=False)
    for step in bar:
        batches = _batches(datasets, attributes, config, step, pad_token_id, device)
        gradients, loss = _attribute_gradients(model, batches, parameters, config)
        weights = None if config.preference_per == "row" else torch.stack([weight[0] for _, _, weight in batches])
        update, stats = combine_gradients(
            gradients, weights, config.surgery, active=config.active, seed=config.seed * 1_000_003 + step
        )
        log.loss.append(loss)
        log.conflicts.append(int(stats.conflicts))
        log.cosine_before.append(_mean_pair(stats.cosines))
        log.cosine_after.append(_mean_pair(stats.cosines_after))
        for parameter, gradient in zip(parameters, update, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}", conflicts=log.conflicts[-1])
    log.pair_accuracy = {
        name: pair_accuracy(model, datasets[name][:200], one_hot(name), pad_token_id=pad_token_id)
        for name in attributes
    }
    return log


def _batches(
    datasets: Mapping[str, Sequence[PreferencePair]],
    attributes: Sequence[str],
    config: ArmTrainingConfig,
    step: int,
    pad_token_id: int,
    device: torch.device,
) -> list[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Each attribute's batch, its pairs' preferences [rows, k], and their weights: alpha of the attribute."""
    k, rows = len(attributes), config.pairs_per_attribute
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    draw = int(torch.randint(0, 2**62, (), generator=generator))
    per_row = config.preference_per == "row"
    alphas = sample_dirichlet(k * rows if per_row else 1, k, config.dirichlet, draw).to(device)
    batches = []
    for i, name in enumerate(attributes):
        pairs = datasets[name]
        drawn = [pairs[int(j)] for j in torch.randint(0, len(pairs), (rows,), generator=generator)]
        batch = {key: value.to(device) for key, value in collate(drawn, pad_token_id).items()}
        alpha = alphas[i * rows : (i + 1) * rows] if per_row else alphas.expand(rows, k)
        batches.append((batch, alpha, alpha[:, i]))
    return batches


def _attribute_gradients(
    model: Any,
    batches: Sequence[tuple[dict[str, Tensor], Tensor, Tensor]],
    parameters: Sequence[Tensor],
    config: ArmTrainingConfig,
) -> tuple[list[list[Tensor]], float]:
    """Each attribute's gradient as k lists of tensors, and the sum of the losses.

    With a preference per row alpha_i weighs the pair inside the loss; with one per step it applies after projection.
    """
    gradients, total = [], 0.0
    for batch, alpha, weight in batches:
        with model.preference(torch.cat([alpha, alpha])):  # chosen rows, then rejected ones
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logprobs = sequence_logprobs(logits, batch["labels"])
        chosen, rejected = logprobs.chunk(2)
        inside = weight if config.preference_per == "row" else None
        loss = pairwise_loss(chosen, rejected, config.beta_r, inside)
        gradients.append(list(torch.autograd.grad(loss, parameters)))
        total += loss.item() * (1.0 if inside is not None else float(weight[0]))
    return gradients, total


def _mean_pair(cosines: Tensor) -> float:
    """Mean over the pairs i != j."""
    k = cosines.shape[-1]
    off_diagonal = cosines.sum() - cosines.diagonal().sum()
    return float(off_diagonal / (k * (k - 1))) if k > 1 else 0.0


def _schedule(step: int, config: ArmTrainingConfig) -> float:
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def pair_accuracy(
    model: Any, pairs: Sequence[PreferencePair], preference: Any, *, pad_token_id: int, batch_size: int = 100
) -> float:
    """Return the share of pairs whose preferred response the model finds likelier under ``preference``."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    right = 0
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        batch = {key: value.to(device) for key, value in collate(part, pad_token_id).items()}
        with model.preference(preference):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logprobs = sequence_logprobs(logits, batch["labels"])
        right += int((logprobs[: len(part)] > logprobs[len(part) :]).sum())
    model.train(training)
    return right / len(pairs)
