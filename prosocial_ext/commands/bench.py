"""``prosocial bench``: the three op families on this machine, beside the memory's limit and torch's own chain."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial

import torch

from prosocial_ext import bench, ops, peers

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prosocial bench``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--family", choices=sorted(_FAMILIES), help="one op family only")
    parser.add_argument("--small", action="store_true", help="a hundredth of the size: to see that it runs")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; every case checks its answer first."""
    machine = bench.machine()
    if not arguments.json:
        print(" ".join(f"{name} {value}" for name, value in machine.items()))
    rows = []
    for name, cases in _FAMILIES.items():
        if arguments.family in (None, name):
            for row in cases(100 if arguments.small else 1):
                rows.append(row)
                if not arguments.json:
                    print(row.line(), flush=True)
    if arguments.json:
        print(json.dumps({"machine": machine, "rows": [row.as_json() for row in rows]}, indent=2))
    return 0


def _normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _sampling(shrink: int) -> Iterator[bench.Row]:
    vocab = 128_256 // shrink
    for rows in (1, 32):
        base, guide = _normal(rows, vocab, seed=0, scale=3.0), _normal(rows, vocab, seed=1, scale=2.0)
        limit = bench.time_read(base, guide)
        with ops.backend("reference"):
            expected = ops.guided_sample(base[:1], guide[:1], top_k=50, top_p=0.95)
        _same(ops.guided_sample(base[:1], guide[:1], top_k=50, top_p=0.95), expected)
        for name, top_k, top_p in (("no filter", 0, 1.0), ("top-k 50, top-p 0.95", 50, 0.95), ("top-p 0.95", 0, 0.95)):
            yield bench.Row(
                family="sampling",
                case=f"B={rows} V={vocab} fp32 {name}",
                ours=bench.time_call(partial(ops.guided_sample, base, guide, top_k=top_k, top_p=top_p)),
                bytes=8 * base.numel(),
                limit=limit,
                limit_name="one read",
                peer=bench.time_call(partial(peers.sampling_chain, base, guide, top_k, top_p)),
                peer_name="the torch chain",
            )


def _topm(shrink: int) -> Iterator[bench.Row]:
    n = 32_000_000 // shrink
    base = _normal(n, seed=0, scale=0.02).bfloat16()
    tuned = (base.float() + _normal(n, seed=1, scale=2e-3)).bfloat16()
    params = base.clone()
    limit = bench.time_axpy(base.clone(), base, tuned)
    edit = ops.topm_subtract_(params, base, tuned, density=0.1)
    assert int(edit.kept.sum()) == n // 10
    for check_finite in (False, True):
        yield bench.Row(
            family="topm",
            case=f"N={n:.1e} bf16 density 0.10{' finite check' if check_finite else ''}",
            ours=bench.time_call(
                partial(ops.topm_subtract_, params, base, tuned, density=0.1, scale=1e-6, check_finite=check_finite)
            ),
            bytes=4 * n * base.element_size(),
            limit=limit,
            limit_name="a dense axpy",
            peer=bench.time_call(partial(peers.kthvalue_subtract_, params, base, tuned, n // 10, 1e-6), seconds=0.0),
            peer_name="torch.kthvalue",
        )


def _projection(shrink: int) -> Iterator[bench.Row]:
    k, n = 5, 20_000_000 // shrink
    gradients = _normal(k, n, seed=0)
    read = bench.time_read(gradients)
    limit = bench.Timing(2 * read.median, 2 * read.low, 2 * read.high, read.rounds)
    few = gradients[:, :1000]
    with ops.backend("reference"):
        expected = torch.as_tensor(ops.project_conflicts(few))
    actual = torch.as_tensor(ops.project_conflicts(few))
    assert torch.allclose(actual, expected, atol=1e-5 * float(few.norm(dim=1).sum()))
    yield bench.Row(
        family="projection",
        case=f"k={k} N={n:.0e} fp32",
        ours=bench.time_call(partial(ops.project_conflicts, gradients)),
        bytes=8 * gradients.numel(),
        limit=limit,
        limit_name="two reads",
        peer=bench.time_call(partial(peers.pairwise_pcgrad, gradients), seconds=0.0),
        peer_name="the pairwise loop",
    )


def _same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual, expected), "the compiled op and the reference disagree: please report this machine"


_FAMILIES: dict[str, Callable[[int], Iterator[bench.Row]]] = {
    "sampling": _sampling,
    "topm": _topm,
    "projection": _projection,
}
