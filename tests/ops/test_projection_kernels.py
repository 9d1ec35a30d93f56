"""What the compiled projection promises beyond its definition: equal bits, compilers, sizes, floating-point modes."""

import doctest
import inspect
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from prosocial_ext.reference import projection as reference_projection
from torch._dynamo.testing import CompileCounterWithBackend

import prosocial_ext
from prosocial_ext import _C, reference
from prosocial_ext.ops import projection as compiled_projection
from tests.asserts import assert_same_bits
from tests.ops.inputs import zero_pages

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 21)  # across the borders of the register and tile kernels
ops = torch.ops.prosocial_ext


def gradients(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def restore_isa():
    before = _C.isa()
    yield
    _C._set_isa(before)


def everything(grads, weights):
    """All bits that the op makes, in one list."""
    out, stats = prosocial_ext.ops.project_conflicts(grads, weights=weights, seed=3, return_stats=True)
    outs = [out] if isinstance(out, torch.Tensor) else out
    return [*outs, prosocial_ext.ops.gradient_gram(grads), *vars(stats).values()]


# ---- equal bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", KS)
def test_every_instruction_set_gives_the_same_bits(k, dtype, restore_isa):
    for n in (1, 7, 13, 4096, 9001):
        grads, weights = gradients(2, k, n, dtype=dtype), torch.arange(1, k + 1) % 3 / 2
        results = []
        for isa in _C.available_isas():
            _C._set_isa(isa)
            results.append(everything(grads, weights))
        for other in results[1:]:
            for actual, expected in zip(other, results[0], strict=True):
                assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 16])
def test_every_thread_count_gives_the_same_bits(compiled, k, dtype, restore_threads):
    grads, lists = gradients(3, k, 30_001, dtype=dtype), [list(row.split(7000)) for row in gradients(k, 40_001)]
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(everything(grads, None) + everything(lists, None))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("offset", range(1, 8))
def test_alignment_does_not_matter(compiled, offset):
    grads = gradients(5 * 5001)
    shifted = torch.empty(5 * 5001 + offset)[offset:].copy_(grads)
    assert_same_bits(compiled.project_conflicts(shifted.view(5, -1)), compiled.project_conflicts(grads.view(5, -1)))


def test_a_group_does_not_depend_on_its_neighbours(compiled):
    grads = gradients(4, 5, 6000)
    gram = compiled.gradient_gram(grads)
    for group in range(4):
        assert_same_bits(gram[group], compiled.gradient_gram(grads[group]))


def test_two_python_threads_at_once_give_the_same_bits(compiled):
    grads = gradients(5, 200_000)
    expected, results = compiled.project_conflicts(grads), []
    work = lambda: results.extend(compiled.project_conflicts(grads) for _ in range(5))  # noqa: E731
    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 10
    for result in results:
        assert_same_bits(result, expected)


def test_flush_to_zero_mode_changes_nothing(compiled):
    lists = [[gradients(3000, seed=i) * 1e-40, (gradients(500, seed=i) * 1e-7).half()] for i in range(3)]
    expected = everything(lists, None)
    assert bool(expected[0].any())
    if not torch.set_flush_denormal(True):
        pytest.skip("no flush-to-zero mode on this processor")
    try:
        out = compiled.project_conflicts(lists, seed=3)
        gram = compiled.gradient_gram(lists)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(out[0], expected[0])
    assert_same_bits(out[1], expected[1])
    assert_same_bits(gram, expected[2])


# ---- sizes


def available_bytes():
    """What this machine could give, the page cache included; 0 where Linux does not tell."""
    facts = Path("/proc/meminfo").read_text() if sys.platform.startswith("linux") else "MemAvailable: 0 kB"
    return int(re.search(r"MemAvailable:\s+(\d+) kB", facts)[1]) << 10


def test_gram_sees_columns_past_two_to_the_31():
    n = 2**31 + 5000
    grads = zero_pages(2 * n).view(2, n)
    grads[0, -3], grads[1, -3], grads[1, 2**31 + 1], grads[0, 5] = 2.0, -3.0, 4.0, 1.0
    expected = torch.tensor([[5.0, -6.0], [-6.0, 25.0]], dtype=torch.float64)
    assert_same_bits(prosocial_ext.ops.gradient_gram(grads), expected)
    assert_same_bits(prosocial_ext.ops.gradient_gram([[grads[0]], [grads[1]]]), expected)


