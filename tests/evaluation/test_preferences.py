"""The mean inner product of preferences and rewards."""

import pytest
import torch

from prosocial_ext.evaluation import mip


def test_one_hot_preferences_pick_their_attributes_reward() -> None:
    rewards = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.7, 0.4], [0.5, 0.6, 0.8]])
    assert mip(torch.eye(3), rewards) == pytest.approx((0.9 + 0.7 + 0.8) / 3)


def test_rewards_that_equal_a_one_hot_preference_score_1() -> None:
    assert mip(torch.eye(5), torch.eye(5)) == 1.0


def test_one_preference_for_all_rows_is_that_row_repeated() -> None:
    preference, rewards = torch.tensor([0.25, 0.75]), torch.rand(6, 2)
    assert mip(preference, rewards) == mip(preference.expand(6, 2), rewards)


def test_is_linear_in_the_rewards() -> None:
    preferences, rewards = torch.rand(50, 5).double(), torch.randn(50, 5).double()
    assert mip(preferences, 2 * rewards - 1) == pytest.approx(
        2 * mip(preferences, rewards) - float(preferences.sum(1).mean())
    )


def test_integer_rewards_and_lists_are_read() -> None:
    assert mip([[1, 0], [0, 1]], [[1, 0], [1, 0]]) == 0.5


@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (2,), (1, 3)], ids=str)
def test_preferences_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"preferences must have shape \(2, 3\), as rewards, or \(3,\) for all rows"):
        mip(torch.ones(shape), torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(3,), (0, 3), (1, 2, 3)], ids=str)
def test_rewards_that_are_no_table_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rewards must have shape \[n, k\]"):
        mip(torch.ones(3), torch.ones(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    rewards = torch.ones(2, 3)
    rewards[1, 2] = bad
    with pytest.raises(ValueError, match=r"rewards\[1, 2\] must be finite"):
        mip(torch.ones(3), rewards)
    with pytest.raises(ValueError, match=r"preferences\[1, 2\] must be finite"):
        mip(rewards, torch.ones(2, 3))
