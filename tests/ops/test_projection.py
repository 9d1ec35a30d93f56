"""The laws of gradient surgery, over the reference and every instruction set."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prosocial_ext.reference.projection import draw_order

from prosocial_ext import reference
from tests.asserts import assert_same_bits

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *SIXTEEN_BIT)
SIZES = (0, 1, 7, 8, 31, 4095, 4096, 4097, 9000)


def gradients(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close_to_norms(actual, expected, grads):
    """Within 1e-5 of the sum of the gradients' norms; 16-bit results may also round to the neighbour."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    slack = 2.0**-7 * expected.double().abs() if actual.dtype in SIXTEEN_BIT else torch.zeros(())
    error = ((actual.double() - expected.double()).abs() - slack).clamp(min=0).norm(dim=-1)
    limit = 1e-5 * grads.double().norm(dim=-1).sum(-1)
    assert (error <= limit).all(), f"error {error.max().item():.3g} beyond {limit.min().item():.3g}"


# ---- the Gram matrix


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 5, 6, 7, 8, 13])
def test_gram_is_the_exact_rational_gram_to_fp64_accuracy(ops, k, dtype):
    grads = gradients(k, 37, dtype=dtype)
    gram = ops.gradient_gram(grads)
    exact = [[Fraction(x) for x in row] for row in grads.double().tolist()]
    for i in range(k):
        for j in range(k):
            products = [a * b for a, b in zip(exact[i], exact[j], strict=True)]
            error = abs(Fraction(gram[i, j].item()) - sum(products))
            assert error <= sum(map(abs, products)) * Fraction(40, 2**53)


def test_gram_of_small_integers_is_exact(ops):
    grads = torch.randint(-50, 50, (9, 5000), generator=torch.Generator().manual_seed(1))
    expected = grads @ grads.mT
    for dtype in DTYPES:
        assert_same_bits(ops.gradient_gram(grads.to(dtype)), expected.double())


@pytest.mark.parametrize("k", [2, 5, 7, 16])
def test_gram_is_symmetric_to_the_bit(compiled, k):
    gram = compiled.gradient_gram(gradients(k, 5000))
    assert_same_bits(gram, gram.mT.contiguous())


def test_gram_of_parts_adds_up_to_the_whole(ops):
    grads = gradients(4, 10_000)
    parts = ops.gradient_gram(grads[:, :3000]) + ops.gradient_gram(grads[:, 3000:])
    torch.testing.assert_close(parts, ops.gradient_gram(grads), rtol=1e-13, atol=1e-10)


def test_gram_shows_a_nan_in_its_row_and_column_only(ops):
    grads = gradients(3, 10)
    grads[1, 4] = torch.nan
    expected = torch.tensor([[False, True, False], [True, True, True], [False, True, False]])
    assert torch.equal(ops.gradient_gram(grads).isnan(), expected)


def test_gram_of_lists_is_that_of_their_concatenation(ops):
    grads = gradients(3, 12_000)
    lists = [[row[:5000].reshape(50, 100), row[5000:5001], row[5001:5001], row[5001:]] for row in grads]
    torch.testing.assert_close(ops.gradient_gram(lists), ops.gradient_gram(grads), rtol=1e-13, atol=1e-10)


# ---- what projection does


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_one_objective_is_returned_as_it_is(ops, size, dtype):
    grads = gradients(1, size, dtype=dtype)
    grads[:, ::3] = -0.0
    assert_same_bits(ops.project_conflicts(grads), grads[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [2, 5, 7])
def test_without_conflict_the_result_is_the_plain_sum(ops, size, k, dtype):
    grads = gradients(k, size, dtype=dtype).abs()
    total = grads[0].double()
    for gradient in grads[1:].double():
        total = total + gradient
    assert_same_bits(ops.project_conflicts(grads), total.to(dtype))


def test_two_opposed_gradients_end_orthogonal_to_each_others_original(ops):
    grads = torch.stack([gradients(1000, seed=1), -gradients(1000, seed=1) + 0.3 * gradients(1000, seed=2)])
    _, stats = ops.project_conflicts(grads, return_stats=True)
    assert stats.cosines[0, 1] < -0.9
    assert stats.cosines_after[0, 1].abs() < 1e-12
    assert stats.cosines_after[1, 0].abs() < 1e-12


def test_exactly_opposite_gradients_cancel(ops):
    grads = gradients(1000)
    out, stats = ops.project_conflicts(torch.stack([grads, -grads]), return_stats=True)
    assert_close_to_norms(out, torch.zeros(1000), torch.stack([grads, -grads]))
    assert_same_bits(stats.cosines_after, torch.zeros(2, 2, dtype=torch.float64))
    assert int(stats.conflicts) == 1


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**40])
def test_scaling_by_a_power_of_two_commutes_to_the_bit(ops, factor):
    grads = gradients(5, 999)
    assert_same_bits(ops.project_conflicts(grads * factor), ops.project_conflicts(grads) * factor)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_extreme_scales_of_float32_neither_overflow_nor_vanish(ops, scale):
    grads = gradients(4, 500)
    small = (grads.double() * scale).float()
    expected = ops.project_conflicts(small.double()).float()
    assert_close_to_norms(ops.project_conflicts(small) / scale, expected / scale, grads)


