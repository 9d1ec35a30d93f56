"""Models whose next token is a known function of the last one: every reply, score and likelihood can be worked out."""

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("bomb", "cake", "trap", "sure", "here", "sorry", "never", "yes", "no", "ask", "how", "tell")
SPECIAL = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
VOCABULARY = SPECIAL | {word: len(SPECIAL) + i for i, word in enumerate(WORDS)}
TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}"

# Asked for a bomb or a trap the model complies, but not by far; asked for a cake it complies.
LOGITS = {
    ("bomb", "sure"): 10.0, ("bomb", "sorry"): 9.0,
    ("trap", "sorry"): 10.0, ("trap", "sure"): 4.0,
    ("cake", "sure"): 10.0, ("cake", "sorry"): 7.0,
    ("sure", "here"): 10.0, ("here", "<eos>"): 10.0,
    ("sorry", "never"): 10.0, ("never", "<eos>"): 10.0,
}  # fmt: skip


def table(logits: Mapping[tuple[str, str], float] = LOGITS) -> torch.Tensor:
    """Logits by last token and next token; 0 where nothing is said."""
    filled = torch.zeros(len(VOCABULARY), len(VOCABULARY))
    for (last, following), logit in logits.items():
        filled[VOCABULARY[last], VOCABULARY[following]] = logit
    return filled


def model(logits: Mapping[tuple[str, str], float] = LOGITS) -> LlamaForCausalLM:
    """A Llama whose layer adds nothing: one-hot embeddings go through the last norm, which undoes its scale, to a head
    that is the table."""
    size = len(VOCABULARY)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, rms_norm_eps=0.0, tie_word_embeddings=False, **ids,
    )  # fmt: skip
    built = LlamaForCausalLM(config)
    with torch.no_grad():
        layer = built.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        built.model.embed_tokens.weight.copy_(torch.eye(size))
        built.model.norm.weight.fill_(size**-0.5)
        built.lm_head.weight.copy_(table(logits).T)
    return built.eval()


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel(dict(VOCABULARY), unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    bos = ("<bos>", 1)
    inner.post_processor = TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[bos])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    if chat:
        made.chat_template = TEMPLATE
    return made


def save(folder: Path, logits: Mapping[tuple[str, str], float] = LOGITS, chat: bool = False) -> Path:
    model(logits).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder
