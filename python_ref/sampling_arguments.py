"""What the sampling ops accept, read once for reference and compiled ops: shapes, readings of guidance, knobs."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import check

MAX_VOCAB = 1 << 22  # so that a row's integer mass stays below 2**63 (docs of the weights in sampling.py)
LARGEST = sys.float_info.max

_TOP_P_REMEDY = "Pass top_p=1.0 to switch the filter off."
_STRENGTH_REMEDY = "guidance is w = 1 / beta."


class Logits(NamedTuple):
    """``base`` [B, V], ``guides`` [G, B, V'] or None, and how many leading columns may be sampled."""

    base: torch.Tensor
    guides: torch.Tensor | None
    vocab_size: int

    @property
    def num_guides(self) -> int:
        """G, 0 without a guide."""
        return 0 if self.guides is None else self.guides.shape[0]


def logits(base_logits: Any, guide_logits: Any, vocab_size: Any) -> Logits:
    """Check shapes, dtypes and devices; a single guide [B, V] becomes [1, B, V]."""
    base = check.floating("base_logits", base_logits)
    if base.dim() != 2:
        check.fail("base_logits", "have shape [B, V]", check.describe(base), "Take the last position: logits[:, -1].")
    rows, columns = base.shape
    if columns == 0:
        check.fail("base_logits", "have at least one column", check.describe(base))
    if vocab_size is None:
        vocab = columns
    else:
        rule = f"be in [1, {columns}], the number of columns of base_logits"
        vocab = check.integer("vocab_size", vocab_size, 1, columns, rule)
    if vocab > MAX_VOCAB:
        check.fail("vocab_size", f"be at most {MAX_VOCAB}", vocab, "The integer weights of a row would overflow.")
    if guide_logits is None:
        return Logits(base, None, vocab)
    guides = check.floating("guide_logits", guide_logits)
    guides = guides.unsqueeze(0) if guides.dim() == 2 else guides
    if guides.dim() != 3 or guides.shape[1] != rows:
        rule = f"have shape [B, V] or [G, B, V] with B = {rows}, as base_logits"
        check.fail("guide_logits", rule, check.describe(guide_logits))
    if guides.device != base.device:
        check.fail("guide_logits", f"be on {base.device}, as base_logits", f"a tensor on {guides.device}")
    if guides.shape[2] < vocab or (vocab_size is None and guides.shape[2] != columns):
        common = min(columns, guides.shape[2])
        remedy = f"If the tail is padding, pass vocab_size={common}."
        check.fail("guide_logits", f"have {columns} columns, as base_logits", f"{guides.shape[2]} columns", remedy)
    return Logits(base, guides, vocab)


def guidance(value: Any, rows: int, guides: int, stacked: bool, device: torch.device) -> torch.Tensor:
    """Return the strength of every guide in every row, fp32 [B, G].

    A scalar holds for all. A 1-D tensor is per row [B] with one guide [B, V], per guide [G] with stacked guides
    [G, B, V]; [B, G] is both. Detached.
    """
    if not isinstance(value, torch.Tensor):
        rule = "be a finite number, or a tensor"
        strength = check.number("guidance", value, -LARGEST, LARGEST, rule, _STRENGTH_REMEDY)
        return _filled((rows, guides), strength, torch.float32, device)
    checked = check.values("guidance", value, device)
    expected = (guides,) if stacked else (rows,)
    if checked.dim() == 0 or tuple(checked.shape) in (expected, (rows, guides)):
        shaped = checked.unsqueeze(1) if checked.dim() == 1 and not stacked else checked
        return shaped.to(torch.float32).to(device).expand(rows, guides)
    check.fail(
        "guidance",
        "be a scalar, per row [B] with one guide [B, V], per guide [G] with stacked guides [G, B, V], or both [B, G]",
        check.describe(checked),
        f"Here {'guides are stacked' if stacked else 'is one guide' if guides else 'is no guide'}, B = {rows} and "
        f"G = {guides}: shape {list(expected)} or {[rows, guides]}.",
    )


def knob(name: str, value: Any, rows: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a scalar or per-row sampling parameter as a detached tensor [B] of ``dtype``; ranges are checked later."""
    integral = dtype == torch.int64
    if isinstance(value, torch.Tensor):
        value = check.values(name, value, device, "be an integer tensor" if integral else "be real numbers")
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != rows):
            check.fail(name, f"be a scalar or have shape [{rows}], one value per row", check.describe(value))
        if integral and value.is_floating_point():
            check.fail(name, "be an integer tensor", check.describe(value), error=TypeError)
        return value.to(dtype).to(device).expand(rows)
    kind = "an int" if integral else "a number"
    if isinstance(value, bool) or not isinstance(value, int if integral else (int, float)):
        check.fail(name, f"be {kind} or a tensor [B]", check.describe(value), error=TypeError)
    if integral and not 0 <= value < 2**63:
        check.fail(name, "be in [0, 2**63)", check.describe(value))
    if not integral and isinstance(value, int):
        check.number(name, value, -LARGEST, LARGEST, "be a number that float64 holds")
    return _filled((rows,), value, dtype, device)


def _filled(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of one value, rounded once; a float beyond fp32 becomes infinite."""
    whole = dtype == torch.int64
    if not torch.compiler.is_compiling() and (whole or abs(value) <= torch.finfo(torch.float32).max):
        return torch.full(shape, value if whole else float(value), dtype=dtype, device=device)
    # torch.full refuses such floats, and would make torch.compile specialise on the value.
    if whole:
        return torch.ones(shape, dtype=torch.int64, device=device) * value
    exact = torch.ones(shape, dtype=torch.float64, device=check.float64_device(device)) * float(value)
    return exact.to(dtype).to(device)


def ranges(
    temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, guidance: torch.Tensor
) -> None:
    """Raise for the first value that no sampling can mean."""
    _all("temperature", temperature, (temperature >= 0) & temperature.isfinite(), "be finite and >= 0", "0 is greedy.")
    _all("top_k", top_k, top_k >= 0, "be >= 0", "0 switches the filter off.")
    _all("top_p", top_p, (top_p >= 0) & (top_p <= 1), "be in [0, 1]", _TOP_P_REMEDY)
    _all("min_p", min_p, (min_p >= 0) & (min_p <= 1), "be in [0, 1]", "0 switches the filter off.")
    _all("guidance", guidance, guidance.isfinite(), "be finite", _STRENGTH_REMEDY)


def counters(seed: torch.Tensor, offset: torch.Tensor) -> None:
    """Raise unless seed and offset are in [0, 2**63)."""
    _all("seed", seed, seed >= 0, "be in [0, 2**63)", "")
    _all("offset", offset, offset >= 0, "be in [0, 2**63)", "")


def per_row(seed: Any) -> bool:
    """Whether ``seed`` has one value per row, so that rows draw from it alone; else the row is in the counter."""
    return isinstance(seed, torch.Tensor) and seed.dim() == 1


def positive_temperature(temperature: torch.Tensor) -> None:
    """Raise unless every temperature is finite and > 0."""
    good = (temperature > 0) & temperature.isfinite()
    _all("temperature", temperature, good, "be finite and > 0", "For greedy decoding use guided_sample.")


def _all(name: str, values: torch.Tensor, good: torch.Tensor, rule: str, remedy: str) -> None:
    if not bool(good.all()):
        index = tuple((~good).nonzero()[0].tolist())
        check.fail(name, rule, f"{values[index].item()} in row {index[0]}", remedy)


def refuse_forward_mode(*logits: torch.Tensor | None) -> None:
    """Raise where a tensor carries a forward-mode tangent, which would be dropped in silence."""
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in logits):
        raise NotImplementedError(
            "guided_logprobs must not be given forward-mode tangents (torch.func.jvp, jacfwd, hessian): only reverse "
            "mode is implemented. Use torch.func.vjp, jacrev or backward()."
        )
