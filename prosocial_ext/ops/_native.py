"""How tensors cross the border to prosocial_ext._C: addresses, dtype tags, a thread count.

Host tables say device="cpu": a caller may have set another default device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

DTYPE_TAG = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # pse::DType

threads = torch.get_num_threads  # asked at every call: DataLoader workers and forked children run with one


def addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the tensors' data pointers as an int64 tensor [n] that outlives the call."""
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device="cpu")


def dtype_tags(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the tensors' dtype tags as an int32 tensor [n]."""
    return torch.tensor([DTYPE_TAG[t.dtype] for t in tensors], dtype=torch.int32, device="cpu")


def element_counts(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the tensors' element counts as an int64 tensor [n]."""
    return torch.tensor([t.numel() for t in tensors], dtype=torch.int64, device="cpu")
