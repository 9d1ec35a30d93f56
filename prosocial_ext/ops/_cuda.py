"""What the ops' CUDA implementations share: the launchers, where they run, and what their error codes mean."""

from __future__ import annotations

from typing import Any

import torch

from prosocial_ext import _C

__all__ = ["checked", "compiled", "launchers", "refuse_capture", "target"]

# Tests put the kernels' twin on host memory here (tests/simt); the implementations then run on CPU tensors.
launchers: Any = getattr(_C, "cuda", None)

# cudaErrorNoKernelImageForDevice; cudaErrorUnsupportedPtxVersion, where only PTX would fit and the driver is older
_NO_KERNELS = (209, 222)


def compiled() -> bool:
    """Whether this build has CUDA kernels; where it has none, CUDA tensors take the reference."""
    return launchers is not None


def target(tensor: torch.Tensor) -> tuple[int, int]:
    """Return (device index, address of torch's current stream there): the last two arguments of every launcher."""
    if not tensor.is_cuda:
        return 0, 0
    index = tensor.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream


def checked(error: int) -> None:
    """Raise for a launcher's error code, 0 being success.

    Raises:
        RuntimeError: the launch failed; the text says what to do where that is known.
    """
    if error == 0:
        return
    if error in _NO_KERNELS:
        raise RuntimeError(
            f"prosocial_ext has no kernels for this GPU: it was compiled for {_C.cuda_archs}. Build it again with "
            "PROSOCIAL_CUDA_ARCHS naming the GPU's architecture, or run ops.backend('reference')."
        )
    raise RuntimeError(
        f"a CUDA launch of prosocial_ext failed with cudaError_t {error}; run with CUDA_LAUNCH_BLOCKING=1"
    )


def refuse_capture(on_cuda: bool, what: str, remedy: str) -> None:
    """Raise inside the capture of a CUDA graph, for a call that waits for the device.

    Raises:
        RuntimeError: the current stream is being captured.
    """
    if on_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what}, which a CUDA graph cannot capture. {remedy}")
