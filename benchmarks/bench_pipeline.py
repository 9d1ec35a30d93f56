"""Guided generation against its own forwards, the base alone in the same loop, and transformers' generate.

OMP_NUM_THREADS=1 python -m pytest benchmarks/bench_pipeline.py --benchmark-only -s

The models are tiny (0.6 M parameters), so that what is timed is the loop around them: with real ones its share is less.
"""

import statistics
import time
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from benchmarks.lines import report
from prosocial_ext import bench
from prosocial_ext.decoding import GuidedGenerator
from prosocial_ext.decoding.prompts import Prompts
from prosocial_ext.decoding.stream import Stream

STEPS = 48
IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}  # no row ends early: equal work for all


class ArmProcessor(LogitsProcessor):
    """What users write today: the arm runs inside a logits processor of ``generate``, with a cache of its own."""

    def __init__(self, arm: Any, mask: torch.Tensor | None) -> None:
        self.arm, self.cache, self.mask = arm, DynamicCache(config=arm.config), mask

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = input_ids[:, self.cache.get_seq_length() :]
        mask, positions = self.mask, None
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])], dim=1)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -new.shape[1] :]
        name = next(name for name in ("cache", "past_key_values") if name in signature(self.arm.forward).parameters)
        arguments = {"attention_mask": mask, "position_ids": positions, name: self.cache}
        return scores + self.arm(input_ids=new, use_cache=True, logits_to_keep=1, **arguments).logits[:, -1].float()


def in_turn(calls: list[Callable[[], object]], rounds: int = 9) -> list[bench.Timing]:
    """Time the calls by turns, so that what else the machine does falls on all of them alike."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, seconds in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    deciles = [statistics.quantiles(seconds, n=10) for seconds in taken]
    return [bench.Timing(ends[4], ends[0], ends[8], rounds) for ends in deciles]


def tiny(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=326, tie_word_embeddings=True, **sizes, **IDS)).eval()


@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_generate(benchmark: Any, guided: bool, rows: int, padded: bool) -> None:
    if padded and rows == 1:
        pytest.skip("a single prompt has no padding")
    base, arm = tiny(1), tiny(2) if guided else None
    ids = torch.randint(4, 326, (rows, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[::2, :5] = 0

    def ours(temperature: float = 1.0) -> torch.Tensor:
        settings = {"attention_mask": mask, "temperature": temperature, "max_new_tokens": STEPS}
        return GuidedGenerator(base, arm).generate(ids, **settings).sequences

    def peer(sample: bool = True) -> torch.Tensor:
        processors = [ArmProcessor(arm, mask if padded else None)] if guided else []
        settings = {"attention_mask": mask, "max_new_tokens": STEPS, "top_k": 0 if sample else None}
        return base.generate(ids, do_sample=sample, logits_processor=processors, **settings)[:, ids.shape[1] :]

    @torch.no_grad()
    def forwards() -> None:
        streams = [Stream(model, Prompts(ids, mask != 0), STEPS, "model") for model in (base, arm) if model is not None]
        for step in range(STEPS):
            for stream in streams:
                stream.next_logits(None if step == 0 else ids[:, 0])

    assert torch.equal(ours(temperature=0.0), peer(sample=False))
    alone = GuidedGenerator(base)
    plain = lambda: alone.generate(ids, attention_mask=mask, max_new_tokens=STEPS)  # noqa: E731
    ours_taken, limit, peer_taken, *plain_taken = in_turn([ours, forwards, peer, *([plain] if guided else [])])
    models = [model for model in (base, arm) if model is not None]
    row = bench.Row(
        family="pipeline",
        case=f"{'guided' if guided else 'plain'} B={rows} {STEPS} tokens{' padded' if padded else ''}",
        ours=ours_taken,
        bytes=STEPS * sum(4 * parameter.numel() for model in models for parameter in model.parameters()),
        limit=limit,
        limit_name="forwards alone",
        peer=peer_taken,
        peer_name="generate" + (" + processor" if guided else ""),
    )
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    ours_speed, peer_speed = (rows * STEPS / taken.median for taken in (ours_taken, peer_taken))
    benchmark.extra_info["tokens_per_second"] = ours_speed
    report(benchmark, row)
    print(f"           {ours_speed:.0f} tokens/s, {row.peer_name} {peer_speed:.0f}")
    if plain_taken:
        benchmark.extra_info["times_plain"] = ours_taken.median / plain_taken[0].median
        print(f"           {ours_taken.median / plain_taken[0].median:.2f} x the base alone in the same loop")
