"""What guided generation refuses: one test per mistake; the text names argument, value and remedy."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prosocial_ext.decoding import GuidedGenerator, row_seeds
from tests.decoding.models import BOS, PAD, VOCAB, PreferenceArm, model, tokenizer

PROMPTS = [[BOS, 5], [BOS, 6]]


@pytest.fixture(scope="module")
def base() -> Any:
    return model("llama", seed=1)


@pytest.fixture(scope="module")
def arm() -> Any:
    return model("llama", seed=2)


@pytest.fixture(scope="module")
def steered(arm: Any) -> PreferenceArm:
    return PreferenceArm(arm)


# ---- prompts


def test_strings_without_a_tokenizer(base: Any) -> None:
    with pytest.raises(TypeError, match=r"prompt 0 must be token ids without a tokenizer.*Pass tokenizer="):
        GuidedGenerator(base).generate(["hello"])


def test_no_prompts(base: Any) -> None:
    with pytest.raises(ValueError, match="prompts must hold at least one prompt, got none"):
        GuidedGenerator(base).generate([])


def test_an_empty_prompt(base: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 must have at least one token, got none. Begin it with .* BOS"):
        GuidedGenerator(base).generate([[BOS], []])


@pytest.mark.parametrize("prompts", [7, {1: 2}, None], ids=["int", "dict", "none"])
def test_prompts_that_are_no_list(base: Any, prompts: Any) -> None:
    with pytest.raises(TypeError, match="prompts must be a list of strings"):
        GuidedGenerator(base).generate(prompts)


@pytest.mark.parametrize("prompt", [5, [1.5], [True], [None]], ids=["bare_id", "float", "bool", "none"])
def test_a_prompt_that_is_no_list_of_ids(base: Any, prompt: Any) -> None:
    with pytest.raises(TypeError, match="prompt 1 must be a string or a list of token ids"):
        GuidedGenerator(base).generate([[BOS], prompt])


@pytest.mark.parametrize(
    "ids", [torch.ones(3, dtype=torch.int64), torch.ones(2, 3), torch.ones(2, 3) == 1, torch.ones(2, 0).long()],
    ids=["one_dimension", "float", "bool", "no_columns"],
)  # fmt: skip
def test_a_tensor_of_another_shape_or_dtype(base: Any, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"prompts must be .* an integer tensor \[B, S\] with B, S >= 1"):
        GuidedGenerator(base).generate(ids)


@pytest.mark.parametrize("token", [-1, VOCAB], ids=["below", "above"])
def test_a_token_that_the_model_does_not_have(base: Any, token: int) -> None:
    with pytest.raises(ValueError, match=rf"prompts must hold token ids of the model, in \[0, {VOCAB}\), got {token}"):
        GuidedGenerator(base).generate([[BOS, token]])


def test_a_token_that_the_arm_does_not_have(base: Any) -> None:
    narrow = model("llama", seed=2, vocab=30)
    with pytest.raises(ValueError, match=r"prompts must hold token ids of the arm, in \[0, 30\), got 40"):
        GuidedGenerator(base, narrow, vocab_size=30).generate([[BOS, 40]], max_new_tokens=4)


def test_a_mask_beside_lists(base: Any) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must come with a tensor of input_ids.*need no mask"):
        GuidedGenerator(base).generate(PROMPTS, attention_mask=torch.ones(2, 2))


def test_a_mask_of_another_shape(base: Any) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be a tensor of shape \(2, 2\)"):
        GuidedGenerator(base).generate(torch.tensor(PROMPTS), attention_mask=torch.ones(2, 3))


@pytest.mark.parametrize("row", [[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]], ids=str)
def test_a_mask_that_is_not_left_padding(base: Any, row: list[int]) -> None:
    mask = torch.tensor([[1, 1, 1], row])
    with pytest.raises(ValueError, match=r"attention_mask\[1\] must be zeros, then ones.*padding_side = 'left'"):
        GuidedGenerator(base).generate(torch.full((2, 3), 5), attention_mask=mask)


@pytest.mark.parametrize("ids", [[[BOS, 5, 6], [PAD, BOS, 7]], [[BOS, 5, 6], [BOS, 7, PAD]]], ids=["left", "right"])
def test_padding_without_a_mask(base: Any, ids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be given with padded input_ids, got None.*prompt 1"):
        GuidedGenerator(base).generate(torch.tensor(ids))


# ---- limits and ids


@pytest.mark.parametrize("steps", [0, -1])
def test_no_tokens_to_draw(base: Any, steps: int) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens must be a count of at least 1, got {steps}"):
        GuidedGenerator(base).generate(PROMPTS, max_new_tokens=steps)


def test_more_tokens_than_the_model_has_positions(base: Any) -> None:
    GuidedGenerator(base).generate([[BOS] * 60], max_new_tokens=5, eos_token_id=[])  # the last is drawn, not read
    with pytest.raises(ValueError, match=r"max_new_tokens must fit the 64 positions of the model after .* 60 tokens"):
        GuidedGenerator(base).generate([[BOS] * 60], max_new_tokens=6)


def test_more_tokens_than_the_arm_has_positions(base: Any) -> None:
    short = model("gpt2", n_positions=16)
    with pytest.raises(ValueError, match="max_new_tokens must fit the 16 positions of the arm"):
        GuidedGenerator(base, short).generate(PROMPTS, max_new_tokens=16)


@pytest.mark.parametrize(("eos", "error"), [(-1, ValueError), ([2, "3"], TypeError)], ids=["negative", "string"])
def test_an_eos_that_is_no_token_id(base: Any, eos: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="eos_token_id must be a token id >= 0, or a list of them"):
        GuidedGenerator(base).generate(PROMPTS, eos_token_id=eos)


def test_a_padding_that_is_no_token_id(base: Any) -> None:
    with pytest.raises(ValueError, match="pad_token_id must be a token id >= 0, got -100"):
        GuidedGenerator(base).generate(PROMPTS, pad_token_id=-100)


# ---- sampling parameters: refused before a model runs


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("guidance", float("nan"), ValueError),
        ("guidance", torch.ones(3), ValueError),
        ("temperature", -1.0, ValueError),
        ("temperature", torch.ones(3), ValueError),
        ("top_k", -1, ValueError),
        ("top_k", 1.5, TypeError),
        ("top_p", 1.5, ValueError),
        ("min_p", -0.1, ValueError),
        ("seed", -1, ValueError),
        ("seed", 0.5, TypeError),
        ("seed", torch.tensor([-1, 0]), ValueError),
        ("seed", torch.tensor([1.0, 0.0]), TypeError),
        ("seed", torch.tensor(3), ValueError),
        ("seed", torch.arange(3), ValueError),
    ],
)
def test_a_sampling_parameter_out_of_range(
    base: Any, arm: Any, name: str, value: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    for lm in (base, arm):
        monkeypatch.setattr(lm, "forward", lambda *_, **__: pytest.fail("a model ran"))
    with pytest.raises(error, match=f"^{name} must"):
        GuidedGenerator(base, arm).generate(PROMPTS, **{name: value})


def test_row_seeds_of_a_negative_count() -> None:
    with pytest.raises(ValueError, match="rows must be a count >= 0, got -1"):
        row_seeds(0, -1)


# ---- preferences


def test_no_preference_for_an_arm_that_is_conditioned_on_one(base: Any, steered: PreferenceArm) -> None:
    with pytest.raises(ValueError, match=r"preference must be given, since the arm is conditioned on it.*'empathy'"):
        GuidedGenerator(base, steered).generate(PROMPTS)


@pytest.mark.parametrize("given", [[{"empathy": 1.0}], torch.ones(3, 3)], ids=["list", "tensor"])
def test_preferences_of_another_number_of_rows(base: Any, steered: PreferenceArm, given: Any) -> None:
    with pytest.raises(ValueError, match="preference must have 2 rows, one per prompt"):
        GuidedGenerator(base, steered).generate(PROMPTS, preference=given)


def test_a_preference_for_an_arm_that_takes_none(base: Any, arm: Any) -> None:
    with pytest.raises(ValueError, match="preference must be None, since the arm takes none"):
        GuidedGenerator(base, arm).generate(PROMPTS, preference={"empathy": 1.0})


def test_a_preference_without_an_arm(base: Any) -> None:
    with pytest.raises(ValueError, match="preference must be None without an arm"):
        GuidedGenerator(base).generate(PROMPTS, preference={"empathy": 1.0})


# ---- models


def test_heads_of_different_widths(base: Any) -> None:
    wide = model("llama", vocab=VOCAB + 16)
    remedy = f"pass the tokenizer or vocab_size={VOCAB}"
    with pytest.raises(
        ValueError, match=rf"the arm must have {VOCAB} logits per position.* got {VOCAB + 16}.*{remedy}"
    ):
        GuidedGenerator(base, wide)


@pytest.mark.parametrize("vocab_size", [0, VOCAB + 1])
def test_a_vocab_size_beyond_the_heads(base: Any, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size must be in \[1, {VOCAB}\].*got {vocab_size}"):
        GuidedGenerator(base, vocab_size=vocab_size)


def test_a_model_that_does_not_fill_the_cache() -> None:
    class Forgetful(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCAB))

    with pytest.raises(ValueError, match=r"model must fill the cache .* got 0 of 2 tokens. Switch gradient checkpoint"):
        GuidedGenerator(Forgetful()).generate(PROMPTS)


def test_logits_that_are_nan(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.lm_head, "weight", torch.nn.Parameter(base.lm_head.weight * float("nan")))
    with pytest.raises(ValueError, match="the combined logit of row 0, token 0, must be finite"):
        GuidedGenerator(base).generate(PROMPTS, max_new_tokens=4)


def test_modes_come_back_after_an_error(steered: PreferenceArm) -> None:
    base = model("llama").train()
    with pytest.raises(ValueError, match="must hold token ids"):
        GuidedGenerator(base, steered).generate([[VOCAB]], preference={}, max_new_tokens=2)
    assert all(module.training for module in base.modules())


def test_text_whose_tokens_the_model_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"prompts must hold token ids of the model, in \[0, 10\), got 44"):
        GuidedGenerator(model("llama", vocab=10), tokenizer=tokenizer()).generate(["w40"])
