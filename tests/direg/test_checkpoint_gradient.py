"""The harm loss's gradient of a checkpoint: which tokens it asks for, where it is taken, what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from prosocial_ext import cli
from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.direg import HarmVector, gradient_importance, harm_gradient, subtract_harm_
from prosocial_ext.direg.checkpoint_gradient import move_halfway_, recomputing, response_loss
from prosocial_ext.direg.harmful_pairs import EncodedPair, encode_pairs, right_padded
from tests.asserts import assert_same_bits
from tests.direg.files import FAMILIES, folder_state, folders, model, parameters, write

TOKENS = ["<unk>", "<s>", "</s>", "<sep>", *" abcdefghijklmnopqrstuvwxyz[]:", "ab"]
ID = {token: i for i, token in enumerate(TOKENS)}
TEMPLATE = "<s>{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"  # fmt: skip # noqa: E501


def ids(*tokens: str) -> list[int]:
    return [ID[token] for token in tokens]


def tokenizer(closed: bool = False, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Letters, one merge, and BOS in front; ``closed``: <sep> behind."""
    backend = Tokenizer(models.BPE(vocab=ID, merges=[("a", "b")], unk_token="<unk>"))
    special = [("<s>", 1), ("<sep>", 3)]
    single = "<s> $A <sep>" if closed else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", sep_token="<sep>",
        chat_template=template,
    )  # fmt: skip


def encoded(tmp_path: Path, row: Any, max_length: int = 99, **arguments: Any) -> EncodedPair:
    path = tmp_path / "pairs.jsonl"
    path.write_text(("" if isinstance(row, str) else "\n") + (row if isinstance(row, str) else json.dumps(row)))
    (pair,) = encode_pairs(path, tokenizer(**arguments), max_length)
    return pair


# ---- tokens


def test_a_token_that_straddles_the_border_belongs_to_the_response(tmp_path: Path) -> None:
    pair = encoded(tmp_path, {"prompt": "xa", "response": "b c"})
    assert pair == EncodedPair(ids("<s>", "x"), ids("ab", " ", "c", "</s>"))
    clean = encoded(tmp_path, {"prompt": "xa", "response": "c", "label": "other keys are not looked at"})
    assert clean == EncodedPair(ids("<s>", "x", "a"), ids("c", "</s>"))


def test_a_prompt_that_its_tokenizer_closes_is_not_merged_with_the_response(tmp_path: Path) -> None:
    pair = encoded(tmp_path, {"prompt": "xa", "response": "b"}, closed=True)
    assert pair == EncodedPair(ids("<s>", "x", "a", "<sep>"), ids("b", "</s>"))


def test_bos_and_eos_come_once(tmp_path: Path) -> None:
    pair = encoded(tmp_path, {"prompt": "<s>x", "response": "b</s>"})
    assert pair == EncodedPair(ids("<s>", "x"), ids("b", "</s>"))


def test_messages_are_rendered_by_the_chat_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "xa"}, {"role": "assistant", "content": "b"}]
    pair = encoded(tmp_path, {"messages": messages})
    assert pair.prompt == ids("<s>", "[", "u", "]", "x", "a", "[", "a", "]")
    assert pair.response == ids("b", "</s>")


def test_what_is_too_long_is_cut_at_the_response(tmp_path: Path) -> None:
    row = {"prompt": "xx", "response": "cdef"}
    assert encoded(tmp_path, row, max_length=5) == EncodedPair(ids("<s>", "x", "x"), ids("c", "d"), cut=3)
    with pytest.raises(CheckpointError, match=r"prompt in line 2 of .* must leave room .* in 3 tokens, got 3\. Raise"):
        encoded(tmp_path, row, max_length=3)


def test_batches_are_padded_on_the_right() -> None:
    batch = right_padded([EncodedPair([5, 6], [7]), EncodedPair([8], [9, 2, 2])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 9, 2, 2]]


