"""Guided generation equals its definition: full forwards without caches, padding or batches."""

from typing import Any

import pytest
import torch

from prosocial_ext.decoding import GuidedGenerator, GuidedOutput, row_seeds
from tests.decoding import slow_loop
from tests.decoding.models import BOS, EOS, PAD, VOCAB, PreferenceArm, model, tokenizer

PROMPTS = [[BOS, 5, 6, 7, 8, 9], [BOS, 10], [BOS, 11, 12, 13], [20]]
SEEDS = row_seeds(0, len(PROMPTS)).tolist()
PAIRS = [(family, family) for family in ("llama", "gpt2", "qwen2", "mistral")] + [("llama", "gpt2"), ("gpt2", "qwen2")]


def rows(output: GuidedOutput) -> list[list[int]]:
    return [row[:length] for row, length in zip(output.sequences.tolist(), output.lengths.tolist(), strict=True)]


@pytest.fixture(scope="module")
def base() -> Any:
    return model("llama", seed=1)


@pytest.fixture(scope="module")
def arm() -> Any:
    return model("llama", seed=2)


@pytest.mark.parametrize(("of_base", "of_arm"), PAIRS, ids=map("+".join, PAIRS))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equals_full_forwards_of_every_row_alone(of_base: str, of_arm: str, temperature: float) -> None:
    base, arm = model(of_base, seed=1), model(of_arm, seed=2)
    knobs = {"guidance": 0.7, "temperature": temperature}
    output = GuidedGenerator(base, arm).generate(PROMPTS, max_new_tokens=12, eos_token_id=[], **knobs)
    assert rows(output) == slow_loop.decode(base, arm, PROMPTS, seeds=SEEDS, steps=12, **knobs)


def test_the_arm_changes_what_is_drawn(base: Any, arm: Any) -> None:
    settings = {"max_new_tokens": 12, "eos_token_id": []}
    guided = GuidedGenerator(base, arm).generate(PROMPTS, guidance=1.0, **settings)
    assert rows(guided) != rows(GuidedGenerator(base).generate(PROMPTS, **settings))


def test_every_sampling_parameter_may_differ_by_row(base: Any, arm: Any) -> None:
    knobs = {
        "guidance": [0.0, 0.5, 2.0, -0.5],
        "temperature": [1.0, 0.0, 0.7, 2.0],
        "top_k": [0, 3, 10, 5],
        "top_p": [1.0, 0.5, 0.9, 0.8],
        "min_p": [0.05, 0.0, 0.0, 0.1],
    }
    tensors = {name: torch.tensor(values) for name, values in knobs.items()}
    output = GuidedGenerator(base, arm).generate(PROMPTS, max_new_tokens=12, eos_token_id=[], **tensors)
    assert rows(output) == slow_loop.decode(base, arm, PROMPTS, seeds=SEEDS, steps=12, **knobs)


def test_another_seed_gives_another_text_and_the_same_seed_the_same(base: Any, arm: Any) -> None:
    generator, settings = GuidedGenerator(base, arm), {"max_new_tokens": 12, "eos_token_id": []}
    first, again, other = (rows(generator.generate(PROMPTS, seed=seed, **settings)) for seed in (3, 3, 4))
    assert first == again
    assert all(row != moved for row, moved in zip(first, other, strict=True))


def test_equal_prompts_in_one_batch_draw_different_texts(base: Any, arm: Any) -> None:
    drawn = rows(GuidedGenerator(base, arm).generate([PROMPTS[0]] * 3, max_new_tokens=12, eos_token_id=[]))
    assert len({tuple(row) for row in drawn}) == 3


def test_the_global_random_state_is_neither_read_nor_moved(base: Any, arm: Any) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = rows(GuidedGenerator(base, arm).generate(PROMPTS, max_new_tokens=8))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert rows(GuidedGenerator(base, arm).generate(PROMPTS, max_new_tokens=8)) == first


@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_a_row_with_its_seed_draws_alone_what_it_draws_in_any_batch(base: Any, arm: Any, row: int) -> None:
    generator, seeds = GuidedGenerator(base, arm), row_seeds(5, len(PROMPTS))
    together = generator.generate(PROMPTS, seed=5, max_new_tokens=12)
    alone = generator.generate(PROMPTS[row : row + 1], seed=seeds[row : row + 1], max_new_tokens=12)
    assert rows(alone)[0] == rows(together)[row]


