"""The demo's tokenizer, and examples as tensors."""

from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prosocial_ext.demo.corpus import encode, shuffled_batches
from prosocial_ext.demo.grammar import Example, draw_example
from prosocial_ext.demo.tokenizer import build_tokenizer, vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    random = Random(0)
    return [draw_example(random) for _ in range(3_000)]


def test_every_drawn_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> None:
    for example in examples:
        for text in (example.prompt, example.reply):
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_grammar_uses_every_word_of_the_vocabulary(examples: list[Example]) -> None:
    used = {word for example in examples for text in (example.prompt, example.reply) for word in text.split()}
    assert used == set(vocabulary()[4:])


def test_a_saved_tokenizer_is_found_again(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example], tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.get_vocab() == tokenizer.get_vocab()
    assert found.special_tokens_map == tokenizer.special_tokens_map
    assert found(examples[0].prompt).input_ids == tokenizer(examples[0].prompt).input_ids


def test_the_chat_template_writes_what_the_tokenizer_writes(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    chat = [{"role": "user", "content": examples[0].prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer(text, add_special_tokens=False).input_ids == tokenizer(examples[0].prompt).input_ids


def test_labels_are_the_reply_and_its_end(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> None:
    data = encode(tokenizer, examples[:20])
    for i, example in enumerate(examples[:20]):
        labelled = data.labels[i] != -100
        reply = data.input_ids[i][labelled]
        assert tokenizer.decode(reply) == f"{example.reply} <eos>"
        assert torch.equal(data.labels[i][labelled], reply)
        assert int(data.lengths[i]) == int(labelled.nonzero().max()) + 1


def test_batches_hold_every_example_once_per_epoch(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> None:
    data = encode(tokenizer, [Example("today", "sad . " * (i + 1)) for i in range(12)])
    epoch = [batch["attention_mask"].sum(dim=1) for batch in islice(shuffled_batches(data, 4, seed=0), 3)]
    assert torch.cat(epoch).sort().values.tolist() == data.lengths.tolist()


def test_batches_are_no_longer_than_their_longest_example(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    for batch in encode(tokenizer, examples[:64]).batches(8):
        assert bool(batch["attention_mask"][:, -1].any())
        assert bool((batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all())
