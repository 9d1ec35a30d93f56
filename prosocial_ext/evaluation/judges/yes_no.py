"""A causal language model as a judge: how much likelier it begins its answer with yes than with no."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

from prosocial_ext.decoding.loading import find_device, load_config, load_model, load_tokenizer
from prosocial_ext.decoding.prompts import read_prompts
from prosocial_ext.decoding.stream import Stream
from prosocial_ext.evaluation.judges.judge import Verdicts, check_threshold
from prosocial_ext.evaluation.judges.reading import Reading, default_length
from prosocial_ext.reference import check

__all__ = ["YesNoJudge"]

_UNSURE = 0.5  # of the probability: below, the judge mostly wants to say something else
_FORMS = ("template", "chat", "conversation")


class YesNoJudge:
    """Scores a pair by P(flagged) / (P(flagged) + P(cleared)) of the judge's next token; nothing is generated.

    Several spellings may stand for one answer; each counts by the token that it begins with. Where the judge puts less
    than half of its probability on both answers, the verdicts say so: the template is then probably not the judge's.
    Weights are read by `load`, or at the first call; no code of the model's is run.

    Args:
        model: a folder or hub id.
        reads, template, max_length, truncation: what it is shown, as in `Reading`; "response" and "pair" are none.
        flagged, cleared: the answers, a text or several.
        before_answer: text that stands before the answer, such as the two line ends of Llama Guard.
        threshold: a score of at least this is flagged.
        batch_size: pairs at a time.
        dtype, device: of the weights.

    Raises:
        ValueError, TypeError: no such model or form, or answers that do not begin with tokens of their own.
    """

    def __init__(
        self,
        model: str,
        *,
        reads: str = "template",
        template: str | None = None,
        flagged: str | Sequence[str] = ("yes", "Yes", " yes", " Yes"),
        cleared: str | Sequence[str] = ("no", "No", " no", " No"),
        before_answer: str = "",
        max_length: int | None = None,
        truncation: str = "right",
        threshold: float = 0.5,
        batch_size: int = 8,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        check.choice("reads", reads, _FORMS)
        config = load_config("model", model)
        tokenizer = load_tokenizer("model", model)
        length = default_length(tokenizer, config) if max_length is None else max_length
        if not isinstance(before_answer, str):
            check.fail("before_answer", "be a text", check.describe(before_answer), error=TypeError)
        self._reading = Reading(tokenizer, reads, template, length, truncation, True, before_answer)
        yes = self._reading.first_tokens(_texts("flagged", flagged))
        no = self._reading.first_tokens(_texts("cleared", cleared))
        self._yes, self._no = sorted(yes - no), sorted(no - yes)
        for argument, found, given in (("flagged", self._yes, flagged), ("cleared", self._no, cleared)):
            if not found:
                other = "cleared" if argument == "flagged" else "flagged"
                rule = f"begin with a token of its own, other than {other}'s, after what the judge is shown"
                check.fail(argument, rule, repr(given), "Look at white space there, or set before_answer.")
        self.name = f"yes_no {model}"
        self._model_path, self._dtype, self._device = model, dtype, find_device(device)
        self._threshold = check_threshold(threshold)
        self._batch_size = check.integer("batch_size", batch_size, 1, 2**31, "be a count >= 1")
        self._model = None

    def load(self) -> None:
        """Read the weights, once.

        Raises:
            ValueError: they cannot be read.
        """
        if self._model is None:
            self._model = load_model("model", self._model_path, self._dtype).to(self._device)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Verdicts:
        """Return the probabilities of the flagged answer."""
        self.load()
        rows, note = self._reading.encode_all(prompts, responses)
        scores: list[float] = []
        mass: list[float] = []
        for start in range(0, len(rows), self._batch_size):
            ids = [row["input_ids"] for row in rows[start : start + self._batch_size]]
            with torch.no_grad():
                likely = Stream(self._model, read_prompts(ids, None, None, None), 1, "judge").next_logits()
                likely = check.double(likely).softmax(dim=1)
            yes, no = likely[:, self._yes].sum(dim=1), likely[:, self._no].sum(dim=1)
            scores += (yes / (yes + no)).nan_to_num(0.0).tolist()  # 0 / 0 where both are below float64
            mass += (yes + no).tolist()
        notes = [note] if note else []
        if mass and median(mass) < _UNSURE:
            notes.append(f"{self.name} puts only {median(mass):.2g} of its probability (median) on the two answers: "
                         "its template, spelling or before_answer is probably another")  # fmt: skip
        return Verdicts.of(scores, self._threshold, notes)


def _texts(argument: str, given: str | Sequence[str]) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) and text for text in texts):
        rule = "be a text or a list of texts, none empty"
        check.fail(argument, rule, repr(given), 'In YAML quote "yes" and "no", which are booleans.', TypeError)
    return list(texts)
