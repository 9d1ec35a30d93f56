"""What becomes of gradients that pull against each other: known answers in two dimensions."""

import pytest
import torch

from prosocial_ext.arm.surgery import combine_gradients

EAST = [torch.tensor([4.0]), torch.tensor([[0.0]])]  # two tensors each, as parameters are
NORTH_WEST = [torch.tensor([-1.0]), torch.tensor([[1.0]])]
NORTH = [torch.tensor([0.0]), torch.tensor([[2.0]])]


def combined(gradients, weights, surgery, **kwargs):
    weights = None if weights is None else torch.tensor(weights)
    update, stats = combine_gradients(gradients, weights, surgery, **kwargs)
    assert [part.shape for part in update] == [part.shape for part in gradients[0]]
    return torch.cat([part.flatten() for part in update]), stats


@pytest.mark.parametrize(
    ("surgery", "weights", "expected"),
    [
        ("none", None, [3.0, 1.0]),
        ("none", [0.5, 0.25], [1.75, 0.25]),
        ("pcgrad", None, [2.0, 3.0]),  # east loses (-2, 2)'s opposite, north-west all of its west
        ("pcgrad", [1.0, 0.5], [2.0, 2.5]),
        ("unit_norm", None, [1 - 0.5**0.5, 0.5**0.5]),
        ("unit_norm", [0.5, 2.0], [0.5 - 2 * 0.5**0.5, 2 * 0.5**0.5]),
        ("pcgrad_active", [0.9, 0.05], [3.6, 0.0]),  # no veto, and no part
        ("pcgrad_active", [0.5, 0.5], [1.0, 1.5]),
    ],
)
def test_two_that_conflict(surgery, weights, expected):
    update, stats = combined([EAST, NORTH_WEST], weights, surgery)
    torch.testing.assert_close(update, torch.tensor(expected))
    if surgery != "pcgrad_active":
        assert int(stats.conflicts) == 1


@pytest.mark.parametrize("surgery", ["none", "pcgrad", "pcgrad_active"])
def test_two_that_do_not_conflict_are_added(surgery):
    update, stats = combined([EAST, NORTH], [0.5, 0.5], surgery)
    assert update.tolist() == [2.0, 1.0]
    assert int(stats.conflicts) == 0


def test_a_gradient_of_nothing_has_no_direction():
    zero = [torch.zeros_like(part) for part in EAST]
    assert combined([EAST, zero], None, "unit_norm")[0].tolist() == [1.0, 0.0]


def test_an_unknown_surgery_is_refused():
    with pytest.raises(ValueError, match=r"surgery must be one of .*, got 'knife'"):
        combine_gradients([EAST], None, "knife")
