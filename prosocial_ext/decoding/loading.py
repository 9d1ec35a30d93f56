"""Models for guided generation from Hugging Face folders or hub ids: base, tokenizer, and an arm of any kind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from prosocial_ext.decoding.generator import GuidedGenerator
from prosocial_ext.reference import check

__all__ = [
    "ArmSource",
    "ModelSources",
    "check_full_model",
    "check_same_tokens",
    "find_arm",
    "find_device",
    "find_models",
    "load_arm",
    "load_classifier",
    "load_config",
    "load_model",
    "load_tokenizer",
]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REASON = 300  # characters of another library's error
_Loaded = TypeVar("_Loaded")


@dataclass(frozen=True)
class ArmSource:
    """Where an arm is, known before any weight is read.

    Attributes:
        path: the folder or hub id.
        base: of an adapter, the model that it was trained on; None for a full model.
        attributes: of PBLoRA, the names that its preferences weigh, in order; None for an arm that takes none.
    """

    path: str
    base: str | None = None
    attributes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ModelSources:
    """A model, its tokenizer and perhaps an arm, looked at but with no weight read.

    Attributes:
        model: the base's folder or hub id.
        tokenizer: the base's.
        arm: what guides it, or None.
    """

    model: str
    tokenizer: Any
    arm: ArmSource | None = None

    @property
    def attributes(self) -> tuple[str, ...] | None:
        """The names that preferences weigh; None where there is no arm, or one that takes none."""
        return None if self.arm is None else self.arm.attributes

    def load(self, dtype: str = "auto", device: torch.device | str = "cpu") -> GuidedGenerator:
        """Return the generator, with the weights read.

        Raises:
            ValueError: weights that cannot be read, or do not fit.
        """
        model = load_model("model", self.model, dtype)
        arm = None if self.arm is None else load_arm(self.arm, model, self.model, dtype).to(device)
        return GuidedGenerator(model.to(device), arm, self.tokenizer)


def find_models(model: str, arm: str | None = None, arm_base: str | None = None) -> ModelSources:
    """Look at a model and at what guides it.

    Args:
        model: a folder or hub id.
        arm: the same, as for `find_arm`; None: nothing guides it.
        arm_base: what an adapter was trained on; None asks the adapter.

    Raises:
        ValueError: something is not there or of the wrong kind, or the tokenizers differ.
    """
    check_full_model("model", model)
    tokenizer = load_tokenizer("model", model)
    if arm is None:
        return ModelSources(model, tokenizer)
    source = find_arm(arm, arm_base)
    check_same_tokens(tokenizer, load_tokenizer("arm", *filter(None, (source.path, source.base))))
    return ModelSources(model, tokenizer, source)


def find_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA where there is one.

    Raises:
        ValueError: torch cannot use it.

    >>> find_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device must be one that torch can use, got {name}: {reason}. Pass cpu.") from error
    return device


def find_arm(path: str, base: str | None = None) -> ArmSource:
    """Look at an arm: a PBLoRA or LoRA adapter of peft, or a full model.

    Args:
        path: a folder or hub id.
        base: what the adapter was trained on; None asks its adapter_config.json.

    Raises:
        ValueError: nothing there, ``base`` for a full model, or an adapter whose base cannot be found.
    """
    from peft import PeftConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    import prosocial_ext.arm  # noqa: F401  peft learns of PBLoRA

    _check_place("arm", path)
    if find_adapter_config_file(path) is None:
        if base is not None:
            check.fail("arm_base", "be left out where the arm is a full model", repr(base))
        return ArmSource(path)
    config: Any = _loading("arm", path, lambda: PeftConfig.from_pretrained(path))
    found = base if base is not None else config.base_model_name_or_path
    if not found or (base is None and not _may_exist(found)):
        rule = (
            f"be given, since the arm's adapter_config.json names its base as {found!r}, which is not found from here"
        )
        check.fail("arm_base", rule, None, "Pass the folder or hub id of the model that the arm was trained on.")
    _check_place("arm_base", found)
    attributes = getattr(config, "attributes", None)
    return ArmSource(path, found, None if attributes is None else tuple(attributes))


def load_tokenizer(argument: str, *places: str) -> Any:
    """Return the tokenizer of the first place that has one: adapter folders may leave it to their base.

    Raises:
        ValueError: none has one.
    """
    from transformers import AutoTokenizer

    has_one = (p for p in places if not os.path.isdir(p) or any(Path(p).glob("tokenizer*")))
    place = next(has_one, places[-1])
    _check_place(argument, place)
    return _loading(argument, place, lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False))


def check_full_model(argument: str, path: str) -> None:
    """Raise where ``path`` is plainly no full model: nothing there, or an adapter.

    Raises:
        ValueError: the text names ``argument``.
    """
    _check_place(argument, path)
    if Path(path, "adapter_config.json").is_file():
        remedy = "Name the model that it was trained on, or merge it into that one."
        check.fail(argument, "be a full model", f"the adapter {path}", remedy)


def load_model(argument: str, path: str, dtype: str = "auto") -> Any:
    """Return a causal language model on the CPU, in evaluation mode.

    Args:
        argument: what errors call it.
        path: a folder or hub id.
        dtype: of the weights, such as "bfloat16"; "auto" keeps that of the file.

    Raises:
        ValueError: nothing there, an adapter, or nothing that transformers reads as a causal language model.
    """
    from transformers import AutoModelForCausalLM

    check_full_model(argument, path)
    return _loading(
        argument, path, lambda: AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False).eval()
    )


def load_config(argument: str, path: str) -> Any:
    """Return a model's configuration.

    Raises:
        ValueError: nothing there, or nothing that transformers reads.
    """
    from transformers import AutoConfig

    check_full_model(argument, path)
    return _loading(argument, path, lambda: AutoConfig.from_pretrained(path, trust_remote_code=False))


def load_classifier(argument: str, path: str, dtype: str = "auto") -> Any:
    """Return a sequence-classification model on the CPU, in evaluation mode.

    Args:
        argument: what errors call it.
        path: a folder or hub id.
        dtype: of the weights; "auto" keeps that of the file.

    Raises:
        ValueError: nothing there, or weights without a trained head, which transformers would draw at random.
    """
    from transformers import AutoModelForSequenceClassification as Auto

    check_full_model(argument, path)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    model, found = _loading(argument, path, lambda: Auto.from_pretrained(path, **options))
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"]))
        check.fail(argument, "have a trained classification head", f"{path} without {missing}")
    return model.eval()


def load_arm(source: ArmSource, model: Any, model_path: str, dtype: str = "auto") -> Any:
    """Return the arm on the CPU, in evaluation mode.

    An adapter that was trained on ``model`` itself, to judge by the paths, shares its weights (and
    `GuidedGenerator` switches it off while the base reads); any other gets a base of its own.

    Args:
        source: what `find_arm` found.
        model: the base model that will be guided, from ``model_path``.
        model_path: its folder or hub id.
        dtype: of the weights that are read.

    Raises:
        ValueError: weights that cannot be read, or do not fit.
    """
    if source.base is None:
        return load_model("arm", source.path, dtype)
    from peft import PeftModel

    base = model if _same(source.base, model_path) else load_model("arm_base", source.base, dtype)
    arm = _loading("arm", source.path, lambda: PeftModel.from_pretrained(base, source.path))
    return arm.eval() if dtype == "auto" else arm.to(getattr(torch, dtype)).eval()


def check_same_tokens(model: Any, arm: Any) -> None:
    """Raise where two tokenizers do not give every token the same id: their models' logits could not be added.

    Raises:
        ValueError: the text names a token and its ids.
    """
    ours, theirs = model.get_vocab(), arm.get_vocab()
    if ours == theirs:
        return
    token = min((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), key=lambda t: (len(t), t))
    value = f"{token!r} with id {theirs.get(token, 'missing')} instead of {ours.get(token, 'missing')}"
    remedy = f"They have {len(theirs)} and {len(ours)} tokens; guidance needs an arm of the model's own tokenizer."
    check.fail("the arm's tokenizer", "give every token the model's id", value, remedy)


def _same(one: str, other: str) -> bool:
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))


def _may_exist(path: str) -> bool:
    return os.path.isdir(path) or _HUB_ID.fullmatch(path) is not None


def _check_place(argument: str, path: str) -> None:
    if not _may_exist(path):
        what = "a file" if os.path.isfile(path) else "nothing there"
        check.fail(argument, "be a folder or a hub id", f"{path} ({what})", "Name the folder that holds config.json.")


def _loading(argument: str, path: str, load: Callable[[], _Loaded]) -> _Loaded:
    """What ``load`` returns, its errors in our form."""
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if "trust_remote_code" in reason:
            reason = "it brings code of its own, which is not run"
        reason = reason if len(reason) <= _REASON else reason[: _REASON - 3] + "..."
        rule = "be a folder or a hub id that can be loaded"
        raise ValueError(f"{argument} must {rule}, got {path}. Loading it failed: {reason}.") from error
