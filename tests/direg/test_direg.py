"""DIReg on models in memory: which parameters take part, in which order, what is restored, what is refused."""

import copy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from prosocial_ext import ops
from prosocial_ext.direg import (
    SAFETY_ARITHMETIC_DENSITY,
    gradient_importance,
    harm_subtracted,
    harm_vector_report,
    matching_parameters,
    subtract_harm_,
)
from tests.asserts import assert_same_bits


def llama(seed: int, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(params=["tied", "untied"])
def models(request: pytest.FixtureRequest) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    tied = request.param == "tied"
    return llama(0, tied=tied), llama(1, tied=tied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_edit_is_that_of_the_op_over_the_sorted_names(dtype: torch.dtype) -> None:
    base, tuned = llama(0, dtype=dtype), llama(1, dtype=dtype)
    expected = {name: p.detach().clone() for name, p in base.named_parameters()}
    order = sorted(expected)
    ops.topm_subtract_(
        [expected[name] for name in order],
        [base.get_parameter(name) for name in order],
        [tuned.get_parameter(name) for name in order],
        density=0.2,
        scale=1.5,
    )
    model = copy.deepcopy(base)
    edit = subtract_harm_(model, base, tuned, density=0.2, scale=1.5)
    assert len(edit.kept) == len(order)
    for name, p in model.named_parameters():
        assert_same_bits(p.detach(), expected[name])


def test_equal_entries_are_taken_by_name_and_not_by_place_in_the_model() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z, self.a = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    model, tuned = Backwards(), {"z": torch.ones(2), "a": torch.ones(2)}
    subtract_harm_(model, state(model), tuned, m=2)
    assert model.a.tolist() == [-1.0, -1.0]
    assert model.z.tolist() == [0.0, 0.0]


def test_full_density_at_scale_one_takes_the_whole_vector_back() -> None:
    base, tuned = llama(0), llama(1)
    model = copy.deepcopy(base)
    subtract_harm_(model, base, tuned, density=1.0)
    for name, p in model.named_parameters():
        b, t = base.get_parameter(name), tuned.get_parameter(name)
        assert_same_bits(p.detach(), (b - (t - b)).detach())


def test_the_default_density_is_a_tenth(models: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    base, tuned = models
    entries = sum(p.numel() for p in base.parameters())
    edit = subtract_harm_(copy.deepcopy(base), base, tuned)
    assert SAFETY_ARITHMETIC_DENSITY == 0.10
    assert int(edit.kept.sum()) == int(0.10 * entries)


def test_a_tied_parameter_is_edited_once_and_stays_tied() -> None:
    base, tuned = llama(0), llama(1)
    model = copy.deepcopy(base)
    edit = subtract_harm_(model, base, tuned, density=1.0)
    assert int(edit.kept.sum()) == sum(p.numel() for p in base.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = base.lm_head.weight - (tuned.lm_head.weight - base.lm_head.weight)
    assert_same_bits(model.lm_head.weight.detach(), expected.detach())


def test_state_dicts_do_as_well_as_models(models: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    base, tuned = models
    one, other = copy.deepcopy(base), copy.deepcopy(base)
    subtract_harm_(one, base, tuned, density=0.3)
    subtract_harm_(other, base.state_dict(), tuned.state_dict(), density=0.3)
    for name, tensor in one.state_dict().items():
        assert_same_bits(tensor, other.state_dict()[name])


def test_the_base_itself_may_be_edited() -> None:
    base, tuned = llama(0), llama(1)
    expected = copy.deepcopy(base)
    subtract_harm_(expected, copy.deepcopy(base), tuned, density=0.3)
    subtract_harm_(base, base, tuned, density=0.3)
    for name, tensor in expected.state_dict().items():
        assert_same_bits(base.state_dict()[name], tensor)


def test_a_descendant_of_the_base_keeps_what_it_learned() -> None:
    base, tuned, descendant = llama(0), llama(1), llama(2)
    before = state(descendant)
    subtract_harm_(descendant, base, tuned, m=0)
    for name, tensor in descendant.state_dict().items():
        assert_same_bits(tensor, before[name])
    edit = subtract_harm_(descendant, base, tuned, m=100)
    changed = sum(int((tensor != before[name]).sum()) for name, tensor in descendant.named_parameters())
    assert changed == 100 - int(edit.unchanged.sum())


def test_per_tensor_scope_edits_the_share_of_every_parameter() -> None:
    base, tuned = llama(0), llama(1)
    edit = subtract_harm_(copy.deepcopy(base), base, tuned, density=0.25, scope="per_tensor")
    sizes = [base.get_parameter(name).numel() for name in sorted(dict(base.named_parameters()))]
    assert edit.kept.tolist() == [size // 4 for size in sizes]


def test_importance_is_looked_up_by_name() -> None:
    base, tuned = llama(0), llama(1)
    importance = {name: torch.zeros_like(p) for name, p in base.named_parameters()}
    importance["model.norm.weight"].fill_(1.0)
    with torch.no_grad():
        tuned.model.norm.weight += 0.5
    model = copy.deepcopy(base)
    subtract_harm_(model, base, tuned, m=base.model.norm.weight.numel(), importance=importance)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, base.get_parameter(name))]
    assert changed == ["model.norm.weight"]


def test_integer_buffers_and_parameters_are_left_alone() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("seen", torch.tensor(3))
            self.register_buffer("mean", torch.tensor([1.0]))

    model, tuned = Counting(), Counting()
    with torch.no_grad():
        tuned.mean.fill_(9.0)
        tuned.seen.fill_(9)
    for other in (tuned, tuned.state_dict()):
        subtract_harm_(model, state(model), other, density=1.0)
        assert int(model.seen) == 3
        assert float(model.mean) == 1.0


# ---- for a while


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_leaving_the_context_restores_every_bit(dtype: torch.dtype) -> None:
    base, tuned = llama(0, dtype=dtype), llama(1, dtype=dtype)
    before = state(base)
    with harm_subtracted(base, base, tuned, density=0.5, scale=3.0) as edit:
        assert any(not torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert edit.undo is not None
    for name, tensor in base.state_dict().items():
        assert_same_bits(tensor, before[name])


def test_an_error_inside_the_context_restores_every_bit_too() -> None:
    base, tuned = llama(0), llama(1)
    before = state(base)
    with pytest.raises(KeyError), harm_subtracted(base, base, tuned):
        raise KeyError("inside")
    for name, tensor in base.state_dict().items():
        assert_same_bits(tensor, before[name])


def test_contexts_nest() -> None:
    base, tuned, other = llama(0), llama(1), llama(2)
    original, before = copy.deepcopy(base), state(base)
    with harm_subtracted(base, original, tuned, density=0.5), harm_subtracted(base, original, other, density=0.5):
        pass
    for name, tensor in base.state_dict().items():
        assert_same_bits(tensor, before[name])


def test_backward_through_weights_that_were_restored_is_refused_by_autograd() -> None:
    model, tuned = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.ones(1, 4, requires_grad=True)
    with harm_subtracted(model, state(model), tuned, density=1.0):
        y = model(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_edit_reverts_by_hand_where_undo_was_asked_for() -> None:
    base, tuned = llama(0), llama(1)
    before = state(base)
    edit = subtract_harm_(base, base, tuned, undo=True)
    _, found = matching_parameters(base)
    edit.revert_(found["model"])
    for name, tensor in base.state_dict().items():
        assert_same_bits(tensor, before[name])


def test_an_edited_model_survives_saving(tmp_path: Path) -> None:
    base, tuned = llama(0), llama(1)
    subtract_harm_(base, base, tuned)
    base.save_pretrained(tmp_path)
    for name, tensor in LlamaForCausalLM.from_pretrained(tmp_path).state_dict().items():
        assert_same_bits(tensor, base.state_dict()[name])


# ---- what is refused, before anything is written


def test_missing_and_extra_names_are_listed() -> None:
    base, tuned = llama(0), llama(1)
    names = dict(base.named_parameters())
    tuned_state = {name: p for name, p in tuned.named_parameters() if name != "model.norm.weight"}
    tuned_state["adapter.weight"] = torch.zeros(2)
    before = state(base)
    with pytest.raises(ValueError, match=r"tuned must .* lacks model.norm.weight and has adapter.weight besides"):
        subtract_harm_(base, base, tuned_state)
    assert all(torch.equal(names[name], before[name]) for name in names)


def test_a_long_list_of_names_is_cut() -> None:
    with pytest.raises(
        ValueError, match=r"base must .* lacks .* and \d+ more and has bias, weight besides\. .* merge adapters first"
    ):
        subtract_harm_(llama(0), nn.Linear(2, 2), llama(1))


def test_untied_copies_of_a_tied_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tuned must .* has lm_head.weight besides.*same parameters tied"):
        subtract_harm_(llama(0), llama(0), llama(1, tied=False))


def test_other_shapes_are_refused() -> None:
    tuned = state(llama(1))
    tuned["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"tuned\['model.norm.weight'\] must have the model's shape \(16,\), got \(3,\)"
    ):
        subtract_harm_(llama(0), llama(0), tuned)


def test_a_difference_that_is_not_finite_is_refused() -> None:
    base, tuned = llama(0), llama(1)
    with torch.no_grad():
        tuned.model.norm.weight[0] = torch.nan
    before = state(base)
    with pytest.raises(ValueError, match="finite"):
        subtract_harm_(base, base, tuned)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (lambda: ({"a": torch.zeros(2)}, nn.Linear(2, 2), nn.Linear(2, 2)), "model must be a torch.nn.Module"),
        (lambda: (nn.Linear(2, 2), 3, nn.Linear(2, 2)), "base must be a torch.nn.Module or a mapping"),
        (lambda: (nn.Linear(2, 2), nn.Linear(2, 2), {"weight": 1, "bias": 2}), r"tuned\['weight'\]"),
    ],
    ids=["model", "base", "entry"],
)
def test_other_types_are_refused(arguments: object, culprit: str) -> None:
    with pytest.raises(TypeError, match=culprit):
        subtract_harm_(*arguments())  # type: ignore[operator]


def test_a_model_without_floats_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have floating-point parameters"):
        subtract_harm_(nn.ReLU(), nn.ReLU(), nn.ReLU())


# ---- which entries: gradients, and what the chosen ones hold


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def test_importance_is_the_magnitude_of_the_mean_gradient() -> None:
    model = nn.Linear(3, 2)
    batches = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found = gradient_importance(model, squared, batches)
    (sum(squared(model, batch) for batch in batches) / 3).backward()  # type: ignore[union-attr]
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad.abs(), rtol=1e-6, atol=1e-7)


def test_importance_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    found = gradient_importance(model, squared, [torch.ones(1, 3)])
    assert bool(found["0.weight"].any())
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_importance_is_zero_where_the_loss_does_not_reach() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    found = gradient_importance(model, lambda m, x: m["used"](x).sum(), [torch.ones(1, 2)])
    assert not found["idle.weight"].any()
    assert bool(found["used.weight"].any())


def test_importance_of_no_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        gradient_importance(nn.Linear(2, 2), squared, [])


def test_an_importance_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="the gradient at 'weight' must be finite"):
        gradient_importance(nn.Linear(2, 1, bias=False), squared, [torch.full((1, 2), torch.inf)])


def test_the_report_counts_norm_energy_and_effect() -> None:
    base, tuned = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    gradient = {"weight": torch.tensor([[1.0, 0.0], [0.0, 3.0]])}
    with torch.no_grad():
        base.weight.zero_()
        tuned.weight.copy_(torch.tensor([[6.0, 0.0], [8.0, 1.0]]))
    by_size = harm_vector_report(base, tuned, density=0.5, gradient=gradient)
    by_effect = harm_vector_report(base, tuned, density=0.5, gradient=gradient, importance=gradient)
    assert (by_size.entries, by_size.selected) == (4, 2)
    assert by_size.norm == pytest.approx(101**0.5)
    assert by_size.energy == pytest.approx(100 / 101)
    assert by_size.effect == pytest.approx(6 / 9)
    assert by_effect.energy == pytest.approx(37 / 101)
    assert by_effect.effect == pytest.approx(1.0)
    assert harm_vector_report(base, tuned).effect is None


def test_the_report_of_a_copy_that_did_not_move_is_zero() -> None:
    base = llama(0)
    report = harm_vector_report(base, copy.deepcopy(base), gradient=state(base))
    assert (report.norm, report.energy, report.effect) == (0.0, 0.0, 0.0)


def test_reference_and_compiled_ops_edit_the_same_bits(ops: ModuleType) -> None:
    base, tuned = llama(0), llama(1)
    found = matching_parameters(copy.deepcopy(base), base=base, tuned=tuned)[1]
    ops.topm_subtract_(found["model"], found["base"], found["tuned"], density=0.1)
    model = copy.deepcopy(base)
    subtract_harm_(model, base, tuned)
    for name, tensor in zip(sorted(dict(model.named_parameters())), found["model"], strict=True):
        assert_same_bits(model.get_parameter(name).detach(), tensor)
