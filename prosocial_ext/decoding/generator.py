"""Guided generation with two models: prefill both, then per step one forward each and one ``ops.guided_sample``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from prosocial_ext import ops
from prosocial_ext.decoding.prompts import Prompts, read_prompts
from prosocial_ext.decoding.seeds import row_seeds
from prosocial_ext.decoding.special_tokens import eos_ids, pad_id, padding_alone
from prosocial_ext.decoding.stream import Stream, base_alone, evaluating, head_width
from prosocial_ext.reference import check
from prosocial_ext.reference import sampling_arguments as arguments

__all__ = ["GuidedGenerator", "GuidedOutput"]

# Whether rows have finished is asked every step where that is free, and every eighth where it waits for a device.
_STEPS_BETWEEN_LOOKS = {"cpu": 1}
_STEPS_BETWEEN_LOOKS_ELSEWHERE = 8


@dataclass(frozen=True)
class GuidedOutput:
    """What was drawn for a batch.

    Attributes:
        sequences: int64 [B, T], the new tokens alone, EOS included, padding after it; T is the longest row's length.
        lengths: int64 [B], tokens per row, EOS included.
        texts: one string per row, without special tokens; None without a tokenizer.
        logprobs: fp32 [B, T], each token's log-prob under softmax((base + guidance * arm) / temperature) before the
            filters (at temperature 0: at temperature 1), 0 after the end; None unless asked for.
    """

    sequences: torch.Tensor
    lengths: torch.Tensor
    texts: list[str] | None = None
    logprobs: torch.Tensor | None = None


class GuidedGenerator:
    """Draws from the base model times the autoregressive reward model (ARM) to the power ``guidance``.

    Args:
        model: the base, a causal language model of transformers' calling convention.
        arm: the guide, with the same tokenizer; None decodes the base alone. One with a ``preference`` method (a
            PBLoRA ``PeftModel``) is asked for a preference at every call. A ``PeftModel`` around ``model`` itself
            shares its weights: its adapter is off while the base reads.
        tokenizer: encodes strings and decodes the result; tokens beyond its vocabulary are never drawn.
        vocab_size: tokens from here on are never drawn; needed for heads of different widths without a tokenizer.

    Raises:
        ValueError: heads of different widths, with neither ``tokenizer`` nor ``vocab_size``.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2, bos_token_id=1, eos_token_id=2)
    >>> base, arm = LlamaForCausalLM(config), LlamaForCausalLM(config)
    >>> output = GuidedGenerator(base, arm).generate([[1, 5, 6], [1, 7]], guidance=1.0, max_new_tokens=4, seed=0)
    >>> output.sequences.shape[0], bool((output.lengths <= 4).all())
    (2, True)
    """

    def __init__(self, model: Any, arm: Any = None, tokenizer: Any = None, *, vocab_size: int | None = None) -> None:
        self.model, self.arm, self.tokenizer = model, arm, tokenizer
        self._given_vocab_size = vocab_size
        self._tokenizer_size = None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
        self._vocab_size()

    def generate(
        self,
        prompts_or_input_ids: Any,
        *,
        attention_mask: torch.Tensor | None = None,
        preference: Any = None,
        guidance: float | torch.Tensor = 1.0,
        temperature: float | torch.Tensor = 1.0,
        top_k: int | torch.Tensor = 0,
        top_p: float | torch.Tensor = 1.0,
        min_p: float | torch.Tensor = 0.0,
        max_new_tokens: int = 128,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | torch.Tensor = 0,
        progress: bool = False,
        return_logprobs: bool = False,
    ) -> GuidedOutput:
        """Draw a continuation of every prompt.

        Args:
            prompts_or_input_ids: strings (with a tokenizer), lists of token ids, or a tensor [B, S], left-padded. A
                string that begins with the BOS token, as chat templates write it, gets no second one.
            attention_mask: [B, S], for a tensor with padding.
            preference: what ``arm.preference`` takes: one for all rows (a dict by name, or a tensor [k]) or one per
                row (a list of dicts, or a tensor [B, k]). Required with such an arm unless guidance is 0.
            guidance: strength w = 1 / beta, a number or [B]; 0 everywhere is the base alone, and the arm is not run.
            temperature: a number or [B]; 0 is greedy.
            top_k, top_p, min_p: filters, a number or [B] each, off by default; as in ``ops.guided_sample``.
                The model's generation_config is not asked for any of these.
            max_new_tokens: the longest answer, EOS included, at least 1.
            eos_token_id: an id or several, each of which ends a row; None asks the model's generation_config, its
                config, then the tokenizer; [] never ends.
            pad_token_id: fills the result after a row's end; None asks the tokenizer, the model, then takes EOS. The
                models are never shown it.
            seed: an int, from which every row's own is derived by its index (``row_seeds``), or the rows' own, [B].
            progress: show a bar.
            return_logprobs: also return the log-probs of the drawn tokens.

        Returns:
            The new tokens, their lengths, texts with a tokenizer, log-probs if asked for.

        Raises:
            ValueError, TypeError: prompts, preference, sampling parameters or models that do not fit; the text names
                argument, value and remedy.

        Guarantees: deterministic. A row is drawn from its own seed and the step, so it does not depend on the batch
        around it, up to the rounding of the models' forwards (a batch of another shape may round a logit otherwise).
        Modes (``train``/``eval``) are restored; gradients are not recorded; the global random state is not touched.
        """
        limit = check.integer("max_new_tokens", max_new_tokens, 1, 2**31, "be a count of at least 1")
        eos = eos_ids(eos_token_id, self.model, self.tokenizer)
        padding = pad_id(pad_token_id, self.model, self.tokenizer, eos)
        forgotten = padding_alone(pad_token_id, self.model, self.tokenizer)
        prompts = read_prompts(prompts_or_input_ids, attention_mask, self.tokenizer, forgotten)
        rows = len(prompts.ids)
        knobs = _knobs(rows, guidance, temperature, top_k, top_p, min_p, seed)
        if self.arm is None or bool((knobs["guidance"] == 0).all()):
            if self.arm is None and preference is not None:
                remedy = "GuidedGenerator(model, arm) takes the model that reads it."
                check.fail("preference", "be None without an arm", check.describe(preference), remedy)
            arm, knobs["guidance"] = None, torch.zeros(rows, 0)
        else:
            arm = self.arm
            self._check_preference(preference, rows)

        with torch.no_grad(), evaluating(self.model, arm):
            batch = _Batch(self, arm, prompts, limit, knobs, eos, padding, return_logprobs)
            with _bar(progress, limit) as advance:
                while batch.going:
                    with nullcontext() if arm is None or preference is None else arm.preference(preference):
                        batch.run(advance)
                    if batch.going:
                        preference = _rows_of(preference, batch.drop_finished())
        sequences, lengths = batch.sequences, _lengths(batch.sequences[:, : batch.step], eos)
        longest = int(lengths.max())
        logprobs = None if batch.logprobs is None else batch.logprobs[:, :longest].clone()
        sequences = sequences[:, :longest].clone()
        return GuidedOutput(sequences, lengths, self._texts(sequences, lengths, eos), logprobs)

    def _vocab_size(self) -> int | None:
        """How many leading columns of both heads may be drawn; None: all of them."""
        base, arm = head_width(self.model), None if self.arm is None else head_width(self.arm)
        widths = [width for width in (base, arm) if width is not None]
        if self._given_vocab_size is not None:
            most = min(widths, default=arguments.MAX_VOCAB)
            return check.integer("vocab_size", self._given_vocab_size, 1, most, f"be in [1, {most}], the common tokens")
        if self._tokenizer_size is not None:
            return min([*widths, self._tokenizer_size])
        if len(set(widths)) > 1:
            remedy = f"If the tail is padding, pass the tokenizer or vocab_size={min(widths)}."
            check.fail("the arm", f"have {base} logits per position, as the model", f"{arm}", remedy)
        return None

    def _check_preference(self, preference: Any, rows: int) -> None:
        if not hasattr(self.arm, "preference"):
            if preference is not None:
                remedy = "It is a plain language model; leave preference away."
                check.fail("preference", "be None, since the arm takes none", check.describe(preference), remedy)
            return
        if preference is None:
            remedy = "Pass weights by attribute, such as preference={'empathy': 1.0}, or a list of them, one per row."
            check.fail("preference", "be given, since the arm is conditioned on it", None, remedy)
        if _is_per_row(preference) and len(preference) != rows:
            remedy = "Pass one per prompt, or one for all."
            check.fail("preference", f"have {rows} rows, one per prompt", check.describe(preference), remedy)

    def _texts(self, sequences: torch.Tensor, lengths: torch.Tensor, eos: list[int]) -> list[str] | None:
        if self.tokenizer is None:
            return None
        texts = []
        for row, length in zip(sequences.tolist(), lengths.tolist(), strict=True):
            ids = row[: length - 1] if row[length - 1] in eos else row[:length]
            texts.append(self.tokenizer.decode(ids, skip_special_tokens=True))
        return texts


class _Batch:
    """The rows still being written, and the two models that read them."""

    def __init__(
        self,
        generator: GuidedGenerator,
        arm: Any,
        prompts: Prompts,
        limit: int,
        knobs: dict[str, torch.Tensor],
        eos: list[int],
        padding: int,
        with_logprobs: bool,
    ) -> None:
        self._base = Stream(generator.model, prompts, limit, "model")
        self._guide = None if arm is None else Stream(arm, prompts, limit, "arm")
        self._models = generator.model, generator.arm
        self._vocab_size = generator._vocab_size()
        rows, self._limit, device = len(prompts.ids), limit, self._base.device
        beside = check.float64_device(device)  # where the op wants them
        self._knobs = {name: value.to(beside) for name, value in knobs.items()}
        self._eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.sequences = torch.full((rows, limit), padding, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, limit, device=device) if with_logprobs else None
        self._rows = torch.arange(rows, device=device)
        self._finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self._tokens: torch.Tensor | None = None
        self._padding = padding
        self._between_looks = _STEPS_BETWEEN_LOOKS.get(device.type, _STEPS_BETWEEN_LOOKS_ELSEWHERE)
        self.step, self.going = 0, True

    def run(self, advance: Any) -> None:
        """Draw until at most half of the rows go on, all have ended, or ``limit`` is reached."""
        rows = len(self._rows)
        while self.step < self._limit:
            self._draw()
            advance()
            if len(self._eos) and self.step % self._between_looks == 0:
                unfinished = rows - int(self._finished.sum())
                if 2 * unfinished <= rows:
                    self.going = unfinished > 0
                    break
        self.going = self.going and self.step < self._limit

    def _draw(self) -> None:
        with base_alone(*self._models):
            base = self._base.next_logits(self._tokens)
        guide = None if self._guide is None else self._guide.next_logits(self._tokens).to(base.device)
        knobs: dict[str, Any] = {**self._knobs, "vocab_size": self._vocab_size, "offset": self.step}
        if self.logprobs is None:
            tokens = ops.guided_sample(base, guide, **knobs)
        else:
            tokens, logprobs = ops.guided_sample(base, guide, **knobs, return_logprobs=True)
            self.logprobs[self._rows, self.step] = logprobs.masked_fill(self._finished, 0.0)
        self.sequences[self._rows, self.step] = tokens.masked_fill(self._finished, self._padding)
        self._tokens = tokens
        self._finished |= torch.isin(tokens, self._eos)
        self.step += 1

    def drop_finished(self) -> torch.Tensor:
        """Go on with the unfinished rows alone; return their indices in the batch as it was, int64 [b]."""
        kept = (~self._finished).nonzero()[:, 0]
        for stream in (self._base, self._guide):
            if stream is not None:
                stream.keep(kept)
        self._knobs = {name: value[kept.to(value.device)] for name, value in self._knobs.items()}
        self._rows, self._finished = self._rows[kept], self._finished[kept]
        self._tokens = None if self._tokens is None else self._tokens[kept]
        return kept


def _knobs(
    rows: int, guidance: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seed: Any
) -> dict[str, torch.Tensor]:
    """The sampler's parameters, one value per row, checked before a model runs."""
    cpu = torch.device("cpu")
    if isinstance(seed, torch.Tensor) and seed.shape != (rows,):
        check.fail("seed", f"be an int, or a tensor of shape [{rows}], one per row", check.describe(seed))
    seeds = seed if isinstance(seed, torch.Tensor) else row_seeds(seed, rows)
    knobs = {
        "guidance": arguments.guidance(guidance, rows, 1, False, cpu),
        "temperature": arguments.knob("temperature", temperature, rows, cpu, torch.float32),
        "top_k": arguments.knob("top_k", top_k, rows, cpu, torch.int64),
        "top_p": arguments.knob("top_p", top_p, rows, cpu, torch.float32),
        "min_p": arguments.knob("min_p", min_p, rows, cpu, torch.float32),
        "seed": arguments.knob("seed", seeds, rows, cpu, torch.int64),
    }
    arguments.ranges(*(knobs[name] for name in ("temperature", "top_k", "top_p", "min_p", "guidance")))
    arguments.counters(knobs["seed"], torch.zeros(1))
    return knobs


def _is_per_row(preference: Any) -> bool:
    if isinstance(preference, torch.Tensor):
        return preference.dim() > 1
    return isinstance(preference, (list, tuple)) and all(isinstance(entry, Mapping) for entry in preference)


def _rows_of(preference: Any, kept: torch.Tensor) -> Any:
    if not _is_per_row(preference):
        return preference
    if isinstance(preference, torch.Tensor):
        return preference[kept.to(preference.device)]
    return [preference[row] for row in kept.tolist()]


def _lengths(sequences: torch.Tensor, eos: list[int]) -> torch.Tensor:
    """The column after each row's first EOS, or the width."""
    steps = sequences.shape[1]
    ended = torch.isin(sequences, torch.tensor(eos, dtype=torch.int64, device=sequences.device))
    columns = torch.arange(1, steps + 1, device=sequences.device).expand_as(sequences)
    return torch.where(ended, columns, steps).amin(dim=1)


@contextmanager
def _bar(shown: bool, steps: int) -> Iterator[Any]:
    """A function to call at every step."""
    if not shown:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=steps, desc="generate", unit="token") as bar:
        yield bar.update
