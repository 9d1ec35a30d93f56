"""Harm vectors: the bits of topm_subtract_ from any sharding, files that are checked, views, live models."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from prosocial_ext import reference
from prosocial_ext.direg import HarmVector, subtract_harm_
from prosocial_ext.direg import extract as extraction
from prosocial_ext.direg.checkpoint import Checkpoint
from prosocial_ext.direg.checkpoint_edit import apply_vector
from prosocial_ext.direg.errors import CheckpointError
from prosocial_ext.direg.pairing import Pairs, pair_checkpoints, pair_models
from prosocial_ext.direg.positions import decode_gaps, encode_gaps, gap_bytes
from prosocial_ext.direg.safetensors_file import SafetensorsFile
from prosocial_ext.direg.sparse_file import SparseReader
from tests.asserts import assert_same_bits
from tests.direg.files import FAMILIES, model, tuned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in sorted(module.named_parameters())}


def entries(vector: HarmVector) -> dict[str, tuple[list[int], Tensor]]:
    found = {}
    for name in vector.tensors:
        blocks = list(vector.blocks(name))
        found[name] = (
            [int(position) for positions, _ in blocks for position in positions],
            torch.cat([values for _, values in blocks]) if blocks else torch.zeros(0),
        )
    return found


def assert_selected(vector: HarmVector, base: list[Tensor], harm: list[Tensor], **arguments: Any) -> None:
    """The vector holds what the reference selects from these tensors."""
    delta = reference.topm_select(base, harm, **arguments)
    ours = entries(vector)
    first = 0
    for count, (name, (positions, values)) in zip(delta.counts.tolist(), ours.items(), strict=True):
        assert positions == delta.indices[first : first + count].tolist(), name
        assert_same_bits(values.to(delta.values.dtype), delta.values[first : first + count], name)
        first += count


def folders(tmp_path: Path, family: str, dtype: torch.dtype, shards: tuple[str, str]) -> tuple[Any, Any, Path, Path]:
    base = model(family, 0, dtype)
    harm = tuned(base, 1)
    for module, name, size in ((base, "base", shards[0]), (harm, "harm", shards[1])):
        module.save_pretrained(tmp_path / name, max_shard_size=size)
    return base, harm, tmp_path / "base", tmp_path / "harm"


# ---- selection


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [("5GB", "5GB"), ("9KB", "23KB")], ids=["single", "sharded"])
def test_checkpoints_and_models_give_what_topm_selects(
    tmp_path: Path, family: str, dtype: torch.dtype, shards: tuple[str, str]
) -> None:
    base, harm, base_folder, harm_folder = folders(tmp_path, family, dtype, shards)
    if shards[0] != "5GB":
        assert len(list(base_folder.glob("*.safetensors"))) > len(list(harm_folder.glob("*.safetensors"))) > 1
    from_files = HarmVector.from_checkpoints(base_folder, harm_folder, density=0.1)
    ours, theirs = parameters(base), parameters(harm)
    assert list(from_files.tensors) == list(ours)
    assert from_files.n == sum(p.numel() for p in base.parameters())
    assert from_files.entries == int(0.1 * from_files.n)
    assert_selected(from_files, list(ours.values()), list(theirs.values()), density=0.1)
    from_models = HarmVector.from_models(base, harm)  # 0.10 is the default
    assert_selected(from_models, list(ours.values()), list(theirs.values()), density=0.1)
    assert from_models.recipe["base_fingerprint"] == from_files.recipe["base_fingerprint"]


@pytest.mark.parametrize("always_miss", [False, True], ids=["sampled", "missed"])
@pytest.mark.parametrize("case", ["normal", "ties", "equal", "one_moved", "float64", "importance"])
def test_a_sampled_edge_changes_nothing(case: str, always_miss: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 65,536 entries an edge is sampled; the result is the reference's, also when it missed."""
    monkeypatch.setattr(extraction, "_CHUNK", 1 << 15)
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (301, 700), "b": (0,), "c": (100_003,)}
    base = {name: torch.zeros(size) for name, size in sizes.items()}
    harm = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    importance = None
    if case == "ties":
        harm = {name: t.round() for name, t in harm.items()}
    elif case == "equal":
        harm = {name: torch.ones_like(t) for name, t in harm.items()}
    elif case == "one_moved":
        harm = {name: torch.zeros_like(t) for name, t in harm.items()}
        harm["c"][-1] = -1e-40
    elif case == "float64":
        harm["a"] = harm["a"].double()
    elif case == "importance":
        importance = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    holder = module_of(base)
    for m in (0, 1, 3000, 31_070, sum(t.numel() for t in base.values())):
        pairs = pair_models(holder, harm, importance)
        vector = extracted(pairs, m=m, always_miss=always_miss)
        weights = None if importance is None else list(importance.values())
        assert_selected(vector, list(base.values()), list(harm.values()), m=m, importance=weights)


