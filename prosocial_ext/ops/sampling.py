"""Guided sampling on compiled kernels; semantics and docs are those of ``prosocial_ext.reference``."""

from __future__ import annotations

import threading
from math import isfinite
from typing import Any

import torch

from prosocial_ext import _C, reference
from prosocial_ext.ops import _backend, _cuda, _cuda_sampling, _knobs, _native
from prosocial_ext.ops._library import LIBRARY, passes_autograd, register
from prosocial_ext.ops._logits import unit_columns, view
from prosocial_ext.reference import check
from prosocial_ext.reference import sampling as definition
from prosocial_ext.reference import sampling_arguments as arguments

__all__ = ["guided_logprobs", "guided_sample"]

_kept = threading.local()


def _scratch(vocab: int, threads: int) -> torch.Tensor:
    """This thread's scratch, grown when needed: a fresh megabyte per call would cost more in page faults than a row."""
    size = _C.sampling_scratch_bytes(vocab, threads)
    buffer: torch.Tensor | None = getattr(_kept, "scratch", None)
    if buffer is None or buffer.numel() < size:
        buffer = _kept.scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
    return buffer


# ---- one set of parameters for all rows: the fast path


def _sample_cpu(
    base: torch.Tensor,
    guide: torch.Tensor | None,
    vocab: int,
    seed: int,
    offset: int,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    rows, threads = base.shape[0], _native.threads()
    tokens = torch.empty(rows, dtype=torch.int64, device="cpu")
    base = unit_columns(base)
    guide = None if guide is None else unit_columns(guide)
    base_view, _ = view(base)
    guide_view, guides = view(guide)
    knobs = guidance, temperature, top_k, top_p, min_p, seed, offset
    scratch = _scratch(vocab, threads).data_ptr()
    bad = _C.guided_sample(base_view, guide_view, guides, rows, vocab, *knobs, tokens.data_ptr(), scratch, threads)
    if bad:
        _sample_elsewhere(base, guide, vocab, seed, offset, guidance, temperature, top_k, top_p, min_p)
        raise RuntimeError(f"guided_sample: {bad} rows were refused by the kernel but not by the reference")
    return tokens


def _sample_elsewhere(
    base: torch.Tensor,
    guide: torch.Tensor | None,
    vocab: int,
    seed: int,
    offset: int,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    return reference.guided_sample(
        base,
        guide,
        guidance=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        vocab_size=vocab,
        seed=seed,
        offset=offset,
    )


def _sample_fake(base: torch.Tensor, guide: torch.Tensor | None, vocab: int, *knobs: Any) -> torch.Tensor:
    return base.new_empty(base.shape[0], dtype=torch.int64)


_sample = register(
    "guided_sample(Tensor base, Tensor? guide, SymInt vocab, SymInt seed, SymInt offset, float guidance=1.0, "
    "float temperature=1.0, SymInt top_k=0, float top_p=1.0, float min_p=0.0) -> Tensor",
    cpu=_sample_cpu,
    cuda=_cuda_sampling.sample if _cuda.compiled() else None,
    elsewhere=_sample_elsewhere,
    fake=_sample_fake,
)


# ---- parameters per row: temperature, top_p, min_p, guidance, top_k, seed, offset, each as in _knobs.py


def _sample_rows_cpu(
    base: torch.Tensor,
    guide: torch.Tensor | None,
    vocab: int,
    row_in_counter: bool,
    logprobs: bool,
    *knobs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, threads = base.shape[0], _native.threads()
    tokens = torch.empty(rows, dtype=torch.int64, device="cpu")
    drawn = torch.empty(rows if logprobs else 0, dtype=torch.float32, device="cpu")
    base = unit_columns(base)
    guide = None if guide is None else unit_columns(guide)
    base_view, _ = view(base)
    guide_view, guides = view(guide)
    real, whole = _knobs.tables(knobs, rows, base.device)
    bad = _C.guided_sample_rows(
        *(base_view, guide_view, guides, rows, vocab, real.data_ptr(), whole.data_ptr(), row_in_counter),
        *(tokens.data_ptr(), drawn.data_ptr() if logprobs else 0, _scratch(vocab, threads).data_ptr(), threads),
    )
    if bad:
        _sample_rows_elsewhere(base, guide, vocab, row_in_counter, logprobs, *knobs)
        raise RuntimeError(f"guided_sample: {bad} rows were refused by the kernel but not by the reference")
    return tokens, drawn


def _sample_rows_elsewhere(
    base: torch.Tensor,
    guide: torch.Tensor | None,
    vocab: int,
    row_in_counter: bool,
    logprobs: bool,
    *knobs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = base.shape[0]
    if rows == 0:
        return base.new_empty(0, dtype=torch.int64), base.new_empty(0, dtype=torch.float32)
    temperature, top_p, min_p, strength, top_k, seed, offset = (_knobs.spread(k, rows, base.device) for k in knobs)
    tokens, drawn = reference.guided_sample(
        base,
        guide,
        guidance=strength,
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        seed=int(seed[0]) if row_in_counter else seed,
        offset=offset,
        vocab_size=vocab,
        return_logprobs=True,
    )
    return tokens, drawn if logprobs else drawn.new_empty(0)


def _sample_rows_fake(
    base: torch.Tensor,
    guide: torch.Tensor | None,
    vocab: int,
    row_in_counter: bool,
    logprobs: bool,
    *knobs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = base.shape[0]
    tokens = base.new_empty(rows, dtype=torch.int64)
    return tokens, base.new_empty(rows if logprobs else 0, dtype=torch.float32)


_sample_rows = register(
    "guided_sample_rows(Tensor base, Tensor? guide, SymInt vocab, bool row_in_counter, bool logprobs, "
    "Tensor temperature, Tensor top_p, Tensor min_p, Tensor guidance, Tensor top_k, Tensor seed, Tensor offset) "
    "-> (Tensor, Tensor)",
    cpu=_sample_rows_cpu,
    cuda=_cuda_sampling.sample_rows if _cuda.compiled() else None,
    elsewhere=_sample_rows_elsewhere,
    fake=_sample_rows_fake,
)


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
    """Draw one token per row from the guided distribution (see the reference for the full text)."""
    if (
        type(guidance) is type(temperature) is type(top_p) is type(min_p) is float
        and type(top_k) is type(seed) is type(offset) is int
        and 0 <= top_k < 2**63
        and 0 <= seed < 2**63
        and 0 <= offset < 2**63
        and isfinite(guidance)  # where no row reads it the kernel would not notice
        and return_logprobs is False
        and not torch.compiler.is_compiling()  # a float argument would make one graph per value
        and (vocab := _plain_vocab(base_logits, guide_logits, vocab_size))
    ):
        # Values out of range are found by the kernel and worded by the reference.
        return _sample(
            base_logits, guide_logits, vocab, seed, offset, guidance, temperature, top_k, top_p, min_p
        )  # fmt: skip
    logits = arguments.logits(base_logits, guide_logits, vocab_size)
    check.boolean("return_logprobs", return_logprobs)
    rows, device = base_logits.shape[0], check.float64_device(base_logits.device)  # MPS draws on the host
    stacked = guide_logits is not None and guide_logits.dim() == 3
    strength = _knobs.guidance(guidance, rows, logits.num_guides, stacked, device)
    real, whole = (
        [_knobs.knob(name, value, rows, device, dtype) for name, value in named.items()]
        for dtype, named in (
            (torch.float32, {"temperature": temperature, "top_p": top_p, "min_p": min_p}),
            (torch.int64, {"top_k": top_k, "seed": seed, "offset": offset}),
        )
    )
    row_in_counter = not arguments.per_row(seed)
    tokens, logprobs = _sample_rows(
        base_logits, guide_logits, logits.vocab_size, row_in_counter, return_logprobs, *real, strength, *whole
    )
    return (tokens, logprobs) if return_logprobs else tokens


guided_sample.__doc__ = reference.guided_sample.__doc__
passes_autograd("guided_sample", "guided_sample_rows")


def _plain_vocab(base: Any, guide: Any, vocab_size: int | None) -> int:
    """The vocabulary where one compound test shows that nothing can be wrong, else 0."""
    if (
        vocab_size is None
        and type(base) is torch.Tensor
        and base.dim() == 2
        and base.dtype in _native.DTYPE_TAG
        and base.layout is torch.strided
        and not base.is_nested
        and not base.is_neg()
        and (
            guide is None
            or (
                type(guide) is torch.Tensor
                and guide.dtype in _native.DTYPE_TAG
                and guide.layout is torch.strided
                and not guide.is_nested  # it has no shape
                and guide.shape == base.shape
                and not guide.is_neg()
                and guide.device == base.device
            )
        )
    ):
        columns = base.shape[1]
        return columns if columns <= arguments.MAX_VOCAB else 0
    return 0


# ---- log-probs: temperature and guidance, as in _knobs.py


def _logprobs_cpu(
    base: torch.Tensor, guide: torch.Tensor | None, temperature: torch.Tensor, guidance: torch.Tensor, vocab: int
) -> torch.Tensor:
    if torch.float64 in (base.dtype, guide.dtype if guide is not None else None):
        # fp64 is a float softmax: no integers, no kernel
        return _logprobs_elsewhere(base, guide, temperature, guidance, vocab)
    rows, columns = base.shape
    threads = _native.threads()
    out = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    base = unit_columns(base)
    guide = None if guide is None else unit_columns(guide)
    base_view, _ = view(base)
    guide_view, guides = view(guide)
    heat, strength = (_knobs.spread(knob, rows, base.device) for knob in (temperature, guidance))
    knobs = torch.cat([heat.unsqueeze(1), strength], dim=1).to(torch.float32)
    bad = _C.guided_logprobs(
        *(base_view, guide_view, guides, rows, vocab, columns, knobs.data_ptr(), out.data_ptr()),
        *(_scratch(vocab, threads).data_ptr(), threads),
    )
    if bad:
        _logprobs_elsewhere(base, guide, temperature, guidance, vocab)
        raise RuntimeError(f"guided_logprobs: {bad} rows were refused by the kernel but not by the reference")
    return out


def _logprobs_elsewhere(
    base: torch.Tensor, guide: torch.Tensor | None, temperature: torch.Tensor, guidance: torch.Tensor, vocab: int
) -> torch.Tensor:
    heat, strength = (_knobs.spread(knob, base.shape[0], base.device) for knob in (temperature, guidance))
    with torch.no_grad():
        return reference.guided_logprobs(base, guide, guidance=strength, temperature=heat, vocab_size=vocab)


def _logprobs_fake(
    base: torch.Tensor, guide: torch.Tensor | None, temperature: torch.Tensor, guidance: torch.Tensor, vocab: int
) -> torch.Tensor:
    double = torch.float64 in (base.dtype, guide.dtype if guide is not None else None)
    return base.new_empty(base.shape, dtype=torch.float64 if double else torch.float32)


_logprobs = register(
    "guided_logprobs(Tensor base, Tensor? guide, Tensor temperature, Tensor guidance, SymInt vocab) -> Tensor",
    cpu=_logprobs_cpu,
    cuda=_cuda_sampling.logprobs if _cuda.compiled() else None,
    elsewhere=_logprobs_elsewhere,
    fake=_logprobs_fake,
)


def _logprobs_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    base, guide, temperature, guidance, _ = inputs
    ctx.save_for_backward(output, temperature, guidance)
    ctx.base_dtype = base.dtype
    ctx.guide_like = None if guide is None else (guide.shape, guide.dtype)


def _logprobs_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    logprobs, *knobs = ctx.saved_tensors
    temperature, guidance = (_knobs.spread(k, logprobs.shape[0], logprobs.device).to(logprobs.dtype) for k in knobs)
    grad_z = definition.logprobs_backward(grad, logprobs, temperature)
    grad_guide = None
    if ctx.guide_like is not None and ctx.needs_input_grad[1]:
        shape, dtype = ctx.guide_like
        strength = guidance.to(grad_z.dtype).T[:, :, None]  # [G, B, 1]
        shared = min(shape[-1], grad_z.shape[-1])
        grads = strength * grad_z[None, :, :shared]
        grads = torch.nn.functional.pad(grads, (0, shape[-1] - shared))
        grad_guide = grads.reshape(shape).to(dtype)
    return grad_z.to(ctx.base_dtype), grad_guide, None, None, None


torch.library.register_autograd(
    "prosocial_ext::guided_logprobs", _logprobs_gradient, setup_context=_logprobs_context, lib=LIBRARY
)


class _FunctionalLogProbs(torch.autograd.Function):
    """The op for torch.func.grad and its kin, which cannot look into the registered gradient."""

    @staticmethod
    def forward(
        base: torch.Tensor, guide: torch.Tensor | None, temperature: torch.Tensor, guidance: torch.Tensor, vocab: int
    ) -> torch.Tensor:
        return _logprobs(base, guide, temperature, guidance, vocab)

    setup_context = staticmethod(_logprobs_context)
    backward = staticmethod(_logprobs_gradient)


def guided_logprobs(
    base_logits: torch.Tensor,
    guide_logits: torch.Tensor | None = None,
    *,
    guidance: float | torch.Tensor = 1.0,
    temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Return the log-probs of the guided distribution (see the reference for the full text)."""
    abstract = torch.compiler.is_compiling() or check.abstract(base_logits) or check.abstract(guide_logits)
    on_mps = isinstance(base_logits, torch.Tensor) and not check.has_float64(base_logits.device)
    if _backend.use_reference and not abstract and not on_mps:  # with a gradient of its own
        return reference.guided_logprobs(
            base_logits, guide_logits, guidance=guidance, temperature=temperature, vocab_size=vocab_size
        )
    logits = arguments.logits(base_logits, guide_logits, vocab_size)
    rows, device = base_logits.shape[0], base_logits.device
    stacked = guide_logits is not None and guide_logits.dim() == 3
    strength = _knobs.guidance(guidance, rows, logits.num_guides, stacked, device)
    heat = _knobs.knob("temperature", temperature, rows, device, torch.float32)
    arguments.refuse_forward_mode(base_logits, guide_logits)
    functional = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    call = _FunctionalLogProbs.apply if functional else _logprobs
    return call(base_logits, guide_logits, heat, strength, logits.vocab_size)


guided_logprobs.__doc__ = reference.guided_logprobs.__doc__
