"""The sampling ops inside torch: opcheck, torch.compile, threads, fork."""

import threading

import pytest
import torch
from torch.library import opcheck

from prosocial_ext import _C, ops, reference
from tests.asserts import assert_same_bits


def logits(rows=3, vocab=50, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guides", [None, 2, 3], ids=["base", "one_guide", "stacked"])
@pytest.mark.parametrize("grad", [False, True], ids=["detached", "requires_grad"])
def test_the_registered_ops_pass_opcheck(guides, grad):
    base = logits().requires_grad_(grad)
    guide = None if guides is None else logits(seed=1) if guides == 2 else torch.stack([logits(seed=1), logits(seed=2)])
    if guide is not None:
        guide.requires_grad_(grad)
    count = 0 if guides is None else 1 if guides == 2 else 2
    namespace = torch.ops.prosocial_ext
    opcheck(namespace.guided_sample.default, (base, guide, 50, 3, 4, 0.5, 0.9, 7, 0.8, 0.01))
    for rows in (1, 3):  # of the knobs: one for all, one for each
        real = [torch.full((rows,), value, requires_grad=grad) for value in (0.9, 0.8, 0.01)]
        strength = torch.full((rows, count), 0.5, requires_grad=grad)
        knobs = [*real, strength, *(torch.full((rows,), value) for value in (7, 3, 4))]
        opcheck(namespace.guided_sample_rows.default, (base, guide, 50, True, True, *knobs))
        opcheck(namespace.guided_sample_rows.default, (base, guide, 50, False, False, *knobs))
        opcheck(namespace.guided_logprobs.default, (base, guide, real[0].detach(), strength.detach(), 50))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_draws_each_batch_as_a_call_of_its_own():
    base, temperature = torch.stack([logits(), logits(seed=1)]), torch.tensor([0.5, 2.0])

    def draw(base, temperature):
        return ops.guided_sample(base, temperature=temperature.expand(3), top_p=0.9, seed=4, return_logprobs=True)

    for result, *expected in zip(torch.vmap(draw)(base, temperature), *map(draw, base, temperature), strict=True):
        assert_same_bits(result, torch.stack(expected))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor, on itself
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fifty_compiled_steps_make_at_most_three_graphs(backend):
    graphs = 0

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def step(base, guide, seed, offset, temperature, top_p):
        return ops.guided_sample(
            base * 1.0, guide, guidance=0.5, temperature=temperature, top_p=top_p, seed=seed, offset=offset
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counting, fullgraph=True)
    for i in range(50):
        base, guide = logits(seed=i), logits(seed=i + 100)
        args = (base, guide, i * 31, i, 0.5 + i / 50, 0.5 + i / 100)
        assert_same_bits(compiled(*args), step(*args))
    assert graphs <= 3


def test_logprobs_compile_with_their_gradient():
    torch._dynamo.reset()
    base, guide = logits().requires_grad_(), logits(seed=1).requires_grad_()
    call = torch.compile(lambda b, g: ops.guided_logprobs(b, g, guidance=0.5), backend="aot_eager", fullgraph=True)
    call(base, guide).sum().backward()
    expected = base.grad.clone(), guide.grad.clone()
    base.grad = guide.grad = None
    ops.guided_logprobs(base, guide, guidance=0.5).sum().backward()
    assert_same_bits(base.grad, expected[0])
    assert_same_bits(guide.grad, expected[1])


def test_the_backend_switch_runs_the_reference(monkeypatch):
    monkeypatch.setattr(_C, "guided_sample", None)
    with ops.backend("reference"):
        assert_same_bits(ops.guided_sample(logits()), reference.guided_sample(logits()))
    with (
        pytest.raises(ValueError, match="name must be one of 'compiled', 'reference', got 'fast'"),
        ops.backend("fast"),
    ):
        pass


def test_two_python_threads_share_nothing():
    base = logits(8, 30_000)
    expected = reference.guided_sample(base, seed=1, top_p=0.9)
    results = []
    workers = [
        threading.Thread(target=lambda: results.extend(ops.guided_sample(base, seed=1, top_p=0.9) for _ in range(20)))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 40
    for tokens in results:
        assert_same_bits(tokens, expected)
