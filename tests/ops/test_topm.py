"""Top-m selection, edit and undo: what is promised, over the reference and every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prosocial_ext
from prosocial_ext import ops as compiled_ops
from prosocial_ext import reference
from prosocial_ext.ops import topm as native
from tests.asserts import assert_same_bits
from tests.ops.inputs import zero_pages

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF, NAN = float("inf"), float("nan")


def triple(shapes, dtypes, seed=0, spread=1e-3):
    """params, base, tuned with the given dtypes each, tuned near base as after a fine-tune."""
    generator = torch.Generator().manual_seed(seed)
    base = [torch.randn(s, generator=generator) * 0.05 for s in shapes]
    tuned = [b + torch.randn(s, generator=generator) * spread for b, s in zip(base, shapes, strict=True)]
    params = [torch.randn(s, generator=generator) * 0.05 for s in shapes]
    return tuple([t.to(dtype) for t in tensors] for tensors, dtype in zip((params, base, tuned), dtypes, strict=True))


def clones(tensors):
    return [t.clone() for t in tensors]


def assert_same_edit(actual, expected):
    for field in ("threshold", "kept", "unchanged", "nonfinite"):
        assert_same_bits(getattr(actual, field), getattr(expected, field), field)
    assert (actual.undo is None) == (expected.undo is None)
    if actual.undo is not None:
        assert_same_bits(actual.undo.indices, expected.undo.indices, "undo.indices")
        assert_same_bits(actual.undo.bits, expected.undo.bits, "undo.bits")


def check_against_reference(ops, params, base, tuned, alias=None, **options):
    """Edit copies with ``ops`` and with the reference; every bit and every figure must agree."""
    results = []
    for module in (ops, reference):
        p, b, t = clones(params), clones(base), clones(tuned)
        if alias == "base":
            b = p = clones(base)
        if alias == "tuned":
            t = p = clones(tuned)
        results.append((p, module.topm_subtract_(p, b, t, **options)))
    (actual, edit), (expected, expected_edit) = results
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, e, f"params[{i}]")
    assert_same_edit(edit, expected_edit)
    return edit


# ---- the selection


@pytest.mark.parametrize("m", [0, 1, 2, 3, 7, 8])
def test_exactly_m_entries_are_selected(ops, m):
    base = torch.zeros(8)
    tuned = torch.tensor([1.0, -5.0, 2.0, 0.0, 5.0, -2.0, 0.0, 3.0])
    delta = ops.topm_select(base, tuned, m=m)
    assert delta.indices.tolist() == sorted([1, 4, 7, 2, 5, 0, 3, 6][:m])
    assert torch.equal(delta.values, tuned[delta.indices])


def test_ties_at_the_threshold_go_to_the_lowest_flat_index(ops):
    tuned = [torch.tensor([[1.0, 2.0], [1.0, 1.0]]), torch.tensor([1.0, -1.0, 2.0])]
    delta = ops.topm_select([torch.zeros_like(t) for t in tuned], tuned, m=5)
    assert delta.counts.tolist() == [4, 1]
    assert delta.indices.tolist() == [0, 1, 2, 3, 2]


def test_zeros_fill_up_by_lowest_index_when_nonzeros_run_out(ops):
    tuned = torch.tensor([0.0, -0.0, 3.0, 0.0])
    assert ops.topm_select(torch.zeros(4), tuned, m=3).indices.tolist() == [0, 1, 2]


def test_the_order_is_row_major_whatever_the_strides(ops):
    tuned = torch.arange(6.0).view(2, 3).t()  # rows 0 3, 1 4, 2 5
    delta = ops.topm_select(torch.zeros(3, 2), tuned, m=2)
    assert delta.indices.tolist() == [3, 5]


def test_density_is_floored(ops):
    assert ops.topm_select(torch.zeros(19), torch.ones(19), density=0.1).indices.numel() == 1


def test_density_one_selects_everything(ops):
    assert ops.topm_select(torch.zeros(19), torch.ones(19), density=1.0).indices.tolist() == list(range(19))


def test_per_tensor_scope_selects_m_of_each(ops):
    tuned = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([30.0, 10.0, 20.0])]
    delta = ops.topm_select([torch.zeros(3)] * 2, tuned, m=1, scope="per_tensor")
    assert delta.indices.tolist() == [2, 0]
    assert delta.threshold.tolist() == [3.0, 30.0]


def test_threshold_is_the_last_score_and_infinite_where_nothing_is_selected(ops):
    tuned = torch.tensor([1.0, -3.0, 2.0])
    assert ops.topm_select(torch.zeros(3), tuned, m=2).threshold.tolist() == [2.0]
    assert ops.topm_select(torch.zeros(3), tuned, m=0).threshold.tolist() == [INF]


def test_importance_ranks_by_the_product(ops):
    tuned = torch.tensor([1.0, -3.0, 2.0, 8.0])
    delta = ops.topm_select(torch.zeros(4), tuned, m=2, importance=torch.tensor([9.0, 1.0, 2.0, 0.0]))
    assert delta.indices.tolist() == [0, 2]
    assert delta.threshold.tolist() == [4.0]


def test_a_score_that_overflows_ranks_highest(ops):
    tuned = torch.tensor([1.0, 3e38, 2e38, 3e38])
    delta = ops.topm_select(torch.zeros(4), tuned, m=2, importance=torch.tensor([1.0, 1.0, 9.0, 9.0]))
    assert delta.indices.tolist() == [2, 3]


def test_subnormal_deltas_are_ranked(ops):
    tuned = torch.tensor([1e-44, 3e-44, 2e-45])
    assert ops.topm_select(torch.zeros(3), tuned, m=1).indices.tolist() == [1]


# ---- the edit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("options", [{}, {"check_finite": False}, {"undo": True}, {"scope": "per_tensor"}], ids=str)
def test_edit_has_the_bits_of_the_reference(compiled, dtype, density, options):
    shapes = [(300, 331), (7,), (0,), (1,), (129, 1031)]
    edit = check_against_reference(compiled, *triple(shapes, [dtype] * 3), density=density, scale=0.7, **options)
    assert int(edit.kept.sum()) > 0


@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float16, torch.bfloat16, torch.float64),
    (torch.float64, torch.float32, torch.float32),
    (torch.bfloat16, torch.float64, torch.float64),
    (torch.float32, torch.float64, torch.float32),
], ids=lambda d: "-".join(str(x)[6:] for x in d))  # fmt: skip
def test_dtypes_may_differ_between_params_base_and_tuned(compiled, dtypes):
    check_against_reference(compiled, *triple([(70001,), (33, 5)], dtypes), density=0.2, scale=1.3, undo=True)


@pytest.mark.parametrize("check_finite", [True, False])
def test_dtypes_may_differ_between_tensors(compiled, check_finite):
    lists = [[], [], []]
    for i, dtype in enumerate(DTYPES):
        for collected, made in zip(lists, triple([(21000 + i,)], [dtype] * 3, seed=i), strict=True):
            collected += made
    check_against_reference(compiled, *lists, density=0.3, scale=-0.3, check_finite=check_finite)


@pytest.mark.parametrize("alias", ["base", "tuned"])
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0, 1e30])
@pytest.mark.parametrize("check_finite", [True, False])
def test_params_may_be_base_or_tuned(compiled, alias, scale, check_finite):
    tensors = triple([(40000,), (50001,)], [torch.bfloat16] * 3)
    check_against_reference(compiled, *tensors, alias=alias, density=0.3, scale=scale, check_finite=check_finite)


@pytest.mark.parametrize("case", ["all_equal", "all_zero", "one_outlier", "alternating_signs", "two_values", "sorted"])
@pytest.mark.parametrize(
    "hook", [0, 1, 2, 8, 16, 48], ids=["none", "overflow", "too_few", "two_pass", "sample", "long"]
)
@pytest.mark.parametrize("check_finite", [True, False])
def test_hostile_data_on_every_path_has_the_bits_of_the_reference(compiled, case, hook, check_finite):
    n = 70_000
    tuned = {
        "all_equal": torch.full((n,), 0.25),
        "all_zero": torch.zeros(n),
        "one_outlier": torch.zeros(n).index_fill(0, torch.tensor([n - 5]), 1e15),
        "alternating_signs": torch.tensor([1e-10, -1e-10]).repeat(n // 2),
        "two_values": (torch.arange(n) % 7 == 0).float() + 1,
        "sorted": torch.linspace(0, 1, n),
    }[case]
    base, params = torch.zeros(n), torch.randn(n, generator=torch.Generator().manual_seed(1))
    for m in (1, 9000):
        expected = reference.topm_subtract_(wanted := [params.clone()], [base], [tuned], m=m, scale=0.5)
        edited = [params.clone()]
        outputs = native.subtract_cpu(edited, [base], [tuned], [], [m], False, 0.5, check_finite, False, hook)
        assert_same_bits(edited[0], wanted[0])
        for actual, field in zip(outputs, ("threshold", "kept", "unchanged", "nonfinite"), strict=False):
            assert_same_bits(actual, getattr(expected, field), field)


@pytest.mark.parametrize("hook", [1, 2, 4, 8, 16], ids=["overflow", "too_few", "too_many", "two_pass", "sample"])
def test_every_path_writes_the_same_record_and_selection(compiled, hook):
    params, base, tuned = triple([(50_000,), (3,), (41_000,)], [torch.bfloat16] * 3)
    m = [9000]
    outputs = native.subtract_cpu(clones(params), base, tuned, [], m, False, 1.0, True, True, hook)
    expected = reference.topm_subtract_(clones(params), base, tuned, m=m[0], undo=True)
    assert_same_bits(outputs[4], expected.undo.indices)
    assert_same_bits(outputs[5], expected.undo.bits)
    selected = native.select_cpu(base, tuned, [], m, False, hook)
    wanted = reference.topm_select(base, tuned, m=m[0])
    for actual, field in zip(selected, ("indices", "values", "counts", "threshold"), strict=True):
        assert_same_bits(actual, getattr(wanted, field), field)


@pytest.mark.parametrize("hook", [1, 2, 8])
def test_unlucky_path_after_edits_of_base_itself_has_the_bits_of_the_reference(compiled, hook):
    _, base, tuned = triple([(90_000,)], [torch.float16] * 3)
    expected = clones(base)
    reference.topm_subtract_(expected, expected, tuned, m=9000, scale=2e7)  # some results overflow to infinity
    edited = clones(base)
    native.subtract_cpu(edited, edited, tuned, [], [9000], False, 2e7, False, False, hook)
    assert_same_bits(edited[0], expected[0])


def test_a_missed_bracket_after_edits_says_that_params_are_spoilt(compiled):
    params, base, tuned = triple([(90_000,)], [torch.float32] * 3)
    with pytest.raises(RuntimeError, match="params are spoilt"):
        native.subtract_cpu(params, base, tuned, [], [9000], False, 1.0, False, False, 4)


@pytest.mark.parametrize("importance_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("check_finite", [True, False])
def test_importance_has_the_bits_of_the_reference(compiled, importance_dtype, dtype, check_finite):
    shapes = [(80_000,), (33,)]
    generator = torch.Generator().manual_seed(3)
    importance = [torch.rand(s, generator=generator).to(importance_dtype) for s in shapes]
    tensors = triple(shapes, [dtype] * 3)
    check_against_reference(compiled, *tensors, density=0.1, importance=importance, check_finite=check_finite)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_changes_no_bit(compiled, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensors = triple([(200_000,), (5,)], [torch.bfloat16] * 3)
        for check_finite in (True, False):
            check_against_reference(compiled, *tensors, density=0.1, check_finite=check_finite)
    finally:
        torch.set_num_threads(before)


def test_a_thousand_small_tensors_with_odd_offsets(compiled):
    storage = triple([(20_000,)], [torch.bfloat16] * 3)
    sizes = [(0, 1, 7, 31, 64)[i % 5] for i in range(900)]

    def cut(flat):
        return [flat[sum(sizes[:i]) + 1 : sum(sizes[:i]) + 1 + n] for i, n in enumerate(sizes)]

    results = []
    for module in (compiled, reference):
        params = storage[0][0].clone()
        edit = module.topm_subtract_(cut(params), cut(storage[1][0]), cut(storage[2][0]), density=0.1)
        results.append((params, edit))
    assert_same_bits(results[0][0], results[1][0])
    assert_same_edit(results[0][1], results[1][1])


def test_strided_params_are_edited_in_place(ops):
    whole = torch.zeros(4, 6)
    tuned = torch.arange(8.0).view(4, 2)
    ops.topm_subtract_(whole[:, 1:5:3], torch.zeros(4, 2), tuned, m=3)
    assert whole.nonzero().tolist() == [[2, 4], [3, 1], [3, 4]]
    assert whole[3, 4] == -7


def test_unselected_entries_keep_even_the_payload_of_a_nan(ops):
    bits = torch.arange(0x7F81, 0x7FA1, dtype=torch.int16)
    params = torch.cat([bits, torch.zeros(32, dtype=torch.int16)]).view(torch.bfloat16)
    tuned = torch.zeros(64)
    tuned[5], tuned[40] = 0.5, 1.0
    ops.topm_subtract_(params, torch.zeros(64), tuned, m=2)
    kept = torch.arange(64) != 5
    expected = torch.cat([bits, torch.zeros(32, dtype=torch.int16)])
    expected[40] = torch.tensor([-1.0], dtype=torch.bfloat16).view(torch.int16)[0]
    assert torch.equal(params.view(torch.int16)[kept], expected[kept])


def test_unchanged_counts_selected_entries_that_round_to_what_they_were(ops):
    params = torch.tensor([1.0, 1.0, 0.0], dtype=torch.bfloat16)
    edit = ops.topm_subtract_(params, torch.zeros(3), torch.tensor([1e-5, 0.5, 1e-5]), m=3)
    assert edit.unchanged.tolist() == [1]
    assert edit.kept.tolist() == [3]


def test_flush_to_zero_mode_of_the_caller_changes_no_bit(compiled):
    base = [torch.randn(70_000, generator=torch.Generator().manual_seed(2)) * 1e-38 * 1e-3]
    tuned = [torch.randn(70_000, generator=torch.Generator().manual_seed(4)) * 1e-38 * 1e-3]
    params = [torch.zeros(70_000)]
    expected = clones(params)
    wanted = reference.topm_subtract_(expected, base, tuned, density=0.3, scale=2.0)
    assert 0 < wanted.threshold[0] < 1.2e-38
    if not torch.set_flush_denormal(True):
        pytest.skip("no flush-to-zero mode on this processor")
    try:
        edit = compiled.topm_subtract_(params, base, tuned, density=0.3, scale=2.0)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(params[0], expected[0])
    assert_same_bits(edit.threshold, wanted.threshold)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_small_list_has_the_bits_of_the_reference(data):
    sizes = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(sum))
    levels = data.draw(st.sampled_from([2, 5, 1000]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    made = lambda: [torch.randint(-levels, levels, (n,), generator=generator) / 8 for n in sizes]  # noqa: E731
    m = data.draw(st.integers(0, sum(sizes)))
    check_against_reference(
        compiled_ops,
        made(),
        made(),
        made(),
        m=m,
        undo=data.draw(st.booleans()),
        check_finite=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([1.0, -0.3])),
    )


@pytest.mark.slow
def test_entries_past_2_to_the_31_are_found():
    n = 2**31 + 2**20
    params, tuned = zero_pages(n), zero_pages(n)
    places = [5, 2**31 - 1, 2**31, 2**31 + 77777, n - 1]
    for value, place in enumerate(places):
        tuned[place] = value + 1.0
    edit = compiled_ops.topm_subtract_(params, params, tuned, m=4, check_finite=False)
    assert params[places].tolist() == [0.0, -2.0, -3.0, -4.0, -5.0]
    assert edit.kept.tolist() == [4]
    assert edit.threshold.tolist() == [2.0]


# ---- entries that are not finite


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("undo", [True, False])
def test_a_delta_that_is_not_finite_is_refused_and_nothing_is_changed(ops, bad, undo):
    params, base, tuned = triple([(5,), (40,)], [torch.float32] * 3)
    tuned[1][7] = bad
    before = clones(params)
    with pytest.raises(ValueError, match=r"tuned\[1\] - base\[1\] must be finite, got 1 entries"):
        ops.topm_subtract_(params, base, tuned, m=3, undo=undo)
    for p, b in zip(params, before, strict=True):
        assert_same_bits(p, b)


def test_per_tensor_scope_also_changes_nothing_when_a_later_tensor_is_refused(ops):
    params, base, tuned = triple([(5,), (40,)], [torch.float32] * 3)
    tuned[1][7] = NAN
    before = clones(params)
    with pytest.raises(ValueError, match="must be finite"):
        ops.topm_subtract_(params, base, tuned, m=3, scope="per_tensor")
    assert_same_bits(params[0], before[0])


def test_topm_select_refuses_a_delta_that_is_not_finite(ops):
    with pytest.raises(ValueError, match=r"tuned\[0\] - base\[0\] must be finite"):
        ops.topm_select(torch.zeros(3), torch.tensor([1.0, NAN, 2.0]), m=1)


@pytest.mark.parametrize("bad", [NAN, INF, -1.0])
def test_importance_that_is_negative_or_not_finite_is_refused(ops, bad):
    with pytest.raises(ValueError, match=r"importance\[0\] must be finite and not negative, got 1 other"):
        ops.topm_select(torch.zeros(2), torch.ones(2), m=1, importance=torch.tensor([1.0, bad]))


def test_unchecked_entries_that_are_not_finite_are_never_selected_and_are_counted(ops):
    params = torch.zeros(4)
    edit = ops.topm_subtract_(
        params, torch.zeros(4), torch.tensor([NAN, 1.0, INF, 2.0]), m=4, check_finite=False, undo=True
    )
    assert params.tolist() == [0.0, -1.0, 0.0, -2.0]
    assert edit.kept.tolist() == [2]
    assert edit.nonfinite.tolist() == [2]
    assert edit.undo.indices.tolist() == [1, 3, -1, -1]


def test_unchecked_entries_without_a_rank_leave_the_bits_of_the_reference(compiled):
    params, base, tuned = triple([(100_000,)], [torch.float32] * 3)
    tuned[0][::3] = NAN
    for density in (0.1, 0.66, 0.9, 1.0):
        check_against_reference(compiled, params, base, tuned, density=density, check_finite=False)
        check_against_reference(compiled, params, base, tuned, density=density, check_finite=False, undo=True)


# ---- undo


@pytest.mark.parametrize("dtype", DTYPES)
def test_revert_restores_every_bit(ops, dtype):
    params, base, tuned = triple([(30, 41), (0,), (7,)], [dtype] * 3)
    params[0][0, :3] = torch.tensor([NAN, -0.0, INF])
    before = clones(params)
    edit = ops.topm_subtract_(params, base, tuned, density=0.5, scale=3.0, undo=True)
    assert not torch.equal(params[2], before[2])
    edit.revert_(params)
    for p, b in zip(params, before, strict=True):
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        assert torch.equal(p.view(integer), b.view(integer))


def test_revert_of_strided_and_mixed_params(ops):
    whole = torch.arange(24.0).view(4, 6).clone()
    params = [whole[:, ::2], torch.ones(5, dtype=torch.bfloat16)]
    tuned = [torch.arange(12.0).view(4, 3), torch.full((5,), 9.0)]
    edit = ops.topm_subtract_(params, [torch.zeros(4, 3), torch.zeros(5)], tuned, m=9, undo=True)
    assert edit.undo.bits.dtype == torch.int32
    edit.revert_(params)
    assert torch.equal(whole, torch.arange(24.0).view(4, 6))
    assert torch.equal(params[1], torch.ones(5, dtype=torch.bfloat16))


def test_revert_needs_a_record(ops):
    params = torch.zeros(3)
    edit = ops.topm_subtract_(params, torch.zeros(3), torch.ones(3), m=1)
    with pytest.raises(ValueError, match="There is no record"):
        edit.revert_(params)


@pytest.mark.parametrize(("wrong", "message"), [
    ([torch.zeros(3)] * 2, "the 1 tensors that were recorded, got 2 tensors"),
    ([torch.zeros(4)], r"params\[0\] must have the recorded shape \(3,\), got \(4,\)"),
    ([torch.zeros(3, dtype=torch.float64)], r"params\[0\] must have the recorded dtype torch.float32"),
], ids=["number", "shape", "dtype"])  # fmt: skip
def test_revert_refuses_other_params(ops, wrong, message):
    edit = ops.topm_subtract_(torch.zeros(3), torch.zeros(3), torch.ones(3), m=1, undo=True)
    with pytest.raises(ValueError, match=message):
        edit.revert_(wrong)


# ---- autograd, modules


def test_parameters_of_a_module_are_taken_as_they_are(ops):
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    ops.topm_subtract_(
        model.parameters(), [torch.zeros_like(b) for b in before], [torch.ones_like(b) for b in before], density=1.0
    )
    for p, b in zip(model.parameters(), before, strict=True):
        assert p.requires_grad
        assert p.grad_fn is None
        assert torch.equal(p.detach(), b - 1)


@pytest.mark.parametrize("call", ["topm_subtract_", "sparse_subtract_"])
def test_a_backward_over_what_was_edited_is_noticed(ops, call):
    w = torch.ones(3, requires_grad=True)
    y = (w * w).sum()
    if call == "topm_subtract_":
        ops.topm_subtract_(w, torch.zeros(3), torch.ones(3), m=1)
    else:
        ops.sparse_subtract_(w, ops.topm_select(torch.zeros(3), torch.ones(3), m=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_tensors_are_edited(ops):
    with torch.inference_mode():
        params = torch.zeros(3)
        ops.topm_subtract_(params, torch.zeros(3), torch.ones(3), m=1)
        assert params.tolist() == [-1.0, 0.0, 0.0]


@pytest.mark.parametrize("strided", [False, True])
def test_inference_tensors_are_edited_and_reverted_outside_inference_mode_too(ops, strided):
    with torch.inference_mode():
        whole = torch.zeros(3, 2)
        params = whole[:, 0] if strided else torch.zeros(3)
        delta = ops.topm_select(torch.zeros(3), torch.ones(3), m=2)
    assert params.is_inference()
    edit = ops.topm_subtract_(params, torch.zeros(3), torch.ones(3), m=1, undo=True)
    assert params.tolist() == [-1.0, 0.0, 0.0]
    sparse = ops.sparse_subtract_(params, delta, undo=True)
    assert params.tolist() == [-2.0, -1.0, 0.0]
    sparse.revert_(params)
    edit.revert_(params)
    assert params.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("call", ["topm_subtract_", "sparse_subtract_", "revert_"])
def test_writes_in_inference_mode_are_noticed_by_a_backward_too(ops, call):
    edit = ops.topm_subtract_(torch.zeros(3), torch.zeros(3), torch.ones(3), m=1, undo=True)
    w = torch.ones(3, requires_grad=True)
    y = (w * w).sum()
    with torch.inference_mode():
        if call == "topm_subtract_":
            ops.topm_subtract_(w, torch.zeros(3), torch.ones(3), m=1)
        elif call == "sparse_subtract_":
            ops.sparse_subtract_(w, ops.topm_select(torch.zeros(3), torch.ones(3), m=1))
        else:
            edit.revert_(w)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_an_integer_scale_is_read_as_a_float(ops):
    params = torch.zeros(2)
    ops.topm_subtract_(params, torch.zeros(2), torch.tensor([0.0, 1.0]), m=1, scale=2**70)
    assert params.tolist() == [0.0, -(2.0**70)]


def test_an_empty_tensor_among_the_params_does_not_cost_the_single_pass(monkeypatch):
    calls = []

    class Counted(native.Prepared):
        def __init__(self, *args, one_pass=False, **options):
            calls.append(one_pass)
            super().__init__(*args, one_pass=one_pass, **options)

    monkeypatch.setattr(native, "Prepared", Counted)
    params, base, tuned = triple([(40,), (0,)], [torch.float32] * 3)
    native.subtract_cpu(params, base, tuned, [], [4], False, -1.0, False)
    native.subtract_cpu(params, params, tuned, [], [4], False, -1.0, False)
    assert calls == [True, False]


def test_the_reference_backend_runs_behind_the_ops_names():
    with prosocial_ext.ops.backend("reference"):
        params = torch.zeros(3)
        delta = compiled_ops.topm_select(torch.zeros(3), torch.ones(3), m=1)
        compiled_ops.sparse_subtract_(params, delta)
        compiled_ops.topm_subtract_(params, torch.zeros(3), torch.ones(3), m=1)
    assert params.tolist() == [-2.0, 0.0, 0.0]
