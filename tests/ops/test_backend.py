"""ops.backend: the reference behind the ops' names, in graphs and on tensors without data too."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from prosocial_ext import _C, ops
from tests.asserts import assert_same_bits

BACKENDS = ["compiled", "reference"]


def inputs():
    """Logits and a guide, a triple of lists for top-m, gradients."""
    lists = [torch.zeros(4)], [torch.zeros(4)], [torch.arange(4.0)]
    return torch.arange(10.0).view(2, 5) / 3, torch.ones(2, 5), *lists, torch.tensor([[1.0, 0, 0], [-1, 1, 1]])


def every_op(base_logits, guide, params, base, tuned, grads):
    edit = ops.topm_subtract_(params, base, tuned, m=2, undo=True)
    delta = ops.topm_select(base, tuned, m=2)
    sparse = ops.sparse_subtract_(params, delta)
    projected, stats = ops.project_conflicts(grads, weights=[0.5, 2.0], return_stats=True)
    return (
        *(edit.kept, edit.undo.bits, delta.values, sparse.kept, projected, stats.conflicts),
        ops.project_conflicts([grads[0], grads[1]]),
        *(ops.gradient_gram(grads), ops.gradient_gram([grads[0], grads[1]])),
        ops.guided_sample(base_logits, guide, seed=3),
        ops.guided_sample(base_logits, guide, return_logprobs=True),
        ops.guided_logprobs(base_logits, guide),
    )


@pytest.fixture
def wanted():
    return tree_leaves(every_op(*inputs()))


def test_the_reference_runs_no_kernel(monkeypatch, wanted):
    for name in ("topm_run", "topm_sparse", "gram_dense", "gram_lists", "project_dense", "project_lists",
                 "guided_sample", "guided_sample_rows", "guided_logprobs"):  # fmt: skip
        monkeypatch.setattr(_C, name, None)
    with ops.backend("reference"):
        eager = every_op(*inputs())
        graph = torch.compile(every_op, backend="aot_eager", fullgraph=True)(*inputs())
    for result in (eager, graph):
        for actual, expected in zip(tree_leaves(result), wanted, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_graphs_give_the_bits_of_eager(backend):
    with ops.backend(backend):
        expected, given = tree_leaves(every_op(*inputs())), inputs()
        version = given[2][0]._version
        actual = torch.compile(every_op, backend="aot_eager", fullgraph=True)(*given)
    for a, e in zip(tree_leaves(actual), expected, strict=True):
        assert_same_bits(a, e)
    assert given[2][0]._version > version


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_data_give_shapes_and_dtypes(backend, kind, wanted):
    with ops.backend(backend):
        if kind == "fake":
            with FakeTensorMode():
                results = tree_leaves(every_op(*inputs()))
        else:
            results = tree_leaves(every_op(*tree_map(lambda tensor: tensor.to("meta"), inputs())))
    assert [(t.shape, t.dtype) for t in results] == [(t.shape, t.dtype) for t in wanted]


@pytest.mark.parametrize("name", [None, torch.ones(2)], ids=["none", "tensor"])
def test_a_backend_is_named_by_a_string(name):
    with pytest.raises(TypeError, match="name must be one of 'compiled', 'reference'"), ops.backend(name):
        pass


@pytest.mark.parametrize("kind", ["weights", "temperature"])
def test_numbers_that_change_at_every_call_make_at_most_two_graphs(kind):
    graphs = 0

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def call(tensor, number):
        if kind == "weights":
            return ops.project_conflicts(tensor, weights=[number, 1.0, 2 * number])
        return ops.guided_logprobs(tensor, temperature=number)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=counting, fullgraph=True)
    tensor = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for step in range(10):
        assert_same_bits(compiled(tensor, 0.5 + step / 7), call(tensor, 0.5 + step / 7))
    assert graphs <= 2
