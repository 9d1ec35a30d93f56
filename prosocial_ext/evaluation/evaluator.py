"""Measures a model, guided or not: harm on prompts to refuse, refusals of prompts to answer, how likely good text is.

One evaluation goes the same way from the command line and for each cell of a sweep: settings are checked and files
read, prompts are encoded, replies drawn, replies judged, figures taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from prosocial_ext.decoding import GuidedGenerator
from prosocial_ext.decoding.loading import ModelSources, load_config
from prosocial_ext.decoding.replies import Reply, Row, draw_replies, encode_rows, reply_limit, settle, unknown_words
from prosocial_ext.decoding.requests import Request, read_file, read_requests
from prosocial_ext.decoding.seeds import sample_seeds
from prosocial_ext.direg.harmful_pairs import EncodedPair, encode_pairs, right_padded
from prosocial_ext.evaluation.figures import category_figures, document_figures, reply_figures
from prosocial_ext.evaluation.judges import Judge, build_judge
from prosocial_ext.evaluation.likelihood import document_losses
from prosocial_ext.evaluation.outcome import DocumentRecord, Evaluation, ReplyRecord
from prosocial_ext.evaluation.repetition import repetition_rate
from prosocial_ext.evaluation.settings import EvaluationSettings
from prosocial_ext.reference import check

__all__ = ["Evaluator"]

_REPLY = 512  # tokens, as HarmBench standardised
_DOCUMENT = 2048  # tokens
_PHRASE = 4  # tokens of a repeated phrase, as in Welleck et al.


class Evaluator:
    """Files read and judges looked at, ready for one model or several.

    Args:
        settings: what to measure.

    Raises:
        ValueError, TypeError: a file that cannot be read, a line that does not fit, or a judge that is none.
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        names = ("harmful", "harmless", "responses")
        files = {name: path for name in names if (path := getattr(settings, name)) is not None}
        hashes = {name: hashlib.sha256(read_file(name, path)).hexdigest() for name, path in files.items()}
        self._inputs = {name: {"file": files[name], "sha256": found} for name, found in hashes.items()}
        self._requests = {name: read_requests(name, path) for name, path in files.items() if name != "responses"}
        self._judges: dict[str, Judge] = {}
        if self._requests:
            build = partial(build_judge, device=settings.device, batch_size=settings.batch_size)
            self._judges["refusal"] = build("refusal_judge", settings.refusal_judge)
            if settings.harm_judge is not None:
                if isinstance(settings.harm_judge, Mapping) and settings.harm_judge.get("kind") == "phrases":
                    remedy = "Write refusal_judge; harm is then what is not refused."
                    check.fail("harm_judge", "flag harm", "phrases, which flag refusals", remedy)
                self._judges["harm"] = build("harm_judge", settings.harm_judge)
        self._rows: dict[str, list[Row]] = {}
        self._pairs: list[EncodedPair] = []
        self._notes: list[str] = []

    def describe(self) -> dict[str, Any]:
        """Return what decides the outcome for a given model: settings, files with their SHA-256, judges."""
        return {
            "settings": asdict(self.settings),
            "inputs": self._inputs,
            "judges": {name: judge.name for name, judge in self._judges.items()},
        }

    def prepare(self, sources: ModelSources) -> list[str]:
        """Encode prompts and responses for a model before its weights are read; return what the user should know.

        Raises:
            ValueError: prompts, preferences or responses that the model cannot take; the text names the line.
        """
        settings, tokenizer = self.settings, sources.tokenizer
        self._notes = []
        for name, requests in self._requests.items():
            rows = settle(
                [_as_chat(request) for request in requests] if settings.chat else requests,
                seed=settings.seed,
                preference=settings.preference,
                guidance=settings.guidance,
                alone=sources.arm is None,
            )
            encode_rows(rows, tokenizer, sources.attributes)
            self._rows[name] = rows
        every = [row for rows in self._rows.values() for row in rows]
        if warning := unknown_words(every, tokenizer):
            self._notes.append(warning)
        if settings.chat is None and tokenizer.chat_template and any(row.request.prompt is not None for row in every):
            self._notes.append("prompts are read as they stand, without the model's chat template (chat: true wraps "
                               "them, chat: false silences this)")  # fmt: skip
        if settings.responses is not None:
            config = load_config("model", sources.model)
            positions = getattr(config, "max_position_embeddings", None) or _DOCUMENT
            length = min(_DOCUMENT, positions) if settings.max_length is None else settings.max_length
            self._pairs = encode_pairs(
                settings.responses, tokenizer, length, chat=bool(settings.chat), argument="responses"
            )
            if len(self._pairs) < 2:
                check.fail("responses", "hold two or more", len(self._pairs), "One has no spread.")
            if cut := sum(pair.cut > 0 for pair in self._pairs):
                self._notes.append(f"{cut} of {len(self._pairs)} responses were cut at max_length {length}")
        return list(self._notes)

    def plan(self) -> str:
        """Return in words how much is to be done, after `prepare`."""
        replies = [f"{len(rows)} {name} prompts" for name, rows in self._rows.items()]
        samples = f" with {self.settings.samples} replies each" if replies and self.settings.samples > 1 else ""
        documents = [f"{len(self._pairs)} responses"] if self._pairs else []
        judges = "; ".join(f"{name} by {judge.name}" for name, judge in self._judges.items())
        return ", ".join(replies) + samples + ", " * bool(replies and documents) + "".join(documents) + (
            f" ({judges})" if judges else "")  # fmt: skip

    def count(self) -> int:
        """Return how many replies will be drawn, after `prepare`."""
        return self.settings.samples * sum(map(len, self._rows.values()))

    def evaluate(self, generator: GuidedGenerator, advance: Callable[[int], object] = lambda done: None) -> Evaluation:
        """Draw, judge and measure.

        Args:
            generator: the models that `prepare` was called for.
            advance: is told how many replies more are drawn.

        Returns:
            The same evaluation for the same models, settings and files, to the bit on one machine.

        Raises:
            ValueError: a prompt that leaves no room for a reply, a judge or a model that gives no numbers.
        """
        notes = list(self._notes)
        limit = self._limit(generator)
        for name, judge in self._judges.items():
            try:
                judge.load()
            except ValueError as error:
                raise ValueError(f"{name}_judge.{error}") from error
        drawn = self._draw(generator, limit, advance)
        records: list[ReplyRecord] = []
        for name, replies in drawn.items():
            records += self._judge(name, replies, notes)
        documents = self._documents(generator)
        judges = {name: judge.name for name, judge in self._judges.items()}
        figures = reply_figures(records, judges) | document_figures(documents)
        categories = category_figures(records, judges)
        return Evaluation(figures, categories, judges, limit, notes, records, documents)

    def _limit(self, generator: GuidedGenerator) -> int | None:
        every = [row for rows in self._rows.values() for row in rows]
        return reply_limit(every, generator, self.settings.max_new_tokens, _REPLY) if every else None

    def _draw(
        self, generator: GuidedGenerator, limit: int | None, advance: Callable[[int], object]
    ) -> dict[str, list[Reply]]:
        """The replies by set, those to one prompt together."""
        drawn: dict[str, list[Reply]] = {}
        for name, rows in self._rows.items():
            sampled = [
                replace(row, seed=seed) for row in rows for seed in sample_seeds(row.seed, self.settings.samples)
            ]
            drawn[name] = []
            assert limit is not None  # there are rows
            for batch in draw_replies(generator, sampled, limit, self.settings.sampling):
                drawn[name] += batch
                advance(len(batch))
        return drawn

    def _judge(self, name: str, replies: Sequence[Reply], notes: list[str]) -> list[ReplyRecord]:
        prompts = [_asked(reply.row.request) for reply in replies]
        asked = {kind: judge for kind, judge in self._judges.items() if kind == "refusal" or name == "harmful"}
        verdicts = {kind: judge(prompts, [reply.text for reply in replies]) for kind, judge in asked.items()}
        for kind, verdict in verdicts.items():
            notes += [f"{name} prompts, {kind} judge: {note}" for note in verdict.notes]
        records = []
        for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            index, sample = divmod(i, self.settings.samples)
            category = reply.row.request.extra.get("category")
            records.append(
                ReplyRecord(
                    name,
                    index,
                    sample,
                    prompt,
                    category if isinstance(category, str) else None,
                    reply.text,
                    reply.finish_reason,
                    reply.row.seed,
                    reply.row.preference,
                    reply.row.guidance,
                    repetition_rate([_said(reply)], _PHRASE),
                    {kind: verdict.scores[i] for kind, verdict in verdicts.items()},
                    {kind: verdict.flags[i] for kind, verdict in verdicts.items()},
                )
            )
        return records

    def _documents(self, generator: GuidedGenerator) -> list[DocumentRecord]:
        """How likely the model, guided as the replies are, finds the given responses."""
        if not self._pairs:
            return []
        settings, arm = self.settings, generator.arm
        guidance = 0.0 if arm is None else settings.guidance
        conditioned = guidance != 0 and hasattr(arm, "preference")
        if conditioned and settings.preference is None:
            check.fail("preference", "be given for responses", None, "The arm is conditioned on it.")
        at_once = settings.batch_size
        batches = (right_padded(self._pairs[start : start + at_once]) for start in range(0, len(self._pairs), at_once))
        with arm.preference(settings.preference) if conditioned else nullcontext():
            losses = document_losses(generator.model, batches, arm=arm, guidance=guidance)
        records = []
        for index, ((loss, tokens), pair) in enumerate(zip(losses.tolist(), self._pairs, strict=True)):
            if not loss < float("inf"):
                check.fail(
                    f"response {index} of {settings.responses}", "be possible for the model", f"a loss of {loss}"
                )
            records.append(DocumentRecord(index, loss, int(tokens), pair.cut))
        return records


def _said(reply: Reply) -> list[int]:
    """The tokens without the EOS."""
    return reply.tokens[:-1] if reply.finish_reason == "stop" else reply.tokens


def _as_chat(request: Request) -> Request:
    """A prompt that is a text, as a user's message."""
    if request.prompt is None:
        return request
    return replace(request, prompt=None, messages=[{"role": "user", "content": request.prompt}])


def _asked(request: Request) -> str:
    """What was asked, as judges see it: the prompt, or the conversation without its template."""
    if request.prompt is not None:
        return request.prompt
    assert request.messages is not None  # a request has one of them
    turns = [(str(turn["role"]), str(turn["content"])) for turn in request.messages]
    said = [turn for turn in turns if turn[0] != "system"] or turns
    return said[0][1] if len(said) == 1 else "\n".join(f"{role}: {content}" for role, content in said)
