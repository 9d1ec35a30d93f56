"""The loops that measure the memory limit do the work that they are timed for."""

from types import ModuleType

import pytest
import torch

from prosocial_ext import _C
from prosocial_ext.ops import _native
from tests.asserts import assert_same_bits


def xor(words: torch.Tensor) -> int:
    total = 0
    for word in words.tolist():
        total ^= word
    return total & 0xFFFFFFFFFFFFFFFF


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 65_536, 65_537, 200_003])
def test_read_loads_every_word_once(count: int, threads: int, compiled: ModuleType) -> None:
    words = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(count))
    assert _C.limit_read(words.data_ptr(), words.numel() * 8, threads) & 0xFFFFFFFFFFFFFFFF == xor(words)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 65_536, 65_537, 200_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_axpy_is_the_dense_edit_to_the_bit(dtype: torch.dtype, count: int, threads: int, compiled: ModuleType) -> None:
    generator = torch.Generator().manual_seed(count)
    params, base, tuned = (torch.randn(count, generator=generator).to(dtype) for _ in range(3))
    expected = (params.float() - 0.3 * (tuned.float() - base.float())).to(dtype)
    tag = _native.DTYPE_TAG[dtype]
    _C.limit_axpy(params.data_ptr(), base.data_ptr(), tuned.data_ptr(), tag, count, 0.3, threads)
    assert_same_bits(params, expected)
