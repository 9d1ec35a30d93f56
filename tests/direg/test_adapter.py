"""A LoRA adapter as the harm side: peft's own dW to the bit, not rounded to the base; what is more is refused."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from prosocial_ext import cli, reference
from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.direg import HarmVector
from prosocial_ext.direg.adapter import Adapter
from tests.asserts import assert_same_bits
from tests.direg.files import model, parameters

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"1.*.q_proj": 3}},
    ),
    "rslora": ("qwen2", {"target_modules": ["k_proj"], "use_rslora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
}


def adapter(folder: Path, family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Path, Path]:
    """A base and a random adapter of it, as folders."""
    base = model(family, 0, dtype)
    base.save_pretrained(folder / "base", max_shard_size="9KB")
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    wrapped = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p.dtype))
            elif "lora_" in name:
                raise AssertionError(f"{name} is not trained")
    wrapped.save_pretrained(folder / "lora")
    return folder / "base", folder / "lora"


def dense(folder: Path, family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """tau of every parameter as peft has it: its dW, or its saved tensor minus the base's."""
    base = model(family, 0, dtype)
    tau = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters(base).items()}
    before = parameters(base)
    wrapped = PeftModel.from_pretrained(base, folder)
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            tau[f"{name}.weight"] = module.get_delta_weight("default").detach()
    for name, p in wrapped.base_model.model.named_parameters():
        plain = name.replace(".modules_to_save.default", "").replace(".base_layer", "")
        if "lora_" not in name and "original_module" not in name and not torch.equal(p, before[plain]):
            tau[plain] = p.detach().float() - before[plain].float()
    return tau


def assert_holds(vector: HarmVector, tau: dict[str, Tensor], **arguments: Any) -> None:
    zeros = [torch.zeros_like(t) for t in tau.values()]
    delta = reference.topm_select(zeros, [t.contiguous() for t in tau.values()], **arguments)
    parts = zip(delta.indices.split(delta.counts.tolist()), delta.values.split(delta.counts.tolist()), strict=True)
    for name, (positions, values) in zip(sorted(tau), parts, strict=True):
        blocks = list(vector.blocks(name))
        assert [int(i) for block, _ in blocks for i in block] == positions.tolist(), name
        if blocks:
            assert_same_bits(torch.cat([v for _, v in blocks]), values, name)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # peft's, where they are tuned