def test_a_row_does_not_depend_on_the_rows_after_it(base: Any, arm: Any) -> None:
    generator = GuidedGenerator(base, arm)
    fewer = generator.generate(PROMPTS[:2], max_new_tokens=12)
    assert rows(fewer) == rows(generator.generate(PROMPTS, max_new_tokens=12))[:2]


def test_reordering_rows_with_their_seeds_reorders_texts(base: Any, arm: Any) -> None:
    generator, order = GuidedGenerator(base, arm), [2, 0, 3, 1]
    drawn = rows(generator.generate(PROMPTS, seed=torch.tensor(SEEDS), max_new_tokens=12))
    moved = generator.generate([PROMPTS[i] for i in order], seed=torch.tensor(SEEDS)[order], max_new_tokens=12)
    assert rows(moved) == [drawn[i] for i in order]


# ---- the base alone


@pytest.mark.parametrize("guidance", [0, 0.0, torch.zeros(4)], ids=["int", "float", "per_row"])
def test_guidance_0_is_the_base_alone_and_does_not_run_the_arm(base: Any, arm: Any, guidance: Any) -> None:
    handle = arm.register_forward_pre_hook(lambda *_: pytest.fail("the arm ran"))
    try:
        output = GuidedGenerator(base, arm).generate(PROMPTS, guidance=guidance, max_new_tokens=12)
    finally:
        handle.remove()
    assert rows(output) == rows(GuidedGenerator(base).generate(PROMPTS, max_new_tokens=12))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral"])
def test_the_base_at_temperature_0_is_the_greedy_generate_of_transformers(family: str) -> None:
    base = model(family, seed=3)
    prompts = torch.tensor([[PAD, PAD, BOS, 5, 6], [BOS, 7, 8, 9, 10], [PAD, BOS, 11, 12, 13]])
    mask = (prompts != PAD).long()
    theirs = base.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=16)[:, prompts.shape[1] :]
    ours = GuidedGenerator(base).generate(prompts, attention_mask=mask, temperature=0.0, max_new_tokens=16)
    assert torch.equal(ours.sequences, theirs)


def test_a_model_guided_by_itself_is_the_model_at_temperature_one_over_one_plus_guidance(base: Any) -> None:
    guided = GuidedGenerator(base, base).generate(PROMPTS, guidance=1.0, max_new_tokens=12)
    assert rows(guided) == rows(GuidedGenerator(base).generate(PROMPTS, temperature=0.5, max_new_tokens=12))


# ---- the end of a row


def ends(base: Any, eos: Any, **settings: Any) -> GuidedOutput:
    return GuidedGenerator(base).generate([[BOS, 5]] * 24, eos_token_id=eos, max_new_tokens=24, **settings)


@pytest.mark.parametrize("eos", [(4,), (4, 9, 15)], ids=["one", "three"])
def test_a_row_ends_at_its_first_eos_and_only_there(base: Any, eos: tuple[int, ...]) -> None:
    output = ends(base, list(eos))
    prompts = [[BOS, 5]] * 24
    expected = slow_loop.decode(base, None, prompts, seeds=row_seeds(0, 24).tolist(), steps=24, eos=eos)
    assert rows(output) == expected
    assert len(set(output.lengths.tolist())) > 5  # so rows were dropped from the batch along the way
    assert {row[-1] for row in expected if len(row) < 24} == set(eos)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mistral"])
def test_unequal_prompts_that_end_at_different_steps_go_on_as_if_alone(family: str) -> None:
    base, arm, prompts, eos = model(family, seed=1), model(family, seed=2), PROMPTS * 4, (4, 9, 15, 22, 33)
    output = GuidedGenerator(base, arm).generate(prompts, eos_token_id=list(eos), max_new_tokens=20)
    seeds = row_seeds(0, 16).tolist()
    assert rows(output) == slow_loop.decode(base, arm, prompts, seeds=seeds, steps=20, eos=eos)
    assert int(output.lengths.sort().values[8]) < 20  # half of the rows have ended on the way


def test_an_eos_id_may_be_a_number(base: Any) -> None:
    assert rows(ends(base, 9)) == rows(ends(base, [9]))


