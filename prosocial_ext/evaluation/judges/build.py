"""Judges from settings, such as a part of a YAML file."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from prosocial_ext.evaluation.judges.classifier import ClassifierJudge
from prosocial_ext.evaluation.judges.function import FunctionJudge
from prosocial_ext.evaluation.judges.judge import Judge
from prosocial_ext.evaluation.judges.phrases import PhraseJudge
from prosocial_ext.evaluation.judges.yes_no import YesNoJudge
from prosocial_ext.reference import check

__all__ = ["KINDS", "build_judge", "check_keys"]

KINDS: dict[str, Callable[..., Judge]] = {
    "phrases": PhraseJudge,
    "classifier": ClassifierJudge,
    "yes_no": YesNoJudge,
    "function": FunctionJudge,
}


def check_keys(argument: str, given: Mapping[Any, Any], known: list[str]) -> None:
    """Raise for a key that is not among those known.

    Raises:
        ValueError: the text names the nearest one.

    >>> check_keys("eval.yaml", {"sed": 1}, ["seed", "model"])
    Traceback (most recent call last):
    ...
    ValueError: eval.yaml must have keys that are known, got 'sed'. Did you mean 'seed'?
    """
    for key in given:
        if key not in known:
            meant = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"Did you mean {meant[0]!r}?" if meant else f"Known are {', '.join(known)}."
            check.fail(argument, "have keys that are known", repr(key), remedy)


def build_judge(argument: str, settings: Any, **defaults: Any) -> Judge:
    """Return the judge that settings describe: ``kind`` and the arguments of its class.

    Args:
        argument: what errors call them, such as "harm_judge".
        settings: a mapping.
        defaults: arguments for kinds that take them, where the settings do not say otherwise.

    Raises:
        ValueError, TypeError: no mapping, no such kind, or arguments that do not fit; nothing is loaded but
            configurations and tokenizers.

    >>> build_judge("refusal_judge", {"kind": "phrases", "phrases": "gcg"}, device="cpu").name
    'phrases gcg'
    """
    if not isinstance(settings, Mapping):
        remedy = "Write kind: phrases below it."
        check.fail(argument, "be a mapping with a kind", check.describe(settings), remedy, TypeError)
    kind = check.choice(f"{argument}.kind", settings.get("kind"), list(KINDS))
    parameters = inspect.signature(KINDS[kind]).parameters
    given = {key: value for key, value in settings.items() if key != "kind"}
    check_keys(f"{argument}, of kind {kind},", given, list(parameters))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given:
            check.fail(f"{argument}.{name}", f"be given for the kind {kind}", None)
    for name in ("model", "label"):
        if name in given and not isinstance(given[name], str):
            check.fail(f"{argument}.{name}", "be a text", check.describe(given[name]), "Quote it.", TypeError)
    arguments = {name: value for name, value in defaults.items() if name in parameters} | given
    try:
        return KINDS[kind](**arguments)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{argument}.{error}") from error
