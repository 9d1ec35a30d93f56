"""Guided sampling: the definition of correct, to the bit.

The distribution is softmax((base + sum_g guidance_g * guide_g) / temperature): the token-level form of
pi(y|x) ~ pi_base(y|x) * prod_g pi_g(y|x)^guidance_g (GUI-Gen of arXiv 2512.06515; the ARM form of GenARM, ICLR 2025),
since every row's own log-normaliser cancels.

A token's weight is an integer, 2^y in fixed point relative to the row's best token. Every sum is then exact and
independent of order, so that all devices, instruction sets and thread counts draw the same token for the same seed.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import check
from . import sampling_arguments as arguments
from .philox import uniform_u64

__all__ = ["guided_logprobs", "guided_sample"]

# 2^f on [-1/2, 1/2], fp32, relative error 1.7e-7 with unfused Horner steps; the constant term is 1, so a row's best
# token weighs exactly 2^FRACTION_BITS.
EXP2 = (0.0013274633092805743, 0.009671961888670921, 0.055506784468889236, 0.24022234976291656, 0.6931470632553101)
LOG2_E = 1.44269502162933349609375  # fp32
FRACTION_BITS = 40
LARGEST = torch.finfo(torch.float32).max


def combine(logits: arguments.Logits, guidance: torch.Tensor) -> torch.Tensor:
    """Return z = base + sum_g guidance_g * guide_g, [B, V] in fp32 (fp64 for fp64 logits of ``guided_logprobs``).

    -inf marks what cannot be drawn: where the base is -inf, beyond the vocabulary, and where a guide of positive
    guidance is -inf. A negative guidance on a guide's infinity is NaN, an error of the row.
    """
    z = logits.base
    out = torch.full_like(z, -math.inf, dtype=guidance.dtype)
    z = z[:, : logits.vocab_size].to(guidance.dtype)
    for guide, w in zip(logits.guides if logits.guides is not None else (), guidance.T[:, :, None], strict=True):
        g = guide[:, : logits.vocab_size].to(guidance.dtype)
        step = z + w * torch.where(g.isinf() & (w < 0), math.nan, g)
        step = torch.where(z == -math.inf, z, step)
        step = torch.where((g == -math.inf) & (w > 0), g, step)
        z = torch.where(w == 0, z, step)  # guidance 0 means that the guide is not read: 0 * -inf is NaN
    out[:, : logits.vocab_size] = z + 0.0  # -0 and +0 are one key
    return out


def refuse_bad_rows(z: torch.Tensor) -> None:
    """Raise for the first row with a NaN or +inf that is not masked, or with nothing left to draw."""
    bad = z.isnan() | (z == math.inf)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        rule = "be finite, or -inf to mask"
        remedy = "A NaN or +inf logit (or negative guidance on an infinite guide logit) has no distribution."
        check.fail(f"the combined logit of row {row}, token {column},", rule, z[row, column].item(), remedy)
    empty = (z == -math.inf).all(dim=-1)
    if bool(empty.any()):
        row = int(empty.nonzero()[0])
        check.fail(f"row {row}", "have at least one token left", "only masked logits", "Check the masks of that row.")


def integer_weights(z: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Return 2^((z - max z) * log2(e) / temperature) as int64 with 40 fraction bits, [B, V]; 0 below about 28 nats."""
    best = z.amax(dim=-1, keepdim=True)
    c = (torch.full_like(best, LOG2_E) / temperature[:, None]).clamp(max=LARGEST)  # float / tensor rounds twice
    y = ((z - best) * c).clamp(min=-60.0)
    n = (y + 12582912.0) - 12582912.0  # round to nearest: 1.5 * 2^23 leaves no fraction bits
    f = y - n
    p = torch.full_like(f, EXP2[0])
    for coefficient in (*EXP2[1:], 1.0):
        p = p * f + coefficient
    mantissa = (p * 2.0**29).to(torch.int64)
    return torch.bitwise_right_shift(mantissa << 11, (-n).to(torch.int64))