def test_one_huge_and_one_tiny_objective_both_keep_their_direction(ops):
    grads = gradients(2, 100).double()
    expected = ops.project_conflicts(grads, return_stats=True)[1]
    stats = ops.project_conflicts(grads * torch.tensor([[1e20], [1e-20]]), return_stats=True)[1]
    torch.testing.assert_close(stats.cosines_after, expected.cosines_after, rtol=0, atol=1e-9)


def test_a_zero_gradient_changes_nothing(ops):
    grads = gradients(3, 200)
    with_zero = torch.cat([grads, torch.zeros(1, 200)])
    out, stats = ops.project_conflicts(with_zero, order="fixed", return_stats=True)
    assert_same_bits(out, ops.project_conflicts(grads, order="fixed"))
    assert not stats.cosines[3].any()
    assert not stats.cosines_after[:, 3].any()


def test_mean_is_the_sum_divided_by_k(ops):
    grads = gradients(4, 300)
    assert_same_bits(ops.project_conflicts(grads, reduction="mean"), ops.project_conflicts(grads) / 4)


def test_weights_apply_after_projection(ops):
    grads = gradients(3, 300).double()
    parts = [ops.project_conflicts(grads, weights=[1.0 if i == j else 1e-300 for j in range(3)]) for i in range(3)]
    expected = 0.5 * parts[0] + 2.0 * parts[1] + 1e-3 * parts[2]
    out = ops.project_conflicts(grads, weights=[0.5, 2.0, 1e-3])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_an_objective_of_weight_zero_takes_no_part(ops):
    grads = gradients(4, 300)
    without = ops.project_conflicts(grads[[0, 1, 3]], order="fixed")
    assert_same_bits(ops.project_conflicts(grads, weights=[1, 1, 0, 1], order="fixed"), without)


def test_an_objective_of_weight_zero_may_be_nan(ops):
    grads = gradients(3, 300)
    expected, clean = ops.project_conflicts(grads, weights=[1, 1, 0], return_stats=True)
    grads[2, 7], grads[2, 9] = torch.nan, torch.inf
    out, stats = ops.project_conflicts(grads, weights=[1, 1, 0], return_stats=True)
    assert_same_bits(out, expected)
    assert_same_bits(stats.cosines_after[:2, :2], clean.cosines_after[:2, :2])
    assert bool(stats.cosines[2].isnan().all())
    assert bool(stats.cosines_after[2].isnan().all())


def test_all_weights_zero_gives_zeros(ops):
    assert_same_bits(ops.project_conflicts(-gradients(2, 50), weights=[0, 0]), torch.zeros(50))


# ---- orders


def test_orders_are_those_of_the_definition(ops):
    """Gradients on which every order of projections leaves another result reveal the order that was drawn."""
    k = 5
    grads = torch.eye(k, dtype=torch.float64) - 0.24 + 0.01 * gradients(k, k).double()
    for seed in (0, 1, 2**40 + 3, 2**63 - 1):
        orders = torch.tensor([draw_order(seed, 0, i, k) for i in range(k)])
        assert_same_bits(ops.project_conflicts(grads, seed=seed), ops.project_conflicts(grads, order=orders))
        shifted = orders.roll(1, dims=1)
        assert not torch.equal(ops.project_conflicts(grads, seed=seed), ops.project_conflicts(grads, order=shifted))


def test_drawn_orders_are_permutations_of_the_others_and_all_occur():
    seen = set()
    for seed in range(300):
        order = draw_order(seed, 0, 1, 4)
        assert sorted(order) == [0, 2, 3]
        seen.add(tuple(order))
    assert len(seen) == 6


