"""The ops on CUDA tensors against the same ops on the CPU, which the other tests hold against the reference."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from prosocial_ext import ops
from prosocial_ext.ops import _cuda, _cuda_sampling
from tests.asserts import assert_same_bits
from tests.ops.inputs import DTYPES, logits_cases

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0},
    {"temperature": 0.3, "top_p": 0.5},
]


def triple(dtype: torch.dtype, sizes: tuple[int, ...], seed: int = 0) -> list[list[torch.Tensor]]:
    """params, base and tuned of the given sizes, deltas full of ties."""
    generator = torch.Generator().manual_seed(seed)
    params, base, tuned = [], [], []
    for size in sizes:
        params.append(torch.randn(size, generator=generator).to(dtype))
        base.append((torch.randn(size, generator=generator) * 0.05).to(dtype))
        tuned.append((base[-1].float() + (torch.randn(size, generator=generator) * 4).round() * 1e-2).to(dtype))
    return [params, base, tuned]


def to(device: torch.device, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


# ---- sampling


@pytest.fixture(params=["chunks", "clusters"])
def form(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample in chunks, or by clusters wherever a row fits."""
    if request.param == "clusters" and not _cuda.launchers.sampling_fits_cluster(1, 0, device.index):
        pytest.skip("this GPU has no clusters, or this build no code for them")
    monkeypatch.setattr(_cuda_sampling, "in_clusters", False if request.param == "chunks" else None)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("case", sorted(logits_cases()))
def test_small_rows_give_the_same_tokens(device: torch.device, case: str, filters: dict[str, Any]) -> None:
    base, guide = logits_cases()[case], logits_cases()["normal"]
    for seed in range(5):
        settings = {"guidance": 0.7, "seed": seed, "return_logprobs": True, **filters}
        expected = ops.guided_sample(base, guide, **settings)
        for actual, wanted in zip(
            ops.guided_sample(base.to(device), guide.to(device), **settings), expected, strict=True
        ):
            assert_same_bits(actual.cpu(), wanted)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 128_256), (32, 128_256), (3, 4097), (2, 262_144)])
