"""Harm vectors: the bits of topm_subtract_ from any sharding, files that are checked, views, live models."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prosocial_ext import reference
from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.checkpoints.safetensors_file import SafetensorsFile
from prosocial_ext.direg import HarmVector
from prosocial_ext.direg import extract as extraction
from prosocial_ext.direg.pairing import Pairs, pair_models
from prosocial_ext.direg.positions import decode_gaps, encode_gaps, gap_bytes
from prosocial_ext.direg.sparse_file import SparseReader
from tests.asserts import assert_same_bits
from tests.direg.files import FAMILIES, folders, model, parameters, tuned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    assert vector.recipe["rank"] == "saliency"
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


# ---- files


def test_positions_survive_both_encodings() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 200, 20_000, 3_000_000, 2**45):
        positions = torch.randint(size, (500,), generator=generator).unique()
        encoded = encode_gaps(positions, -1)
        assert len(encoded) == gap_bytes(positions, -1)
        decoded, used, inside = decode_gaps(encoded, len(positions), -1, 2**48)
        assert (used, inside) == (len(encoded), True)
        assert decoded.tolist() == positions.tolist()


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
