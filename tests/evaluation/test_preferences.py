"""The mean inner product and the mean cosine of preferences and rewards."""

import pytest
import torch

from prosocial_ext.evaluation import mip, preference_cosine


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


# ---- the cosine


def test_rewards_along_their_preference_score_1_whatever_their_size() -> None:
    preferences = torch.rand(20, 5).double() + 0.1
    assert preference_cosine(preferences, torch.arange(1, 21)[:, None] * preferences) == pytest.approx(1.0)
    assert preference_cosine(preferences, -preferences) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([[0.0, 3.0]], 0.0), ([[2.0, 2.0]], 0.5**0.5), ([[3.0, 4.0]], 0.6), ([[3.0, 4.0], [0.0, 0.0]], 0.3)],
    ids=["across", "diagonal", "three_four_five", "no_reward_counts_0"],
)
def test_cosines_of_known_angles(rewards: list[list[float]], expected: float) -> None:
    assert preference_cosine([1.0, 0.0], rewards) == pytest.approx(expected)


def test_it_is_the_mean_of_torchs_cosines() -> None:
    preferences, rewards = torch.rand(30, 5).double(), torch.randn(30, 5).double()
    expected = torch.nn.functional.cosine_similarity(preferences, rewards, dim=1).mean()
    assert preference_cosine(preferences, rewards) == pytest.approx(float(expected))


def test_ranges_bring_attributes_to_one_scale() -> None:
    preferences, rewards = torch.rand(10, 3).double(), torch.rand(10, 3).double()
    low, high = torch.tensor([-5.0, 0.0, 100.0]).double(), torch.tensor([5.0, 0.01, 300.0]).double()
    stretched = low + rewards * (high - low)
    assert preference_cosine(preferences, stretched, low=low, high=high) == pytest.approx(
        preference_cosine(preferences, rewards)
    )
    assert preference_cosine([1.0, 0.0], [[3.0, 1.0]], low=1.0, high=5.0) == 1.0


def test_a_preference_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="preferences must weigh at least one attribute in every row"):
        preference_cosine([[1.0, 0.0], [0.0, 0.0]], torch.ones(2, 2))


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (0.0, [1.0, -1.0]), (0.0, float("inf"))])
def test_an_empty_or_endless_range_is_refused(low: object, high: object) -> None:
    with pytest.raises(ValueError, match="high must be finite and above low"):
        preference_cosine([1.0, 0.0], torch.ones(2, 2), low=low, high=high)


def test_a_range_for_other_attributes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"low must be a number or have shape \(2,\)"):
        preference_cosine([1.0, 0.0], torch.ones(2, 2), low=[0.0, 0.0, 0.0])
