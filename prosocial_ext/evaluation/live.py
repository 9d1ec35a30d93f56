"""The evaluation of ``prosocial eval`` on a model in memory, again and again: for the cells of ``direg sweep``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from prosocial_ext.decoding import GuidedGenerator
from prosocial_ext.decoding.loading import find_device, find_models, load_arm
from prosocial_ext.evaluation.evaluator import Evaluator
from prosocial_ext.evaluation.settings import read_settings
from prosocial_ext.reference import check

__all__ = ["LiveEvaluation"]


class LiveEvaluation:
    """Evaluates whatever weights a model has at the moment. An arm is loaded once, over a base of its own.

    Args:
        config: the YAML file; its model is not looked at.
        model: the folder from which the model in memory was or will be read.
        device: its device, and that of judges that do not name their own.

    Raises:
        ValueError, TypeError: as for `read_settings`, `Evaluator` and its ``prepare``; another device; a dtype, which
            an edit in memory could not follow.
    """

    def __init__(self, config: str | Path, model: Path, device: str) -> None:
        settings = read_settings(config, {"model": str(model)})
        if settings.device not in ("auto", device):
            check.fail("device", "be left out in a sweep, which has its own", repr(settings.device), f"It is {device}.")
        settings = replace(settings, device=device)
        if settings.dtype != "auto":
            check.fail("dtype", "be left out in a sweep, which edits the weights as they are", repr(settings.dtype))
        self._evaluator, self._device = Evaluator(settings), find_device(device)
        sources = find_models(str(model), settings.arm, settings.arm_base)
        self._source, self._arm = sources.arm, None
        self.notes = self._evaluator.prepare(sources)

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the outcome for given weights, as JSON: settings, the files' hashes, judges."""
        facts = self._evaluator.describe()
        for name in ("model", "device"):
            del facts["settings"][name]
        return facts

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Return the figures' values by name."""
        if self._source is not None and self._arm is None:
            self._arm = load_arm(self._source, None, "").to(self._device)
        return self._evaluator.evaluate(GuidedGenerator(model, self._arm, tokenizer)).numbers
