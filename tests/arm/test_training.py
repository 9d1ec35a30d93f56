"""Preferences, pairs, loss, and a small training run."""

import math

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from prosocial_ext.arm import (
    ArmTrainingConfig,
    PBLoraConfig,
    PreferencePair,
    as_matrix,
    collate,
    pair_accuracy,
    pairwise_loss,
    sample_dirichlet,
    sequence_logprobs,
    train_arm,
)
from tests.asserts import assert_same_bits

NAMES = ["even", "odd"]


def test_preferences_by_name_and_by_row():
    assert as_matrix({"b": 0.5}, ["a", "b"]).tolist() == [0.0, 0.5]
    assert as_matrix([{"b": 1.0}, {}], ["a", "b"]).tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert as_matrix(torch.tensor([1, 2]), ["a", "b"]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("preference", "error", "words"),
    [
        ({"c": 1.0}, ValueError, "preference must name attributes among aa, b, got 'c'"),
        (torch.ones(3), ValueError, "preference must have shape"),
        ({"b": math.nan}, ValueError, "preference must be finite"),
        ("b", TypeError, "preference must be a dict"),
        ([0.5, 0.5], TypeError, "preference must be a dict"),
    ],
    ids=["unknown", "shape", "nan", "string", "positional"],
)
def test_bad_preferences_are_refused(preference, error, words):
    with pytest.raises(error, match=words):
        as_matrix(preference, ["aa", "b"])


def test_dirichlet_draws_lie_on_the_simplex_and_repeat():
    draws = sample_dirichlet(2000, 5, 0.5, seed=3)
    torch.testing.assert_close(draws.sum(1), torch.ones(2000))
    assert (draws >= 0).all()
    assert (draws.mean(0) - 0.2).abs().max() < 0.03
    assert_same_bits(draws, sample_dirichlet(2000, 5, 0.5, seed=3))


def test_a_batch_scores_the_response_alone():
    batch = collate([PreferencePair([1, 2], [3, 4, 5], [6]), PreferencePair([1], [7], [8, 9])], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 7, 0, 0, 0], [1, 2, 6, 0, 0], [1, 8, 9, 0, 0]]
    assert batch["labels"].tolist()[1] == [-100, 7, -100, -100, -100]
    logits = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(0))
    table = logits.log_softmax(-1)
    expected = [
        table[0, 1, 3] + table[0, 2, 4] + table[0, 3, 5],
        table[1, 0, 7],
        table[2, 1, 6],
        table[3, 0, 8] + table[3, 1, 9],
    ]
    torch.testing.assert_close(sequence_logprobs(logits, batch["labels"]), torch.stack(expected))


def test_empty_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs must hold at least one pair"):
        collate([], 0)
    with pytest.raises(ValueError, match=r"pairs\[0\] must have a prompt and two responses"):
        collate([PreferencePair([1], [2], [])], 0)


def test_swapping_the_responses_flips_the_margin():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    margin = pairwise_loss(chosen, rejected, 0.7) - pairwise_loss(rejected, chosen, 0.7)
    torch.testing.assert_close(margin, -0.7 * (chosen - rejected).mean())


def test_a_vanishing_beta_gives_log_2():
    loss = pairwise_loss(torch.tensor([5.0]), torch.tensor([-5.0]), 1e-9)
    assert abs(float(loss) - math.log(2)) < 1e-6
    with pytest.raises(ValueError, match="beta_r must be > 0, got 0"):
        pairwise_loss(torch.zeros(1), torch.zeros(1), 0)


def test_the_loss_is_dpo_with_a_constant_reference():
    chosen, rejected, reference = torch.tensor([1.0]), torch.tensor([0.5]), 3.0
    dpo = -torch.nn.functional.logsigmoid(0.1 * ((chosen - reference) - (rejected - reference)))
    torch.testing.assert_close(pairwise_loss(chosen, rejected, 0.1), dpo.mean())


