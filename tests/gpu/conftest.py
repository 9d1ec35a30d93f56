"""Tests of this folder need a GPU and a build with CUDA kernels; elsewhere they are skipped, with the reason."""

import pytest
import torch

from prosocial_ext.ops import _cuda

REASON = (
    "torch finds no GPU"
    if not torch.cuda.is_available()
    else "this build has no CUDA kernels (PROSOCIAL_CUDA)"
    if not _cuda.compiled()
    else ""
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here."""
    for item in items:
        if REASON and "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def device() -> torch.device:
    """The first GPU."""
    return torch.device("cuda", 0)
