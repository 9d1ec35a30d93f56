"""Sixteen and thirty-two bits: exact conversions both ways, and rounding by chance that loses nothing on average."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from prosocial_ext.reference import check

__all__ = ["SIXTEEN", "narrow", "round_stochastic", "widen"]

SIXTEEN = (torch.bfloat16, torch.float16)
_MASK = 0xFFFFFFFF


def widen(elements: Tensor) -> Tensor:
    """Return 16-bit floats as float32, every pattern of bits (of NaN, too) as one that `narrow` gives back.

    >>> widen(torch.tensor([1.5], dtype=torch.bfloat16))
    tensor([1.5000])
    """
    bits = elements.view(torch.int16).to(torch.int32)
    if elements.dtype == torch.bfloat16:
        return (bits << 16).view(torch.float32)
    nan = (bits & -0x80000000) | 0x7F800000 | ((bits & 0x3FF) << 13)  # a conversion would make it quiet
    return torch.where(elements.isnan(), nan.to(torch.int32), elements.float().view(torch.int32)).view(torch.float32)


def narrow(elements: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return what `widen` was given, or None if it never gave these elements.

    >>> narrow(torch.tensor([1.5]), torch.float16), narrow(torch.tensor([1 / 3]), torch.float16)
    (tensor([1.5000], dtype=torch.float16), None)
    """
    bits = elements.view(torch.int32)
    if dtype == torch.bfloat16:
        found = (bits >> 16).to(torch.int16)
    else:
        nan = (bits >> 16 & -0x8000) | 0x7C00 | (bits >> 13 & 0x3FF)
        found = torch.where(elements.isnan(), nan.to(torch.int16), elements.to(dtype).view(torch.int16))
    narrowed = found.view(dtype)
    return narrowed if torch.equal(widen(narrowed).view(torch.int32), bits) else None


def round_stochastic(values: Tensor, dtype: torch.dtype, *, seed: int, name: str, positions: Tensor) -> Tensor:
    """Round float32 to one of the two neighbours in 16 bits, each with the probability that keeps the mean.

    The chance of an element is a Philox word of (seed, tensor name, flat position), so chunks, shards and threads do
    not matter. What ``dtype`` can hold stays as it is; beyond its largest number the nearest one is taken, as always.

    Args:
        values: float32 [n].
        dtype: torch.bfloat16 or torch.float16.
        seed: 0 <= seed < 2^63.
        name: Of the tensor.
        positions: int64 [n], the elements' places in the flat tensor.

    >>> third = torch.full((4,), 1 / 3)
    >>> round_stochastic(third, torch.bfloat16, seed=0, name="w", positions=torch.arange(4)).tolist()
    [0.333984375, 0.333984375, 0.33203125, 0.333984375]
    """
    check.integer("seed", seed, 0, (1 << 63) - 1, "be in [0, 2^63)")
    nearest = values.to(dtype)
    magnitude = nearest.view(torch.int16).to(torch.int32) & 0x7FFF
    size = values.double().abs()
    lower = magnitude - (_of_bits(magnitude, dtype) > size).to(torch.int32)
    low, high = _of_bits(lower, dtype), _of_bits(lower + 1, dtype)
    up = _words(seed, name, positions).double() < (size - low) / (high - low) * 2.0**32  # exact, up to 2^-32 of a step
    sign = nearest.view(torch.int16).to(torch.int32) & ~0x7FFF
    chosen = (sign | (lower + up.to(torch.int32))).to(torch.int16).view(dtype)
    return torch.where(high.isfinite() & values.isfinite(), chosen, nearest)


def _of_bits(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    return magnitude.to(torch.int16).view(dtype).double()


def _words(seed: int, name: str, positions: Tensor) -> Tensor:
    """Word 0 of Philox4x32-10 with key ``seed`` and counter (position, hash of the name), as int64 below 2^32.

    The products of 32-bit words wrap at 2^64, as the generator wants it.
    """
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    k0, k1 = seed & _MASK, seed >> 32
    c0, c1 = positions & _MASK, positions >> 32
    c2, c3 = (torch.full_like(positions, half) for half in (stream & _MASK, stream >> 32))
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0