def test_large_vocabularies(
    device: torch.device, rows: int, vocab: int, filters: dict[str, Any], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(vocab)
    base = (torch.randn(rows, vocab, generator=generator) * 3).to(dtype)
    guide = (torch.randn(rows, vocab, generator=generator) * 2).to(dtype)
    expected = ops.guided_sample(base, guide, seed=11, **filters)
    assert_same_bits(ops.guided_sample(base.to(device), guide.to(device), seed=11, **filters).cpu(), expected)


@pytest.mark.usefixtures("form")
def test_small_a_bad_row_is_flagged_and_the_others_are_drawn(device: torch.device) -> None:
    base = torch.randn(4, 100)
    base[1, 3] = torch.nan
    tokens = ops.guided_sample(base.to(device), seed=5).cpu()
    assert tokens[1] == -1
    base[1, 3] = 0.0
    expected = ops.guided_sample(base, seed=5)
    assert_same_bits(tokens[[0, 2, 3]], expected[[0, 2, 3]])
    with pytest.raises(ValueError, match="row 1"):
        ops.raise_if_bad(tokens)


def test_small_logprobs_and_their_gradient(device: torch.device) -> None:
    base, guide = torch.randn(3, 1000), torch.randn(3, 1000)
    here = base.clone().requires_grad_(), guide.clone().requires_grad_()
    there = base.to(device).requires_grad_(), guide.to(device).requires_grad_()
    expected, actual = ops.guided_logprobs(*here, guidance=0.5), ops.guided_logprobs(*there, guidance=0.5)
    assert_same_bits(actual.cpu(), expected)
    for out in (expected, actual):
        out[:, :10].sum().backward()
    for a, b in zip(there, here, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad.cpu(), b.grad)


# ---- top-m


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("options", [{}, {"check_finite": False}, {"undo": True}], ids=str)
def test_small_edits_are_the_same_bits(
    device: torch.device, dtype: torch.dtype, scope: str, options: dict[str, bool]
) -> None:
    for density in (0.001, 0.1, 0.9, 1.0):
        here = triple(dtype, (1000, 1, 37, 4096, 0, 70_001))
        there = [to(device, tensors) for tensors in here]
        expected = ops.topm_subtract_(*here, density=density, scope=scope, scale=0.7, **options)
        before = [p.clone() for p in there[0]]
        actual = ops.topm_subtract_(*there, density=density, scope=scope, scale=0.7, **options)
        for a, b in zip(there[0], here[0], strict=True):
            assert_same_bits(a.cpu(), b)
        for name in ("threshold", "kept", "unchanged", "nonfinite"):
            assert_same_bits(getattr(actual, name).cpu(), getattr(expected, name), name)
        if options.get("undo"):
            actual.revert_(there[0])
            for a, b in zip(there[0], before, strict=True):
                assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("density", [0.01, 0.1])
@pytest.mark.parametrize("undo", [False, True])
def test_many_entries(device: torch.device, dtype: torch.dtype, density: float, undo: bool) -> None:
    here = triple(dtype, (20_000_000, 3, 5_000_001))
    there = [to(device, tensors) for tensors in here]
    expected = ops.topm_subtract_(*here, density=density, undo=undo)
    actual = ops.topm_subtract_(*there, density=density, check_finite=False, undo=undo)
    for a, b in zip(there[0], here[0], strict=True):
        assert_same_bits(a.cpu(), b)
    if undo:
        assert actual.undo is not None
        assert expected.undo is not None
        assert_same_bits(actual.undo.indices.cpu(), expected.undo.indices)
        assert_same_bits(actual.undo.bits.cpu(), expected.undo.bits)


def test_small_selection_and_sparse_subtraction(device: torch.device) -> None:
    here = triple(torch.float32, (5000, 77))
    there = [to(device, tensors) for tensors in here]
    expected, actual = ops.topm_select(*here[1:], m=500), ops.topm_select(*there[1:], m=500)
    for name in ("indices", "values", "counts", "threshold"):
        assert_same_bits(getattr(actual, name).cpu(), getattr(expected, name), name)
    ops.sparse_subtract_(here[0], expected, scale=0.5)
    ops.sparse_subtract_(there[0], actual, scale=0.5)
    for a, b in zip(there[0], here[0], strict=True):
        assert_same_bits(a.cpu(), b)


@pytest.mark.parametrize("undo", [False, True])  # with a record what is edited already is put back
def test_small_a_delta_that_is_not_finite_leaves_params_alone(device: torch.device, undo: bool) -> None:
    params, base, tuned = (tensors[0].to(device) for tensors in triple(torch.float32, (100_000,)))
    tuned[17] = torch.inf
    before = params.clone()
    with pytest.raises(ValueError, match=r"tuned\[0\] - base\[0\] must be finite"):
        ops.topm_subtract_(params, base, tuned, m=10_000, undo=undo)
    assert_same_bits(params, before)


# ---- projection


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 5, 8, 9, 16, 64])
@pytest.mark.parametrize("n", [1, 100, 4097, 50_000])
def test_small_projections_agree(device: torch.device, dtype: torch.dtype, k: int, n: int) -> None:
    grads = torch.randn(2, k, n, generator=torch.Generator().manual_seed(k)).to(dtype)
    weights = torch.rand(2, k, generator=torch.Generator().manual_seed(n))
    expected, wanted = ops.project_conflicts(grads, weights=weights, seed=3, return_stats=True)
    actual, found = ops.project_conflicts(grads.to(device), weights=weights, seed=3, return_stats=True)
    slack = 1e-5 if dtype in (torch.float32, torch.float64) else 2.0**-8
    reach = slack * grads.double().norm(dim=-1).sum(dim=-1)
    assert bool(((actual.cpu().double() - expected.double()).norm(dim=-1) <= reach).all())
    assert_same_bits(found.conflicts.cpu(), wanted.conflicts)
    torch.testing.assert_close(found.cosines.cpu(), wanted.cosines, rtol=1e-9, atol=1e-12)
    gram = ops.gradient_gram(grads.to(device)).cpu()
    torch.testing.assert_close(gram, ops.gradient_gram(grads), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [5, 16, 33, 64])
