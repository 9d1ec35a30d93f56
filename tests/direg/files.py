"""Small checkpoints and damaged files for the tests of DiReg on disk."""

import json
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
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


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """A new folder, or more for one, with these tensors in one file."""
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def folders(tmp_path: Path, family: str, dtype: torch.dtype, shards: tuple[str, str]) -> tuple[Any, Any, Path, Path]:
    """A model and its tuned copy, saved with these shard sizes, and their folders."""
    base = model(family, 0, dtype)
    harm = tuned(base, 1)
    for module, name, size in ((base, "base", shards[0]), (harm, "harm", shards[1])):
        module.save_pretrained(tmp_path / name, max_shard_size=size)
    return base, harm, tmp_path / "base", tmp_path / "harm"


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters by sorted name."""
    return {name: p.detach().clone() for name, p in sorted(module.named_parameters())}


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
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
