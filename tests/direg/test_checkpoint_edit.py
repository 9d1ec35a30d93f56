"""Edits of checkpoints on disk: the bits of the edit in memory, whole outputs or none, exact undo."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.checkpoints.outputs import new_file, new_folder
from prosocial_ext.direg import HarmVector, subtract_harm_
from prosocial_ext.direg import checkpoint_edit as editing
from prosocial_ext.direg import extract as extraction
from prosocial_ext.direg.checkpoint_edit import UNDO, apply_vector, revert_checkpoint
from tests.asserts import assert_same_bits
from tests.direg.files import FAMILIES, folder_bytes, folder_state, model, tuned, write

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARDS = [("5GB", "5GB", "5GB"), ("9KB", "23KB", "40KB"), ("5GB", "9KB", "9KB")]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "_CHUNK", 512)  # so that tensors take several


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with base, harm, and v.safetensors of them."""
    base = model("llama-tied", 0, torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="9KB")
    tuned(base, 1).save_pretrained(tmp_path / "harm")
    HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm", out=tmp_path / "v.safetensors")
    return tmp_path


def vector(folder: Path) -> HarmVector:
    return HarmVector.load(folder / "v.safetensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", SHARDS, ids=["single", "sharded", "mixed"])
def test_the_output_is_the_edit_in_memory(
    tmp_path: Path, family: str, dtype: torch.dtype, shards: tuple[str, str, str]
) -> None:
    base = model(family, 0, dtype)
    harm, other = tuned(base, 1), tuned(base, 2, 1e-2)
    for module, name, size in zip((base, harm, other), ("base", "harm", "other"), shards, strict=True):
        module.save_pretrained(tmp_path / name, max_shard_size=size)
    found = HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm", density=0.2)
    for name, module in (("base", base), ("other", other)):
        before = folder_bytes(tmp_path / name)
        expected = copy.deepcopy(module)
        edit = subtract_harm_(expected, base, harm, density=0.2, scale=1.5)
        done = apply_vector(tmp_path / name, found, tmp_path / "out", scale=1.5, undo=True, overwrite=True)
        assert (done.edited, done.unchanged) == (int(edit.kept.sum()), int(edit.unchanged.sum()))
        assert done.is_base == (name == "base")
        assert done.threshold == pytest.approx(float(edit.threshold[0]))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        for key, tensor in loaded.state_dict().items():
            assert_same_bits(tensor, expected.state_dict()[key], key)
        for key, data in before.items():  # the same files, of the same headers
            out = (tmp_path / "out" / key).read_bytes()
            assert len(out) == len(data)
            assert key.endswith(".safetensors") or out == data
        assert folder_bytes(tmp_path / name) == before
        assert revert_checkpoint(tmp_path / "out", tmp_path / "back", overwrite=True) == done.edited
        assert folder_bytes(tmp_path / "back") == before


def test_live_and_disk_agree(made: Path) -> None:
    live = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.bfloat16)
    vector(made).subtract_(live, 0.7)
    apply_vector(made / "base", vector(made), made / "out", scale=0.7)
    for key, tensor in folder_state(made / "out").items():
        assert_same_bits(tensor, live.state_dict()[key], key)


def test_views_are_applied(made: Path) -> None:
    apply_vector(made / "base", vector(made).top(0.01), made / "one")
    HarmVector.from_checkpoints(made / "base", made / "harm", density=0.01, out=made / "w.safetensors")
    apply_vector(made / "base", HarmVector.load(made / "w.safetensors"), made / "two")
    for key, tensor in folder_state(made / "one").items():
        assert_same_bits(tensor, folder_state(made / "two")[key], key)


def test_the_recipe_tells_what_was_done(made: Path) -> None:
    done = apply_vector(made / "base", vector(made), made / "out", scale=0.25, undo=True)
    recipe = json.loads((made / "out" / "direg" / "recipe.json").read_text())
    assert recipe["scale"] == 0.25
    assert recipe["undo"] == UNDO
    assert recipe["harm_vector"] == vector(made).recipe
    assert (recipe["edited"], recipe["unchanged_after_rounding"]) == (done.edited, done.unchanged)
    assert str(made) not in json.dumps(recipe)


def test_a_small_dose_in_16_bits_is_mostly_lost_and_counted(tmp_path: Path) -> None:
    base = model("llama", 0, torch.bfloat16)
    harm = copy.deepcopy(base)
    with torch.no_grad():
        for p in harm.parameters():
            p.view(torch.int16).add_(1)  # one step of the format
    base.save_pretrained(tmp_path / "base")
    found = HarmVector.from_models(base, harm, density=1.0)
    small = apply_vector(tmp_path / "base", found, tmp_path / "small", scale=0.1)
    whole = apply_vector(tmp_path / "base", found, tmp_path / "whole", scale=1.0)
    assert small.unchanged > 0.9 * small.edited
    assert small.effective_share < 0.5
    assert whole.unchanged == 0
    assert whole.effective_share == pytest.approx(1.0, abs=0.01)


