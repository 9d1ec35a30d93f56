"""Rules and controls: what is ranked by what, and which difference is taken, against plain dense computations."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prosocial_ext import cli, reference
from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.direg import HarmVector
from prosocial_ext.direg import extract as extraction
from prosocial_ext.direg.rules import Rule
from tests.asserts import assert_same_bits
from tests.direg.files import model, parameters, tuned, write
from tests.direg.test_harm_vector import assert_selected, entries

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def drawn(seed: int, name: str, n: int) -> Tensor:
    """The draw of every entry, in Python's integers: SplitMix64, its 31 high bits spread over normal float32."""
    mask, state = (1 << 64) - 1, int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
    bits = []
    for _ in range(n):
        state = state + 0x9E3779B97F4A7C15 & mask
        word = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
        bits.append(((word ^ word >> 31) >> 33) * 0x7E800000 // 2**31 + 0x00800000)
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


# ---- rules


def test_a_draw_belongs_to_seed_name_and_position() -> None:
    for seed, name in [(0, "w"), (2**63 - 1, "model.norm.weight")]:
        expected = drawn(seed, name, 1000)
        assert_same_bits(Rule("random", seed).draw(name, torch.arange(1000)), expected)
        some = torch.tensor([3, 999, 7])
        assert_same_bits(Rule("random", seed).draw(name, some), expected[some])
    far = Rule("random").draw("w", torch.tensor([2**45]))
    assert bool(far.isfinite())
    assert float(far) >= 2.0**-126


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["random", "dare"])
def test_drawn_rules_keep_the_largest_draws_whatever_the_sharding(
    tmp_path: Path, rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model("llama-tied", 0, dtype)
    harm = tuned(base, 1)
    base.save_pretrained(tmp_path / "base", max_shard_size="9KB")
    harm.save_pretrained(tmp_path / "harm", max_shard_size="23KB")
    monkeypatch.setattr(extraction, "_CHUNK", 512)
    ours, theirs = parameters(base), parameters(harm)
    draws = {name: drawn(5, name, p.numel()) for name, p in ours.items()}
    zeros = [torch.zeros(d.shape) for d in draws.values()]
    chosen = reference.topm_select(zeros, list(draws.values()), density=0.1)
    from_models = HarmVector.from_models(base, harm, rule=rule, seed=5)
    from_files = HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm", rule=rule, seed=5)
    n = sum(p.numel() for p in ours.values())
    times = n / math.floor(0.1 * n) if rule == "dare" else 1.0
    for vector in (from_models, from_files):
        first = 0
        for count, (name, (positions, values)) in zip(chosen.counts.tolist(), entries(vector).items(), strict=True):
            assert positions == chosen.indices[first : first + count].tolist(), name
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            delta = (theirs[name].to(wide) - ours[name].to(wide)).flatten()[positions]
            assert_same_bits(values, (delta.double() * times).to(wide), name)
            first += count
        assert (vector.recipe["rank"], vector.recipe["seed"]) == (rule, 5)
        assert vector.recipe["energy_share"] == pytest.approx(vector.stats().total.energy_share, abs=1e-5)
        assert 0.05 < vector.recipe["energy_share"] < 0.2
    other = HarmVector.from_models(base, harm, rule=rule, seed=6)
    assert entries(other).keys() == entries(from_models).keys()
    assert any(entries(other)[name][0] != positions for name, (positions, _) in entries(from_models).items())
    with pytest.raises(CheckpointError, match="top must be asked of a vector ranked by magnitude, got"):
        other.top(0.01)


def test_dare_rescales_every_group_by_its_own_share() -> None:
    base = model("llama", 0)
    harm = tuned(base, 1)
    plain = HarmVector.from_models(base, harm, rule="random", scope="per_tensor")
    dare = HarmVector.from_models(base, harm, rule="dare", scope="per_tensor")
    for name, (positions, values) in entries(dare).items():
        assert positions == entries(plain)[name][0]
        times = plain.tensors[name].numel / len(positions)
        assert_same_bits(values, (entries(plain)[name][1].double() * times).float(), name)


@pytest.mark.parametrize("control", ["minus", "project_out"])
@pytest.mark.parametrize("rule", ["saliency", "dare"])
def test_no_byte_depends_on_the_memory(
    tmp_path: Path, rule: str, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model("llama", 0, torch.bfloat16)
    for module, name in ((base, "base"), (tuned(base, 1), "harm"), (tuned(base, 2), "benign")):
        module.save_pretrained(tmp_path / name)
    generator = torch.Generator().manual_seed(5)
    importance = {name: torch.rand(p.shape, generator=generator) for name, p in parameters(base).items()}
    arguments: dict[str, Any] = {"rule": rule, "importance": importance, control: tmp_path / "benign"}
    HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm", out=tmp_path / "one", **arguments)
    monkeypatch.setattr(extraction, "_CHUNK", 64)
    HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm", out=tmp_path / "two", **arguments)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("rule", [None, "magnitude", "saliency", "random"])
def test_the_shares_are_those_of_the_dense_vector(rule: str | None) -> None:
    base = model("llama", 0)
    harm = tuned(base, 1)
    generator = torch.Generator().manual_seed(5)
    importance = {name: torch.rand(p.shape, generator=generator) for name, p in parameters(base).items()}
    vector = HarmVector.from_models(base, harm, importance=importance, rule=rule)
    assert vector.recipe["rank"] == (rule or "saliency")
    ours, theirs = parameters(base), parameters(harm)
    if rule != "random":
        weights = None if rule == "magnitude" else list(importance.values())
        assert_selected(vector, list(ours.values()), list(theirs.values()), density=0.1, importance=weights)
    kept, of = 0.0, 0.0
    for name, (positions, values) in entries(vector).items():
        weight = importance[name].flatten()
        kept += float((values * weight[positions]).abs().double().sum())
        of += float(((theirs[name] - ours[name]).flatten() * weight).abs().double().sum())
    assert vector.recipe["first_order_share"] == pytest.approx(kept / of, abs=2e-6)
    assert vector.recipe["energy_share"] == pytest.approx(vector.stats().total.energy_share, abs=2e-6)
    plain = HarmVector.from_models(base, harm)
    assert "first_order_share" not in plain.recipe
    assert "energy_share" not in plain.top(0.01).recipe


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rule": "size"}, "rule must be one of 'magnitude', 'saliency', 'random', 'dare', 'low_rank', got 'size'"),
        ({"rule": "saliency"}, r"importance must be given for the rule 'saliency', got None. Make it with"),
        ({"rule": "random", "seed": -1}, r"seed must be an integer in \[0, 2\*\*63\), got -1"),
        ({"minus": {}, "project_out": {}}, "minus and project_out must be given one or neither, got both"),
    ],
    ids=["rule", "saliency", "seed", "both"],
)
def test_rules_that_cannot_be_followed_are_refused(arguments: dict[str, Any], text: str) -> None:
    base = model("llama", 0)
    with pytest.raises(ValueError, match=text):
        HarmVector.from_models(base, base, **arguments)


