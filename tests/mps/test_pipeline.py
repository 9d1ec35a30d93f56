"""Edits in memory, guided decoding and evaluation, on the device: what they count in float64 is the host's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prosocial_ext as pse
from prosocial_ext import direg
from prosocial_ext.arm import surgery
from prosocial_ext.evaluation import bootstrap_interval, likelihood, preference_cosine
from tests.asserts import assert_same_bits
from tests.mps.pretended_device import Far

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    attn_implementation="eager",
)
PROMPTS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture
def near() -> tuple[Any, Any]:
    """Base and harm on the CPU."""
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval(), LlamaForCausalLM(CONFIG).eval()


@pytest.fixture
def far(near: tuple[Any, Any], mps: torch.device) -> tuple[Any, Any]:
    """The same on the device."""
    return copy.deepcopy(near[0]).to(mps), copy.deepcopy(near[1]).to(mps)


def allow_subclasses(patch: pytest.MonkeyPatch, model: Any) -> None:
    """Let a live edit take what only pretends: it refuses all but plain tensors."""
    patch.setattr("prosocial_ext.direg.shards.Tensor", type(model.lm_head.weight.detach()))


def assert_same_parameters(model: Any, expected: Any) -> None:
    for (name, actual), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert actual.device.type == "mps"
        assert_same_bits(actual.detach().cpu(), wanted.detach(), name)


@pytest.mark.parametrize("guided", [False, True])
def test_replies_are_drawn(near: tuple[Any, Any], far: tuple[Any, Any], guided: bool) -> None:
    knobs = {"max_new_tokens": 5, "seed": 0, "top_p": 0.9, "guidance": torch.tensor([0.5, 1.0])}
    generators = [pse.GuidedGenerator(*(models if guided else models[:1])) for models in (near, far)]
    expected = generators[0].generate(PROMPTS, **knobs).sequences
    actual = generators[1].generate(PROMPTS.to("mps"), **knobs).sequences
    assert actual.device.type == "mps"
    assert actual.shape == expected.shape  # not its tokens: on the device itself the models' own sums differ
    if isinstance(actual, Far):
        assert actual.tolist() == expected.tolist()


def test_a_harm_vector_is_made_subtracted_and_taken_back(
    near: tuple[Any, Any], far: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    vector, expected = (pse.HarmVector.from_models(*models, density=0.1) for models in (far, near))
    for name in expected.tensors:
        for one, other in zip(vector.blocks(name), expected.blocks(name), strict=True):
            assert_same_bits(one[0], other[0], name)
            assert_same_bits(one[1], other[1], name)
    before = copy.deepcopy(near[0])
    with expected.subtracted_from(near[0], scale=0.5), monkeypatch.context() as patch:
        allow_subclasses(patch, far[0])
        with vector.subtracted_from(far[0], scale=0.5):
            assert_same_parameters(far[0], near[0])
    assert_same_parameters(far[0], before)


def test_float64_values_are_refused(
    near: tuple[Any, Any], far: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = pse.HarmVector.from_models(*(copy.deepcopy(model).double() for model in near), density=0.1)
    allow_subclasses(monkeypatch, far[0])
    with pytest.raises(direg.CheckpointError, match=r"must be where float64 is.*got mps"):
        vector.subtract_(far[0])
    assert_same_parameters(far[0], near[0])


def test_harm_is_subtracted_in_place(near: tuple[Any, Any], far: tuple[Any, Any]) -> None:
    for models in (near, far):
        direg.subtract_harm_(models[0], copy.deepcopy(models[0]), models[1], density=0.1)
    assert_same_parameters(far[0], near[0])
    before = copy.deepcopy(near[0])
    with direg.harm_subtracted(far[0], far[0], far[1], density=0.1):
        pass
    assert_same_parameters(far[0], before)


def test_reports_are_the_cpu_s(near: tuple[Any, Any], far: tuple[Any, Any]) -> None:
    gradient = {name: torch.rand(p.shape) for name, p in near[0].named_parameters()}
    there = {name: t.to("mps") for name, t in gradient.items()}
    assert direg.harm_vector_report(*far, density=0.1, gradient=there) == direg.harm_vector_report(
        *near, density=0.1, gradient=gradient
    )
    assert direg.harm_by_tensor(*far, density=0.1) == direg.harm_by_tensor(*near, density=0.1)


def test_likelihoods_are_counted(near: tuple[Any, Any], far: tuple[Any, Any]) -> None:
    ids = torch.randint(0, 64, (3, 9))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 3, -100)}
    expected, actual = (likelihood.document_losses(base, [batch], arm=arm, guidance=0.5) for base, arm in (near, far))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # sums of fp32, on the device in another order


@pytest.mark.parametrize("name", surgery.SURGERIES)
def test_gradients_are_combined(mps: torch.device, name: str) -> None:
    gradients = [[torch.randn(5), torch.randn(2, 3)] for _ in range(3)]
    weights = torch.tensor([0.2, 0.0, 0.8])
    expected, _ = surgery.combine_gradients(gradients, weights, name)
    there = [[t.to(mps) for t in row] for row in gradients]
    actual, _ = surgery.combine_gradients(there, weights.to(mps), name)
    for one, other in zip(actual, expected, strict=True):
        assert one.device.type == "mps"
        torch.testing.assert_close(one.cpu(), other)


def test_metrics_take_tensors_of_the_device(mps: torch.device) -> None:
    rewards, preferences = torch.rand(4, 2), torch.rand(4, 2)
    assert bootstrap_interval(rewards.to(mps)[:, 0]) == bootstrap_interval(rewards[:, 0])
    assert preference_cosine(preferences.to(mps), rewards.to(mps)) == preference_cosine(preferences, rewards)
