"""What a run of the demo found, and whether the mechanisms held; written to results.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prosocial_ext.demo.measure import Attributes, Mean, Safety
from prosocial_ext.demo.settings import DemoSettings
from prosocial_ext.direg import HarmVectorReport
from prosocial_ext.evaluation import Rate

__all__ = ["ArmTraining", "Check", "DemoResults", "MipRow", "SafetyRow", "SupportRow"]


@dataclass(frozen=True)
class SafetyRow:
    """One model's way with requests."""

    name: str
    safety: Safety


@dataclass(frozen=True)
class SupportRow:
    """The attributes of support replies at one guidance; ``wanted`` is the one-hot preference's attribute, or None."""

    name: str
    guidance: float
    wanted: str | None
    attributes: Attributes


@dataclass(frozen=True)
class MipRow:
    """The mean inner product of everyone's preference with the attributes of the replies; ``shortfall``: how much
    lower than under the right preference, paired by prompt, None for the right one itself."""

    name: str
    guidance: float
    mip: Mean
    shortfall: Mean | None


@dataclass(frozen=True)
class ArmTraining:
    """How a reward model's training went; cosines are of the attributes' gradients, over all pairs and steps."""

    surgery: str
    trainable: int
    pair_accuracy: dict[str, float]
    negative_cosines: float
    mean_cosine: float
    mean_cosine_after: float


@dataclass(frozen=True)
class Check:
    """A claim of the method, and whether this run bears it out."""

    claim: str
    holds: bool
    figures: str


@dataclass
class DemoResults:
    """All figures of a run, in the order in which they were found."""

    settings: DemoSettings
    machine: dict[str, Any]
    parameters: int = 0
    base_loss: list[float] = field(default_factory=list)  # mean of the first and of the last tenth of the steps
    vectors: dict[str, HarmVectorReport] = field(default_factory=dict)
    edited: int = 0
    unchanged: int = 0
    safety: list[SafetyRow] = field(default_factory=list)
    arms: list[ArmTraining] = field(default_factory=list)
    support: list[SupportRow] = field(default_factory=list)
    mip: list[MipRow] = field(default_factory=list)
    guided_harm: dict[str, Rate] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def safety_of(self, name: str) -> Safety:
        """The safety figures of one row."""
        return next(row.safety for row in self.safety if row.name == name)

    def support_of(self, name: str, guidance: float) -> Attributes:
        """The attributes of one row; unguided replies are those at guidance 0."""
        return next(row.attributes for row in self.support if (row.name, row.guidance) == (name, guidance))

    def mip_of(self, name: str, guidance: float) -> Mean:
        """The mean inner product of one row."""
        return next(row.mip for row in self.mip if (row.name, row.guidance) == (name, guidance))

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