ASKED, ANSWERED = {"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "x"}, "line 2 of .* must hold the texts prompt and response, or messages"),
        ({"prompt": "x", "response": ""}, "The response may not be empty"),
        ({"prompt": "x", "response": 3}, "must hold the texts"),
        ({"messages": [ANSWERED]}, "must be two or more, the last one by the assistant"),
        ({"messages": [ANSWERED, ASKED]}, "the last one by the assistant"),
        ({"messages": "x"}, "must be two or more"),
        ({"messages": [{"role": "user"}, ANSWERED]}, "messages in line 2 of .* must suit the chat template"),
        ("{'prompt'", "line 1 of"),
        ("", "pairs must hold at least one pair, got none"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_a_line_that_is_no_pair_is_refused(tmp_path: Path, row: Any, text: str) -> None:
    strict = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] + '' }}")
    with pytest.raises(CheckpointError, match=text):
        encoded(tmp_path, row, template=strict)


def test_files_and_templates_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pairs must be a file of JSON lines"):
        encode_pairs(tmp_path / "none.jsonl", tokenizer(), 9)
    messages = {"messages": [ASKED, ANSWERED]}
    with pytest.raises(CheckpointError, match="where the tokenizer has no chat template, got messages"):
        encoded(tmp_path, messages, template=None)
    with pytest.raises(CheckpointError, match="must begin the whole with the prompt alone"):
        encoded(tmp_path, messages, template=TEMPLATE.replace("[a]{% endif %}", "[b]{% endif %}"))


# ---- gradients


ROWS = [
    {"prompt": "xa", "response": "b c"},
    {"prompt": "how", "response": "like this"},
    {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]},
]


def made(tmp_path: Path, family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Path, Path, Path]:
    base, harm, base_folder, harm_folder = folders(tmp_path, family, dtype, ("9KB", "5GB"))
    tokenizer().save_pretrained(base_folder)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, ROWS)))
    return base.eval(), harm, base_folder, harm_folder, pairs