def module_of(tensors: dict[str, Tensor]) -> nn.Module:
    holder = nn.Module()
    for name, tensor in tensors.items():
        holder.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
    return holder


def extracted(pairs: Pairs, **arguments: Any) -> HarmVector:
    import os
    import tempfile

    with tempfile.TemporaryFile() as file:
        options = {"m": None, "density": None, "scope": "global", "recipe": {"rank": "magnitude"}, **arguments}
        extraction.extract(pairs, file.fileno(), Path(tempfile.gettempdir()), **options)
        return HarmVector(SparseReader(SafetensorsFile("x", os.dup(file.fileno())), "harm_vector"))


def test_the_file_does_not_depend_on_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, base, harm = folders(tmp_path, "llama", torch.bfloat16, ("5GB", "9KB"))
    HarmVector.from_checkpoints(base, harm, out=tmp_path / "one.safetensors")
    monkeypatch.setattr(extraction, "_CHUNK", 64)
    HarmVector.from_checkpoints(base, harm, out=tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize("scope", ["per_tensor", "per_layer"])
def test_scopes_select_in_every_group(scope: str) -> None:
    base = model("llama", 0)
    harm = tuned(base, 1)
    vector = HarmVector.from_models(base, harm, density=0.2, scope=scope)
    ours, theirs = parameters(base), parameters(harm)
    if scope == "per_tensor":
        assert_selected(vector, list(ours.values()), list(theirs.values()), density=0.2, scope="per_tensor")
        return
    layer = [name for name in ours if ".layers.1." in name]
    delta = reference.topm_select([ours[n] for n in layer], [theirs[n] for n in layer], density=0.2)
    assert [vector.tensors[name].entries for name in layer] == delta.counts.tolist()
    assert vector.tensors["model.norm.weight"].entries == 6


def test_globs_choose_the_tensors() -> None:
    base = model("llama", 0)
    vector = HarmVector.from_models(
        base, tuned(base, 1), density=1.0, include=["*mlp*"], exclude=["*.0.*", "*up_proj*"]
    )
    assert list(vector.tensors) == [f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "gate")]
    for argument in ("include", "exclude"):
        with pytest.raises(CheckpointError, match=rf"{argument} must match a tensor, got 'nothing\*'"):
            HarmVector.from_models(base, base, **{argument: ["nothing*"]})
    with pytest.raises(CheckpointError, match="must leave a tensor"):
        HarmVector.from_models(base, base, exclude=["*"])
    with pytest.raises(TypeError, match=r"include must be a list of globs.*Pass \['\*mlp\*'\]"):
        HarmVector.from_models(base, base, include="*mlp*")