def test_small_gram_matrices_are_the_bits_of_the_cpu(device: torch.device, dtype: torch.dtype, k: int) -> None:
    """More than the design asks. Beyond k = 16 it says that the tensor cores add in ascending order."""
    for n in (4097, 50_001):
        grads = torch.randn(k, n, generator=torch.Generator().manual_seed(k)).to(dtype)
        assert_same_bits(ops.gradient_gram(grads.to(device)).cpu(), ops.gradient_gram(grads))


def test_small_a_bad_weight_on_the_cpu_raises(device: torch.device) -> None:
    for grads in (torch.randn(2, 5, device=device), to(device, [torch.randn(5), torch.randn(5)])):
        with pytest.raises(ValueError, match=r"weights\[1\] must be finite and >= 0, got -1"):
            ops.project_conflicts(grads, weights=[1.0, -1.0])


def test_small_weights_on_the_cpu_are_those_on_the_device(device: torch.device) -> None:
    grads, weights = torch.randn(300, 3, 20, device=device), torch.rand(300, 3, dtype=torch.float64)
    for own in (weights, weights[0]):
        expected = ops.project_conflicts(grads, weights=own.to(device))
        assert_same_bits(ops.project_conflicts(grads, weights=own), expected)


def test_small_lists_of_tensors(device: torch.device) -> None:
    sizes = [(3, 5), (0,), (4097,), (8, 16)]
    grads = [[torch.randn(size) for size in sizes] for _ in range(5)]
    expected = ops.project_conflicts(grads, seed=1)
    actual = ops.project_conflicts([to(device, tensors) for tensors in grads], seed=1)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


def test_small_a_gradient_that_is_not_finite_is_flagged(device: torch.device) -> None:
    grads = torch.randn(3, 100, device=device)
    grads[1, 5] = torch.nan
    out, stats = ops.project_conflicts(grads, return_stats=True)
    assert bool(out.isnan().all())
    assert not bool(stats.finite)
    with pytest.raises(ValueError, match="must be finite"):
        ops.raise_if_bad(stats)


# ---- graphs, streams, devices, compile, determinism


@pytest.fixture(params=[True, False], ids=["overlapping", "one_by_one"])
def launches(request: pytest.FixtureRequest) -> Iterator[None]:
    """Launches that may overlap, where the GPU can do that, and launches one after the other."""
    before = _cuda.launchers.set_launch_overlap(request.param)
    yield
    _cuda.launchers.set_launch_overlap(before)