def test_rows_past_two_to_the_31_elements_are_projected():
    k, n = 17, 2**27 + 8
    grads = zero_pages(k * n).view(k, n)
    grads[0, -1], grads[16, -1], grads[16, 4] = 1.0, -1.0, 2.0
    out, stats = prosocial_ext.ops.project_conflicts(grads, return_stats=True)
    assert out[[4, -1]].tolist() == [pytest.approx(2.0 + 0.4, rel=2**-8), pytest.approx(0.8 - 1.0 + 1.0, rel=2**-8)]
    assert int(stats.conflicts) == 1
    assert int(out.count_nonzero()) == 2


@pytest.mark.slow
@pytest.mark.skipif(available_bytes() < 8 << 30, reason="writes 4.3 GB")
def test_columns_past_two_to_the_31_are_combined():
    n = 2**31 + 5000
    grads = zero_pages(n).view(1, n)
    grads[0, 2**31 + 1], grads[0, -1] = 4.0, -7.0
    out = prosocial_ext.ops.project_conflicts(grads)
    assert out[[5, 2**31, 2**31 + 1, -1]].tolist() == [0.0, 0.0, 4.0, -7.0]


def test_many_small_groups_and_many_small_tensors(compiled):
    grads = gradients(3000, 3, 5)
    out = compiled.project_conflicts(grads, order="fixed")
    assert_same_bits(out[1234], compiled.project_conflicts(grads[1234], order="fixed"))
    lists = [[gradients(t % 7, seed=i * 1000 + t) for t in range(600)] for i in range(3)]
    joined = torch.cat([p.double() for p in compiled.project_conflicts(lists)])
    whole = compiled.project_conflicts(torch.stack([torch.cat(tensors) for tensors in lists]).double())
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-6)


def test_many_objectives_agree_with_the_reference(compiled):
    grads = gradients(70, 900) + 0.02 * gradients(1, 900, seed=1)
    out, expected = compiled.project_conflicts(grads), reference.project_conflicts(grads)
    assert (out - expected).norm() <= 1e-5 * grads.norm(dim=1).sum()


# ---- torch.library and torch.compile


SAMPLES = [
    (lambda: (gradients(5, 100),), "dense"),
    (lambda: (gradients(2, 3, 100).requires_grad_(),), "batched_requires_grad"),
    (lambda: (gradients(100, 5).t(),), "strided"),
    (lambda: (gradients(3, 0),), "empty"),
]


@pytest.mark.parametrize("make", [make for make, _ in SAMPLES], ids=[name for _, name in SAMPLES])
def test_dense_ops_pass_opcheck(make):
    (grads,) = make()
    groups, k = grads.shape[:-2].numel(), grads.shape[-2]
    torch.library.opcheck(ops.gradient_gram.default, (grads,))
    for weights in (None, torch.ones(groups, k, dtype=torch.float64)):
        for stats in (False, True):
            torch.library.opcheck(ops.project_conflicts.default, (grads, weights, None, "random", 3, "sum", stats))
    order = torch.tensor([[j for j in range(k) if j != i] for i in range(k)])
    torch.library.opcheck(ops.project_conflicts.default, (grads, None, order, "given", 0, "mean", False))