def test_drawn_orders_are_uniform():
    counts: dict[tuple[int, ...], int] = {}
    for group in range(6000):
        order = tuple(draw_order(7, group, 0, 4))
        counts[order] = counts.get(order, 0) + 1
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert chi_square < 36  # 5 degrees of freedom: beyond with probability 1e-6


def test_fixed_is_ascending_order(ops):
    grads = gradients(4, 300) - 0.5
    ascending = torch.tensor([[j for j in range(4) if j != i] for i in range(4)])
    assert_same_bits(ops.project_conflicts(grads, order="fixed"), ops.project_conflicts(grads, order=ascending))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_an_order_of_all_skips_the_objective_itself(ops, dtype):
    grads = gradients(3, 300)
    all_of_them = torch.tensor([[2, 0, 1], [1, 2, 0], [0, 2, 1]], dtype=dtype)
    others = torch.tensor([[2, 1], [2, 0], [0, 1]], dtype=dtype)
    assert_same_bits(ops.project_conflicts(grads, order=all_of_them), ops.project_conflicts(grads, order=others))


def test_group_zero_equals_the_unbatched_call(ops):
    grads = gradients(3, 5, 100)
    assert_same_bits(ops.project_conflicts(grads, seed=9)[0], ops.project_conflicts(grads[0], seed=9))


def test_groups_draw_orders_of_their_own(ops):
    grads = (torch.eye(5, dtype=torch.float64) - 0.24 + 0.01 * gradients(5, 5).double()).expand(20, 5, 5)
    assert len({tuple(row.tolist()) for row in ops.project_conflicts(grads)}) > 10


# ---- forms of the arguments


def test_batches_have_any_number_of_dimensions(ops):
    grads, weights = gradients(2, 3, 4, 50), torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    out, stats = ops.project_conflicts(grads, weights=weights, return_stats=True)
    flat, flat_stats = ops.project_conflicts(grads.flatten(0, 1), weights=weights.flatten(0, 1), return_stats=True)
    assert_same_bits(out, flat.reshape(2, 3, 50))
    assert stats.cosines.shape == stats.cosines_after.shape == (2, 3, 4, 4)
    assert_same_bits(stats.conflicts, flat_stats.conflicts.reshape(2, 3))


@pytest.mark.parametrize("shape", [(0, 3, 10), (2, 0, 3, 10), (2, 3, 0), (1, 0)])
def test_empty_batches_and_empty_gradients(ops, shape):
    grads = torch.empty(shape)
    out, stats = ops.project_conflicts(grads, return_stats=True)
    assert_same_bits(out, torch.empty(shape[:-2] + shape[-1:]))
    assert_same_bits(stats.cosines, torch.zeros(shape[:-1] + shape[-2:-1], dtype=torch.float64))
    assert bool(stats.finite.all())


def test_lists_are_projected_as_one_long_vector(ops):
    grads = gradients(3, 9000)
    cut = lambda row: [row[:4000].reshape(40, 100), row[4000:4000], row[4000:4001].reshape(()), row[4001:]]  # noqa: E731
    out, stats = ops.project_conflicts([cut(row) for row in grads], return_stats=True)
    whole, whole_stats = ops.project_conflicts(grads, return_stats=True)
    assert [part.shape for part in out] == [(40, 100), (0,), (), (4999,)]
    assert_close_to_norms(torch.cat([part.reshape(-1) for part in out]), whole, grads)
    torch.testing.assert_close(stats.cosines_after, whole_stats.cosines_after, rtol=0, atol=1e-10)


def test_a_sequence_of_tensors_is_lists_of_one(ops):
    grads = gradients(3, 20, 30)
    (out,) = ops.project_conflicts(list(grads))
    assert_same_bits(out, ops.project_conflicts(grads.flatten(1)).reshape(20, 30))


def test_dtypes_may_differ_between_tensors_of_a_list(ops):
    lists = [[gradients(50, dtype=dtype, seed=10 * i + d) for d, dtype in enumerate(DTYPES)] for i in range(3)]
    out = ops.project_conflicts(lists)
    assert [part.dtype for part in out] == list(DTYPES)
    whole = torch.stack([torch.cat([t.double() for t in tensors]) for tensors in lists])
    expected = ops.project_conflicts(whole).split(50)
    for part, wanted in zip(out, expected, strict=True):
        assert_close_to_norms(part, wanted.to(part.dtype), whole)


