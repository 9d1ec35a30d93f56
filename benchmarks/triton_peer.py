"""Guided sampling without filters as one writes it in Triton: Gumbel-max, the best of each chunk, then of the row."""

import torch
import triton
import triton.language as tl

_CHUNK = 4096


@triton.jit
def _best_of_chunk(base, guide, scores, tokens, vocab, seed, size: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * size + tl.arange(0, size)
    inside = token < vocab
    at = row * vocab + token
    logits = tl.load(base + at, inside, other=float("-inf")).to(tl.float32)
    logits += tl.load(guide + at, inside, other=0).to(tl.float32)
    noise = -tl.log(-tl.log(tl.rand(seed, at)))
    score, best = tl.max(logits + noise, 0, return_indices=True)
    place = row * tl.num_programs(1) + chunk
    tl.store(scores + place, score)
    tl.store(tokens + place, chunk * size + best)


@triton.jit
def _best_of_row(scores, tokens, out, chunks, size: tl.constexpr):
    row = tl.program_id(0)
    chunk = tl.arange(0, size)
    found = tl.load(scores + row * chunks + chunk, chunk < chunks, other=float("-inf"))
    tl.store(out + row, tl.load(tokens + row * chunks + tl.argmax(found, 0)).to(tl.int64))


def triton_sample(base: torch.Tensor, guide: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw a token per row from softmax(base + guide): contiguous [B, V] logits of any float dtype to int64 [B]."""
    rows, vocab = base.shape
    chunks = triton.cdiv(vocab, _CHUNK)
    scores = torch.empty(rows, chunks, device=base.device)
    tokens = torch.empty(rows, chunks, dtype=torch.int32, device=base.device)
    out = torch.empty(rows, dtype=torch.int64, device=base.device)
    _best_of_chunk[rows, chunks](base, guide, scores, tokens, vocab, seed, size=_CHUNK, num_warps=8)
    _best_of_row[rows,](scores, tokens, out, chunks, size=triton.next_power_of_2(chunks))
    return out
