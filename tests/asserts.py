"""Named assertions of the tests. A failure tells the first wrong element, its coordinate and both values."""

import torch

_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers; every NaN reads as one NaN, since no payload is promised."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.view(_INTEGER_OF[tensor.element_size()]) if tensor.dtype is not torch.bool else tensor


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "result") -> None:
    """Equal shape, dtype and bits (so 0.0 and -0.0 differ)."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    differs = bits(actual) != bits(expected)
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} elements differ, first at {first}: "
            f"{actual[first].item()!r}, expected {expected[first].item()!r}"
        )