def test_importance_ranks_and_may_be_a_folder(tmp_path: Path) -> None:
    base, harm, base_folder, harm_folder = folders(tmp_path, "llama-tied", torch.float32, ("9KB", "5GB"))
    generator = torch.Generator().manual_seed(5)
    importance = {name: torch.rand(p.shape, generator=generator) for name, p in parameters(base).items()}
    (tmp_path / "importance").mkdir()
    safetensors.torch.save_file(importance, tmp_path / "importance" / "model.safetensors")
    arguments = {"density": 0.05, "importance": list(importance.values())}
    for given_importance in (importance, tmp_path / "importance"):
        vector = HarmVector.from_checkpoints(base_folder, harm_folder, density=0.05, importance=given_importance)
        assert_selected(vector, list(parameters(base).values()), list(parameters(harm).values()), **arguments)
    assert vector.recipe["rank"] == "importance"
    with pytest.raises(CheckpointError, match="top must be asked of a vector ranked by magnitude"):
        vector.top(0.01)
    importance["model.norm.weight"][3] = -1
    with pytest.raises(CheckpointError, match=r"importance of 'model.norm.weight' must be finite and not negative"):
        HarmVector.from_checkpoints(base_folder, harm_folder, importance=importance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_difference_that_is_not_finite_is_refused(value: float) -> None:
    base = model("llama", 0)
    harm = tuned(base, 1)
    with torch.no_grad():
        harm.model.norm.weight[3] = value
    with pytest.raises(CheckpointError, match=r"differences at 'model.norm.weight' must be finite, got 1 NaN or Inf"):
        HarmVector.from_models(base, harm)


@pytest.mark.parametrize(
    "arguments", [{"density": 0.0}, {"density": 1.5}, {"m": -1}, {"m": 1, "density": 0.5}], ids=str
)
def test_a_count_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    base = model("llama", 0)
    with pytest.raises(ValueError, match=r"density|m must"):
        HarmVector.from_models(base, base, **arguments)


# ---- pairs of checkpoints


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


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
        assert checkpoint.describe() == {"name": None, "commit": "c0ffee"}
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


# ---- files


def test_positions_survive_both_encodings() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 200, 20_000, 3_000_000, 2**45):
        positions = torch.randint(size, (500,), generator=generator).unique()
        encoded = encode_gaps(positions, -1)
        assert len(encoded) == gap_bytes(positions, -1)
        gaps, left = decode_gaps(encoded)
        assert left == 0
        assert ((gaps + 1).cumsum(0) - 1).tolist() == positions.tolist()


