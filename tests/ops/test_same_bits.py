"""The ops' bits on fixed input, as they were on x86-64: every processor, build and thread count must give them.

Recorded with x86-64-v2, v3 and v4 kernels, and met by the NEON kernels on arm64. A change of a definition changes them:
then run `python tests/ops/test_same_bits.py` and say so in CHANGELOG.md.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

import prosocial_ext.ops

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
EXPECTED = {
    ("edited", "fp32"): "283968d46f427666",
    ("edited", "fp16"): "b1948310ac343e9f",
    ("edited", "bf16"): "bf79c30c31637528",
    ("edited", "fp64"): "12f2500d8053d66f",
    ("projected", "fp32"): "890d8c67fd00d26d",
    ("projected", "fp16"): "d0bb6ff1ce45cda9",
    ("projected", "bf16"): "90b9080547850377",
    ("projected", "fp64"): "6742c0daaadf10c4",
    ("drawn", "fp32"): "11cdbeeca3e0a9a9",
    ("drawn", "fp16"): "798913fcaeceb15d",
    ("drawn", "bf16"): "8b83f42a47ca0453",
    ("drawn", "fp64"): "11cdbeeca3e0a9a9",
}


class Numbers:
    """Multiples of 2^-20 in [-8, 8), the same on every machine; torch's own normal numbers are not."""

    def __init__(self) -> None:
        self._generator = np.random.Generator(np.random.PCG64(7))

    def draw(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        integers = self._generator.integers(-(2**23), 2**23, shape)
        return (torch.from_numpy(integers).float() * 2.0**-20).to(dtype)


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def edited(ops: Any, dtype: torch.dtype) -> str:
    numbers = Numbers()
    base = [numbers.draw(dtype, 300, 200), numbers.draw(dtype, 33)]
    tuned = [(b.float() + numbers.draw(torch.float32, *b.shape) / 64).to(dtype) for b in base]
    params = [b.clone() for b in base]
    edit = ops.topm_subtract_(params, base, tuned, density=0.1, scale=0.7, undo=True)
    delta = ops.topm_select(base, tuned, m=1000)
    fields = (edit.threshold, edit.kept, edit.unchanged, edit.undo.indices, edit.undo.bits)
    return digest(*params, *fields, delta.indices, delta.values)


def projected(ops: Any, dtype: torch.dtype) -> str:
    grads = Numbers().draw(dtype, 6, 30_001)
    return digest(ops.gradient_gram(grads), ops.project_conflicts(grads, seed=5))


def drawn(ops: Any, dtype: torch.dtype) -> str:
    numbers = Numbers()
    base, guide = numbers.draw(dtype, 8, 32_003), numbers.draw(dtype, 8, 32_003)
    filters = [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_p": 0.95, "top_k": 50, "min_p": 0.01}]
    tokens = [ops.guided_sample(base, guide, guidance=0.5, seed=seed, **f) for seed in range(3) for f in filters]
    return digest(*tokens)


OPS = {"edited": edited, "projected": projected, "drawn": drawn}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", ["edited", "drawn"])
def test_edits_and_tokens_are_the_same_everywhere(ops: Any, name: str, dtype: str) -> None:
    assert OPS[name](ops, DTYPES[dtype]) == EXPECTED[name, dtype]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_projections_are_the_same_everywhere(compiled: Any, dtype: str) -> None:
    assert projected(compiled, DTYPES[dtype]) == EXPECTED["projected", dtype]


if __name__ == "__main__":
    for name, function in OPS.items():
        for dtype in DTYPES:
            print(f'    ("{name}", "{dtype}"): "{function(prosocial_ext.ops, DTYPES[dtype])}",')