def test_rows_are_padded_after_their_end_and_cut_at_the_longest(base: Any) -> None:
    output = ends(base, list(range(4, 30)), pad_token_id=33)
    after = torch.arange(output.sequences.shape[1]) >= output.lengths[:, None]
    assert after.any()
    assert (output.sequences[after] == 33).all()
    assert output.sequences.shape == (24, int(output.lengths.max()))


def test_padding_that_is_also_eos_does_not_shorten_a_row(base: Any) -> None:
    output, other = ends(base, [4, 9], pad_token_id=4), ends(base, [4, 9], pad_token_id=33)
    assert output.lengths.tolist() == other.lengths.tolist()
    assert rows(output) == rows(other)


def test_padding_is_only_written_never_read_by_the_models(base: Any) -> None:
    output = ends(base, [4, 9, 15], pad_token_id=VOCAB + 100)
    assert rows(output) == rows(ends(base, [4, 9, 15]))


def test_no_eos_runs_to_the_end(base: Any) -> None:
    output = GuidedGenerator(base).generate(PROMPTS, eos_token_id=[], max_new_tokens=30)
    assert output.lengths.tolist() == [30] * 4


def test_eos_comes_from_generation_config_then_config_then_the_tokenizer() -> None:
    base = model("llama", seed=1)
    base.generation_config.eos_token_id = [4, 9]
    assert rows(ends(base, None)) == rows(ends(base, [4, 9]))
    base.generation_config.eos_token_id = None
    assert rows(ends(base, None)) == rows(ends(base, EOS))
    base.config.eos_token_id, words = None, tokenizer()
    words.eos_token = "w3"
    settings = {"max_new_tokens": 24, "seed": 1}
    prompts = [[BOS, 5]] * 8
    told = GuidedGenerator(base, tokenizer=words).generate(prompts, **settings)
    assert rows(told) == rows(GuidedGenerator(base).generate(prompts, eos_token_id=7, **settings))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_max_new_tokens_is_the_prefix_of_a_longer_run(base: Any, arm: Any, steps: int) -> None:
    generator = GuidedGenerator(base, arm)
    short = generator.generate(PROMPTS, eos_token_id=[], max_new_tokens=steps).sequences
    assert torch.equal(short, generator.generate(PROMPTS, eos_token_id=[], max_new_tokens=9).sequences[:, :steps])


# ---- what else comes back


def test_logprobs_are_those_of_the_guided_distribution_and_0_after_the_end(base: Any, arm: Any) -> None:
    settings = {"guidance": 0.7, "max_new_tokens": 10, "eos_token_id": list(range(4, 16))}
    output = GuidedGenerator(base, arm).generate(PROMPTS, return_logprobs=True, **settings)
    assert rows(output) == rows(GuidedGenerator(base, arm).generate(PROMPTS, **settings))
    assert output.logprobs.shape == output.sequences.shape
    for row, prompt, logprobs in zip(rows(output), PROMPTS, output.logprobs, strict=True):
        ids = torch.tensor([prompt + row])
        with torch.no_grad():
            z = base(input_ids=ids).logits + 0.7 * arm(input_ids=ids).logits
        expected = z.log_softmax(-1)[0, len(prompt) - 1 : -1].gather(1, torch.tensor(row)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[: len(row)].double(), expected, rtol=1e-5, atol=1e-5)
        assert (logprobs[len(row) :] == 0).all()


def test_no_logprobs_and_no_texts_unless_asked_for(base: Any) -> None:
    output = GuidedGenerator(base).generate(PROMPTS, max_new_tokens=2)
    assert output.logprobs is None
    assert output.texts is None


def test_texts_are_the_decoded_rows_without_special_tokens(base: Any) -> None:
    output = GuidedGenerator(base, tokenizer=tokenizer()).generate(["w1 w2", "w3"], eos_token_id=9, max_new_tokens=24)
    for row, text in zip(rows(output), output.texts, strict=True):
        kept = row[:-1] if row[-1] == 9 else row
        assert text.split() == [f"w{token - 4}" for token in kept if token > 3]


def test_results_may_be_used_in_a_graph(base: Any) -> None:
    output = GuidedGenerator(base).generate(PROMPTS, max_new_tokens=3, return_logprobs=True)
    scale = torch.ones((), requires_grad=True)
    (scale * output.logprobs).sum().backward()
    assert not output.sequences.is_inference()