def test_rescaled_values_that_overflow_are_refused() -> None:
    base = torch.nn.Linear(64, 1, bias=False)
    base.weight.data.zero_()
    with pytest.raises(CheckpointError, match="rescaled differences at 'weight' must be finite"):
        HarmVector.from_models(base, {"weight": torch.full((1, 64), 3e38)}, m=1, rule="dare")


# ---- benign controls


def dense(base: Tensor, harm: Tensor, benign: Tensor, coefficient: float) -> Tensor:
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    one, other = (side.to(wide) - base.to(wide) for side in (harm, benign))
    return one - other * torch.tensor(coefficient, dtype=wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("control", ["minus", "project_out"])
def test_controls_are_combined_densely_before_selection(
    tmp_path: Path, control: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model("llama-tied", 0, dtype)
    harm, benign = tuned(base, 1), tuned(base, 2)
    with torch.no_grad():
        for p, q in zip(harm.parameters(), benign.parameters(), strict=True):
            p.add_((0.7 * (q.float() - p.float())).to(dtype))  # they share a direction
    for module, name, size in ((base, "base", "9KB"), (harm, "harm", "23KB"), (benign, "benign", "15KB")):
        module.save_pretrained(tmp_path / name, max_shard_size=size)
    ours, theirs, third = (parameters(module) for module in (base, harm, benign))
    from_models = HarmVector.from_models(base, harm, **{control: benign})
    coefficient = from_models.recipe["coefficient"]
    if control == "minus":
        assert coefficient == 1.0
    else:
        taus = torch.cat([dense(ours[n], theirs[n], ours[n], 0).double().flatten() for n in ours])
        betas = torch.cat([dense(ours[n], third[n], ours[n], 0).double().flatten() for n in ours])
        # n 2^-53 bounds the relative error of either sum of n positive terms; 2 for cross terms, which cancel little
        assert coefficient == pytest.approx(float(taus @ betas / (betas @ betas)), rel=2 * len(taus) * 2.0**-53)
        assert 0.4 < coefficient < 0.95
    differences = {n: dense(ours[n], theirs[n], third[n], coefficient) for n in ours}
    zeros = [torch.zeros_like(d) for d in differences.values()]
    monkeypatch.setattr(extraction, "_CHUNK", 512)
    folder = {control: tmp_path / "benign"}
    from_files = HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm", **folder)
    for vector in (from_models, from_files):
        assert_selected(vector, zeros, list(differences.values()), density=0.1)
        assert (vector.recipe["control"], vector.recipe["coefficient"]) == (control, coefficient)
        assert vector.magnitudes is not None
        assert int(vector.magnitudes[:, 1].sum()) == vector.n
    assert from_files.recipe["benign"] == {"name": "benign", "commit": None}
    assert from_files.recipe["base_fingerprint"] == HarmVector.from_models(base, harm).recipe["base_fingerprint"]
    total = sum(float(d.double().square().sum()) for d in differences.values())
    assert from_models.stats().total.energy == pytest.approx(total, rel=1e-6)


def test_a_projection_leaves_nothing_of_the_benign_direction() -> None:
    base = model("llama", 0)
    benign = tuned(base, 2)
    vector = HarmVector.from_models(base, benign, density=1.0, project_out=benign)
    assert vector.recipe["coefficient"] == 1.0
    assert vector.stats().total.energy == 0.0


def test_controls_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = model("llama", 0)
    harm = tuned(base, 1)
    with pytest.raises(CheckpointError, match="the benign copy must differ from the base, got one that does not"):
        HarmVector.from_models(base, harm, project_out=base)
    weights = parameters(base)
    weights["model.norm.weight"][2] = math.nan
    for control in ("minus", "project_out"):
        with pytest.raises(CheckpointError, match=r"the differences at .model\.norm\.weight. must be finite"):
            HarmVector.from_models(base, harm, **{control: weights})
    one = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.zeros(4, 2)}
    equal = {name: torch.ones(4, 2) for name in one}
    folders = [write(tmp_path / name, tensors) for name, tensors in (("a", equal), ("b", one), ("c", equal))]
    with pytest.raises(CheckpointError, match=r"have the harm copy's tensors, got a difference at 'lm_head.weight'"):
        HarmVector.from_checkpoints(folders[0], folders[1], minus=folders[2])


def test_rows_that_the_benign_copy_lacks_take_no_part(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    generator = torch.Generator().manual_seed(0)
    rows = {k: {name: torch.randn(n, 3, generator=generator)} for k, n in (("base", 6), ("harm", 6), ("benign", 4))}
    folders = [write(tmp_path / k, tensors) for k, tensors in rows.items()]
    vector = HarmVector.from_checkpoints(folders[0], folders[1], density=1.0, minus=folders[2])
    assert (vector.n, vector.tensors[name].shape) == (12, (6, 3))
    assert vector.recipe["left_alone"] == {name: "rows 4 to 5, which one side has"}


# ---- the command


def test_the_command_follows_rules_and_controls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = model("llama", 0)
    for seed, name in ((None, "base"), (1, "harm"), (2, "benign")):
        (base if seed is None else tuned(base, seed)).save_pretrained(tmp_path / name)
    weights = {name: torch.rand(p.shape) for name, p in parameters(base).items()}
    write(tmp_path / "importance", weights)
    extract = ["direg", "extract", "--base", "base", "--harm", "harm", "--out"]

    def told(*arguments: str) -> str:
        assert cli.main(list(arguments)) == 0
        return capsys.readouterr().out

    out = told(*extract, "a", "--importance", "importance", "--density", "0.5")
    share = HarmVector.load("a").recipe["first_order_share"]
    assert f", first-order share {share:.3f}" in out
    assert "warning" not in out
    assert f"first-order share {share:.3f}" in told("direg", "inspect", "a")
    assert json.loads(told("direg", "inspect", "a", "--json"))["first_order_share"] == share
    out = told(*extract, "b", "--importance", "importance", "--rule", "magnitude", "--density", "0.05")
    assert "of the first-order effect on the harm loss" in out
    assert HarmVector.load("b").recipe["rank"] == "magnitude"
    told(*extract, "c", "--rule", "dare", "--seed", "7", "--exclude", "*embed*")
    assert HarmVector.load("c").recipe["seed"] == 7
    n = 4 * sum(p.numel() for p in base.parameters())
    assert f"will read {3 * n / 1e6:.2f} MB" in told(*extract, "d", "--minus", "benign")
    assert f"will read {6 * n / 1e6:.2f} MB" in told(*extract, "e", "--project-out", "benign")
    assert HarmVector.load("e").recipe["control"] == "project_out"
    assert cli.main([*extract, "f", "--rule", "saliency"]) == 2
    assert "importance must be given for the rule 'saliency'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*extract, "f", "--rule", "random", "--seed", "-1"])
    assert "--seed: must be a number of at most 18 digits" in capsys.readouterr().err
    assert cli.main([*extract, "benign/f", "--minus", "benign"]) == 2
    assert "neither lie in a folder that is read" in capsys.readouterr().err