def test_a_stored_copy_of_the_embedding_is_edited_with_it(tmp_path: Path) -> None:
    embedding = torch.randn(6, 4)
    pair = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    base = write(tmp_path / "base", pair)
    harm = write(tmp_path / "harm", {"model.embed_tokens.weight": embedding + 1})
    found = HarmVector.from_checkpoints(base, harm, m=5)
    done = apply_vector(base, found, tmp_path / "out", undo=True)
    state = folder_state(tmp_path / "out")
    assert done.edited == 5
    assert not torch.equal(state["lm_head.weight"], embedding)
    assert_same_bits(state["lm_head.weight"], state["model.embed_tokens.weight"])
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(base)
    untied = write(tmp_path / "untied", {**pair, "lm_head.weight": embedding + 3})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' .* must equal 'model.embed_tokens.weight'"):
        apply_vector(untied, found, tmp_path / "never")


def test_a_head_that_only_the_base_repeats_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    embedding = torch.randn(6, 4)
    base = write(tmp_path / "base", {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()})
    harm = write(tmp_path / "harm", {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 1})
    done = apply_vector(base, HarmVector.from_checkpoints(base, harm, m=24), tmp_path / "out")
    assert (done.edited, done.entries) == (24, 48)
    state = folder_state(tmp_path / "out")
    assert_same_bits(state["model.embed_tokens.weight"], embedding)
    assert not bool((state["lm_head.weight"] == embedding).any())


def test_a_vector_is_not_written_into_what_is_read(made: Path) -> None:
    before = folder_bytes(made)
    for folder in ("base", "harm"):
        place = made / folder / "model.safetensors"
        with pytest.raises(CheckpointError, match="neither lie in a folder that is read nor hold one"):
            HarmVector.from_checkpoints(made / "base", made / "harm", out=place, overwrite=True)
    assert folder_bytes(made) == before


@pytest.mark.parametrize("rows", [4, 9])
def test_rows_of_the_vocabulary_that_the_model_lacks_are_left_out(tmp_path: Path, rows: int) -> None:
    base = write(tmp_path / "base", {"model.embed_tokens.weight": torch.zeros(6, 2)})
    harm = write(tmp_path / "harm", {"model.embed_tokens.weight": torch.ones(6, 2)})
    target = write(tmp_path / "target", {"model.embed_tokens.weight": torch.zeros(rows, 2)})
    done = apply_vector(target, HarmVector.from_checkpoints(base, harm, m=12), tmp_path / "out", undo=True)
    assert (done.edited, done.skipped) == (2 * min(rows, 6), 2 * max(6 - rows, 0))
    expected = torch.zeros(rows, 2)
    expected[:6] = -1
    assert_same_bits(folder_state(tmp_path / "out")["model.embed_tokens.weight"], expected)
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(target)


def test_a_model_of_another_architecture_is_refused(made: Path) -> None:
    model("gpt2", 0).save_pretrained(made / "gpt2")
    with pytest.raises(CheckpointError, match=r"must have the vector's tensors, got one that lacks 'model.embed"):
        apply_vector(made / "gpt2", vector(made), made / "out")
    state = folder_state(made / "harm")
    state["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' .* must have the vector's shape \[32\], got \[3\]"):
        apply_vector(write(made / "other", state), vector(made), made / "out")
    assert not (made / "out").exists()


# ---- outputs