def test_strides_do_not_matter(ops):
    grads = gradients(7, 3, 4).permute(1, 2, 0)  # [3, 4, 7]
    assert_same_bits(ops.project_conflicts(grads), ops.project_conflicts(grads.contiguous()))
    lists = [[gradients(6, 5, seed=i).t()[1:]] for i in range(3)]
    copies = [[t.contiguous() for t in tensors] for tensors in lists]
    assert_same_bits(ops.project_conflicts(lists)[0], ops.project_conflicts(copies)[0])


def test_expanded_gradients_are_read_as_they_look(ops):
    grads = gradients(1, 100).expand(3, 100)
    assert_same_bits(ops.project_conflicts(grads), ops.project_conflicts(grads.contiguous()))


def test_results_are_detached_and_inputs_untouched(ops):
    grads = gradients(3, 100).requires_grad_()
    before, version = grads.detach().clone(), grads._version
    out, stats = ops.project_conflicts(grads, weights=torch.ones(3, requires_grad=True), return_stats=True)
    (part,) = ops.project_conflicts(list(grads))
    assert not any(t.requires_grad for t in (out, part, stats.cosines, stats.cosines_after, ops.gradient_gram(grads)))
    assert_same_bits(grads.detach(), before)
    assert grads._version == version


# ---- statistics


def test_statistics_count_pairs_of_negative_cosine(ops):
    grads = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -3.0], [0.0, 0.0]])
    stats = ops.project_conflicts(grads, return_stats=True)[1]
    assert int(stats.conflicts) == 3  # (0, 1), (0, 2), (1, 2)
    assert stats.conflicts.dtype == torch.int64
    expected = torch.nn.functional.cosine_similarity(grads[:, None].double(), grads[None].double(), dim=-1)
    torch.testing.assert_close(stats.cosines, expected, rtol=0, atol=1e-15)
    assert stats.finite.dtype == torch.bool
    assert bool(stats.finite)


def test_statistics_count_no_pair_with_an_objective_of_weight_zero(ops):
    grads = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -3.0]])
    stats = ops.project_conflicts(grads, weights=[1, 1, 0], return_stats=True)[1]
    assert int(stats.conflicts) == 1
    torch.testing.assert_close(stats.cosines_after[2], stats.cosines[2])


# ---- refusals: reference and ops word them alike


def refused(ops, match, error=ValueError, /, *arguments, **options):
    with pytest.raises(error) as reason:
        ops.project_conflicts(*arguments, **options)
    assert match in str(reason.value)
    with pytest.raises(error) as worded:
        reference.project_conflicts(*arguments, **options)
    assert str(worded.value) == str(reason.value)


def test_refuses_one_dimension(ops):
    refused(ops, "grads must have at least two dimensions", ValueError, torch.ones(3))


def test_refuses_no_objective(ops):
    refused(ops, "grads must hold at least one gradient", ValueError, torch.ones(0, 3))
    refused(ops, "grads must hold at least one gradient", ValueError, [])


def test_refuses_what_is_no_tensor(ops):
    refused(ops, "grads must be a tensor or a sequence", TypeError, 3)
    refused(ops, "grads[1][0] must be a tensor", TypeError, [[torch.ones(1)], [None]])


def test_refuses_a_generator_of_tensors(ops):
    refused(ops, "Generators are read once", TypeError, [(t for t in [torch.ones(1)])])


def test_refuses_tensors_beside_lists(ops):
    refused(ops, "grads[1] must be a tensor, like grads[0]", TypeError, [torch.ones(1), [torch.ones(1)]])


def test_refuses_empty_lists(ops):
    refused(ops, "grads[0] must hold at least one tensor", ValueError, [[], []])


def test_refuses_lists_of_different_lengths(ops):
    refused(
        ops, "grads[1] must hold as many tensors as grads[0], 1", ValueError, [[torch.ones(1)], [torch.ones(1)] * 2]
    )


def test_refuses_different_shapes_and_dtypes_of_one_tensor(ops):
    refused(ops, "grads[1][0] must match grads[0][0]", ValueError, [[torch.ones(1)], [torch.ones(2)]])
    refused(ops, "grads[1] must match grads[0]", ValueError, [torch.ones(1), torch.ones(1).double()])