def calls(device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """One call per op, each with inputs of its own; what they return changes if anything in them does."""
    generator = torch.Generator().manual_seed(1)
    base, guide = (torch.randn(4, 50_000, generator=generator).to(device) for _ in range(2))
    grads = torch.randn(5, 40_000, generator=generator).to(device)
    order = torch.tensor([[j for j in range(5) if j != i] for i in range(5)])
    params, b, t = (to(device, tensors) for tensors in triple(torch.bfloat16, (300_000, 77)))
    importance = [p.abs() for p in params]
    strength, seeds = torch.linspace(0.5, 2, 4, device=device), torch.arange(4, device=device)
    delta = ops.topm_select(b, t, m=1000)

    def edit(**options: Any) -> torch.Tensor:
        copies = [p.clone() for p in params]
        found = ops.topm_subtract_(copies, b, t, density=0.1, check_finite=False, **options)
        return torch.cat([*copies, *([] if found.undo is None else [found.undo.bits.view(copies[0].dtype)])])

    def sparse_edit() -> torch.Tensor:
        copies = [p.clone() for p in params]
        ops.sparse_subtract_(copies, delta)
        return torch.cat(copies)

    def sample_in_chunks() -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_cuda_sampling, "in_clusters", False)
            return ops.guided_sample(base, guide, top_k=50, top_p=0.9, min_p=0.01, seed=3)

    return {
        "sample": lambda: ops.guided_sample(base, guide, seed=3),
        "sample_filtered": lambda: ops.guided_sample(base, guide, top_k=50, top_p=0.9, min_p=0.01, seed=3),
        "sample_in_chunks": sample_in_chunks,
        "sample_by_rows": lambda: ops.guided_sample(
            base, guide, guidance=strength, temperature=0.8, top_p=0.9, seed=seeds, offset=5, return_logprobs=True
        )[1],
        "logprobs": lambda: ops.guided_logprobs(base, guide),
        "logprobs_in_double": lambda: ops.guided_logprobs(base.double(), guide),
        "project": lambda: ops.project_conflicts(grads, seed=2),
        "project_lists": lambda: ops.project_conflicts(list(grads), weights=[0.1, 0.2, 0.3, 0.2, 0.2], order=order)[0],
        "project_many": lambda: ops.project_conflicts(grads.view(25, 8000), order="fixed"),
        "gram": lambda: ops.gradient_gram(grads),
        "edit": edit,
        "edit_per_tensor": lambda: edit(scope="per_tensor", importance=importance),
        "edit_with_record": lambda: edit(undo=True),
        "sparse_edit": sparse_edit,
        "select": lambda: ops.topm_select(b, t, m=1000).values,
    }


WAITS = ["select"]
NAMES = ["sample", "sample_filtered", "sample_in_chunks", "sample_by_rows", "logprobs", "logprobs_in_double",
         "project", "project_lists", "project_many", "gram", "edit", "edit_per_tensor", "edit_with_record",
         "sparse_edit"]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(device: torch.device, name: str) -> None:
    call = calls(device)[name]
    expected = call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(actual, expected)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_replays_to_the_same_bits(device: torch.device, name: str) -> None:
    call = calls(device)[name]
    expected = call()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(100):
        out.fill_(0)
        graph.replay()
        assert_same_bits(out, expected)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_what_waits_is_refused_inside_a_capture(device: torch.device) -> None:
    params, base, tuned = (tensors[0].to(device) for tensors in triple(torch.float32, (1000,)))
    order = torch.tensor([[1], [0]], device=device)
    refused: dict[str, Callable[[], object]] = {
        "check_finite=False": lambda: ops.topm_subtract_(params, base, tuned, m=10),
        "Select before": lambda: ops.topm_select(base, tuned, m=10),
        "order on the device": lambda: ops.project_conflicts(params.view(2, 500), order=order),
        "257 objectives": lambda: ops.project_conflicts(base[:771].view(257, 3)),
    }
    for message, call in refused.items():
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("name", [*NAMES, *WAITS])
def test_small_a_hundred_runs_give_the_same_bits(device: torch.device, name: str) -> None:
    call = calls(device)[name]
    expected = call()
    for _ in range(100):
        assert_same_bits(call(), expected)


def test_a_call_sees_what_was_written_just_before_it(device: torch.device) -> None:
    sources = torch.randn(3, 4, 200_000, device=device)
    base, guide = torch.empty(4, 200_000, device=device), torch.randn(4, 200_000, device=device)
    for filters in ({}, {"top_k": 50, "top_p": 0.9}):
        expected = [ops.guided_sample(source, guide, seed=3, **filters).cpu() for source in sources]
        found = []
        for i in range(300):
            base.copy_(sources[i % 3])
            found.append(ops.guided_sample(base, guide, seed=3, **filters))
        for i, tokens in enumerate(found):
            assert_same_bits(tokens.cpu(), expected[i % 3], f"call {i}")