@pytest.mark.parametrize("density", [0.001, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_saved_vector_loads_to_the_same_entries(tmp_path: Path, density: float, dtype: torch.dtype) -> None:
    base = model("gpt2", 0, dtype)
    vector = HarmVector.from_models(base, tuned(base, 1), density=density)
    vector.save(tmp_path / "v.safetensors")
    again = HarmVector.load(tmp_path / "v.safetensors")
    assert again.recipe == vector.recipe
    for name, (positions, values) in entries(vector).items():
        assert entries(again)[name][0] == positions
        assert_same_bits(entries(again)[name][1], values)
    encodings = {tensor.encoding for tensor in again.tensors.values()}
    assert ("bitmap" if density == 0.9 else "gaps") in encodings
    assert sum(safetensors.torch.load_file(tmp_path / "v.safetensors")["magnitudes"][:, 1]) == vector.n
    with pytest.raises(CheckpointError, match="must not exist"):
        vector.save(tmp_path / "v.safetensors")
    vector.save(tmp_path / "v.safetensors", overwrite=True)


def test_positions_take_about_a_byte_each_at_a_tenth(tmp_path: Path) -> None:
    base = module_of({"w": torch.zeros(1000, 1000)})
    vector = HarmVector.from_models(base, {"w": torch.randn(1000, 1000)}, density=0.1)
    vector.save(tmp_path / "v.safetensors")
    assert vector.file_bytes == (tmp_path / "v.safetensors").stat().st_size
    with SafetensorsFile(tmp_path / "v.safetensors") as file:
        assert file.entries["values.w"].numel == 100_000
        assert 100_000 <= file.entries["positions.w"].numel < 101_000


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_top_is_an_extraction_at_the_lower_density(tmp_path: Path, scope: str) -> None:
    base = model("llama", 0, torch.bfloat16)
    harm = tuned(base, 1)
    wide = HarmVector.from_models(base, harm, density=0.5, scope=scope)
    for density in (0.5, 0.2, 0.01):
        view, direct = wide.top(density), HarmVector.from_models(base, harm, density=density, scope=scope)
        assert view.entries == direct.entries
        view.save(tmp_path / f"{density}")
        for vector in (view, HarmVector.load(tmp_path / f"{density}"), view.top(density)):
            assert entries(vector).keys() == entries(direct).keys()
            for name, (positions, values) in entries(direct).items():
                assert entries(vector)[name][0] == positions
                assert_same_bits(entries(vector)[name][1], values)
    with pytest.raises(CheckpointError, match=r"at most the .* stored entries"):
        wide.top(0.6)


def test_a_scaled_view_has_scaled_values(tmp_path: Path) -> None:
    base = model("llama", 0)
    vector = HarmVector.from_models(base, tuned(base, 1))
    double = vector.scale(-2.0)
    double.save(tmp_path / "v")
    for scaled in (double, HarmVector.load(tmp_path / "v")):
        assert scaled.recipe["factor"] == -2.0
        for name, (positions, values) in entries(vector).items():
            assert entries(scaled)[name][0] == positions
            assert_same_bits(entries(scaled)[name][1], values * -2)
        assert scaled.stats().total.energy_share == pytest.approx(vector.stats().total.energy_share)
    with pytest.raises(CheckpointError, match="keep values finite"):
        entries(huge())
    with pytest.raises(ValueError, match="not be 0"):
        vector.scale(0)


def huge() -> HarmVector:
    base = module_of({"w": torch.zeros(2)})
    return HarmVector.from_models(base, {"w": torch.tensor([1e10, 0.0])}, m=1).scale(1e38)


def test_stats_count_entries_and_energy() -> None:
    base = nn.Linear(2, 2)
    harm = copy.deepcopy(base)
    with torch.no_grad():
        for p, value in ((base.weight, 0.0), (base.bias, 0.0)):
            p.fill_(value)
        harm.weight.copy_(torch.tensor([[6.0, 0.0], [8.0, 1.0]]))
        harm.bias.zero_()
    total = HarmVector.from_models(base, harm, m=2).stats()
    assert [(row.name, row.kept, row.entries) for row in total.tensors] == [("bias", 0, 2), ("weight", 2, 4)]
    assert total.total.energy_share == pytest.approx(100 / 101)
    assert HarmVector.from_models(base, base, m=2).stats().total.energy_share == 0.0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "v.safetensors"
    base = module_of({"a": torch.zeros(40, 8), "b": torch.zeros(300)})
    generator = torch.Generator().manual_seed(0)
    harm = {"a": torch.randn(40, 8, generator=generator), "b": torch.randn(300, generator=generator) / 9}
    HarmVector.from_models(base, harm, density=0.4).save(path)
    assert {t.encoding for t in HarmVector.load(path).tensors.values()} == {"bitmap", "gaps"}
    return path


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_a_damaged_vector_is_refused_or_edits_inside_its_tensors(saved: Path, data: st.DataObject) -> None:
    damaged = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        if data.draw(st.booleans()):
            damaged[place] = data.draw(st.integers(0, 255))
        else:
            damaged[place] = data.draw(st.sampled_from(b'0123456789-{}[]",:e.'))
    path = saved.with_name("damaged.safetensors")
    path.write_bytes(damaged)
    try:
        vector = HarmVector.load(path)
        for name, tensor in vector.tensors.items():
            last, count = -1, 0
            for positions, values in vector.blocks(name):
                assert positions.tolist() == sorted(set(positions.tolist()))
                assert last < int(positions[0])
                assert bool(values.isfinite().all())
                last, count = int(positions[-1]), count + len(positions)
            assert last < tensor.numel
            assert count == tensor.entries
    except CheckpointError:
        pass


def test_other_safetensors_files_are_no_harm_vectors(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="of kind 'harm_vector', version 1, got kind None"):
        HarmVector.load(tmp_path / "w.safetensors")


# ---- live models


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


def test_pairs_of_checkpoints_and_models_agree(tmp_path: Path) -> None:
    base, harm, base_folder, harm_folder = folders(tmp_path, "gpt2", torch.float32, ("9KB", "5GB"))
    with Checkpoint(base_folder) as one, Checkpoint(harm_folder) as other:
        names = [pair.name for pair in pair_checkpoints(one, other).pairs]
    assert names == [pair.name for pair in pair_models(base, harm).pairs]


def test_the_reader_in_the_documentation_reads_what_is_written(saved: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "harm_vector.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    expected = entries(HarmVector.load(saved))
    found = list(names["read"](saved))
    assert [name for name, *_ in found] == list(expected)
    for name, _, positions, values in found:
        assert positions.tolist() == expected[name][0]
        assert_same_bits(torch.from_numpy(values), expected[name][1])
