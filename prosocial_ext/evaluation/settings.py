"""The settings of an evaluation: a YAML file, its keys, their types and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from prosocial_ext.decoding.replies import Sampling
from prosocial_ext.decoding.requests import LARGEST, read_file
from prosocial_ext.evaluation.judges.build import check_keys
from prosocial_ext.reference import check

__all__ = ["EvaluationSettings", "read_settings"]

_DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, on what, by whom and how.

    What is not said otherwise has the default of ``prosocial generate`` or of this package.

    Attributes:
        model: the base, a folder or hub id.
        arm, arm_base: what guides it, and what an adapter was trained on, as for ``prosocial generate``.
        preference: weights by attribute, of prompts without their own.
        guidance: the strength w = 1 / beta, of prompts without their own.
        harmful: a file of prompts that should not be answered (JSON lines, or one per line).
        harmless: a file of prompts that should be, such as those that only look harmful.
        responses: a file of prompts and responses, whose perplexity is taken (JSON lines).
        harm_judge: settings of a judge that flags harm; None: a harmful prompt that is not refused counts as harm.
        refusal_judge: settings of a judge that flags refusals.
        chat: whether a prompt that is a text is a user's message in the chat template, or as it is. None: as it is,
            with a note where there is a template.
        samples: replies per prompt.
        seed: from which every prompt gets its own by its place in the file.
        temperature: 0 is greedy, as in HarmBench and most of its peers.
        top_k, top_p, min_p: filters, off.
        max_new_tokens: of a reply; None: 512 as in HarmBench (the rate depends on it), or half of the positions.
        batch_size: prompts, responses or pairs at a time.
        max_length: tokens of a prompt with its given response; None: 2048, or all positions.
        dtype, device: of the weights, as for ``prosocial generate``; judges may have their own.

    Raises:
        ValueError, TypeError: a value that does not fit, nothing to measure, or options that contradict each other.

    >>> EvaluationSettings(model="B", harmful="harmful.jsonl").temperature
    0.0
    """

    model: str | None = None
    arm: str | None = None
    arm_base: str | None = None
    preference: dict[str, float] | None = None
    guidance: float = 1.0
    harmful: str | None = None
    harmless: str | None = None
    responses: str | None = None
    harm_judge: dict[str, Any] | None = None
    refusal_judge: dict[str, Any] = field(default_factory=lambda: {"kind": "phrases"})
    chat: bool | None = None
    samples: int = 1
    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("model", "arm", "arm_base", "harmful", "harmless", "responses", "device"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                check.fail(name, "be a text", check.describe(value), "Quote it.", TypeError)
        if self.model is None:
            check.fail("model", "be given", None, "Name a folder or a hub id.")
        if self.harmful is None and self.harmless is None and self.responses is None:
            check.fail("harmful", "be given, or harmless, or responses", "none", "Name a file for each figure wanted.")
        check.number("guidance", self.guidance, -LARGEST, LARGEST, "be a finite number")
        self._check_preference()
        check.integer("seed", self.seed, 0, 2**63 - 1, "be an integer in [0, 2**63)")
        check.integer("samples", self.samples, 1, 2**20, "be a count >= 1")
        if self.chat is not None:
            check.boolean("chat", self.chat)
        if self.max_length is not None:
            check.integer("max_length", self.max_length, 2, 2**31, "be a count >= 2")
        check.choice("dtype", self.dtype, _DTYPES)
        if self.sampling.temperature == 0 and self.samples > 1:
            check.fail("samples", "be 1 at temperature 0", self.samples, "Greedy replies are all the same.")
        if self.arm is None:
            for name, default in (("arm_base", None), ("preference", None), ("guidance", 1.0)):
                if getattr(self, name) != default:
                    check.fail(name, "be left out without an arm", getattr(self, name), "Name the arm that it is for.")

    @property
    def sampling(self) -> Sampling:
        """How replies are drawn."""
        return Sampling(**{f.name: getattr(self, f.name) for f in fields(Sampling)})

    def _check_preference(self) -> None:
        if self.preference is None:
            return
        if not isinstance(self.preference, Mapping):
            remedy = "Write preference: {empathy: 0.7, truthfulness: 0.3}."
            check.fail("preference", "be a mapping of numbers", check.describe(self.preference), remedy, TypeError)
        for name, weight in self.preference.items():
            check.number(f"preference[{name!r}]", weight, -LARGEST, LARGEST, "be a finite number")


def read_settings(path: str | Path | None, overrides: Mapping[str, Any]) -> EvaluationSettings:
    """Return the settings in a YAML file, but for what the overrides say.

    Args:
        path: the file, or None: the overrides are all. A mapping with the fields of `EvaluationSettings` as keys; plain
            data, no YAML tag is followed.
        overrides: fields and their values.

    Raises:
        ValueError, TypeError: it cannot be read, is no mapping, has a key twice or one that is none (the text names
            the nearest), and as in `EvaluationSettings`.
    """
    if path is None:
        return EvaluationSettings(**overrides)
    try:
        found = yaml.load(read_file("CONFIG", path), Loader=_UniqueKeys)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"CONFIG must be YAML, got {path}: {' '.join(str(error).split())}.") from error
    if not isinstance(found, dict):
        check.fail("CONFIG", "be a mapping of settings", f"{path} with {check.describe(found)}", "Write model: NAME.")
    check_keys(str(path), found, [f.name for f in fields(EvaluationSettings)])
    given = {key: value for key, value in found.items() if value is not None}  # `arm:` alone means none
    return EvaluationSettings(**{**given, **overrides})


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader keeps the last of equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping, or refuse a key that comes twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"the key {key!r} comes twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep=deep)