def test_the_bar_counts_the_steps(base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    GuidedGenerator(base).generate(PROMPTS, max_new_tokens=5, eos_token_id=[], progress=True)
    assert "5/5" in capsys.readouterr().err
    GuidedGenerator(base).generate(PROMPTS, max_new_tokens=5)
    assert capsys.readouterr().err == ""


# ---- forms of prompts


def test_lists_tensors_and_strings_of_the_same_tokens_draw_the_same(base: Any) -> None:
    generator, settings = GuidedGenerator(base, tokenizer=tokenizer()), {"max_new_tokens": 8}
    expected = rows(generator.generate([[BOS, 4, 5, 6], [BOS, 7]], **settings))
    ids = torch.tensor([[BOS, 4, 5, 6], [40, 41, BOS, 7]], dtype=torch.int32)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert rows(generator.generate(ids, attention_mask=mask, **settings)) == expected
    assert rows(generator.generate(["w0 w1 w2", "w3"], **settings)) == expected
    assert rows(generator.generate([torch.tensor([BOS, 4, 5, 6]), torch.tensor([BOS, 7])], **settings)) == expected


def test_a_single_string_is_a_batch_of_one(base: Any) -> None:
    generator = GuidedGenerator(base, tokenizer=tokenizer())
    assert rows(generator.generate("w0 w1", max_new_tokens=4)) == rows(generator.generate(["w0 w1"], max_new_tokens=4))


def test_a_template_that_writes_bos_gets_no_second_one(base: Any) -> None:
    generator = GuidedGenerator(base, tokenizer=tokenizer())
    templated = generator.generate(["<bos> w0 w1"], max_new_tokens=8)
    assert rows(templated) == rows(generator.generate(["w0 w1"], max_new_tokens=8))


def test_what_stands_in_the_padding_is_not_read(base: Any, arm: Any) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    filled = [torch.tensor([[fill, fill, BOS, 7], [BOS, 4, 5, 6]]) for fill in (PAD, 30, VOCAB + 100)]
    generator = GuidedGenerator(base, arm)
    drawn = [rows(generator.generate(ids, attention_mask=mask, max_new_tokens=8)) for ids in filled]
    assert drawn[0] == drawn[1] == drawn[2]


# ---- preferences


@pytest.fixture(scope="module")
def steered() -> PreferenceArm:
    return PreferenceArm(model("llama", seed=2)).eval()


MIXED = [{"empathy": 1.0}, {"truthfulness": 1.0}, {"helpfulness": 0.5, "empathy": 0.5}, {}]
AS_TENSOR = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("given", [MIXED, tuple(MIXED), AS_TENSOR], ids=["list", "tuple", "tensor"])
def test_every_row_is_steered_by_its_own_preference(base: Any, steered: PreferenceArm, given: Any) -> None:
    if isinstance(given, tuple):
        given = list(given)
    output = GuidedGenerator(base, steered).generate(PROMPTS, preference=given, eos_token_id=[], max_new_tokens=10)
    assert rows(output) == slow_loop.decode(base, steered, PROMPTS, seeds=SEEDS, preference=MIXED, steps=10)


@pytest.mark.parametrize("given", [MIXED[0], AS_TENSOR[0]], ids=["dict", "tensor"])
def test_one_preference_steers_all_rows(base: Any, steered: PreferenceArm, given: Any) -> None:
    output = GuidedGenerator(base, steered).generate(PROMPTS, preference=given, eos_token_id=[], max_new_tokens=10)
    assert rows(output) == slow_loop.decode(base, steered, PROMPTS, seeds=SEEDS, preference=MIXED[0], steps=10)


@pytest.mark.parametrize("given", [MIXED * 6, AS_TENSOR.repeat(6, 1), MIXED[0]], ids=["list", "tensor", "one"])
def test_rows_keep_their_preference_when_finished_rows_are_dropped(
    base: Any, steered: PreferenceArm, given: Any
) -> None:
    prompts, before, eos = PROMPTS * 6, steered.entered, tuple(range(4, VOCAB, 4))
    knobs = {"guidance": [0.1 * row for row in range(24)], "temperature": 1.2}
    settings = {"guidance": torch.tensor(knobs["guidance"]), "temperature": 1.2, "max_new_tokens": 24}
    output = GuidedGenerator(base, steered).generate(prompts, preference=given, eos_token_id=list(eos), **settings)
    assert steered.entered > before + 1  # once more for each time that rows were dropped
    seeds, each = row_seeds(0, 24).tolist(), [given] * 24 if isinstance(given, dict) else MIXED * 6
    expected = slow_loop.decode(base, steered, prompts, seeds=seeds, preference=each, steps=24, eos=eos, **knobs)
    assert rows(output) == expected


def test_guidance_0_needs_no_preference(base: Any, steered: PreferenceArm) -> None:
    output = GuidedGenerator(base, steered).generate(PROMPTS, guidance=0.0, max_new_tokens=6)
    assert rows(output) == rows(GuidedGenerator(base).generate(PROMPTS, max_new_tokens=6))


# ---- what is left as it was


def test_dropout_is_off_and_training_mode_comes_back() -> None:
    base = model("gpt2", seed=1, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    expected = rows(GuidedGenerator(base).generate(PROMPTS, max_new_tokens=8))
    base.train()
    base.transformer.h[0].eval()
    before = [module.training for module in base.modules()]
    assert rows(GuidedGenerator(base).generate(PROMPTS, max_new_tokens=8)) == expected
    assert [module.training for module in base.modules()] == before


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 with transformers 5.23
def test_an_adapter_on_the_bases_own_weights_is_off_while_the_base_reads() -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(base: Any) -> Any:
        torch.manual_seed(5)
        return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))

    shared_base = model("llama", seed=1)
    separate, shared = adapted(model("llama", seed=1)), adapted(shared_base)
    expected = GuidedGenerator(model("llama", seed=1), separate).generate(PROMPTS, max_new_tokens=10)
    output = GuidedGenerator(shared_base, shared).generate(PROMPTS, max_new_tokens=10)
    assert rows(output) == rows(expected)
    alone = rows(GuidedGenerator(model("llama", seed=1)).generate(PROMPTS, max_new_tokens=10))
    assert rows(output) != alone
    unguided = GuidedGenerator(shared_base, shared).generate(PROMPTS, guidance=0.0, max_new_tokens=10)
    assert rows(unguided) == alone  # also where the arm does not run


