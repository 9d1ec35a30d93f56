"""A sequence-classification model as a judge: the probability of one of its labels."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch

from prosocial_ext.decoding.loading import find_device, load_classifier, load_config, load_tokenizer
from prosocial_ext.evaluation.judges.judge import Verdicts, check_threshold
from prosocial_ext.evaluation.judges.reading import Reading, default_length
from prosocial_ext.reference import check

__all__ = ["ClassifierJudge"]


class ClassifierJudge:
    """Scores a pair by a label's probability under any model with a classification head.

    A head of several labels gives a softmax; one of a single label, or with problem_type multi_label_classification, a
    sigmoid, as in transformers' pipeline. Weights are read by `load`, or at the first call.

    Args:
        model: a folder or hub id.
        label: the name of the label that is flagged, as in the model's id2label.
        reads, template, max_length, truncation: what it is shown, as in `Reading`.
        threshold: a probability of at least this is flagged.
        batch_size: pairs at a time.
        dtype, device: of the weights.

    Raises:
        ValueError, TypeError: no such model, label or form.
    """

    def __init__(
        self,
        model: str,
        label: str,
        *,
        reads: str = "pair",
        template: str | None = None,
        max_length: int | None = None,
        truncation: str = "right",
        threshold: float = 0.5,
        batch_size: int = 8,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        config = load_config("model", model)
        names = [str(config.id2label[index]) for index in sorted(config.id2label)]
        if label not in names:
            close = difflib.get_close_matches(str(label).lower(), {name.lower(): name for name in names}, n=1)
            meant = next((name for name in names if close and name.lower() == close[0]), None)
            check.fail("label", f"be one of {', '.join(map(repr, names))}", repr(label),
                       f"Did you mean {meant!r}?" if meant else "They are the model's id2label.")  # fmt: skip
        self.name = f"classifier {model}, label {label}"
        self._model_path, self._dtype, self._device = model, dtype, find_device(device)
        self._column, self._threshold = names.index(label), check_threshold(threshold)
        self._batch_size = check.integer("batch_size", batch_size, 1, 2**31, "be a count >= 1")
        self._sigmoid = len(names) == 1 or config.problem_type == "multi_label_classification"
        self._tokenizer = load_tokenizer("model", model)
        length = default_length(self._tokenizer, config) if max_length is None else max_length
        self._reading = Reading(self._tokenizer, reads, template, length, truncation)
        self._model: Any = None

    def load(self) -> None:
        """Read the weights, once.

        Raises:
            ValueError: they cannot be read, or the head was never trained.
        """
        if self._model is None:
            self._model = load_classifier("model", self._model_path, self._dtype).to(self._device)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Verdicts:
        """Return the label's probabilities."""
        self.load()
        rows, note = self._reading.encode_all(prompts, responses)
        # decoders look for padding to find a text's last token: without an id for it, pairs go one by one
        padding = getattr(self._model.config, "pad_token_id", None)
        at_once = 1 if padding is None else self._batch_size
        scores: list[float] = []
        for start in range(0, len(rows), at_once):
            batch = _right_padded(rows[start : start + at_once], padding or 0)
            with torch.no_grad():
                logits = self._model(**{name: ids.to(self._device) for name, ids in batch.items()}).logits.float()
            likely = logits.sigmoid() if self._sigmoid else logits.softmax(dim=1)
            scores += likely[:, self._column].tolist()
        return Verdicts.of(scores, self._threshold, [note] if note else [])


def _right_padded(rows: Sequence[dict[str, list[int]]], padding: int) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    types = {"token_type_ids": column("token_type_ids", 0)} if "token_type_ids" in rows[0] else {}
    return {"input_ids": column("input_ids", padding), "attention_mask": mask, **types}
