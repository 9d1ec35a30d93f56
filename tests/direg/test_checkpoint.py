"""Checkpoints on disk: which are read, which are refused, and how two of them are paired up."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.direg import HarmVector
from prosocial_ext.direg.pairing import pair_checkpoints, pair_models
from tests.direg.files import folders, write


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_plain_weights_of_any_width_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    with Checkpoint(write(tmp_path / "a", {"w": torch.ones(3, dtype=dtype)})) as checkpoint:
        assert checkpoint.parameters == ["w"]
        assert checkpoint.read("w", 0, 3).dtype == dtype


def test_a_head_that_repeats_the_embedding_counts_once(tmp_path: Path) -> None:
    embedding = torch.randn(6, 4)
    base = write(tmp_path / "a", {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()})
    harm = write(tmp_path / "b", {"model.embed_tokens.weight": embedding + 1})
    vector = HarmVector.from_checkpoints(base, harm, density=1.0)
    assert list(vector.tensors) == ["model.embed_tokens.weight"]
    assert vector.recipe["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    untied = write(tmp_path / "c", {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 2})
    assert len(HarmVector.from_checkpoints(base, untied, density=1.0).tensors) == 2
    with pytest.raises(CheckpointError, match=r"only .*c has 'lm_head.weight'"):
        HarmVector.from_checkpoints(harm, untied)


def test_integers_and_buffers_are_left_alone_and_reported(tmp_path: Path) -> None:
    base = write(
        tmp_path / "a", {"w": torch.zeros(4), "steps": torch.tensor([3]), "x.rotary_emb.inv_freq": torch.ones(2)}
    )
    harm = write(tmp_path / "b", {"w": torch.ones(4), "steps": torch.tensor([9])})
    vector = HarmVector.from_checkpoints(base, harm, density=1.0)
    assert list(vector.tensors) == ["w"]
    assert set(vector.recipe["left_alone"]) == {"steps", "x.rotary_emb.inv_freq"}


def test_rows_of_the_vocabulary_that_one_side_has_take_no_part(tmp_path: Path) -> None:
    base = write(tmp_path / "a", {"model.embed_tokens.weight": torch.zeros(6, 4), "w": torch.zeros(2)})
    harm = write(tmp_path / "b", {"model.embed_tokens.weight": torch.ones(8, 4), "w": torch.ones(2)})
    for one, other in ((base, harm), (harm, base)):
        vector = HarmVector.from_checkpoints(one, other, density=1.0)
        assert (vector.n, vector.entries) == (26, 26)
        assert vector.recipe["left_alone"] == {"model.embed_tokens.weight": "rows 6 to 7, which one side has"}


def test_other_names_and_shapes_are_listed(tmp_path: Path) -> None:
    base = write(tmp_path / "a", {"w": torch.zeros(2), "v": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"same tensors, got only .*a has 'v'; only .*b has 'u'"):
        HarmVector.from_checkpoints(base, write(tmp_path / "b", {"w": torch.zeros(2), "u": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"same shapes, got 'w' \[2\] and \[3\]"):
        HarmVector.from_checkpoints(base, write(tmp_path / "c", {"w": torch.zeros(3), "v": torch.zeros(2)}))


@pytest.mark.parametrize(
    ("tensors", "config", "match"),
    [
        ({"w": torch.zeros(2)}, {"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
        (
            {"w": torch.zeros(2)},
            {"text_config": {"quantization_config": {"quant_method": "awq"}}},
            "quantised by 'awq'",
        ),
        ({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, {}, "'w' .* be a plain weight, got a quantised one, F8_E4M3"),
        ({"w.weight_scale_inv": torch.zeros(2)}, {}, "'w.weight_scale_inv' .* be a plain weight"),
        ({"w.qweight": torch.zeros(2, dtype=torch.int32)}, {}, "be a plain weight, got a quantised one, I32"),
        ({"w.SCB": torch.zeros(2)}, {}, "be a plain weight"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, {}, "be real, got complex"),
    ],
    ids=["gptq", "awq", "fp8", "fp8_scale", "qweight", "bitsandbytes", "complex"],
)
def test_quantised_checkpoints_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        Checkpoint(write(tmp_path / "q", tensors, config))


def test_float64_is_no_quantised_dtype(tmp_path: Path) -> None:
    with Checkpoint(write(tmp_path / "wide", {"w": torch.zeros(2, dtype=torch.float64)})) as checkpoint:
        assert checkpoint.parameters == ["w"]


def test_a_config_may_hold_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"w": torch.zeros(2)})
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "longest": 1000000000000000019884624}')
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.parameters == ["w"]


def test_folders_without_safetensors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hold model.safetensors or .*index.json, got neither"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"'pytorch_model.bin' is a pickle.*never opened"):
        Checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"full checkpoint, got a peft adapter. Merge it first"):
        Checkpoint(tmp_path)
    for source in (str(tmp_path / "nothing"), "../x", "a/b/c"):
        with pytest.raises(CheckpointError, match="folder of a checkpoint or a hub id"):
            Checkpoint(source)


def test_an_index_is_believed_only_where_the_shards_agree(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    safetensors.torch.save_file({"w": torch.zeros(2)}, folder / "one.safetensors")
    safetensors.torch.save_file({"v": torch.zeros(2)}, folder / "two.safetensors")

    def index(weight_map: object, more: str = "") -> None:
        text = json.dumps({"metadata": {"total_size": 16.0}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text + more)

    index({"w": "one.safetensors", "v": "two.safetensors"})
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.parameters == ["v", "w"]
    for weight_map, match in [
        ({"w": "one.safetensors", "v": "one.safetensors"}, "one.safetensors must hold 'v'.*no such tensor"),
        ({"w": "one.safetensors"} | {"v": "three.safetensors"}, "three.safetensors must be a readable file"),
        ({"w": "../m/one.safetensors"}, "file of 'w' .* plain name"),
        ({"w": "/etc/passwd"}, "plain name"),
        ({"w": "one.bin"}, "plain name"),
        ({"w": 3}, "plain name"),
        ({}, "map tensors to files"),
        ([], "map tensors to files"),
    ]:
        index(weight_map)
        with pytest.raises(CheckpointError, match=match):
            Checkpoint(folder)
    index({"w": "one.safetensors", "v": "two.safetensors"}, "}")
    with pytest.raises(CheckpointError, match=r"index.json must be a JSON object"):
        Checkpoint(folder)
    safetensors.torch.save_file({"w": torch.zeros(2), "x": torch.zeros(2)}, folder / "one.safetensors")
    index({"w": "one.safetensors", "v": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"one.safetensors must hold the tensors that .* got also 'x'"):
        Checkpoint(folder)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_index_is_refused_or_places_every_tensor(tmp_path: Path, data: st.DataObject) -> None:
    text = b'{"metadata": {"total_size": 16}, "weight_map": {"v": "two.safetensors", "w": "one.safetensors"}}'
    for name, tensor in (("one", "w"), ("two", "v")):
        if not (tmp_path / f"{name}.safetensors").exists():
            safetensors.torch.save_file({tensor: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    damaged = bytearray(text)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (tmp_path / "model.safetensors.index.json").write_bytes(damaged)
    try:
        checkpoint = Checkpoint(tmp_path)
    except CheckpointError:
        return
    with checkpoint:
        assert all(checkpoint.read(name, 0, 2).tolist() == [0.0, 0.0] for name in checkpoint.parameters)


def test_a_hub_id_becomes_one_commit_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    write(tmp_path / "snapshot", {"w": torch.zeros(2)})
    calls: list[Any] = []

    class Api:
        def model_info(self, name: str, revision: str | None = None) -> Any:
            calls.append((name, revision))
            return type("Info", (), {"sha": "c0ffee"})()

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with Checkpoint("owner/name@refs/pr/1") as checkpoint:
        assert checkpoint.describe() == {"name": "owner/name", "commit": "c0ffee"}
    assert calls[0] == ("owner/name", "refs/pr/1")
    name, options = calls[1]
    assert (name, options["revision"]) == ("owner/name", "c0ffee")
    assert not any(pattern.endswith((".py", "*", ".bin")) and pattern not in ("LICENSE*", "NOTICE*")
                   for pattern in options["allow_patterns"])  # fmt: skip
    assert "*.py" in options["ignore_patterns"]

    def offline(name: str, **options: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"'owner/name' must be a folder, or a hub id .* got no network"):
        Checkpoint("owner/name")


def test_pairs_of_checkpoints_and_models_agree(tmp_path: Path) -> None:
    base, harm, base_folder, harm_folder = folders(tmp_path, "gpt2", torch.float32, ("9KB", "5GB"))
    with Checkpoint(base_folder) as one, Checkpoint(harm_folder) as other:
        names = [pair.name for pair in pair_checkpoints(one, other).pairs]
    assert names == [pair.name for pair in pair_models(base, harm).pairs]
