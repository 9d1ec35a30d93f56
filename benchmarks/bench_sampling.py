"""K3: guided sampling against one read of both logits and the torch chain, at the vocabulary of Llama 3.

python -m pytest benchmarks/bench_sampling.py --benchmark-only -s
"""

import pytest
import torch

from benchmarks.lines import report
from prosocial_ext import bench, ops, peers, reference

VOCAB = 128_256
FILTERS = {"plain": {}, "top_k_top_p": {"top_k": 50, "top_p": 0.95}, "top_p": {"top_p": 0.95}, "min_p": {"min_p": 0.05}}


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_guided_sample(benchmark, rows, dtype, filters):
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(rows, VOCAB, generator=generator) * 3).to(dtype)
    guide = (torch.randn(rows, VOCAB, generator=generator) * 2).to(dtype)
    knobs = FILTERS[filters]
    expected = reference.guided_sample(base[:2], guide[:2], seed=1, **knobs)
    assert torch.equal(ops.guided_sample(base[:2], guide[:2], seed=1, **knobs), expected)

    limit = bench.time_read(base, guide)
    peer = bench.time_call(lambda: peers.sampling_chain(base, guide, **knobs), seconds=1.0)
    ours = bench.time_call(lambda: ops.guided_sample(base, guide, seed=1, **knobs))
    benchmark.pedantic(lambda: ops.guided_sample(base, guide, seed=1, **knobs), rounds=20, warmup_rounds=2)
    row = bench.Row(
        family="sampling",
        case=f"{str(dtype)[6:]} B={rows} V={VOCAB} {filters}",
        ours=ours,
        bytes=2 * base.numel() * base.element_size(),
        limit=limit,
        limit_name="one read",
        peer=peer,
        peer_name="torch chain",
    )
    report(benchmark, row)


def test_two_threads_against_one(benchmark):
    base = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    before, taken = torch.get_num_threads(), {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        taken[threads] = bench.time_call(lambda: ops.guided_sample(base, seed=1))
    torch.set_num_threads(before)
    benchmark.pedantic(lambda: ops.guided_sample(base, seed=1), rounds=20, warmup_rounds=2)
    benchmark.extra_info["speedup_of_two_threads"] = taken[1].median / taken[2].median
    print(f"\nsampling   two threads: {taken[1].median / taken[2].median:.2f} x one (B=8, no filter)")


def test_dispatch(benchmark):
    base, guide = torch.randn(1, 64), torch.randn(1, 64)
    benchmark(lambda: ops.guided_sample(base, guide, seed=1))
    print(f"\nsampling   dispatch and checks at V=64: {benchmark.stats.stats.median * 1e6:.1f} us a call")