def test_streams_do_not_disturb_each_other(device: torch.device) -> None:
    every = calls(device)
    expected = {name: call() for name, call in every.items()}
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in range(4)]
    results = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results += [(name, call()) for name, call in every.items()]
    torch.cuda.synchronize(device)
    for name, result in results:
        assert_same_bits(result, expected[name])


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    first, second = calls(torch.device("cuda", 0)), calls(torch.device("cuda", 1))
    with torch.cuda.device(0):
        for name in NAMES:
            assert_same_bits(second[name]().cpu(), first[name]().cpu())


@pytest.mark.filterwarnings("default")  # inductor imports what torch has deprecated
@pytest.mark.parametrize("name", [name for name in NAMES if name != "sample_in_chunks"] + WAITS)
def test_compiled_calls_give_the_same_bits(device: torch.device, name: str) -> None:
    call = calls(device)[name]
    torch.compiler.reset()
    assert_same_bits(torch.compile(call, fullgraph=True, backend="aot_eager")(), call())


@pytest.mark.filterwarnings("default")  # inductor imports what torch has deprecated
def test_compiled_steps(device: torch.device) -> None:
    base, guide = torch.randn(4, 5000, device=device), torch.randn(4, 5000, device=device)

    def step(temperature: float, seed: int) -> torch.Tensor:
        return ops.guided_sample(base, guide, temperature=temperature, seed=seed, top_p=0.9)

    compiled = torch.compile(step, fullgraph=True)
    for i in range(20):
        assert_same_bits(compiled(0.5 + i / 10, i), step(0.5 + i / 10, i))


def test_rows_past_two_to_the_31(device: torch.device) -> None:
    if torch.cuda.get_device_properties(device).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    rows, vocab = 9000, 250_000  # 2.25e9 elements of bf16
    base = torch.full((rows, vocab), -5.0, dtype=torch.bfloat16, device=device)
    base[rows - 1, 123_456] = 30.0
    assert int(ops.guided_sample(base, seed=0)[-1]) == 123_456
    logprobs = ops.guided_logprobs(base)
    assert -1e-6 < float(logprobs[rows - 1, 123_456]) <= 0
    assert -12.5 < float(logprobs[rows - 2, vocab - 1]) < -12.4  # -ln 250000
    del base, logprobs
    n = (1 << 31) + 1000
    zeros, tuned = (
        torch.zeros(n, dtype=torch.bfloat16, device=device),
        torch.zeros(n, dtype=torch.bfloat16, device=device),
    )
    tuned[n - 3] = 1.0
    params = torch.zeros(n, dtype=torch.bfloat16, device=device)
    ops.topm_subtract_(params, zeros, tuned, m=1, check_finite=False)
    assert float(params[n - 3]) == -1.0
    params.zero_()
    edit = ops.topm_subtract_(params, zeros, tuned, m=1, check_finite=False, undo=True)
    assert edit.undo is not None
    assert edit.undo.indices.tolist() == [n - 3]
    assert float(params[n - 3]) == -1.0
    delta = ops.topm_select(zeros, tuned, m=1)
    assert (delta.indices.tolist(), delta.values.tolist()) == ([n - 3], [1.0])
    ops.sparse_subtract_(params, delta)
    assert float(params[n - 3]) == -2.0
    zeros[n - 3], tuned[n - 1] = -2.0, 3.0
    assert ops.gradient_gram([zeros, tuned]).tolist() == [[4.0, -2.0], [-2.0, 10.0]]
    (combined,) = ops.project_conflicts([zeros, tuned])  # (-2, 0) + 2 / 10 (1, 3), and (1, 3) + 2 / 4 (-2, 0)
    assert_same_bits(combined[[n - 3, n - 1]].cpu(), torch.tensor([-1.8, 3.6], dtype=torch.bfloat16))