def test_a_weight_scales_its_pair():
    chosen, rejected = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])
    weighted = pairwise_loss(chosen, rejected, 1.0, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(weighted, pairwise_loss(chosen[:1], rejected[:1], 1.0) / 2)


def pairs(even, count=60):
    """The response is two tokens of one parity or the other."""
    generator = torch.Generator().manual_seed(int(even))

    def tokens(parity):
        return (torch.randint(2, 10, (2,), generator=generator) * 2 + parity).tolist()

    return [PreferencePair([1], tokens(1 - int(even)), tokens(int(even))) for _ in range(count)]


def arm():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=22, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return get_peft_model(
        LlamaForCausalLM(config), PBLoraConfig(attributes=NAMES, target_modules="all-linear", lora_dropout=0.0)
    )


DATA = {"even": pairs(True), "odd": pairs(False)}


@pytest.mark.parametrize(
    ("surgery", "preference_per"),
    [
        ("pcgrad", "row"),
        ("none", "row"),
        ("pcgrad", "step"),
        ("none", "step"),
        ("pcgrad_active", "step"),
        ("unit_norm", "step"),
    ],
)
def test_training_teaches_each_attribute_its_own_pairs(surgery, preference_per):
    model = arm()
    before = [pair_accuracy(model, DATA[name], {name: 1.0}, pad_token_id=0) for name in NAMES]
    config = ArmTrainingConfig(
        steps=60, pairs_per_attribute=8, lr=2e-2, beta_r=1.0, warmup=5, surgery=surgery, preference_per=preference_per
    )
    log = train_arm(model, DATA, config, pad_token_id=0, progress=False)
    after = [log.pair_accuracy[name] for name in NAMES]
    assert sum(after) > sum(before) + 0.3
    assert min(after) > 0.7  # the two attributes want opposite things: only conditioning can serve both
    assert len(log.loss) == len(log.conflicts) == len(log.cosine_after) == 60
    assert sum(log.conflicts) > 0


def test_training_is_the_same_for_the_same_seed():
    runs = []
    for _ in range(2):
        model = arm()
        log = train_arm(model, DATA, ArmTrainingConfig(steps=5, lr=1e-2, warmup=1), pad_token_id=0, progress=False)
        runs.append((log, [p.detach().clone() for n, p in model.named_parameters() if "pblora" in n]))
    assert runs[0][0] == runs[1][0]
    for first, second in zip(runs[0][1], runs[1][1], strict=True):
        assert_same_bits(first, second)


def test_the_base_stays_frozen():
    model = arm()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "pblora" not in n}
    train_arm(model, DATA, ArmTrainingConfig(steps=2), pad_token_id=0, progress=False)
    for name, parameter in model.named_parameters():
        if name in before:
            assert_same_bits(parameter.detach(), before[name], name)


def test_datasets_must_match_the_attributes():
    with pytest.raises(ValueError, match="datasets must have pairs for each of even, odd"):
        train_arm(arm(), {"even": DATA["even"]}, ArmTrainingConfig(steps=1), pad_token_id=0)


def test_no_step_may_be_left_without_attributes():
    config = ArmTrainingConfig(steps=1, surgery="pcgrad_active", preference_per="step", active=0.5)
    with pytest.raises(ValueError, match=r"active must be in \[0, 1/k\) = \[0, 0.5\), got 0.5"):
        train_arm(arm(), DATA, config, pad_token_id=0, progress=False)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"surgery": "knife"}, "surgery must be one of"),
        ({"preference_per": "day"}, "preference_per must be one of"),
        ({"surgery": "unit_norm"}, 'preference_per must be "step" with surgery="unit_norm"'),
        ({"surgery": "pcgrad_active"}, 'preference_per must be "step" with surgery="pcgrad_active"'),
        ({"steps": 0}, "steps must be an int >= 1"),
        ({"pairs_per_attribute": 0}, "pairs_per_attribute must be an int >= 1"),
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        ArmTrainingConfig(**kwargs)
