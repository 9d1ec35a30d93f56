"""raise_if_bad turns what a device could only flag into an error, and lets everything else through."""

import dataclasses

import pytest
import torch

NAN = float("nan")


@pytest.fixture
def good(ops):
    """A result of every kind that the ops return."""
    grads = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    base = torch.zeros(2, 4)
    return {
        "tokens": ops.guided_sample(base),
        "tokens_and_logprobs": ops.guided_sample(base, return_logprobs=True),
        "logprobs": ops.guided_logprobs(base),
        "gradients_and_stats": ops.project_conflicts(grads, return_stats=True),
        "gradient_lists": ops.project_conflicts([[row] for row in grads[0]]),
        "edit": ops.topm_subtract_(torch.ones(4), torch.zeros(4), torch.ones(4), m=2),
        "delta": ops.topm_select(torch.zeros(4), torch.ones(4), m=2),
    }


def test_good_results_pass_unchanged(ops, good):
    for result in good.values():
        assert ops.raise_if_bad(result) is result


def test_masked_logprobs_are_not_bad(ops):
    ops.raise_if_bad(ops.guided_logprobs(torch.tensor([[0.0, -torch.inf]])))


def test_a_token_of_minus_one_names_its_row(ops):
    with pytest.raises(ValueError, match="row 1 must have a finite result, got -1"):
        ops.raise_if_bad(torch.tensor([3, -1]))


def test_nan_logprobs_name_their_row(ops):
    with pytest.raises(ValueError, match="row 0 must have a finite result, got NaN"):
        ops.raise_if_bad((torch.tensor([3]), torch.tensor([NAN])))


def test_a_nonfinite_gradient_names_its_group(ops, good):
    gradients, stats = good["gradients_and_stats"]
    bad = dataclasses.replace(stats, finite=torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"grads of group \(1,\) must be finite"):
        ops.raise_if_bad((gradients, bad))


def test_a_nonfinite_delta_names_its_tensor(ops, good):
    bad = dataclasses.replace(good["edit"], nonfinite=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"every entry of tensor 1 must have a finite delta .*got 5 that could not"):
        ops.raise_if_bad(bad)


def test_bad_importance_is_not_blamed_on_the_difference(ops):
    importance = torch.tensor([NAN, 1.0])
    edit = ops.topm_subtract_(torch.zeros(2), torch.zeros(2), torch.ones(2), m=1, importance=importance,
                              check_finite=False)  # fmt: skip
    with pytest.raises(ValueError, match=r"every entry of tensor 0 must have .* a finite importance >= 0, got 1 that"):
        ops.raise_if_bad(edit)


@pytest.mark.parametrize("gradients", [torch.tensor([0.0, NAN]), [torch.tensor([0.0, NAN])]], ids=["dense", "list"])
def test_a_nan_gradient_is_named_by_index_and_not_as_a_row(ops, gradients):
    with pytest.raises(ValueError, match=r"the result at index \(1,\) must be finite, got NaN"):
        ops.raise_if_bad(gradients)


def test_nan_in_a_table_of_logprobs_names_row_and_column(ops):
    with pytest.raises(ValueError, match=r"the result at index \(1, 0\) must be finite, got NaN"):
        ops.raise_if_bad(torch.tensor([[0.0], [NAN]]))


def test_anything_else_is_refused(ops):
    with pytest.raises(TypeError, match="result must be what an op returned, got 'token'"):
        ops.raise_if_bad("token")


def test_a_refused_dataclass_is_shown_by_its_name_alone(ops, good):
    with pytest.raises(TypeError, match=r"result must be what an op returned, got a UndoRecord\.$"):
        ops.raise_if_bad(ops.UndoRecord(torch.ones(3), torch.ones(3), (), ()))
