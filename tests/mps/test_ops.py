"""The ops give MPS tensors the CPU's results, where MPS lacks float64 and its pointers are handles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prosocial_ext import ops
from prosocial_ext.ops import sampling
from tests.asserts import assert_same_bits


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    """Both run on the host here."""
    with ops.backend(request.param):
        yield


def same(actual: torch.Tensor, expected: torch.Tensor, device: torch.device) -> None:
    assert actual.device.type == device.type
    assert_same_bits(actual.cpu(), expected)


def test_the_device_is_as_strict_as_mps(mps: torch.device) -> None:
    here = torch.ones(3, device=mps)
    with pytest.raises(TypeError, match="float64"):
        here.double()
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, dtype=torch.float64, device=mps)
    with pytest.raises(RuntimeError, match="same device"):
        here + torch.ones(3)
    assert (here + 1).cpu().tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "guidance": -0.3},
        {"temperature": torch.tensor([0.5, 0.0, 1.0, 2.0]), "top_p": torch.tensor([0.5, 1.0, 0.9, 0.1])},
        {"guidance": torch.tensor([0.0, 0.1, 1.0, 3.0], dtype=torch.float64), "seed": torch.arange(4)},
        {"return_logprobs": True, "vocab_size": 90},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_draws_the_cpu_s_tokens(mps: torch.device, dtype: torch.dtype, knobs: dict[str, Any]) -> None:
    base, guide = (3 * torch.randn(2, 4, 100)).to(dtype)
    knobs = {"seed": 3, "offset": 5, **knobs}
    expected = ops.guided_sample(base, guide, **knobs)
    knobs = {name: x.to(mps) if torch.is_tensor(x) and x.dtype != torch.float64 else x for name, x in knobs.items()}
    actual = ops.guided_sample(base.to(mps), guide.to(mps), **knobs)
    pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    for one, other in pairs:
        same(one, other, mps)


def test_several_guides_and_their_logprobs(mps: torch.device) -> None:
    base, guides, strength = torch.randn(3, 40), torch.randn(2, 3, 40), torch.tensor([0.5, -1.0])
    guides[0, 1, 7] = -torch.inf
    knobs = {"guidance": strength, "temperature": torch.tensor([1.0, 0.5, 2.0])}
    expected = ops.guided_logprobs(base, guides, **knobs)
    there = {name: value.to(mps) for name, value in knobs.items()}
    same(ops.guided_logprobs(base.to(mps), guides.to(mps), **there), expected, mps)


def test_the_gradient_of_logprobs(mps: torch.device) -> None:
    """By its formula: autograd's engine asks for a device that is there."""
    base, guides, knobs = torch.randn(3, 40), torch.randn(2, 3, 40), torch.rand(3, 3) + 0.5
    seen = []
    for move in (lambda t: t, lambda t: t.to(mps)):
        given = [move(t) for t in (base, guides, knobs)]
        out = ops.guided_logprobs(given[0], given[1], guidance=given[2][:, 1:], temperature=given[2][:, 0])
        ctx = SimpleNamespace(needs_input_grad=(True, True), save_for_backward=lambda *tensors: seen.append(tensors))
        sampling._logprobs_context(ctx, (*given[:2], given[2][:, 0], given[2][:, 1:], 40), out)
        ctx.saved_tensors = seen[-1]
        seen.append(sampling._logprobs_gradient(ctx, move(base + 1.0))[:2])
    for expected, actual in zip(seen[1], seen[3], strict=True):
        same(actual, expected, mps)


def test_bad_logits_are_refused_as_on_the_cpu(mps: torch.device) -> None:
    base = torch.randn(2, 10)
    base[1, 3] = torch.nan
    with pytest.raises(ValueError) as expected:
        ops.guided_sample(base)
    with pytest.raises(ValueError) as actual:
        ops.guided_sample(base.to(mps))
    assert str(actual.value) == str(expected.value)


