"""Harm vectors on live models: the bits of the op, taken back without a trace, all or nothing."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.checkpoints.safetensors_file import SafetensorsFile
from prosocial_ext.direg import HarmVector, subtract_harm_
from prosocial_ext.direg.checkpoint_edit import apply_vector
from tests.asserts import assert_same_bits
from tests.direg.files import FAMILIES, model, parameters, tuned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_edit_has_the_bits_of_the_op_and_leaves_no_trace(family: str, dtype: torch.dtype) -> None:
    base = model(family, 0, dtype)
    harm = tuned(base, 1)
    before, expected, other_dose = parameters(base), copy.deepcopy(base), copy.deepcopy(base)
    edit = subtract_harm_(expected, base, harm, density=0.1, scale=1.5)
    subtract_harm_(other_dose, base, harm, density=0.1, scale=0.25)
    vector = HarmVector.from_models(base, harm)
    with vector.subtracted_from(base, scale=1.5) as live:
        assert (live.kept, live.unchanged) == (int(edit.kept.sum()), int(edit.unchanged.sum()))
        for name, p in parameters(base).items():
            assert_same_bits(p, parameters(expected)[name], name)
        vector.rescale_(base, 0.25)
        for name, p in parameters(base).items():
            assert_same_bits(p, parameters(other_dose)[name], name)
    for name, p in parameters(base).items():
        assert_same_bits(p, before[name], name)
    vector.subtract_(base, 1.5)
    with pytest.raises(CheckpointError, match="model must not hold this vector already"):
        vector.subtract_(base)
    vector.revert_(base)
    for name, p in parameters(base).items():
        assert_same_bits(p, before[name], name)
    with pytest.raises(CheckpointError, match="model must hold this vector"):
        vector.revert_(base)


def test_a_peft_model_is_edited_at_its_base() -> None:
    from peft import LoraConfig, get_peft_model

    base = model("llama", 0)
    harm = tuned(base, 1)
    vector = HarmVector.from_models(base, harm)
    expected = copy.deepcopy(base)
    vector.subtract_(expected)
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"]))
    vector.subtract_(wrapped)
    found = parameters(wrapped.merge_and_unload())  # LoRA's B is zero: merging changes nothing
    for name, p in parameters(expected).items():
        assert_same_bits(found[name], p, name)


def test_a_model_that_does_not_fit_is_left_as_it_was() -> None:
    base = model("llama", 0)
    vector = HarmVector.from_models(base, tuned(base, 1))
    other = model("llama-tied", 0)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' must be untied|untied, as it was for the vector"):
        vector.subtract_(other)
    with pytest.raises(CheckpointError, match=r"one that lacks 'lm_head.weight'.*prosocial direg apply"):
        vector.subtract_(nn.Linear(2, 2))
    small = copy.deepcopy(base)
    small.model.norm.weight = nn.Parameter(torch.ones(5))
    kept = parameters(small)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' must have the vector's shape \[32\], got \[5\]"):
        vector.subtract_(small)
    for name, p in parameters(small).items():
        assert_same_bits(p, kept[name])


def test_a_model_whose_loading_merges_tensors_is_edited_on_disk_alone(tmp_path: Path) -> None:
    """Mixtral's experts are tensors of their own in a checkpoint, and one in memory."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=61, num_key_value_heads=2, num_local_experts=4, **sizes)
    base = MixtralForCausalLM(config)
    harm = tuned(base, 1)
    base.save_pretrained(tmp_path / "base")
    harm.save_pretrained(tmp_path / "harm")
    from_files = HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm")
    with pytest.raises(CheckpointError, match=r"lacks 'model.layers.0.*edit the checkpoint on disk"):
        from_files.subtract_(base)
    with pytest.raises(CheckpointError, match=r"lacks 'model.layers.0.*loading may rename tensors"):
        apply_vector(tmp_path / "base", HarmVector.from_models(base, harm), tmp_path / "out")
    apply_vector(tmp_path / "base", from_files, tmp_path / "out", scale=1.0)
    again = HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "out", density=1.0).stats().total
    assert again.kept_energy == pytest.approx(from_files.stats().total.kept_energy, rel=1e-3)


def test_an_edit_that_fails_half_way_is_taken_back(tmp_path: Path) -> None:
    base = model("llama", 0)
    vector = HarmVector.from_models(base, tuned(base, 1), density=0.5)
    path = tmp_path / "v.safetensors"
    vector.save(path)
    with SafetensorsFile(path) as file:
        place = file.data_start + file.entries["values.model.norm.weight"].start
    data = bytearray(path.read_bytes())
    data[place : place + 4] = torch.tensor([float("nan")]).numpy().tobytes()
    path.write_bytes(data)
    before = parameters(base)
    with pytest.raises(CheckpointError, match=r"values of tensor 'model.norm.weight' .* must be finite"):
        HarmVector.load(path).subtract_(base)
    for name, p in parameters(base).items():
        assert_same_bits(p, before[name])
