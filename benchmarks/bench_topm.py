"""K1: the top-m edit against one dense axpy over the same bytes (the limit) and torch's kthvalue route (the peer).

python -m pytest benchmarks/bench_topm.py --benchmark-only -s
"""

from typing import Any

import pytest
import torch

from benchmarks.lines import report
from prosocial_ext import bench, ops, peers, reference

N = 1 << 25
SCALE = 1e-6  # keeps params in range over many edits


def triple(dtype: torch.dtype, n: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, generator=generator) * 0.05
    tuned = base + torch.randn(n, generator=generator) * 1e-3
    return torch.randn(n, generator=generator).to(dtype), base.to(dtype), tuned.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("density", [0.10, 0.01])
@pytest.mark.parametrize("options", [{"check_finite": False}, {"check_finite": True}, {"undo": True}], ids=str)
def test_topm_subtract(benchmark: Any, dtype: torch.dtype, density: float, options: dict[str, bool]) -> None:
    small = triple(dtype, 1 << 18)
    expected, edited = small[0].clone(), small[0].clone()
    reference.topm_subtract_(expected, *small[1:], density=density, **options)
    ops.topm_subtract_(edited, *small[1:], density=density, **options)
    assert torch.equal(edited, expected)

    params, base, tuned = triple(dtype)
    call = lambda: ops.topm_subtract_(params, base, tuned, density=density, scale=SCALE, **options)  # noqa: E731
    ours = bench.time_call(call)
    limit = bench.time_axpy(params, base, tuned)
    peer = None
    if options == {"check_finite": False}:
        m = int(density * N)
        peer = bench.time_call(lambda: peers.kthvalue_subtract_(params, base, tuned, m, SCALE), seconds=0.1)
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    row = bench.Row(
        family="topm",
        case=f"{str(dtype)[6:]} N=2^25 d={density} {', '.join(f'{name}={on}' for name, on in options.items())}",
        ours=ours,
        bytes=4 * N * dtype.itemsize,
        limit=limit,
        limit_name="dense axpy",
        peer=peer,
        peer_name="kthvalue" if peer else "",
    )
    report(benchmark, row)
