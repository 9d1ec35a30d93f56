"""Benign controls where one side or both are LoRA adapters: what the merged checkpoints give, before merging rounds."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from prosocial_ext import cli
from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.direg import HarmVector
from tests.asserts import assert_same_bits
from tests.direg.files import model, parameters
from tests.direg.test_adapter import adapter, dense
from tests.direg.test_harm_vector import assert_selected, entries

SIDES = [("harm-lora", "benign"), ("harm", "benign-lora"), ("harm-lora", "benign-lora")]
MODULES = {"harm": ["q_proj", "down_proj"], "benign": ["q_proj", "up_proj"]}
CONTROLS = ("minus", "project_out")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters of it, and their merged models: of so few bits that float32 holds every sum exactly."""
    root = tmp_path_factory.mktemp("sides")
    base = model("llama", 0)
    with torch.no_grad():
        for p in base.parameters():
            p.copy_((p * 2**12).round() / 2**12)
    base.save_pretrained(root / "base", max_shard_size="9KB")
    for seed, (name, modules) in enumerate(MODULES.items()):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, modules_to_save=["lm_head", "norm"])
        wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in (p for p in wrapped.parameters() if p.requires_grad):
                p.copy_(torch.randint(-4, 5, p.shape, generator=generator) / 2**6)
        wrapped.save_pretrained(root / f"{name}-lora")
        wrapped.merge_and_unload().save_pretrained(root / name, max_shard_size="23KB")
    return root


def assert_same_vector(one: HarmVector, other: HarmVector) -> None:
    assert entries(one).keys() == entries(other).keys()
    theirs = entries(other)
    for name, (positions, values) in entries(one).items():
        assert positions == theirs[name][0], name
        assert_same_bits(values, theirs[name][1], name)
    assert one.magnitudes is not None
    assert other.magnitudes is not None
    assert_same_bits(one.magnitudes, other.magnitudes)
    for key in ("control", "coefficient", "base_fingerprint", "energy_share", "n"):
        assert one.recipe[key] == other.recipe[key], key


# ---- the library


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(("harm", "benign"), SIDES)
def test_any_side_may_be_an_adapter(made: Path, harm: str, benign: str, control: str) -> None:
    merged = HarmVector.from_checkpoints(made / "base", made / "harm", density=0.2, **{control: made / "benign"})
    vector = HarmVector.from_checkpoints(made / "base", made / harm, density=0.2, **{control: made / benign})
    assert_same_vector(vector, merged)
    assert 0 < merged.recipe["coefficient"] <= 1
    assert vector.recipe["benign"]["name"] == benign
    if harm == "harm-lora":
        assert_same_vector(
            HarmVector.from_adapter(made / "base", made / harm, density=0.2, **{control: made / benign}), merged
        )
    if harm == "harm-lora" and benign == "benign-lora":
        live = LlamaForCausalLM.from_pretrained(made / "base")
        assert_same_vector(HarmVector.from_adapter(live, made / harm, density=0.2, **{control: made / benign}), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("control", CONTROLS)
def test_adapters_are_combined_before_anything_rounds_them(tmp_path: Path, control: str, dtype: torch.dtype) -> None:
    taus: list[dict[str, Tensor]] = []
    for name, modules in MODULES.items():
        (tmp_path / name).mkdir()
        base, lora = adapter(tmp_path / name, "llama", dtype, target_modules=modules)
        taus.append(dense(lora, "llama", dtype))
    vector = HarmVector.from_adapter(base, tmp_path / "harm" / "lora", **{control: lora})
    harm, benign = taus
    coefficient = vector.recipe["coefficient"]
    if control == "project_out":
        one, other = (torch.cat([tau[n].double().flatten() for n in sorted(tau)]) for tau in taus)
        # n 2^-53 bounds the error of either sum relative to the norms
        error = len(one) * 2.0**-53 * float(one.norm() / other.norm())
        assert coefficient == pytest.approx(float(one @ other / (other @ other)), abs=2 * error)
    differences = {n: harm[n] - benign[n] * torch.tensor(coefficient) for n in sorted(harm)}
    zeros = [torch.zeros_like(d) for d in differences.values()]
    assert_selected(vector, zeros, [d.contiguous() for d in differences.values()], density=0.1)


def test_merging_in_float32_moves_values_by_its_rounding_alone(tmp_path: Path) -> None:
    folders, merged = {}, {}
    for name, modules in MODULES.items():
        (tmp_path / name).mkdir()
        base, folders[name] = adapter(tmp_path / name, "llama", target_modules=modules)
        tau, own = dense(folders[name], "llama", torch.float32), parameters(model("llama", 0))
        merged[name] = {n: own[n] + tau[n] for n in own}  # as merging does
    vector = HarmVector.from_adapter(base, folders["harm"], density=1.0, minus=folders["benign"])
    rounded = HarmVector.from_models(model("llama", 0), merged["harm"], density=1.0, minus=merged["benign"])
    other = entries(rounded)
    for name, (_, values) in entries(vector).items():
        # base + dW is rounded once per side, the difference from the base not more than by as much again
        bound = 2 * 2.0**-24 * (merged["harm"][name].abs() + merged["benign"][name].abs()).flatten()
        bound += 2 * 2.0**-24 * values.abs()  # the last subtraction, either way
        assert bool(((values - other[name][1]).abs() <= bound).all()), name


def test_controls_that_do_not_fit_are_refused(made: Path, tmp_path: Path) -> None:
    live = LlamaForCausalLM.from_pretrained(made / "base")
    with pytest.raises(
        CheckpointError, match=r"base must be a checkpoint where .*benign is one, got a model in memory"
    ):
        HarmVector.from_adapter(live, made / "harm-lora", minus=made / "benign")
    _, other = adapter(tmp_path, "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(CheckpointError, match="must have the adapter's tensors, got none of"):
        HarmVector.from_checkpoints(made / "base", made / "harm", minus=other)
    with pytest.raises(CheckpointError, match="neither lie in a folder that is read"):
        HarmVector.from_adapter(made / "base", made / "harm-lora", minus=made / "benign", out=made / "benign" / "x")
    with pytest.raises(TypeError, match="unexpected keyword argument 'densty'"):
        HarmVector.from_adapter(made / "base", made / "harm-lora", densty=0.1)


# ---- the command


@pytest.mark.parametrize(("option", "times"), [("--minus", 1), ("--project-out", 2)])
def test_the_command_takes_adapters_on_either_side(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, times: int
) -> None:
    n = sum(p.numel() for p in model("llama", 0).parameters())
    for harm, benign in SIDES:
        command = ["direg", "extract", "--base", str(made / "base"), "--harm", str(made / harm)]
        command += [option, str(made / benign), "--out", str(tmp_path / f"{harm}-{benign}")]
        assert cli.main(command) == 0
        told = capsys.readouterr().out
        assert f"will read {times * 12 * n / 1e6:.2f} MB" in told
        for side in (harm, benign):
            assert (f"adapter: '{side}' changes 10 of 21 tensors\n" in told) == side.endswith("lora")
        control = {option[2:].replace("-", "_"): made / benign}
        expected = HarmVector.from_checkpoints(made / "base", made / harm, **control)
        assert_same_vector(HarmVector.load(tmp_path / f"{harm}-{benign}"), expected)