def test_refuses_different_devices(ops):
    grads = [torch.ones(1), torch.ones(1, device="meta")]
    refused(ops, "grads[1] must be on the device of grads[0], cpu", ValueError, grads)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_refuses_other_dtypes(ops, dtype):
    refused(ops, str(dtype), TypeError, torch.ones(2, 3).to(dtype))


def test_refuses_an_unknown_reduction(ops):
    refused(ops, "reduction must be one of 'sum', 'mean'", ValueError, torch.ones(2, 3), reduction="max")


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_refuses_a_seed_out_of_range(ops, seed):
    refused(ops, "seed must be an integer in [0, 2**63)", ValueError, torch.ones(2, 3), seed=seed)


def test_refuses_a_seed_that_is_no_integer(ops):
    refused(ops, "seed must be an integer", TypeError, torch.ones(2, 3), seed=1.0)


def test_refuses_an_unknown_order(ops):
    refused(ops, "order must be 'random', 'fixed' or an integer tensor", ValueError, torch.ones(2, 3), order="up")


def test_refuses_an_order_of_the_wrong_shape(ops):
    refused(ops, "order must have shape [2, 1] or [2, 2]", ValueError, torch.ones(2, 3), order=torch.ones(2).long())


def test_refuses_an_order_of_floats(ops):
    refused(ops, "order must hold integers", TypeError, torch.ones(2, 3), order=torch.ones(2, 2))


def test_refuses_an_order_that_is_no_permutation(ops):
    refused(ops, "order[1] must be a permutation of the others, [0, 2]", ValueError, torch.ones(3, 3),
            order=torch.tensor([[1, 2], [0, 1], [0, 1]]))  # fmt: skip
    refused(ops, "order[0] must be a permutation of all objectives, [0, 1]", ValueError, torch.ones(2, 3),
            order=torch.tensor([[1, 1], [0, 1]]))  # fmt: skip


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_refuses_bad_weights_by_name(ops, bad):
    refused(ops, "weights[1] must be finite and >= 0", ValueError, torch.ones(2, 3), weights=[1.0, bad])
    batch = torch.tensor([[1.0, 1.0], [bad, 1.0]])
    refused(ops, "weights[0] in group 1 must be", ValueError, torch.ones(2, 2, 3), weights=batch)


def test_refuses_weights_of_the_wrong_shape(ops):
    refused(ops, "weights must have shape [2], got [3]", ValueError, torch.ones(2, 3), weights=torch.ones(3))
    refused(ops, "weights must have shape [2] or [4, 2]", ValueError, torch.ones(4, 2, 3), weights=torch.ones(4))


