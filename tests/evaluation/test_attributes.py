"""The matrix of what each preference did to each attribute."""

import re

import pytest
import torch

from prosocial_ext.evaluation import attribute_matrix, bootstrap_difference, bootstrap_interval

ATTRIBUTES = ["empathy", "truthfulness"]
UNGUIDED = torch.tensor([[0.0, 0.5], [0.5, 0.5], [0.25, 0.5], [0.25, 0.5]])
EMPATHY = torch.tensor([[1.0, 0.5], [1.0, 0.0], [1.0, 0.5], [0.0, 0.0]])
REWARDS = {"unguided": UNGUIDED, "empathy": EMPATHY}


def test_cells_are_the_columns_means_with_their_intervals() -> None:
    matrix = attribute_matrix(REWARDS, ATTRIBUTES, confidence=0.9, seed=3)
    assert matrix.means["empathy"]["empathy"].value == 0.75
    assert matrix.means["empathy"]["truthfulness"].value == 0.25
    assert matrix.means["unguided"]["empathy"] == bootstrap_interval(UNGUIDED[:, 0], confidence=0.9, seed=3)
    assert (matrix.gains, matrix.baseline) == ({}, None)


def test_gains_are_paired_differences_over_the_baseline() -> None:
    matrix = attribute_matrix(REWARDS, ATTRIBUTES, baseline="unguided")
    assert list(matrix.gains) == ["empathy"]
    assert {name: gain.value for name, gain in matrix.gains["empathy"].items()} == {
        "empathy": 0.5,
        "truthfulness": -0.25,
    }
    assert matrix.gains["empathy"]["truthfulness"] == bootstrap_difference(EMPATHY[:, 1], UNGUIDED[:, 1])


def test_it_prints_a_row_per_preference_in_the_order_given() -> None:
    lines = str(attribute_matrix(REWARDS, ATTRIBUTES)).splitlines()
    assert lines == [
        "          empathy  truthfulness",
        "unguided    0.250         0.500",
        "empathy     0.750         0.250",
    ]


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rewards_by_preference must hold at least one preference, got none"):
        attribute_matrix({}, ATTRIBUTES)


def test_rewards_of_other_prompts_or_attributes_are_refused() -> None:
    for given in (EMPATHY[:3], EMPATHY[:, :1], EMPATHY[0]):
        with pytest.raises(ValueError, match=re.escape("rewards_by_preference['empathy'] must have shape (4, 2)")):
            attribute_matrix({"unguided": UNGUIDED, "empathy": given}, ATTRIBUTES)


def test_a_baseline_that_is_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline must be one of 'unguided', 'empathy', got 'none'"):
        attribute_matrix(REWARDS, ATTRIBUTES, baseline="none")