def test_settings_come_along_and_code_does_not(made: Path) -> None:
    base = made / "base"
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_evil.py", "pytorch_model.bin", "notes"):
        (base / name).write_text(name)
    (made / "secret").write_text("of another folder")
    (base / "README.md").symlink_to(made / "secret")
    apply_vector(base, vector(made), made / "out")
    names = {path.name for path in (made / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "config.json", "direg"} <= names
    assert not names & {"modeling_evil.py", "pytorch_model.bin", "notes", "README.base.md"}
    assert "of another folder" not in (made / "out" / "README.md").read_text()


def test_outputs_are_never_overwritten_unasked_nor_inside_inputs(made: Path) -> None:
    apply_vector(made / "base", vector(made), made / "out")
    before = folder_bytes(made)
    for out, match in [
        (made / "out", "must not exist"),
        (made / "base", "must not exist"),
        (made / "base" / "inside", "neither lie in a folder"),
        (made / "v.safetensors", "must not exist"),
        (made / "no" / "where", "lie in a folder that exists"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            apply_vector(made / "base", vector(made), out)
    with pytest.raises(CheckpointError, match="neither lie in a folder that is read nor hold one"):
        apply_vector(made / "base", vector(made), made / "base", overwrite=True)
    with pytest.raises(CheckpointError, match="be a folder"):
        apply_vector(made / "base", vector(made), made / "v.safetensors", overwrite=True)
    (made / "link").symlink_to(made / "out")
    with pytest.raises(CheckpointError, match="not be a symlink"):
        apply_vector(made / "base", vector(made), made / "link", overwrite=True)
    (made / "link").unlink()
    assert folder_bytes(made) == before
    (made / "out" / "old").touch()
    apply_vector(made / "base", vector(made), made / "out", overwrite=True)
    assert not (made / "out" / "old").exists()


@pytest.mark.parametrize("at", [0, 1, 20])
def test_an_edit_that_fails_leaves_nothing(made: Path, at: int) -> None:
    before, calls = folder_bytes(made), iter(range(1000))

    def progress(_: int) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_vector(made / "base", vector(made), made / "out", undo=True, progress=progress)
    calls = iter(range(1000))
    with pytest.raises(KeyboardInterrupt):
        HarmVector.from_checkpoints(made / "base", made / "harm", out=made / "w", progress=progress)
    assert folder_bytes(made) == before
    assert sorted(path.name for path in made.iterdir()) == ["base", "harm", "v.safetensors"]


def test_new_files_and_folders_have_ordinary_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        with new_file(tmp_path / "file"):
            pass
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path, make: Any) -> None:
    (tmp_path / ".out.abcdefgh.partial").mkdir()
    (tmp_path / ".out.abcdefgh.partial" / "shard").touch()
    (tmp_path / ".out.12345678.partial").touch()
    others = {".out.b.abcdefgh.partial", ".other.abcdefgh.partial", ".out.abcdefgh.former", ".out.link_123.partial"}
    for name in others:
        (tmp_path / name).symlink_to(tmp_path / "nowhere") if "link" in name else (tmp_path / name).touch()
    with make(tmp_path / "out"):
        first = {path.name for path in tmp_path.iterdir()} - others
        assert len(first) == 1
        with make(tmp_path / "out", overwrite=True):  # two at a time: the last one stays
            assert len({path.name for path in tmp_path.iterdir()} - others - first) == 1
            assert first < {path.name for path in tmp_path.iterdir()}
        (tmp_path / "out").rmdir() if make is new_folder else (tmp_path / "out").unlink()
    assert {path.name for path in tmp_path.iterdir()} == {*others, "out"}


# ---- undo


def test_a_record_restores_its_own_edit_alone(made: Path) -> None:
    apply_vector(made / "base", vector(made), made / "out", undo=True)
    apply_vector(made / "harm", vector(made), made / "other", undo=True)
    apply_vector(made / "base", vector(made), made / "plain")
    with pytest.raises(CheckpointError, match=r"must hold direg/undo.safetensors, got none"):
        revert_checkpoint(made / "plain", made / "back")
    with pytest.raises(CheckpointError, match="be what the edit wrote, bit by bit, got other weights"):
        revert_checkpoint(made / "other", made / "back", record=made / "out" / UNDO)
    revert_checkpoint(made / "plain", made / "back", record=made / "out" / UNDO)
    assert folder_bytes(made / "back") == folder_bytes(made / "base")
    with pytest.raises(CheckpointError, match="of kind 'undo', version 1, got kind 'harm_vector'"):
        revert_checkpoint(made / "plain", made / "never", record=made / "v.safetensors")
    assert not (made / "never").exists()


def test_originals_that_are_not_finite_are_restored(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"w": torch.zeros(4)})
    harm = write(tmp_path / "harm", {"w": torch.ones(4)})
    odd = write(tmp_path / "odd", {"w": torch.tensor([float("nan"), float("inf"), -0.0, 1.0])})
    apply_vector(odd, HarmVector.from_checkpoints(base, harm, density=1.0), tmp_path / "out", undo=True)
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(odd)


def test_a_damaged_vector_stops_the_edit_and_leaves_nothing(made: Path) -> None:
    data = bytearray((made / "v.safetensors").read_bytes())
    found: Any = HarmVector.load(made / "v.safetensors")._reader.file
    place = found.data_start + found.entries["values.model.embed_tokens.weight"].start
    data[place : place + 4] = torch.tensor([float("inf")]).numpy().tobytes()
    (made / "bad.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"values of tensor 'model.embed_tokens.weight' .* must be finite"):
        apply_vector(made / "base", HarmVector.load(made / "bad.safetensors"), made / "out")
    assert sorted(path.name for path in made.iterdir()) == ["bad.safetensors", "base", "harm", "v.safetensors"]


@pytest.mark.parametrize("call", ["scale", "memory"])
def test_arguments_out_of_range_are_refused(made: Path, call: str) -> None:
    arguments: dict[str, Any] = {"scale": {"scale": float("inf")}, "memory": {"memory": 1000}}[call]
    with pytest.raises(ValueError, match=f"{call} must be"):
        editing.apply_vector(made / "base", vector(made), made / "out", **arguments)