def test_refuses_weights_that_are_no_real_numbers(ops):
    refused(ops, "weights must be a tensor or a sequence of k numbers", TypeError, torch.ones(2, 3), weights={"a": 1.0})
    refused(ops, "weights must be real numbers", TypeError, torch.ones(2, 3), weights=torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refuses_a_non_finite_gradient_by_name(ops, dtype, bad):
    grads = gradients(2, 3, 4, 5000, dtype=dtype)
    grads[1, 0, 2, 4321] = bad
    refused(ops, "grads[1, 0, 2] must be finite, got 1 NaN or infinite of 5000 elements", ValueError, grads)
    refused(ops, "grads[2] must be finite", ValueError, grads[1, 0])
    lists = [[row[:100], row[100:]] for row in grads[1, 0]]
    refused(ops, "grads[2][1] must be finite", ValueError, lists)
    refused(ops, "Check the loss of objective 2", ValueError, list(grads[1, 0]))


def test_refuses_squared_norms_beyond_float64(ops):
    refused(ops, "squared norms that float64 holds", ValueError, torch.full((2, 3), 1e200, dtype=torch.float64))


@pytest.mark.parametrize("call", ["project_conflicts", "gradient_gram"])
def test_both_ops_refuse_the_same_gradients(ops, call):
    with pytest.raises(ValueError, match="at least two dimensions"):
        getattr(ops, call)(torch.ones(3))


def test_refuses_weights_that_are_bools_or_too_large_for_a_float(ops):
    refused(
        ops,
        "weights[1] must be a number that float64 holds, got False",
        TypeError,
        torch.ones(2, 3),
        weights=[1, False],
    )
    refused(ops, "weights[0] must be a number that float64 holds, got an integer of 1329 bits", ValueError,
            torch.ones(2, 3), weights=[10**400, 1])  # fmt: skip
    refused(ops, "weights must be real numbers, got torch.complex64", TypeError, torch.ones(2, 3),
            weights=torch.ones(2, dtype=torch.complex64))  # fmt: skip


def test_weights_may_be_large_integers(ops):
    expected = ops.project_conflicts(torch.ones(2, 3), weights=[2.0**70, 1.0])
    assert_same_bits(ops.project_conflicts(torch.ones(2, 3), weights=[2**70, 1]), expected)


def test_refuses_weights_and_orders_without_values(ops):
    refused(ops, "weights must hold values", ValueError, torch.ones(2, 3), weights=torch.ones(2, device="meta"))
    order = torch.zeros(2, 1, dtype=torch.int64, device="meta")
    refused(ops, "order must hold values", ValueError, torch.ones(2, 3), order=order)
    refused(ops, "order must hold values", ValueError, [torch.ones(3)] * 2, order=order)


@pytest.mark.parametrize("flag", [1, None, "yes"], ids=str)
def test_refuses_a_flag_that_is_no_bool(ops, flag):
    refused(ops, "return_stats must be True or False", TypeError, torch.ones(2, 3), return_stats=flag)


def test_refuses_nested_tensors(ops):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    refused(ops, "grads must be a dense (strided) tensor, got a nested tensor", TypeError, nested)
    refused(ops, "weights must be a dense (strided) tensor", TypeError, torch.ones(2, 3), weights=nested)


def test_refuses_a_reduction_that_is_no_string(ops):
    refused(ops, "reduction must be one of 'sum', 'mean', got a tensor", TypeError, torch.ones(2, 3),
            reduction=torch.ones(2))  # fmt: skip


# ---- surroundings


def test_another_default_device_changes_nothing(ops):
    grads, order = gradients(3, 50), torch.tensor([[1, 2], [2, 0], [0, 1]])
    options = [{"seed": 3}, {"order": order}, {"order": "fixed", "weights": [1.0, 2.0, 0.0]}]
    expected = [ops.project_conflicts(g, return_stats=True, **o) for g in (grads, list(grads)) for o in options]
    with torch.device("meta"):
        actual = [ops.project_conflicts(g, return_stats=True, **o) for g in (grads, list(grads)) for o in options]
        gram = ops.gradient_gram(grads), ops.gradient_gram(list(grads))
        with pytest.raises(ValueError, match="grads\\[1, 0\\] must be finite"):
            ops.project_conflicts(torch.stack([grads, grads / torch.zeros((), device="cpu")]))
    for (out, stats), (wanted, wanted_stats) in zip(actual, expected, strict=True):
        for a, e in zip([out, stats.cosines_after], [wanted, wanted_stats.cosines_after], strict=True):
            assert_same_bits(*(x[0] if isinstance(x, list) else x for x in (a, e)))
    assert_same_bits(gram[0], ops.gradient_gram(grads))
    assert_same_bits(gram[1], ops.gradient_gram(list(grads)))


# ---- hypothesis


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    pool=st.sampled_from([2, 5, 1000]),
    order=st.sampled_from(["random", "fixed"]),
    reduction=st.sampled_from(["sum", "mean"]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_agrees_with_the_reference_within_the_promise(compiled, shape, dtype, pool, order, reduction, weighted, seed):
    """A small pool of directions makes zero, equal, opposite and nearly parallel gradients common."""
    groups, k, n = shape
    generator = torch.Generator().manual_seed(seed % 2**32)
    directions = torch.randn(pool, n, generator=generator)
    chosen = torch.randint(pool, (groups, k), generator=generator)
    signs = torch.randint(-1, 2, (groups, k, 1), generator=generator)
    grads = (directions[chosen] * signs + 1e-4 * torch.randn(shape, generator=generator)).to(dtype)
    weights = torch.randint(0, 3, (groups, k), generator=generator) / 2 if weighted else None
    options = {"weights": weights, "order": order, "reduction": reduction, "seed": seed, "return_stats": True}
    out, stats = compiled.project_conflicts(grads, **options)
    expected, expected_stats = reference.project_conflicts(grads, **options)
    scale = 1.0 if weights is None else max(1.0, float(weights.max()))
    assert_close_to_norms(out, expected, grads * scale)
    assert torch.equal(stats.finite, expected_stats.finite)
    torch.testing.assert_close(stats.cosines, expected_stats.cosines, rtol=0, atol=1e-9)