def models(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    base = [torch.randn(50, 40).to(dtype), torch.randn(7).to(dtype), torch.randn(30, 20).to(dtype)]
    return base, [(t.float() + 0.01 * torch.randn(t.shape)).to(dtype) for t in base]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_an_edit_and_its_undo(mps: torch.device, dtype: torch.dtype, scope: str) -> None:
    base, tuned = models(dtype)
    expected = [t.clone() for t in base]
    edit = ops.topm_subtract_(expected, base, tuned, density=0.1, scale=0.7, scope=scope, undo=True)
    params, far_base, far_tuned = ([t.to(mps) for t in tensors] for tensors in (base, base, tuned))
    versions = [p._version for p in params]
    far = ops.topm_subtract_(params, far_base, far_tuned, density=0.1, scale=0.7, scope=scope, undo=True)
    for param, wanted in zip(params, expected, strict=True):
        same(param, wanted, mps)
    for field in ("threshold", "kept", "unchanged", "nonfinite"):
        same(getattr(far, field), getattr(edit, field), mps)
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    far.revert_(params)
    for param, before in zip(params, base, strict=True):
        same(param, before, mps)


def test_params_that_are_base_or_strided_are_edited(mps: torch.device) -> None:
    base, tuned = torch.randn(20, 30), torch.randn(20, 30)
    expected = base.clone()
    ops.topm_subtract_(expected.T, base.T.clone(), tuned.T, m=50)
    param = base.to(mps)
    ops.topm_subtract_(param.T, param.T, tuned.to(mps).T, m=50)
    same(param, expected, mps)


def test_memory_that_is_shared_is_refused_and_neighbours_are_not(mps: torch.device) -> None:
    flat, tuned = torch.randn(100).to(mps), torch.randn(60).to(mps)
    with pytest.raises(ValueError, match=r"params\[0\] must not share memory with params\[1\]"):
        ops.topm_subtract_([flat[:60], flat[40:]], [tuned, tuned], [tuned, tuned], m=3)
    halves = [flat[:50], flat[50:]]
    ops.topm_subtract_(halves, [tuned[:50].clone(), tuned[:50].clone()], [tuned[:50], tuned[10:]], m=3)


def test_nothing_is_written_where_a_delta_is_bad(mps: torch.device) -> None:
    base, tuned = models(torch.bfloat16)
    tuned[2][3, 3] = torch.inf
    params = [t.to(mps) for t in base]
    with pytest.raises(ValueError, match=r"tuned\[2\]"):
        ops.topm_subtract_(params, [t.to(mps) for t in base], [t.to(mps) for t in tuned], m=3)
    for param, before in zip(params, base, strict=True):
        same(param, before, mps)


def test_entries_are_selected_and_subtracted(mps: torch.device) -> None:
    base, tuned = models(torch.bfloat16)
    expected = ops.topm_select(base, tuned, m=99)
    delta = ops.topm_select([t.to(mps) for t in base], [t.to(mps) for t in tuned], m=99)
    for field in ("indices", "values", "counts", "threshold"):
        same(getattr(delta, field), getattr(expected, field), mps)
    params = [t.to(mps) for t in base]
    edit = ops.sparse_subtract_(params, delta, scale=2.0, undo=True)
    ops.sparse_subtract_(wanted := [t.clone() for t in base], expected, scale=2.0)
    for param, t in zip(params, wanted, strict=True):
        same(param, t, mps)
    edit.revert_(params)
    for param, t in zip(params, base, strict=True):
        same(param, t, mps)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"weights": [0.1, 0.2, 0.3, 0.0, 0.4], "order": "fixed"},
        {"weights": torch.rand(5), "reduction": "mean", "order": torch.stack([torch.randperm(5) for _ in range(5)])},
    ],
)
def test_conflicts_are_projected(mps: torch.device, knobs: dict[str, Any]) -> None:
    grads = torch.randn(5, 300)
    expected, found = ops.project_conflicts(grads, return_stats=True, **knobs)
    knobs = {name: value.to(mps) if torch.is_tensor(value) else value for name, value in knobs.items()}
    far = grads.to(mps)
    actual, stats = ops.project_conflicts(far, return_stats=True, **knobs)
    same(actual, expected, mps)
    for field, device in (("cosines", "cpu"), ("cosines_after", "cpu"), ("conflicts", "mps"), ("finite", "mps")):
        same(getattr(stats, field), getattr(found, field), torch.device(device))  # float64 stays on the host
    lists = ops.project_conflicts([[row[:100], row[100:]] for row in far], **knobs)
    same(torch.cat(lists), expected, mps)
    assert_same_bits(ops.gradient_gram(far), ops.gradient_gram(grads))


def test_a_gradient_that_is_not_finite_is_refused_as_on_the_cpu(mps: torch.device) -> None:
    grads = torch.randn(3, 10)
    grads[1, 4] = torch.inf
    with pytest.raises(ValueError, match=r"grads\[1\] must be finite"):
        ops.project_conflicts(grads.to(mps))
