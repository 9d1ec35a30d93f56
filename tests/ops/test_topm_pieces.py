"""Select then subtract, streams of chunks, and the ops under torch.compile and opcheck."""

import pytest
import torch

from prosocial_ext import ops as compiled_ops
from prosocial_ext import reference
from prosocial_ext.ops import _streaming as streaming
from tests.asserts import assert_same_bits
from tests.ops.test_topm import DTYPES, assert_same_edit, clones, triple

CASES = [(torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.bfloat16, torch.float32, torch.float64)]
SHAPES = [(301, 7), (0,), (5,), (12345,)]


@pytest.mark.parametrize("dtypes", CASES, ids=["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_select_then_subtract_gives_the_bits_of_the_edit(ops, dtypes, scope):
    params, base, tuned = triple(SHAPES, dtypes)
    expected, edited = clones(params), clones(params)
    wanted = ops.topm_subtract_(expected, base, tuned, density=0.2, scope=scope, scale=1.5, undo=True)
    delta = ops.topm_select(base, tuned, density=0.2, scope=scope)
    edit = ops.sparse_subtract_(edited, delta, scale=1.5, undo=True)
    for a, e in zip(edited, expected, strict=True):
        assert_same_bits(a, e)
    assert_same_edit(edit, wanted)
    edit.revert_(edited)
    for a, e in zip(edited, params, strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_has_the_bits_of_the_reference(compiled, dtype):
    _, base, tuned = triple([(90_000,), (33, 3), (0,)], [dtype] * 3)
    actual = compiled.topm_select(base, tuned, density=0.07)
    expected = reference.topm_select(base, tuned, density=0.07)
    for field in ("indices", "values", "counts", "threshold"):
        assert_same_bits(getattr(actual, field), getattr(expected, field), field)
    assert (actual.shapes, actual.dtypes) == (expected.shapes, expected.dtypes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_subtract_has_the_bits_of_the_reference(compiled, dtype):
    params, base, tuned = triple([(90_000,), (33, 3)], [dtype, torch.float32, torch.float32])
    delta = reference.topm_select(base, tuned, density=0.5)
    actual, expected = clones(params), clones(params)
    edit = compiled.sparse_subtract_(actual, delta, scale=0.3, undo=True)
    assert_same_edit(edit, reference.sparse_subtract_(expected, delta, scale=0.3, undo=True))
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


def test_sparse_subtract_edits_strided_params(ops):
    whole = torch.zeros(3, 4)
    ops.sparse_subtract_(whole[:, ::2], ops.topm_select(torch.zeros(3, 2), torch.arange(6.0).view(3, 2), m=2))
    assert whole.nonzero().tolist() == [[2, 0], [2, 2]]


# ---- streams


def stream(chunks, m, wide, scale=1.0):
    """The two-pass select and edit over chunks, each a (params, base, tuned)."""
    selection = streaming.Selection(m, wide)
    excluded = 0
    while not selection.settled:
        histogram = torch.zeros(streaming.BINS, dtype=torch.int64)
        for chunk in chunks:
            excluded += streaming.add_histogram_(histogram, *chunk, selection)
        selection = streaming.settle(histogram, selection)
    kept = 0
    for chunk in chunks:
        edit, selection = streaming.apply_(*chunk, selection, scale=scale)
        kept += int(edit.kept.sum())
    return kept, excluded


@pytest.mark.parametrize("dtypes", CASES, ids=["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("pieces", [1, 2, 7])
@pytest.mark.parametrize("m", [0, 1, 5000, 70_000])
def test_any_chunking_in_global_order_gives_the_bits_of_the_edit(compiled, dtypes, pieces, m):
    (params,), (base,), (tuned,) = triple([(70_000,)], dtypes)
    expected = params.clone()
    reference.topm_subtract_(expected, base, tuned, m=m, scale=0.7)
    parts = [[[part] for part in tensor.tensor_split(pieces)] for tensor in (params, base, tuned)]
    kept, excluded = stream(list(zip(*parts, strict=True)), m, torch.float64 in dtypes, 0.7)
    assert_same_bits(params, expected)
    assert (kept, excluded) == (m, 0)


@pytest.mark.parametrize("m", [1, 3, 500, 900, 1000])
def test_ties_across_chunks_go_to_the_lowest_flat_index(m):
    params, base, tuned = torch.zeros(1000), torch.zeros(1000), (torch.arange(1000) % 2).float() * 2
    expected = params.clone()
    reference.topm_subtract_(expected, base, tuned, m=m)
    parts = [[[part] for part in tensor.tensor_split(4)] for tensor in (params, base, tuned)]
    kept, _ = stream(list(zip(*parts, strict=True)), m, False)
    assert_same_bits(params, expected)
    assert kept == m


def test_streams_leave_out_and_count_entries_that_are_not_finite():
    params, base, tuned = torch.zeros(6), torch.zeros(6), torch.tensor([float("nan"), 1, 2, float("inf"), 0, 3])
    assert stream([([params], [base], [tuned])], 6, False) == (4, 2)
    assert params.tolist() == [0.0, -1.0, -2.0, 0.0, 0.0, -3.0]


def test_a_rank_finds_its_ties_in_its_own_last_histogram():
    base, tuned = torch.zeros(8), torch.tensor([1.0, 1, 1, 2, 1, 0, 0, 1])
    selection = streaming.Selection(3, False)
    while not selection.settled:
        histogram = torch.zeros(streaming.BINS, dtype=torch.int64)
        streaming.add_histogram_(histogram, [base], [base], [tuned], selection)
        selection = streaming.settle(histogram, selection)
    assert selection.need == 2
    assert histogram[selection.digit] == 5


def test_streams_take_importance():
    params, base, tuned = torch.zeros(4), torch.zeros(4), torch.tensor([1.0, 3.0, 2.0, 8.0])
    importance = [torch.tensor([9.0, 1.0, 2.0, 0.0])]
    selection = streaming.Selection(2, False)
    while not selection.settled:
        histogram = torch.zeros(streaming.BINS, dtype=torch.int64)
        streaming.add_histogram_(histogram, [params], [base], [tuned], selection, importance)
        selection = streaming.settle(histogram, selection)
    streaming.apply_([params], [base], [tuned], selection, importance=importance)
    assert params.tolist() == [-1.0, 0.0, -2.0, 0.0]


def test_streams_edit_strided_params():
    whole = torch.zeros(2, 4)
    chunk = ([whole[:, ::2]], [torch.zeros(2, 2)], [torch.arange(4.0).view(2, 2)])
    stream([chunk], 2, False)
    assert whole.nonzero().tolist() == [[1, 0], [1, 2]]


HISTOGRAM = torch.zeros(streaming.BINS, dtype=torch.int64)


@pytest.mark.parametrize(("histogram", "error", "message"), [
    (None, TypeError, "histogram must be a tensor, got None"),
    (HISTOGRAM.int(), TypeError, "histogram must be torch.int64, got torch.int32"),
    (HISTOGRAM[:-1], ValueError, r"histogram must have shape \[65536\] and be contiguous, on the CPU"),
    (HISTOGRAM.view(2, -1), ValueError, r"histogram must have shape \[65536\]"),
    (HISTOGRAM.repeat(2)[::2], ValueError, r"histogram must have shape \[65536\] and be contiguous"),
    (HISTOGRAM.to("meta"), ValueError, "on the CPU, got a tensor .* on meta"),
], ids=["none", "dtype", "short", "shape", "strided", "device"])  # fmt: skip
def test_a_histogram_of_another_form_is_refused(histogram, error, message):
    with pytest.raises(error, match=message):
        streaming.add_histogram_(
            histogram, [torch.zeros(3)], [torch.zeros(3)], [torch.ones(3)], streaming.Selection(1, False)
        )


def test_streams_ignore_the_default_device():
    params, base, tuned = torch.zeros(4), torch.zeros(4), torch.tensor([1.0, 3.0, 2.0, 8.0])
    selection, histograms = streaming.Selection(2, False), [HISTOGRAM.clone(), HISTOGRAM.clone()]
    with torch.device("meta"):
        for histogram in histograms:
            streaming.add_histogram_(histogram, [params], [base], [tuned], selection)
            selection = streaming.settle(histogram, selection)
        streaming.apply_([params], [base], [tuned], selection)
    assert params.tolist() == [0.0, -3.0, 0.0, -8.0]


def test_the_ops_ignore_the_default_device(ops):
    whole, base, tuned = torch.zeros(4, 2), torch.zeros(4), torch.tensor([1.0, 3.0, 2.0, 8.0])
    params = whole[:, 0]
    with torch.device("meta"):
        edit = ops.topm_subtract_(params, base, tuned, m=2, undo=True)
        sparse = ops.sparse_subtract_(params, ops.topm_select(base, tuned, m=1), undo=True)
        with pytest.raises(ValueError, match="must be finite"):
            ops.topm_subtract_(params, base, tuned / torch.zeros((), device="cpu"), m=2)
        assert params.tolist() == [0.0, -3.0, 0.0, -16.0]
        sparse.revert_(params)
        edit.revert_(params)
    assert params.tolist() == [0.0] * 4
    assert edit.kept.tolist() == [2]


# ---- torch.library and torch.compile

OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("grad", [False, True], ids=["detached", "requires_grad"])
@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("undo", [False, True])
def test_topm_subtract_passes_opcheck(importance, undo, grad):
    params, base, tuned = triple([(5, 3), (4,)], [torch.bfloat16] * 3)
    weights = [torch.ones(5, 3), torch.ones(4)] if importance else []
    params[0] = params[0].t().contiguous().t()
    for tensor in [*params, *base, *tuned, *weights]:
        tensor.requires_grad_(grad)
    torch.library.opcheck(
        torch.ops.prosocial_ext.topm_subtract_.default,
        (params, base, tuned, weights, [7], False, 0.5, True, undo),
        test_utils=OPCHECK,
    )


def test_topm_subtract_passes_opcheck_with_params_given_as_base_too():
    params, _, tuned = triple([(5, 3), (0,)], [torch.float32] * 3)
    torch.library.opcheck(
        torch.ops.prosocial_ext.topm_subtract_.default,
        (params, params, tuned, [], [2, 0], True, 0.5, False, False),
        test_utils=OPCHECK,
    )


@pytest.mark.parametrize("grad", [False, True], ids=["detached", "requires_grad"])
def test_topm_select_passes_opcheck(grad):
    _, base, tuned = triple([(5, 3), (4,)], [torch.bfloat16] * 3)
    for tensor in [*base, *tuned]:
        tensor.requires_grad_(grad)
    torch.library.opcheck(
        torch.ops.prosocial_ext.topm_select.default, (base, tuned, [], [7], False), test_utils=OPCHECK
    )


@pytest.mark.parametrize("grad", [False, True], ids=["detached", "requires_grad"])
@pytest.mark.parametrize("undo", [False, True])
def test_sparse_subtract_passes_opcheck(undo, grad):
    params, base, tuned = triple([(5, 3), (4,)], [torch.float16] * 3)
    delta = reference.topm_select(base, tuned, m=6)
    for tensor in [*params, delta.values]:
        tensor.requires_grad_(grad)
    torch.library.opcheck(
        torch.ops.prosocial_ext.sparse_subtract_.default,
        (params, delta.indices, delta.values, delta.counts, [False, False], 0.5, undo),
        test_utils=OPCHECK,
    )


def test_the_ops_compile_without_a_graph_break():
    def edit(params, base, tuned):
        done = compiled_ops.topm_subtract_(params, base, tuned, m=5, undo=True)
        delta = compiled_ops.topm_select(base, tuned, density=0.5)
        sparse = compiled_ops.sparse_subtract_(params, delta, scale=-0.5)
        return done.threshold, done.undo.bits, delta.indices, sparse.unchanged

    params, base, tuned = triple([(5, 3), (4,)], [torch.float32] * 3)
    expected = clones(params)
    wanted = edit(expected, base, tuned)
    outputs = torch.compile(edit, fullgraph=True, backend="aot_eager")(params, base, tuned)
    for a, e in zip([*params, *outputs], [*expected, *wanted], strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("case", ["params_twice", "params_as_another_base"])
def test_one_tensor_given_twice_is_refused_under_compile_too(case):
    p, q, z, one = (torch.full((4,), value) for value in (0.0, 0.0, 0.0, 1.0))
    params, base = ([p, p], [z, z]) if case == "params_twice" else ([p, q], [q, z])
    call = torch.compile(lambda *a: compiled_ops.topm_subtract_(*a, m=1).kept, backend="aot_eager")
    with pytest.raises(ValueError, match=r"params\[\d\] must not share memory with (params|base)"):
        call(params, base, [one, one])
    assert p.tolist() == [0.0] * 4


def test_one_tensor_given_twice_to_the_sparse_op_is_refused_under_compile_too():
    p = torch.zeros(4)
    delta = reference.topm_select([torch.zeros(4)] * 2, [torch.ones(4)] * 2, m=1)
    call = torch.compile(lambda *a: compiled_ops.sparse_subtract_(*a).kept, backend="aot_eager")
    with pytest.raises(ValueError, match=r"params\[0\] must not share memory with params\[1\]"):
        call([p, p], delta)


def test_params_given_as_their_own_base_compile():
    p, z, one = torch.zeros(4), torch.zeros(4), torch.ones(4)
    call = torch.compile(lambda *a: compiled_ops.topm_subtract_(*a, m=5).kept, backend="aot_eager", fullgraph=True)
    assert call([p, z], [p, z], [one, one]).tolist() == [4, 1]
    assert p.tolist() == [-1.0] * 4


def test_devices_without_kernels_run_the_reference():
    params, base, tuned = triple([(5,)], [torch.float32] * 3)
    key = "CompositeExplicitAutograd"
    outputs = torch._C._dispatch_has_kernel_for_dispatch_key("prosocial_ext::topm_subtract_", key)
    assert outputs
    expected = clones(params)
    wanted = reference.topm_subtract_(expected, base, tuned, m=2)
    from prosocial_ext.ops import topm

    actual = topm._with_defaults(topm._definition.subtract_core, True, False)(params, base, tuned, [], [2], False, 1.0)
    assert_same_bits(actual[0], wanted.threshold)
    assert_same_bits(params[0], expected[0])
