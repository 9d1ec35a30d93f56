"""Small checkpoints and damaged files for the tests of DiReg on disk."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

FAMILIES = ("llama", "llama-tied", "gpt2", "qwen2")


def model(family: str, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of 10 to 20 thousand parameters."""
    sizes: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        config: Any = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=16, **sizes)
        kind: Any = GPT2LMHeadModel
    else:
        kind = Qwen2ForCausalLM if family == "qwen2" else LlamaForCausalLM
        config = (Qwen2Config if family == "qwen2" else LlamaConfig)(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=family in ("llama-tied", "qwen2"), **sizes,
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).to(dtype)


def tuned(base: PreTrainedModel, seed: int, size: float = 1e-3) -> PreTrainedModel:
    """A copy whose parameters moved by about ``size``: in 16 bits full of ties and zeros."""
    other = type(base)(base.config).to(base.dtype)
    other.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_((p.float() + size * torch.randn(p.shape, generator=generator)).to(p.dtype))
    return other


def safetensors_bytes(
    tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None
) -> bytes:
    """A file made by hand: name -> dtype, shape, bytes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return with_header(json.dumps(header).encode(), body)


def with_header(header: bytes, body: bytes) -> bytes:
    """A file with this JSON, whatever it says."""
    return struct.pack("<Q", len(header)) + header + body


def folder_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, read by the safetensors library."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
