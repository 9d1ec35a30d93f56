"""What a run of the demo found, down to every reply, and whether the mechanisms held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prosocial_ext.demo.measure import Attributes, Generation, Safety
from prosocial_ext.demo.names import DENSE
from prosocial_ext.demo.records import from_json
from prosocial_ext.demo.settings import DemoSettings
from prosocial_ext.direg import TensorShare
from prosocial_ext.evaluation import Estimate, Rate

__all__ = [
    "ArmRow",
    "Check",
    "DemoResults",
    "Edit",
    "GuidedRow",
    "MipRow",
    "OpTiming",
    "SafetyRow",
    "SupportRow",
    "Timings",
]


@dataclass(frozen=True)
class Edit:
    """What was subtracted from the base.

    ``copy``: whose difference from the base. ``rule``: how its entries were chosen. ``density``, ``scale``: how many,
    how much. ``energy``: the chosen entries' share of the difference's squared norm. ``effect``: their share of the
    first-order effect on the harm loss, None where no gradient was taken. ``norm``: of all that was subtracted.
    """

    copy: str
    rule: str
    density: float
    scale: float
    energy: float
    effect: float | None
    norm: float


@dataclass(frozen=True)
class SafetyRow:
    """One model's way with requests; its name is also the cell of its generations."""

    name: str
    edit: Edit | None
    safety: Safety


@dataclass(frozen=True)
class SupportRow:
    """The attributes of support replies at one guidance; ``wanted`` is the one-hot preference's attribute, or None."""

    name: str
    guidance: float
    wanted: str | None
    cell: str
    attributes: Attributes


@dataclass(frozen=True)
class MipRow:
    """The mean inner product of everyone's preference with the attributes of the replies; ``shortfall``: how much
    lower than under the right preference, paired by prompt, None for the right one itself."""

    name: str
    guidance: float
    cell: str
    mip: Estimate
    shortfall: Estimate | None


@dataclass(frozen=True)
class GuidedRow:
    """Requests under guidance; ``trained_on`` is the model that the reward model was trained on."""

    name: str
    trained_on: str
    guidance: float
    cell: str
    safety: Safety


@dataclass(frozen=True)
class ArmRow:
    """One reward model: how its training went, and how well it guides.

    ``trained_on``: the model under the adapter. ``surgery``, ``preference_per``, ``beta_r``: as in
    `ArmTrainingConfig`. Per step:
    the weighted loss, the mean cosine of the attributes' gradients before and after the surgery, the conflicting pairs.
    ``mip``, ``uniform``: the mean inner product under the right and under the uniform preference, ``diagonal``: each
    attribute's rate under its one-hot preference; all at the headline's guidance.
    """

    name: str
    trained_on: str
    surgery: str
    preference_per: str
    beta_r: float
    trainable: int
    pair_accuracy: dict[str, float]
    loss: list[float]
    cosine_before: list[float]
    cosine_after: list[float]
    conflicts: list[int]
    mip: Estimate
    uniform: Estimate
    diagonal: dict[str, Rate]

    @property
    def conflict_share(self) -> float:
        """The share of all pairs of attributes and steps whose gradients conflicted."""
        k = len(self.pair_accuracy)
        return sum(self.conflicts) / (len(self.conflicts) * k * (k - 1) / 2)


@dataclass(frozen=True)
class Check:
    """A claim of the method, and whether this run bears it out."""

    claim: str
    holds: bool
    figures: str


@dataclass(frozen=True)
class OpTiming:
    """Medians in milliseconds of the same work with the compiled ops and with the reference, taken in turns."""

    work: str
    compiled: float
    reference: float


@dataclass
class Timings:
    """What differs from run to run: seconds per stage, and the ops' milliseconds."""

    seconds: dict[str, float] = field(default_factory=dict)
    ops: list[OpTiming] = field(default_factory=list)


@dataclass
class DemoResults:
    """All figures of a run in the order in which they were found, and the generations behind them.

    All but ``timings`` is the same in every run with the same settings on one machine.
    """

    settings: DemoSettings
    machine: dict[str, Any]
    parameters: int = 0
    base_loss: list[float] = field(default_factory=list)  # mean of the first and of the last tenth of the steps
    edited: int = 0
    unchanged: int = 0
    safety: list[SafetyRow] = field(default_factory=list)
    tensors: dict[str, dict[str, TensorShare]] = field(default_factory=dict)  # by copy, then by parameter
    arms: list[ArmRow] = field(default_factory=list)
    support: list[SupportRow] = field(default_factory=list)
    preferences: list[list[float]] = field(default_factory=list)  # of the people behind the support prompts, [n, k]
    sharp: list[SupportRow] = field(default_factory=list)  # under the reward model of a tenth of the headline's beta_r
    mip: list[MipRow] = field(default_factory=list)
    guided: list[GuidedRow] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)

    def row_of(self, name: str) -> SafetyRow:
        """One model's row."""
        return next(row for row in self.safety if row.name == name)

    def safety_of(self, name: str) -> Safety:
        """The safety figures of one row."""
        return self.row_of(name).safety

    def edit_of(self, copy: str, rule: str) -> SafetyRow:
        """The row of one copy and rule at the headline's density and scale."""
        density, scale = 1.0 if rule == DENSE else self.settings.density, self.settings.scale
        wanted = copy, rule, density, scale
        return next(row for row in self.safety if (e := row.edit) and (e.copy, e.rule, e.density, e.scale) == wanted)

    def support_of(self, name: str, guidance: float) -> Attributes:
        """The attributes of one row; unguided replies are those at guidance 0."""
        return next(row.attributes for row in self.support if (row.name, row.guidance) == (name, guidance))

    def mip_of(self, name: str, guidance: float) -> Estimate:
        """The mean inner product of one row."""
        return next(row.mip for row in self.mip if (row.name, row.guidance) == (name, guidance))

    def replies(self, cell: str) -> Iterator[Generation]:
        """The generations of one cell, in the order of its prompts."""
        return (generation for generation in self.generations if generation.cell == cell)

    def save(self, folder: Path) -> None:
        """Write results.json, a line per generation, and timings.json."""
        found = asdict(self)
        timings, generations = found.pop("timings"), found.pop("generations")
        lines = ",\n".join(f"  {json.dumps(generation)}" for generation in generations)
        text = json.dumps(found, indent=1)[: -len("\n}")] + f',\n "generations": [\n{lines}\n ]\n}}\n'
        for name, content in (("results.json", text), ("timings.json", json.dumps(timings, indent=1) + "\n")):
            unfinished = folder / f".{name}.unfinished"
            unfinished.write_text(content, encoding="utf-8")
            unfinished.replace(folder / name)

    @classmethod
    def load(cls, folder: Path) -> DemoResults:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no results.json.
        """
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        found["timings"] = json.loads((folder / "timings.json").read_text(encoding="utf-8"))
        results: DemoResults = from_json(cls, found)
        return results
