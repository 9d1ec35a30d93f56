"""The user's own judge."""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from typing import Any

from prosocial_ext.evaluation.judges.judge import Verdicts, check_threshold
from prosocial_ext.reference import check
from prosocial_ext.user_function import import_function

__all__ = ["FunctionJudge"]


class FunctionJudge:
    """Calls function(prompts, responses), two lists of texts, for a list of numbers or booleans.

    Args:
        function: module:function; modules of the working folder can be named.
        threshold: a score of at least this is flagged.

    Raises:
        ValueError: it cannot be imported; when called, it fails, or returns another number of scores or one that is no
            finite number.

    >>> FunctionJudge("operator:eq").name
    'function operator:eq'
    """

    def __init__(self, function: str, threshold: float = 0.5) -> None:
        if not isinstance(function, str):
            check.fail("function", "be module:function", check.describe(function), error=TypeError)
        self.name, self._threshold = f"function {function}", check_threshold(threshold)
        self._function = import_function("function", function)

    def load(self) -> None:
        """Do nothing: the function was imported when it was named."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Verdicts:
        """Return the function's scores."""
        try:
            scores: Any = self._function(list(prompts), list(responses))
        except Exception as error:
            traceback.print_exc()  # its place is what the user needs: the function is theirs
            raise ValueError(f"{self.name} failed with {type(error).__name__}: {error}") from error
        rule = f"return {len(responses)} numbers, one per response"
        try:
            read = [float(score) for score in scores]
        except (TypeError, ValueError):
            check.fail(self.name, rule, check.describe(scores))
        if len(read) != len(responses) or not all(map(math.isfinite, read)):
            check.fail(self.name, rule, check.describe(scores), "NaN and infinity are none.")
        return Verdicts.of(read, self._threshold)
