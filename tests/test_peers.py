"""What the ops are timed against does the same work."""

import torch

from prosocial_ext import ops, peers


def test_gram_coefficients_project_conflicts_in_ascending_order() -> None:
    gradients = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.2
    expected, stats = ops.project_conflicts(gradients, order="fixed", return_stats=True)
    assert int(stats.conflicts) > 1
    torch.testing.assert_close(peers.gram_coefficients(gradients @ gradients.T) @ gradients, expected)
    torch.testing.assert_close(peers.pairwise_pcgrad(gradients), expected)
