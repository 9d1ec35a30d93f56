"""Tests of this folder need a GPU and a build with CUDA kernels; elsewhere they are skipped, with the reason."""

import os

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
    """Skip what cannot run here. Under a sanitizer, of tests with parameters every so manieth runs (`gpu_check.sh`)."""
    every = int(os.environ.get("PROSOCIAL_GPU_TESTS_EVERY", "1"))
    items[:] = [item for i, item in enumerate(items) if i % every == 0 or not hasattr(item, "callspec")]
    for item in items:
        if REASON and "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def device() -> torch.device:
    """The first GPU."""
    return torch.device("cuda", 0)