# ---- vocabularies


def test_tokens_beyond_the_tokenizer_are_never_drawn() -> None:
    base, words = model("llama", seed=1, vocab=200), tokenizer()
    free = GuidedGenerator(base).generate(PROMPTS, eos_token_id=[], max_new_tokens=40)
    assert (free.sequences >= VOCAB).any()
    held = GuidedGenerator(base, tokenizer=words).generate(PROMPTS, eos_token_id=[], max_new_tokens=40)
    assert (held.sequences < VOCAB).all()


@pytest.mark.parametrize("how", ["tokenizer", "vocab_size"])
def test_heads_of_different_widths_draw_from_the_common_tokens(how: str) -> None:
    base, arm = model("llama", seed=1), model("llama", seed=2, vocab=VOCAB + 16)
    remedy = {"tokenizer": tokenizer()} if how == "tokenizer" else {"vocab_size": VOCAB}
    output = GuidedGenerator(base, arm, **remedy).generate(PROMPTS, eos_token_id=[], max_new_tokens=10)
    expected = slow_loop.decode(base, arm, PROMPTS, seeds=SEEDS, steps=10, vocab_size=VOCAB)
    assert rows(output) == expected


def test_vocab_size_narrows_what_is_drawn(base: Any) -> None:
    output = GuidedGenerator(base, vocab_size=10).generate(PROMPTS, eos_token_id=[], max_new_tokens=10)
    assert (output.sequences < 10).all()


# ---- seeds


def test_row_seeds_are_distinct_and_those_of_fewer_rows_a_prefix() -> None:
    seeds = row_seeds(3, 500)
    assert seeds.dtype == torch.int64
    assert (seeds >= 0).all()
    assert len(set(seeds.tolist()) | set(row_seeds(4, 500).tolist())) == 1000
    assert torch.equal(row_seeds(3, 7), seeds[:7])
    assert row_seeds(0, 0).shape == (0,)