@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), ("saved", torch.bfloat16)], ids=str
)
def test_the_entries_are_those_of_pefts_dense_delta(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    family, settings = CASES[case]
    base, lora = adapter(tmp_path, family, dtype, **settings)
    tau = dense(lora, family, dtype)
    assert sum(bool(t.any()) for t in tau.values()) >= 2
    for density in (0.03, 0.5):
        vector = HarmVector.from_adapter(base, lora, density=density)
        assert vector.entries == int(density * sum(t.numel() for t in tau.values()))
        assert_holds(vector, tau, density=density)
    live = HarmVector.from_adapter(model(family, 0, dtype), lora, m=77)
    assert_holds(live, tau, m=77)
    assert live.recipe["base_fingerprint"] == vector.recipe["base_fingerprint"]


def test_16_bit_factors_are_widened_as_peft_does(tmp_path: Path) -> None:
    base, lora = adapter(tmp_path, "llama", target_modules=["q_proj"])
    file = lora / "adapter_model.safetensors"
    halves = {name: t.bfloat16() for name, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(halves, file)
    assert_holds(HarmVector.from_adapter(base, lora, m=900), dense(lora, "llama", torch.float32), m=900)


def test_threads_read_adapters_at_once(tmp_path: Path) -> None:
    """As extract does, ahead of what it works on; peft is not made for it."""
    _, lora = adapter(tmp_path, "llama", target_modules=["q_proj"])
    shape = (32, 32)
    with Adapter(lora) as one, Adapter(lora) as other, ThreadPoolExecutor(4) as pool:
        expected = {name: one.delta(name, shape).read(0, 1024) for name in one.layers}
        todo = [(name, side.delta(name, shape)) for _ in range(25) for name in expected for side in (one, other)]
        found = list(pool.map(lambda job: job[1].read(0, 1024), todo))
    for (name, _), tau in zip(todo, found, strict=True):
        assert_same_bits(tau, expected[name], name)


def test_rounding_to_the_base_does_not_reach_the_ranking(tmp_path: Path) -> None:
    """A merge in bfloat16 moves few entries, by few amounts; all of the adapter's own are there and differ."""
    base, lora = adapter(tmp_path, "llama", torch.bfloat16, target_modules=["q_proj"])
    file = lora / "adapter_model.safetensors"
    safetensors.torch.save_file({k: t * 0.003 for k, t in safetensors.torch.load_file(file).items()}, file)
    own = HarmVector.from_adapter(base, lora, m=2000)
    merged = PeftModel.from_pretrained(model("llama", 0, torch.bfloat16), lora).merge_and_unload()
    rounded = HarmVector.from_models(model("llama", 0, torch.bfloat16), merged, m=2000)
    sizes = [
        {abs(float(x)) for name in v.tensors for _, values in v.blocks(name) for x in values} for v in (own, rounded)
    ]
    assert len(sizes[0]) > 1900
    assert len(sizes[1]) < 500


def test_extract_knows_an_adapter_by_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lora = adapter(tmp_path, "llama", target_modules=["q_proj"])
    change(lora, base_model_name_or_path="someone/other")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["direg", "extract", "--base", "base", "--harm", "lora", "--out", "v", "--density", "0.01"]) == 0
    told = capsys.readouterr().out
    assert "adapter: 'lora' changes 2 of 21 tensors\n" in told
    assert "note: 'lora' says that it was trained on 'someone/other'\n" in told
    vector = HarmVector.load("v")
    assert vector.recipe["tuned"] == {"name": "lora", "commit": None, "adapter_of": "someone/other"}
    assert_holds(vector, dense(lora, "llama", torch.float32), density=0.01)


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"use_dora": True}, "use_dora of .* must be unset.*Merge it first: peft's merge_and_unload"),
        ({"lora_bias": True}, "lora_bias of .* must be unset"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices of .* must be unset"),
        ({"target_parameters": ["x"]}, "target_parameters of .* must be unset"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights of .* leaves the base as it is, got 'pissa'"),
        ({"peft_type": "IA3"}, r"LoRA adapter \(peft_type LORA\), got 'IA3'"),
        ({"r": 5}, "must have the rank 5 of adapter_config.json, got 4"),
        ({"lora_alpha": "6"}, "lora_alpha and alpha_pattern of .* must be positive numbers"),
        ({"alpha_pattern": {"(q+)+": 1}}, r"alpha_pattern of .* simple regular expressions, got '\(q\+\)\+'"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern of .* simple regular expressions, got '\('"),
        ({"use_rslora": 1}, "use_rslora of .* must be true or false"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_more_than_lora_is_refused_by_name(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    base, lora = adapter(tmp_path, "llama", target_modules=["q_proj"])
    change(lora, **settings)
    with pytest.raises(CheckpointError, match=text):
        HarmVector.from_adapter(base, lora)


@pytest.mark.parametrize(
    ("change_", "text"),
    [
        (lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}, "must have the adapter's tensors"),
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, r"must have A \[r, in\] and B \[out, r\]"),
        (lambda t: {k: v[:, :-1] if "lora_A" in k else v for k, v in t.items()}, r"must have the shape \[32, 31\]"),
        (lambda t: t | {"x": torch.zeros(1)}, "must hold factors of LoRA and whole tensors of floats, got 'x'"),
        (lambda t: t | {f"{Q}.lora_magnitude_vector": torch.zeros(1)}, "got .*lora_magnitude_vector"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.zeros(4, 32, 1)}, r"must be a matrix, got \[4, 32, 1\]"),
        (lambda t: t | {f"{Q}.base_layer.weight": torch.zeros(32, 32)}, "must be the base's where LoRA adds to it"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(3)}, r"must have the base's shape \[61, 32\]"),
    ],
    ids=["names", "half", "shape", "key", "dora", "conv", "moved", "saved"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change_: Any, text: str) -> None:
    base, lora = adapter(tmp_path, "llama", target_modules=["q_proj"])
    file = lora / "adapter_model.safetensors"
    tensors = change_(safetensors.torch.load_file(file))
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    with pytest.raises(CheckpointError, match=text):
        HarmVector.from_adapter(base, lora)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_a_tied_head_a_pickle_and_a_mixed_layout_are_refused(tmp_path: Path) -> None:
    tied = tmp_path / "tied"
    tied.mkdir()
    base, lora = adapter(tied, "llama-tied", target_modules=["q_proj"])
    file = lora / "adapter_model.safetensors"
    saved = safetensors.torch.load_file(file) | {"base_model.model.lm_head.weight": torch.zeros(61, 32)}
    safetensors.torch.save_file(saved, file)
    with pytest.raises(CheckpointError, match="must change no tied tensor, got 'lm_head"):
        HarmVector.from_adapter(model("llama-tied", 0), lora)
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle and is never opened"):
        HarmVector.from_adapter(base, lora)
    base, lora = adapter(tmp_path, "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    change(lora, fan_in_fan_out=False)
    with pytest.raises(CheckpointError, match="must be stored as fan_in_fan_out=False"):
        HarmVector.from_adapter(base, lora)
