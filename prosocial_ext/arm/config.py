"""The configuration of a PBLoRA adapter, saved as adapter_config.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from prosocial_ext.arm.peft_type import NAME
from prosocial_ext.arm.preferences import ATTRIBUTES
from prosocial_ext.reference import check

__all__ = ["PBLoraConfig"]


@dataclass
class PBLoraConfig(PeftConfig):
    """A preference-based low-rank adapter: dW(alpha) = s (B1 W1 A1 + B2 W2(alpha) A2), s = lora_alpha / r2.

    The form and the defaults are PARM's (Lin et al., ICML 2025).

    Attributes:
        r1: rank of the part that all preferences share.
        r2: rank of the part whose core W2(alpha) = reshape(alpha P, [r2, r2]) depends on the preference.
        lora_alpha: numerator of the scale; the denominator is r2, not r1 + r2.
        lora_dropout: dropout on the adapter's input while training.
        attributes: the names that a preference weighs, in the order of the rows of P.
        target_modules: modules to adapt, as elsewhere in peft; PARM's are q_proj, k_proj and v_proj.
        exclude_modules: modules to leave alone, as elsewhere in peft.
    """

    r1: int = 4
    r2: int = 4
    lora_alpha: float = 8.0
    lora_dropout: float = 0.05
    attributes: list[str] = field(default_factory=lambda: list(ATTRIBUTES))
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NAME
        for name in ("r1", "r2"):
            check.integer(name, getattr(self, name), 1, 1 << 16, "be an int >= 1")
        check.number("lora_dropout", self.lora_dropout, 0.0, 0.999, "be in [0, 1)")
        self.attributes = list(self.attributes)
        if not self.attributes or len(set(self.attributes)) != len(self.attributes):
            check.fail("attributes", "be one name or more, each once", self.attributes)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