@pytest.mark.parametrize("stats", [False, True])
def test_list_ops_pass_opcheck(stats):
    flat = [gradients(4, 5).requires_grad_(), gradients(3).half(), gradients(5, 4).t(), gradients(3).half()]
    torch.library.opcheck(ops.gradient_gram_lists.default, (flat, 2))
    arguments = (flat, 2, True, torch.ones(1, 2, dtype=torch.float64), None, "random", 3, "sum", stats)
    torch.library.opcheck(ops.project_conflicts_lists.default, arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, from inductor
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_without_a_graph_per_seed(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    @torch.compile(backend=counter, fullgraph=True)
    def step(grads, lists, weights, seed):
        out, stats = prosocial_ext.ops.project_conflicts(grads, weights=weights, seed=seed, return_stats=True)
        parts = prosocial_ext.ops.project_conflicts(lists, seed=seed, order="fixed", reduction="mean")
        return out * 2, stats.conflicts, stats.cosines_after, parts[1] + 1, prosocial_ext.ops.gradient_gram(lists)

    grads, weights = gradients(2, 4, 300), torch.tensor([1.0, 0.5, 0.0, 2.0])
    lists = [[gradients(10, 3, seed=i), gradients(7, seed=i)] for i in range(3)]
    for seed in range(12):
        results = step(grads, lists, weights, seed)
        out, stats = prosocial_ext.ops.project_conflicts(grads, weights=weights, seed=seed, return_stats=True)
        parts = prosocial_ext.ops.project_conflicts(lists, order="fixed", reduction="mean")
        expected = (out * 2, stats.conflicts, stats.cosines_after, parts[1] + 1, prosocial_ext.ops.gradient_gram(lists))
        for actual, wanted in zip(results, expected, strict=True):
            assert_same_bits(actual, wanted)
    assert counter.frame_count <= 3


def test_a_bad_gradient_raises_inside_a_compiled_function():
    torch._dynamo.reset()
    step = torch.compile(lambda g: prosocial_ext.ops.project_conflicts(g), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"grads\[1\] must be finite"):
        step(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))


# ---- the reference behind the ops' names, and on devices without kernels


def test_devices_without_kernels_run_the_reference():
    """Their implementations, called on the CPU, where they can be."""
    grads, weights = gradients(2, 3, 50), torch.tensor([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]], dtype=torch.float64)
    expected, stats = reference.project_conflicts(grads, weights=weights, seed=4, return_stats=True)
    out, found = compiled_projection._project_elsewhere(grads, weights, None, "random", 4, "sum", True)
    assert_same_bits(out, expected)
    for actual, wanted in zip(found, vars(stats).values(), strict=True):
        assert_same_bits(actual, wanted)
    order = torch.tensor([[2, 1], [2, 0], [1, 0]])
    for nested in (False, True):
        lists = [[row[:20], row[20:]] if nested else row for row in grads[0]]
        flat = [t for tensors in lists for t in tensors] if nested else lists
        expected = reference.project_conflicts(lists, order=order)
        out, found = compiled_projection._project_lists_elsewhere(
            flat, 3, nested, None, order, "given", 0, "sum", False
        )
        assert not found
        for actual, wanted in zip(out, expected, strict=True):
            assert_same_bits(actual, wanted)
        assert_same_bits(compiled_projection._gram_lists_elsewhere(flat, 3), reference.gradient_gram(lists))


def test_where_nothing_raises_a_bad_group_is_nan_and_the_others_are_untouched(monkeypatch):
    monkeypatch.setattr(reference_projection, "check_finite", lambda *a: None)  # as on a device
    monkeypatch.setattr(reference_projection, "check_weight_values", lambda *a: None)
    grads, weights = gradients(3, 2, 40), torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    expected = reference.project_conflicts(grads, weights=weights.abs())
    grads[1, 0, 3] = torch.inf
    out, stats = reference.project_conflicts(grads, weights=weights, return_stats=True)
    assert stats.finite.tolist() == [True, False, False]
    assert bool(out[1:].isnan().all())
    assert_same_bits(out[0], expected[0])


@pytest.mark.parametrize("name", ["gradient_gram", "project_conflicts"])
def test_signatures_are_those_of_the_reference(name):
    ours, theirs = (inspect.signature(getattr(where, name)) for where in (prosocial_ext.ops, reference))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("module", [compiled_projection, reference_projection], ids=["ops", "reference"])
def test_docstring_examples_run(module):
    finder = doctest.DocTestFinder()
    examples = [test for test in finder.find(module, module.__name__) if test.examples]
    assert len(examples) >= 2
    runner = doctest.DocTestRunner()
    for test in examples:
        test.globs["torch"] = torch
        runner.run(test)
    assert runner.summarize().failed == 0