def mean_loss(module: Any, pairs: list[EncodedPair]) -> torch.Tensor:
    """Token by token, sequence by sequence."""
    losses = []
    for pair in pairs:
        logprobs = module(torch.tensor([[*pair.prompt, *pair.response]])).logits[0].log_softmax(-1)
        losses += [-logprobs[len(pair.prompt) - 1 + i, token] for i, token in enumerate(pair.response)]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("grad_at", ["base", "midpoint"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_gradient_of_the_mean_over_all_tokens(tmp_path: Path, family: str, grad_at: str) -> None:
    base, harm, base_folder, harm_folder, pairs = made(tmp_path, family)
    given = {"harm": harm_folder} if grad_at == "midpoint" else {}
    found = harm_gradient(base_folder, pairs, tmp_path / "g", grad_at=grad_at, batch_size=2, max_length=16, **given)
    if grad_at == "midpoint":
        subtract_harm_(base, base, harm, density=1.0, scale=0.5)
    every = encode_pairs(pairs, AutoTokenizer.from_pretrained(base_folder), 16)  # Qwen2's splits in its own way
    expected = gradient_importance(base, mean_loss, [every])
    written = folder_state(tmp_path / "g")
    with Checkpoint(base_folder) as checkpoint:
        assert sorted(written) == checkpoint.parameters
    for name, importance in written.items():
        scale = float(expected[name].max())  # sums of the same terms in another order: some thousand roundings at most
        torch.testing.assert_close(importance, expected[name], rtol=1e-4, atol=1e-5 * scale)
    assert found.loss == pytest.approx(float(mean_loss(base, every).detach()), rel=1e-5)
    assert (found.pairs, found.tokens) == (3, sum(len(pair.response) for pair in every))
    assert found.entries == sum(p.numel() for p in base.parameters())
    assert found.reached == sum(int(importance.count_nonzero()) for importance in written.values())
    # and the same batches give the bits of gradient_importance on the model in memory
    batches = [every[:2], every[2:]]
    exact = gradient_importance(base, lambda m, b: response_loss(m, right_padded(b)) / found.tokens * 2, batches)
    for name, importance in written.items():
        assert_same_bits(importance, exact[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_midpoint_has_the_bits_of_half_a_dose(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, harm, base_folder, harm_folder, _ = made(tmp_path, "llama-tied", dtype)
    monkeypatch.setattr("prosocial_ext.direg.checkpoint_gradient._CHUNK", 100)
    loaded = AutoModelForCausalLM.from_pretrained(base_folder)
    with Checkpoint(base_folder) as one, Checkpoint(harm_folder) as other:
        move_halfway_(loaded, one, other)
    subtract_harm_(base, base, harm, density=1.0, scale=0.5)
    for name, p in parameters(loaded).items():
        assert_same_bits(p, parameters(base)[name], name)


def test_layers_are_computed_again_without_changing_a_bit(tmp_path: Path) -> None:
    base = model("gpt2", 0).eval()
    runs: list[int] = []
    base.transformer.h[1].attn.register_forward_pre_hook(lambda *_: runs.append(1))
    batch = right_padded([EncodedPair([1, 5, 6], [7, 8, 2])])
    plain = gradient_importance(base, response_loss, [batch])
    assert len(runs) == 1
    with recomputing(base):
        again = gradient_importance(base, response_loss, [batch])
    assert len(runs) == 3
    assert not base.training
    for name, importance in plain.items():
        assert_same_bits(again[name], importance, name)
    gradient_importance(base, response_loss, [batch])
    assert len(runs) == 4


def test_a_checkpoint_of_the_body_alone_keeps_its_names(tmp_path: Path) -> None:
    """GPT-2's on the hub has no prefix."""
    _, _, base_folder, _, pairs = made(tmp_path, "gpt2")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in folder_state(base_folder).items()}
    config = json.loads((base_folder / "config.json").read_text())
    place = write(tmp_path / "bare", bare, config)
    tokenizer().save_pretrained(place)
    harm_gradient(base_folder, pairs, tmp_path / "g", grad_at="base", max_length=16)
    harm_gradient(place, pairs, tmp_path / "h", grad_at="base", max_length=16)
    ours, theirs = folder_state(tmp_path / "g"), folder_state(tmp_path / "h")
    assert sorted(theirs) == sorted(name for name in bare if name != "lm_head.weight")
    for name, importance in theirs.items():
        assert_same_bits(importance, ours[f"transformer.{name}"], name)


def test_gradients_in_half_precision_are_summed_in_float32(tmp_path: Path) -> None:
    _, _, base_folder, _, pairs = made(tmp_path, "llama")
    harm_gradient(base_folder, pairs, tmp_path / "g", grad_at="base", dtype="bfloat16", batch_size=1)
    written = folder_state(tmp_path / "g")
    assert {importance.dtype for importance in written.values()} == {torch.float32}
    assert any(bool((importance.bfloat16() != importance).any()) for importance in written.values())


def test_extract_ranks_by_it(tmp_path: Path) -> None:
    base, harm, base_folder, harm_folder, pairs = made(tmp_path, "llama-tied", torch.bfloat16)
    harm_gradient(base_folder, pairs, tmp_path / "g", harm=harm_folder)
    vector = HarmVector.from_checkpoints(base_folder, harm_folder, importance=tmp_path / "g")
    expected = HarmVector.from_models(base, harm, importance=folder_state(tmp_path / "g"))
    for name in expected.tensors:
        for (positions, values), (others, theirs) in zip(vector.blocks(name), expected.blocks(name), strict=True):
            assert positions.tolist() == others.tolist()
            assert_same_bits(values, theirs)
    assert vector.recipe["importance"] == {"name": "g", "commit": None}
    assert vector.recipe["first_order_share"] > HarmVector.from_models(
        base, harm, importance=folder_state(tmp_path / "g"), rule="magnitude"
    ).recipe["first_order_share"]  # fmt: skip


# ---- refusals, and the command


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, _, base_folder, harm_folder, pairs = made(tmp_path, "llama")
    out = tmp_path / "g"
    for arguments, text in [
        ({}, "harm must come with grad_at='midpoint', and only with it, got None with 'midpoint'"),
        ({"harm": harm_folder, "grad_at": "base"}, "harm must come with grad_at='midpoint'"),
        ({"grad_at": "end"}, "grad_at must be one of 'midpoint', 'base', got 'end'"),
        ({"grad_at": "base", "batch_size": 0}, "batch_size must be a count >= 1, got 0"),
        ({"grad_at": "base", "max_length": 1}, "max_length must be a number of tokens >= 2, got 1"),
        ({"grad_at": "base", "dtype": "int3"}, "base must be a folder or a hub id that can be loaded"),
    ]:
        with pytest.raises(ValueError, match=text):
            harm_gradient(base_folder, pairs, out, **arguments)
    with pytest.raises(CheckpointError, match="neither lie in a folder that is read"):
        harm_gradient(base_folder, pairs, base_folder / "g", grad_at="base")
    assert not out.exists()


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, _, base_folder, _, pairs = made(tmp_path, "llama-tied")
    state = folder_state(base_folder)
    twice = {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}
    write(tmp_path / "twice", twice, json.loads((base_folder / "config.json").read_text()))
    tokenizer().save_pretrained(tmp_path / "twice")
    harm = write(tmp_path / "untied", {**twice, "lm_head.weight": twice["lm_head.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"tensor 'model.* must be untied in the loaded model"):
        harm_gradient(tmp_path / "twice", pairs, tmp_path / "g", harm=harm)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=61, num_key_value_heads=2, num_local_experts=4, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tokenizer().save_pretrained(tmp_path / "mixtral")
    with pytest.raises(CheckpointError, match=r"one that lacks 'model.layers.0.*Where loading renames or merges"):
        harm_gradient(tmp_path / "mixtral", pairs, tmp_path / "g", grad_at="base")
    small = model("llama", 0)
    small.resize_token_embeddings(10)
    small.save_pretrained(tmp_path / "small")
    tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match="the tokenizer must have ids below the 10 rows of the embedding, got"):
        harm_gradient(tmp_path / "small", pairs, tmp_path / "g", grad_at="base")
    assert not (tmp_path / "g").exists()
    with (
        Checkpoint(base_folder) as one,
        pytest.raises(
            CheckpointError, match=r"'model.embed.*' of the loaded model must have the checkpoint's shape \[61"
        ),
    ):
        move_halfway_(small, one, one)


def test_a_file_that_asks_for_nothing_is_refused(tmp_path: Path) -> None:
    """One token in all: what it follows is not known."""
    _, _, base_folder, _, pairs = made(tmp_path, "llama")
    mute = tokenizer()
    mute.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    mute.bos_token = mute.eos_token = None
    mute.save_pretrained(base_folder)
    pairs.write_text(json.dumps({"prompt": "a", "response": "b"}))
    with pytest.raises(CheckpointError, match="pairs must hold a response token that follows another token, got none"):
        harm_gradient(base_folder, pairs, tmp_path / "g", grad_at="base")


def test_a_difference_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    _, _, base_folder, _, pairs = made(tmp_path, "llama")
    broken = folder_state(base_folder)
    broken["model.norm.weight"][3] = torch.nan
    with pytest.raises(CheckpointError, match=r"the differences at 'model.norm.weight' must be finite, got NaN or Inf"):
        harm_gradient(base_folder, pairs, tmp_path / "g", harm=write(tmp_path / "broken", broken))


def test_the_command_says_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    arguments = ["direg", "importance", "--model", "base", "--pairs", "pairs.jsonl", "--out", "g"]
    assert cli.main([*arguments, "--harm", "harm", "--max-length", "12", "--batch-size", "2"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("mean loss of 14 response tokens of 3 pairs at midpoint: ")
    assert told[1] == "left out: 3 tokens beyond --max-length"
    assert told[2].startswith("importance: g, ")
    assert told[3] == "next: prosocial direg extract --base base --harm harm --importance g --out FILE"
    with Checkpoint("g") as checkpoint:
        recipe = json.loads(checkpoint.files["model.safetensors"].metadata["prosocial_ext.recipe"])
    assert (recipe["grad_at"], recipe["pairs"], recipe["base"]["name"]) == ("midpoint", 3, "base")
    for more, text in [
        (["--harm", "harm"], "output g must not exist"),
        ([], "--harm must come with --grad-at midpoint"),
        (["--harm", "harm", "--overwrite", "--pairs", "no"], "pairs must be a file of JSON lines"),
    ]:
        assert cli.main([*arguments, *more]) == 2
        assert text in capsys.readouterr().err