def log_mass(mass: int) -> float:
    """Return ln(mass / 2^40) in fp64, by a series in unfused steps, so that every implementation rounds alike."""
    ratio, exponent = math.frexp(float(mass))
    if ratio < 0.7071067811865476:
        ratio, exponent = ratio * 2.0, exponent - 1
    s = (ratio - 1.0) / (ratio + 1.0)
    square, series = s * s, 0.0
    for odd in (21.0, 19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = series * square + 1.0 / odd
    return float(exponent - FRACTION_BITS) * 0.6931471805599453 + 2.0 * s * series


def kept_tokens(z: torch.Tensor, weights: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Return what the filters leave of a row, bool [V]; filters in transformers' order."""
    kept = torch.ones_like(z, dtype=torch.bool)
    if 0 < top_k < z.numel():
        kept &= z >= z.topk(top_k).values[-1]  # everything tied with the k-th largest stays
    if top_p < 1:
        target = (math.floor(top_p * 2.0**64) * int(weights[kept].sum())) >> 64
        keys, order = torch.where(kept, z, -math.inf).sort(descending=True)
        mass = torch.where(kept, weights, 0)[order].cumsum(0)
        first = torch.searchsorted(-keys, -keys)  # the first of each group of ties
        greater = torch.where(first > 0, mass[first - 1], 0)
        kept[order] &= (keys == keys[0]) | (greater < target)
    return kept & (weights >= math.floor(min_p * 2.0**FRACTION_BITS))


def draw(kept_weights: torch.Tensor, word: int) -> int:
    """Return the first token whose inclusive prefix exceeds the share ``word / 2**64`` of the mass."""
    prefix = kept_weights.cumsum(0)
    threshold = (word * int(prefix[-1])) >> 64
    return int(torch.searchsorted(prefix, threshold, right=True))


def guided_sample(
    base_logits: torch.Tensor,
    guide_logits: torch.Tensor | None = None,
    *,
    guidance: float | torch.Tensor = 1.0,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    vocab_size: int | None = None,
    seed: int | torch.Tensor = 0,
    offset: int | torch.Tensor = 0,
    return_logprobs: bool = False,
) -> Any:
    """Draw one token per row from the guided distribution.

    Args:
        base_logits: [B, V], any floating dtype, read as fp32; -inf masks a token whatever the guides say.
        guide_logits: [B, V], or stacked guides [G, B, V]; None draws from the base.
        guidance: strength w = 1 / beta. A scalar; with one guide [B, V] a 1-D tensor is per row [B]; with stacked
            guides a 1-D tensor is per guide [G]; [B, G] is both. 0 does not read the guide.
        temperature: scalar or [B], finite and >= 0; 0 is greedy (lowest index among ties).
        top_k: scalar or [B]; keeps the k best and everything tied with the last of them; 0 is off.
        top_p: scalar or [B] in [0, 1]; keeps the smallest set of best tokens that holds this share of what top_k
            left, ties included; 1 is off.
        min_p: scalar or [B] in [0, 1]; keeps tokens of at least this share of the best token's probability; 0 is off.
        vocab_size: columns from here on are padding and never drawn.
        seed: int (or a 0-dim tensor), or int64 [B]. With an int, row i draws with counter (offset, i); with one value
            per row, from its own seed and offset alone, so that its token does not depend on the batch around it.
        offset: int or int64 [B]; advance it at every step.
        return_logprobs: also return the drawn tokens' log-probs.

    Returns:
        int64 [B]; with ``return_logprobs`` also fp32 [B], each token's log-prob under softmax(combined / temperature)
        before the filters (at temperature 0: at temperature 1). Detached.

    Raises:
        ValueError: a shape, range or row that has no distribution; the text names argument, value and remedy.
        TypeError: an argument of the wrong type.

    Guarantees: the same token on every device, instruction set and thread count; one 64-bit Philox word per row.

    The compiled op on CUDA waits for nothing, so a row that would raise gives token -1 and log-prob NaN there, which
    ``raise_if_bad`` words. Values per row are read where they lie on the device; from the CPU they are copied, which
    waits for the stream and cannot be captured in a graph.

    >>> base = torch.tensor([[1.0, 3.0, 2.0]])
    >>> guide = torch.tensor([[5.0, 0.0, 0.0]])
    >>> guided_sample(base, guide, guidance=1.0, temperature=0.0)
    tensor([0])
    """
    logits = arguments.logits(base_logits, guide_logits, vocab_size)
    check.boolean("return_logprobs", return_logprobs)
    rows, device = base_logits.shape[0], base_logits.device
    stacked = guide_logits is not None and guide_logits.dim() == 3
    strength = arguments.guidance(guidance, rows, logits.num_guides, stacked, device)
    heat = arguments.knob("temperature", temperature, rows, device, torch.float32)
    best_k = arguments.knob("top_k", top_k, rows, device, torch.int64)
    nucleus = arguments.knob("top_p", top_p, rows, device, torch.float32)
    floor = arguments.knob("min_p", min_p, rows, device, torch.float32)
    seeds = arguments.knob("seed", seed, rows, device, torch.int64)
    offsets = arguments.knob("offset", offset, rows, device, torch.int64)
    arguments.ranges(heat, best_k, nucleus, floor, strength)
    arguments.counters(seeds, offsets)

    with torch.no_grad():
        z = combine(logits, strength)
        refuse_bad_rows(z)
        weights = integer_weights(z, torch.where(heat > 0, heat, 1.0))
        tokens = torch.empty(rows, dtype=torch.int64, device=device)
        logprobs = torch.empty(rows, dtype=torch.float32, device=device)
        for row in range(rows):
            t = heat[row].item()
            if t == 0:
                token = int(z[row].argmax())
            else:
                index = 0 if arguments.per_row(seed) else row
                word = uniform_u64(int(seeds[row]), int(offsets[row]), index)
                filters = int(best_k[row]), nucleus[row].item(), floor[row].item()
                kept = kept_tokens(z[row], weights[row], *filters)
                token = draw(torch.where(kept, weights[row], 0), word)
            tokens[row] = token
            below = z[row, token].item() - z[row].max().item()
            logprobs[row] = below / (t if t > 0 else 1.0) - log_mass(int(weights[row].sum()))
    return (tokens, logprobs) if return_logprobs else tokens


class _LogProbs(torch.autograd.Function):
    """log softmax(z / temperature); in fp32 from the integer weights, so that ``guided_sample`` agrees to the bit."""

    @staticmethod
    def forward(z: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        if z.dtype == torch.float64:
            return torch.log_softmax(z / temperature[:, None], dim=-1)
        mass = integer_weights(z, temperature).sum(dim=-1)
        log_masses = torch.tensor([log_mass(m) for m in mass.tolist()], dtype=torch.float64, device=z.device)
        below = z.double() - z.amax(dim=-1, keepdim=True).double()
        return (below / temperature[:, None].double() - log_masses[:, None]).float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return logprobs_backward(grad, *ctx.saved_tensors), None


def logprobs_backward(grad: torch.Tensor, logprobs: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Return the gradient of log softmax(z / temperature) in z, [B, V]; masked tokens neither give nor get any."""
    grad = torch.where(logprobs == -math.inf, 0.0, grad)
    return (grad - logprobs.exp() * grad.sum(dim=-1, keepdim=True)) / temperature[:, None]


def guided_logprobs(
    base_logits: torch.Tensor,
    guide_logits: torch.Tensor | None = None,
    *,
    guidance: float | torch.Tensor = 1.0,
    temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Return the log-probs of the guided distribution, softmax((base + sum_g guidance_g * guide_g) / temperature).

    Args:
        base_logits: [B, V], any floating dtype.
        guide_logits: [B, V], [G, B, V] or None.
        guidance: as in ``guided_sample``.
        temperature: scalar or [B], finite and > 0.
        vocab_size: columns from here on are padding, -inf in the result.

    Returns:
        fp32 [B, V] (fp64 where any logits are fp64), -inf at masked ids. Differentiable in all logits, in reverse mode;
        guidance and temperature are constants, and masked tokens neither give nor get a gradient.

    Raises:
        ValueError: a shape, range or row that has no distribution.
        TypeError: an argument of the wrong type.
        NotImplementedError: logits carry forward-mode tangents (torch.func.jvp).

    >>> guided_logprobs(torch.zeros(1, 4)).exp()
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    logits = arguments.logits(base_logits, guide_logits, vocab_size)
    rows, device = base_logits.shape[0], base_logits.device
    stacked = guide_logits is not None and guide_logits.dim() == 3
    strength = arguments.guidance(guidance, rows, logits.num_guides, stacked, device)
    heat = arguments.knob("temperature", temperature, rows, device, torch.float32)
    arguments.refuse_forward_mode(base_logits, guide_logits)
    arguments.positive_temperature(heat)
    arguments.ranges(heat, *(torch.zeros(1, device=device),) * 3, strength)
    double = torch.float64 in (base_logits.dtype, guide_logits.dtype if guide_logits is not None else None)
    z = combine(logits, strength.double() if double else strength)
    refuse_bad_rows(z.detach())
    return _LogProbs.apply(z, heat.to(z.dtype))
