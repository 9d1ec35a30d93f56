"""K2: gradient surgery against two reads of the gradients, BLAS in Gram space, the pairwise loop and TorchJD.

python -m pytest benchmarks/bench_projection.py --benchmark-only -s
"""

import pytest
import torch

from benchmarks.lines import report
from prosocial_ext import _C, bench, ops, peers, reference


def gradients(k, n, dtype=torch.float32):
    """k gradients with a common part, some pairs of them in conflict."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(k, n, generator=generator)
    rows[::2] += 0.2 * rows[0]
    rows[1::2] -= 0.1 * rows[0]
    return rows.to(dtype)


def blas(grads):
    """What a careful user writes: Gram matrix, recurrence, coefficients times gradients, in the gradients' dtype."""
    gram = grads @ grads.T
    entries, k = gram.tolist(), len(gram)
    totals = [0.0] * k
    for i in range(k):
        a = [float(m == i) for m in range(k)]
        for j in torch.randperm(k).tolist():
            dot = sum(a[m] * entries[m][j] for m in range(k))
            if j != i and dot < 0:
                a[j] -= dot / entries[j][j]
        totals = [total + x for total, x in zip(totals, a, strict=True)]
    return torch.tensor(totals, dtype=grads.dtype) @ grads


def torchjd(grads):
    return pytest.importorskip("torchjd.aggregation").PCGrad()(grads)


PEERS = {"blas": blas, "pairwise": peers.pairwise_pcgrad, "torchjd": torchjd}
CASES = [(5, 20_000_000, torch.float32), (5, 20_000_000, torch.bfloat16), (5, 6_300_672, torch.float32),
         (16, 1_000_000, torch.float32), (64, 200_000, torch.float32)]  # fmt: skip


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("k", "n", "dtype"), CASES, ids=[f"k{k}-n{n}-{str(d)[6:]}" for k, n, d in CASES])
def test_project_conflicts(benchmark, k, n, dtype, peer):
    if peer != "blas" and (k, n, dtype) != CASES[0]:
        pytest.skip("the slower peers are timed on the first case")
    grads = gradients(k, n, dtype)
    head = grads[:, :50_000]
    error = (ops.project_conflicts(head).double() - reference.project_conflicts(head).double()).norm()
    slack = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert error <= slack * head.double().norm(dim=1).sum()

    PEERS[peer](head)
    limit = bench.time_read(grads, grads)
    ours = bench.time_call(lambda: ops.project_conflicts(grads), seconds=2.0)
    theirs = bench.time_call(lambda: PEERS[peer](grads), seconds=1.0)
    benchmark.pedantic(lambda: ops.project_conflicts(grads), rounds=10, warmup_rounds=1)
    row = bench.Row(
        family="projection",
        case=f"{str(dtype)[6:]} k={k} N={n}",
        ours=ours,
        bytes=(2 * k + 1) * n * grads.element_size(),
        limit=limit,
        limit_name="two reads",
        peer=theirs,
        peer_name=peer,
    )
    report(benchmark, row)


def test_gradient_gram(benchmark):
    grads = gradients(5, 20_000_000)
    head = grads[:, :50_000]
    torch.testing.assert_close(ops.gradient_gram(head), reference.gradient_gram(head), rtol=1e-12, atol=1e-9)
    limit, theirs = bench.time_read(grads), bench.time_call(lambda: grads @ grads.T)
    ours = bench.time_call(lambda: ops.gradient_gram(grads))
    benchmark.pedantic(lambda: ops.gradient_gram(grads), rounds=10, warmup_rounds=1)
    nbytes = grads.numel() * 4
    row = bench.Row(
        "projection", "gram float32 k=5 N=20000000", ours, nbytes, limit, "one read", theirs, "G @ G.T fp32"
    )
    report(benchmark, row)


@pytest.mark.parametrize("fresh", [False, True], ids=["warm_output", "fresh_output"])
def test_where_the_time_goes(benchmark, fresh):
    """The kernels alone into memory already faulted in, and with the allocation that every call of the op makes."""
    from prosocial_ext.ops import _native
    from prosocial_ext.ops import projection as op

    grads = gradients(5, 20_000_000)
    buffers, out = op._Buffers(1, 5, -(-grads.shape[1] // op._BLOCK)), torch.zeros(grads.shape[1])
    arguments = *op._dense_arguments(grads), *op._knob_arguments(buffers, None, None, "random", 0, "sum")

    def call():
        to = torch.empty_like(out) if fresh else out
        _C.project_dense(*arguments, to.data_ptr(), buffers.scratch.data_ptr(), _native.threads())
        return to

    assert torch.equal(call(), ops.project_conflicts(grads))
    limit, ours = bench.time_read(grads, grads), bench.time_call(call, seconds=2.0)
    benchmark.pedantic(call, rounds=10, warmup_rounds=1)
    name = f"kernels, {'fresh' if fresh else 'warm'} output, k=5 N=20000000"
    report(benchmark, bench.Row("projection", name, ours, 11 * grads.shape[1] * 4, limit, "two reads"))


def test_two_threads_against_one(benchmark):
    """In cache, where memory does not bound it: the limit column is one thread, so 0.5 is perfect."""
    grads = gradients(16, 100_000)
    threads = torch.get_num_threads()
    if threads < 2:
        pytest.skip("one thread only")
    try:
        torch.set_num_threads(1)
        expected = ops.project_conflicts(grads)
        single = bench.time_call(lambda: ops.project_conflicts(grads))
        torch.set_num_threads(2)
        assert torch.equal(ops.project_conflicts(grads), expected)
        double = bench.time_call(lambda: ops.project_conflicts(grads))
        benchmark.pedantic(lambda: ops.project_conflicts(grads), rounds=20, warmup_rounds=2)
    finally:
        torch.set_num_threads(threads)
    report(benchmark, bench.Row("projection", "two threads k=16 N=100000", double, 33 * 400_000, single, "one thread"))
