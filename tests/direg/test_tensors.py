"""Where a harm vector sits: shares per parameter that add up to the report on the whole."""

import pytest
import torch

from prosocial_ext.direg import harm_by_tensor, harm_vector_report


def models():
    torch.manual_seed(0)
    base, tuned = (torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4, bias=False)) for _ in range(2))
    return base, tuned


@pytest.mark.parametrize("ranked", [False, True], ids=["by size", "by importance"])
def test_the_shares_add_up_to_the_report(ranked):
    base, tuned = models()
    importance = {n: torch.rand(p.shape) for n, p in base.named_parameters()} if ranked else None
    report = harm_vector_report(base, tuned, density=0.3, importance=importance)
    shares = harm_by_tensor(base, tuned, density=0.3, importance=importance)
    assert list(shares) == ["0.bias", "0.weight", "1.weight"]
    assert sum(share.entries for share in shares.values()) == report.entries
    assert sum(share.selected for share in shares.values()) == report.selected
    assert sum(share.energy for share in shares.values()) == pytest.approx(1.0)
    assert sum(share.selected_energy for share in shares.values()) == pytest.approx(report.energy)


def test_a_parameter_that_did_not_move_has_no_share():
    base, tuned = models()
    with torch.no_grad():
        tuned[1].weight.copy_(base[1].weight)
    share = harm_by_tensor(base, tuned, density=0.1)["1.weight"]
    assert (share.entries, share.energy, share.selected, share.selected_energy) == (20, 0.0, 0, 0.0)


def test_no_difference_has_no_energy():
    base, _ = models()
    assert all(share.energy == 0.0 for share in harm_by_tensor(base, base.state_dict()).values())


def test_models_of_other_shapes_are_refused():
    base, _ = models()
    with pytest.raises(ValueError, match="tuned must have the model's parameter names"):
        harm_by_tensor(base, torch.nn.Linear(6, 5))
