"""What rounding would lose of an edit, kept: float32 outputs and rounding by chance, both undone to the bit."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from prosocial_ext.reference.philox import philox
from transformers import AutoModelForCausalLM

from prosocial_ext import cli
from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.direg import HarmVector, subtract_harm_
from prosocial_ext.direg import extract as extraction
from prosocial_ext.direg.checkpoint_edit import UNDO, apply_vector, revert_checkpoint
from prosocial_ext.direg.widths import SIXTEEN, _words, narrow, round_stochastic, widen
from tests.asserts import assert_same_bits
from tests.direg.files import folder_bytes, folder_state, model, safetensors_bytes, tuned, write

HALVES = pytest.mark.parametrize("dtype", SIXTEEN, ids=str)


def made(tmp_path: Path, dtype: torch.dtype, shards: str = "9KB") -> HarmVector:
    """Folders base and harm."""
    base = model("llama-tied", 0, dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size=shards)
    tuned(base, 1).save_pretrained(tmp_path / "harm")
    return HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm", density=0.3)


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


# ---- the numbers


@HALVES
def test_widening_is_exact_and_gives_every_pattern_back(dtype: torch.dtype) -> None:
    numbers = every_pattern(dtype)
    assert_same_bits(widen(numbers), numbers.float())
    back = narrow(widen(numbers), dtype)
    assert back is not None
    assert torch.equal(back.view(torch.int16), numbers.view(torch.int16))
    assert narrow(torch.tensor([1.0, 1 / 3]), dtype) is None


@HALVES
def test_what_16_bits_hold_stays_when_rounded_by_chance(dtype: torch.dtype) -> None:
    numbers = every_pattern(dtype)
    found = round_stochastic(widen(numbers), dtype, seed=3, name="w", positions=torch.arange(len(numbers)))
    assert_same_bits(found, numbers)


@HALVES
@pytest.mark.parametrize("value", [1 / 3, -7.77, 1e-3, 3e-6, -3e-8, 1.0002], ids=str)
def test_rounding_by_chance_keeps_the_mean(dtype: torch.dtype, value: float) -> None:
    n = 1 << 17
    values = torch.full((n,), value)
    rounded = round_stochastic(values, dtype, seed=5, name="w", positions=torch.arange(n))
    found = rounded.double()
    exact = float(values[0].double())
    low, high = float(found.min()), float(found.max())
    assert low < exact < high
    assert torch.diff(rounded.view(torch.int16).unique()).tolist() == [1]  # its neighbours alone
    share = (exact - low) / (high - low)
    six_sigma = 6 * (share * (1 - share) / n) ** 0.5
    assert abs(float((found == high).double().mean()) - share) < six_sigma


def test_beyond_the_largest_number_the_nearest_is_taken() -> None:
    values = torch.tensor([65510.0, 65530.0, -1e9, float("inf"), float("nan")])
    found = round_stochastic(values, torch.float16, seed=0, name="w", positions=torch.arange(5))
    assert_same_bits(found, values.half())


def test_the_words_are_those_of_the_reference() -> None:
    import hashlib

    stream = int.from_bytes(hashlib.sha256(b"w").digest()[:8], "little")
    places = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**45 + 7])
    for seed in (0, 1, 2**63 - 1):
        expected = [philox(seed, place, stream)[0] for place in places.tolist()]
        assert _words(seed, "w", places).tolist() == expected


# ---- checkpoints


@HALVES
@pytest.mark.parametrize("shards", ["5GB", "9KB"])
def test_float32_output_is_the_edit_of_a_float32_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shards: str
) -> None:
    monkeypatch.setattr(extraction, "_CHUNK", 512)
    vector = made(tmp_path, dtype, shards)
    base = model("llama-tied", 0, dtype)
    expected = copy.deepcopy(base).float()
    edit = subtract_harm_(expected, base, tuned(base, 1), density=0.3, scale=0.1)
    done = apply_vector(tmp_path / "base", vector, tmp_path / "out", scale=0.1, undo=True, dtype=torch.float32)
    assert (done.unchanged, done.is_base) == (int(edit.unchanged.sum()), True)
    assert done.effective_share == pytest.approx(1.0, abs=1e-4)
    assert done.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    for key, tensor in loaded.state_dict().items():
        assert_same_bits(tensor, expected.state_dict()[key], key)
    index = tmp_path / "out" / "model.safetensors.index.json"
    if shards == "9KB":
        total = sum(tensor.nbytes for tensor in folder_state(tmp_path / "out").values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(tmp_path / "base")


def test_float32_output_gives_back_odd_bits_and_leaves_integers(tmp_path: Path) -> None:
    """NaN of every kind, tensors the vector does not name, a header with metadata and spaces."""
    folder = write(tmp_path / "base", {"w": torch.zeros(2, dtype=torch.bfloat16)})
    odd = every_pattern(torch.float16).view(torch.uint8).numpy().tobytes()
    tensors = {
        "w": ("BF16", [2], b"\x80\x3f\x81\x7f"), "other": ("F16", [65536], odd), "steps": ("I64", [1], b"12345678"),
        "wide": ("F64", [1], b"\x00" * 8),
    }  # fmt: skip
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    config = '{"torch_dtype" : "bfloat16","text_config":{"dtype":"float16"}, "rope": 1e-05}'
    (folder / "config.json").write_text(config)
    one = write(tmp_path / "one", {"w": torch.zeros(2, dtype=torch.bfloat16)})
    two = write(tmp_path / "two", {"w": torch.ones(2, dtype=torch.bfloat16)})
    vector = HarmVector.from_checkpoints(one, two, density=1.0)
    apply_vector(folder, vector, tmp_path / "out", undo=True, dtype=torch.float32)
    state = folder_state(tmp_path / "out")
    assert {name: str(t.dtype) for name, t in state.items()} == {
        "w": "torch.float32", "other": "torch.float32", "steps": "torch.int64", "wide": "torch.float64"
    }  # fmt: skip
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "rope": 1e-05}
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(folder)


@HALVES
def test_rounding_by_chance_depends_on_the_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    vector = made(tmp_path, dtype)
    base = model("llama-tied", 0, dtype)
    base.save_pretrained(tmp_path / "whole")
    arguments: dict[str, Any] = {"scale": 0.1, "rounding": "stochastic", "seed": 7}
    done = apply_vector(tmp_path / "base", vector, tmp_path / "out", undo=True, **arguments)
    monkeypatch.setattr(extraction, "_CHUNK", 512)
    apply_vector(tmp_path / "whole", vector, tmp_path / "other", **arguments)
    apply_vector(tmp_path / "base", vector, tmp_path / "wide", scale=0.1, dtype=torch.float32)
    first, same, exact = (folder_state(tmp_path / name) for name in ("out", "other", "wide"))
    before = folder_state(tmp_path / "base")
    unchanged = 0
    for key, tensor in first.items():
        assert_same_bits(tensor, same[key], key)
        places = torch.cat([torch.zeros(0, dtype=torch.int64), *(positions for positions, _ in vector.blocks(key))])
        flat = exact[key].flatten()[places]
        rounded = round_stochastic(flat, dtype, seed=7, name=key, positions=places)
        expected = before[key].flatten()
        unchanged += int((expected[places] == rounded).sum())
        expected[places] = rounded
        assert_same_bits(tensor.flatten(), expected, key)
    assert done.unchanged == unchanged
    apply_vector(tmp_path / "base", vector, tmp_path / "seed", **{**arguments, "seed": 8})
    assert any(not torch.equal(t, first[key]) for key, t in folder_state(tmp_path / "seed").items())
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(tmp_path / "base")


def test_a_record_of_another_width_is_refused(tmp_path: Path) -> None:
    vector = made(tmp_path, torch.bfloat16)
    apply_vector(tmp_path / "base", vector, tmp_path / "wide", undo=True, dtype=torch.float32)
    apply_vector(tmp_path / "base", vector, tmp_path / "plain", undo=True)
    with pytest.raises(CheckpointError, match="must be BF16"):
        revert_checkpoint(tmp_path / "wide", tmp_path / "never", record=tmp_path / "plain" / UNDO)
    with pytest.raises(CheckpointError, match="be what the edit wrote"):
        revert_checkpoint(tmp_path / "plain", tmp_path / "never", record=tmp_path / "wide" / UNDO)


def test_weights_that_were_never_16_bits_are_not_narrowed(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {name: torch.zeros(2, dtype=torch.bfloat16) for name in ("w", "x")})
    two = write(tmp_path / "two", {name: torch.ones(2, dtype=torch.bfloat16) for name in ("w", "x")})
    vector = HarmVector.from_checkpoints(one, two, density=1.0, include=["w"])
    apply_vector(one, vector, tmp_path / "wide", undo=True, dtype=torch.float32)
    place = tmp_path / "wide" / "model.safetensors"
    state = folder_state(tmp_path / "wide")
    safetensors.torch.save_file({**state, "x": torch.full((2,), 1 / 3)}, place)
    with pytest.raises(CheckpointError, match=r"'x' must hold torch.bfloat16 widened to float32, got other values"):
        revert_checkpoint(tmp_path / "wide", tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dtype": torch.float16}, "dtype must be torch.float32 or None"),
        ({"rounding": "up"}, "rounding must be"),
        ({"rounding": "stochastic", "seed": -1}, "seed must be"),
        ({"rounding": "stochastic", "dtype": torch.float32}, "rounding must be 'nearest' for float32 outputs"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        apply_vector(tmp_path, made(tmp_path, torch.bfloat16), tmp_path / "out", **arguments)


def test_the_command_takes_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, torch.bfloat16).save(tmp_path / "v.safetensors")
    monkeypatch.chdir(tmp_path)
    apply = ["direg", "apply", "--model", "base", "--harm-vector", "v.safetensors", "--scale", "0.01", "--out"]
    assert cli.main([*apply, "plain", "--density", "0.1", "--scale", "1e-4"]) == 0
    assert "add --dtype float32 or --round stochastic" in capsys.readouterr().out
    assert cli.main([*apply, "wide", "--dtype", "float32"]) == 0
    assert cli.main([*apply, "chance", "--round", "stochastic", "--seed", "4"]) == 0
    assert json.loads((tmp_path / "chance" / "direg" / "recipe.json").read_text())["seed"] == 4
    assert folder_state(tmp_path / "wide")["model.norm.weight"].dtype == torch.float32
    assert cli.main([*apply, "both", "--round", "stochastic", "--dtype", "float32"]) == 2
    assert "leave one of the two out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda found: [], "must map files to texts"),
        (lambda found: {**found, "more": {}}, "must map files to texts"),
        (lambda found: {**found, "texts": {"config.json": 1}}, "must map files to texts"),
        (lambda found: {**found, "texts": {"../evil": ""}}, "must be those of the checkpoint's files"),
        (lambda found: {**found, "headers": {"x": "{}"}}, "must be those of the checkpoint's files"),
        (lambda found: {**found, "headers": {"model.safetensors": "{}"}}, "must name the tensors of"),
        (lambda found: {**found, "headers": {"model.safetensors": "["}}, "must be a JSON object"),
        (
            lambda found: json.loads(json.dumps(found).replace("BF16", "F16")),
            r"BF16 \[2\] as recorded, got F16",
        ),
        (lambda found: json.loads(json.dumps(found).replace("BF16", "I16")), "must be I16 or widened, got F32"),
    ],
)
def test_a_record_is_checked_before_it_is_believed(tmp_path: Path, change: Any, match: str) -> None:
    one = write(tmp_path / "one", {"w": torch.zeros(2, dtype=torch.bfloat16)}, {"dtype": "bfloat16"})
    two = write(tmp_path / "two", {"w": torch.ones(2, dtype=torch.bfloat16)})
    vector = HarmVector.from_checkpoints(one, two, density=1.0)
    apply_vector(one, vector, tmp_path / "out", undo=True, dtype=torch.float32)
    place = tmp_path / "out" / UNDO
    with safetensors.safe_open(place, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    recipe = json.loads(metadata["prosocial_ext.recipe"])
    recipe["original"] = change(recipe["original"])
    metadata["prosocial_ext.recipe"] = json.dumps(recipe)
    safetensors.torch.save_file(tensors, place, metadata)
    with pytest.raises(CheckpointError, match=match):
        revert_checkpoint(tmp_path / "out", tmp_path / "never")
    assert not (tmp_path / "never").exists()
