"""The rule low_rank: the nearest matrices of a rank, against torch.linalg.svd, spectra that are known, and rivals."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prosocial_ext import cli
from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.commands import direg
from prosocial_ext.direg import HarmVector, apply_vector, low_rank, revert_checkpoint
from prosocial_ext.direg.low_rank import plan_ranks
from prosocial_ext.direg.pairing import Pairs, pair_models
from prosocial_ext.direg.ranks import Ranks
from prosocial_ext.direg.sweep import Cell, plan_cells
from tests.asserts import assert_same_bits
from tests.direg.files import folder_bytes, folders, model, parameters, tuned, write
from tests.direg.test_adapter import adapter
from tests.direg.test_adapter import dense as dense_of_adapter
from tests.direg.test_harm_vector import module_of

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def stored(vector: HarmVector) -> dict[str, Tensor]:
    """Every tensor of a vector that stores all of its entries."""
    found = {}
    for name, tensor in vector.tensors.items():
        blocks = list(vector.blocks(name))
        positions = torch.cat([positions for positions, _ in blocks])
        assert torch.equal(positions, torch.arange(tensor.numel)), name
        found[name] = torch.cat([values for _, values in blocks])
    return found


def of_zero(tensors: dict[str, Tensor], **arguments: Any) -> HarmVector:
    """The low-rank vector of these differences."""
    base = module_of({name: torch.zeros_like(t) for name, t in tensors.items()})
    return HarmVector.from_models(base, tensors, rule="low_rank", **arguments)


def difference(base: nn.Module, harm: nn.Module) -> dict[str, Tensor]:
    wide = {name: torch.float64 if p.dtype == torch.float64 else torch.float32 for name, p in base.named_parameters()}
    ours, theirs = parameters(base), parameters(harm)
    return {name: theirs[name].to(wide[name]) - ours[name].to(wide[name]) for name in ours}


def with_spectrum(spectrum: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A drawn float64 matrix of these singular values."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(n, len(spectrum), generator=generator, dtype=torch.float64) for n in (rows, columns)]
    left, right = (torch.linalg.qr(side).Q for side in sides)
    return left * spectrum @ right.T


def pairs_of(*shapes: tuple[int, ...]) -> Pairs:
    """Pairs of these shapes without data."""
    base = nn.Module()
    for i, shape in enumerate(shapes):
        base.register_parameter(f"w{i}", nn.Parameter(torch.empty(shape, device="meta")))
    return pair_models(base, base)


# ---- the approximation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_matrices_are_the_truncated_svd(dtype: torch.dtype) -> None:
    base = model("llama", 0, dtype)
    harm = tuned(base, 1)
    vector = HarmVector.from_models(base, harm, density=0.3, rule="low_rank")
    found, ranks = stored(vector), vector.recipe["ranks"]
    for name, tau in difference(base, harm).items():
        if tau.ndim < 2:
            assert name not in ranks
            assert_same_bits(found[name], tau, name)
            continue
        rows, columns = tau.shape
        rank = ranks[name]
        assert rank == math.floor(0.3 * rows * columns / (rows + columns))
        left, s, right = torch.linalg.svd(tau.double(), full_matrices=False)
        expected = left[:, :rank] * s[:rank] @ right[:rank]
        # A backward error of n 2^-52 sigma_1 in either SVD turns the subspace by that over the gap (Wedin), and moves
        # the product by as much times 2 sigma_1; then one rounding to what is stored.
        backward = 2 * max(rows, columns) * 2.0**-52 * float(s[0])
        turned = backward * (1 + 2 * float(s[0]) / float(s[rank - 1] - s[rank]))
        bound = turned + torch.finfo(tau.dtype).eps / 2 * expected.abs()
        assert bool(((found[name].view(tau.shape).double() - expected).abs() <= bound).all()), name


KNOWN = {
    "root": lambda k: k**-0.5,
    "exponential": lambda k: torch.exp(-k / 20),
    "step": lambda k: torch.where(k <= 10, 1.0, 1e-3),
    "flat": None,
}


@pytest.mark.parametrize("spectrum", KNOWN)
def test_large_matrices_are_near_the_optimum(spectrum: str) -> None:
    rows, columns = 900, 600
    assert rows * columns > low_rank._EXACT
    law = KNOWN[spectrum]
    tau = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if law is not None:
        tau = with_spectrum(law(torch.arange(1, columns + 1, dtype=torch.float64)), rows, columns)
    vector = of_zero({"w": tau}, density=0.1)
    (rank,) = vector.recipe["ranks"].values()
    s = torch.linalg.svdvals(tau)
    optimum = float(s[rank:].norm())
    error = float((stored(vector)["w"].view_as(tau) - tau).norm())
    assert optimum * (1 - 1e-12) <= error <= optimum * {"root": 1.003, "flat": 1.01}.get(spectrum, 1 + 1e-5)
    share = 1 - error**2 / float(tau.square().sum())
    assert vector.recipe["energy_share"] == pytest.approx(share, abs=1e-6)  # it has six digits
    assert vector.stats().total.energy_share == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "drawn"])
def test_no_rival_of_the_same_rank_holds_more(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_EXACT", 1 << 30 if exact else 0)
    generator = torch.Generator().manual_seed(3)
    spectrum = torch.arange(1, 121, dtype=torch.float64) ** -0.7
    tau = with_spectrum(spectrum, 200, 120)
    vector = of_zero({"w": tau}, density=0.2)
    (rank,) = vector.recipe["ranks"].values()
    held = vector.stats().total.kept_energy
    rivals = []
    for _ in range(20):
        drawn = torch.randn(120, rank, generator=generator, dtype=torch.float64)
        rivals += [drawn, tau.T @ (tau @ drawn)]
        rivals.append(tau[torch.randperm(200, generator=generator)[:rank]].T)  # the span of some of its rows
    rivals.append(torch.eye(120, dtype=torch.float64)[:, tau.square().sum(0).topk(rank).indices])  # largest columns
    for rival in rivals:
        assert float((tau @ torch.linalg.qr(rival).Q).square().sum()) < held
    assert held == pytest.approx(float(spectrum[:rank].square().sum()), rel=1e-12 if exact else 1e-3)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "drawn"])
def test_a_matrix_of_that_rank_is_left_as_it_is(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_EXACT", 1 << 30 if exact else 0)
    generator = torch.Generator().manual_seed(0)
    tau = torch.randn(300, 7, generator=generator) @ torch.randn(7, 200, generator=generator)
    tau[40:50] = 0
    vector = of_zero({"w": tau, "z": torch.zeros(300, 200)}, density=0.1)
    assert vector.recipe["ranks"] == {"w": 12, "z": 12}
    found = stored(vector)
    # tau is of rank 7 up to its own rounding, 2^-24 of an entry; what is stored is rounded once more
    assert float((found["w"].view_as(tau) - tau).abs().max()) <= 2 * 2.0**-24 * float(tau.abs().max())
    assert not found["w"].view_as(tau)[40:50].any()  # rows that nothing moved stay as they are
    assert not found["z"].any()
    assert vector.recipe["energy_share"] == 1.0


def test_an_adapter_keeps_all_of_its_rank(tmp_path: Path) -> None:
    base, lora = adapter(tmp_path, "llama", target_modules=["q_proj"])
    vector = HarmVector.from_adapter(base, lora, density=0.3, rule="low_rank")
    assert vector.recipe["ranks"]["model.layers.0.self_attn.q_proj.weight"] == 4
    assert vector.recipe["energy_share"] == 1.0
    found = stored(vector)
    for name, tau in dense_of_adapter(lora, "llama", torch.float32).items():
        most = 2 * 2.0**-24 * float(tau.abs().max())
        assert float((found[name] - tau.flatten()).abs().max()) <= most


# ---- ranks


def test_factors_take_the_share_of_the_numbers() -> None:
    shapes = [(300, 100), (100, 300), (4, 30, 50), (7,), (), (1, 900), (3, 3), (0, 5), (2, 0, 4)]
    assert plan_ranks(pairs_of(*shapes), m=None, density=0.1) == {"w0": 7, "w1": 7, "w2": 1, "w6": 1}
    for density in (0.01, 0.1, 0.5, 0.99):
        for name, rank in plan_ranks(pairs_of(*shapes), m=None, density=density).items():
            rows, columns = shapes[int(name[1:])][-2:]
            assert rank == 1 or rank * (rows + columns) <= density * rows * columns < (rank + 1) * (rows + columns)
    assert plan_ranks(pairs_of(*shapes), m=None, density=1.0) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_density_one_is_the_difference_itself(dtype: torch.dtype) -> None:
    base = model("gpt2", 0, dtype)
    harm = tuned(base, 1)
    vector = HarmVector.from_models(base, harm, density=1.0, rule="low_rank")
    assert (vector.recipe["ranks"], vector.recipe["energy_share"]) == ({}, 1.0)
    found = stored(vector)
    for name, tau in difference(base, harm).items():
        assert_same_bits(found[name], tau.flatten(), name)


def test_a_stack_is_a_matrix_per_place(tmp_path: Path) -> None:
    tau = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(0))
    found = stored(of_zero({"w": tau}))["w"].view_as(tau)
    for i in range(3):
        assert_same_bits(found[i], stored(of_zero({"w": tau[i]}))["w"].view(40, 50))
    name = "model.embed_tokens.weight"  # rows that one side lacks take no part
    here = [write(tmp_path / k, {name: t}) for k, t in (("base", torch.zeros(40, 50)), ("harm", tau[0, :30]))]
    vector = HarmVector.from_checkpoints(*here, rule="low_rank")
    assert (vector.tensors[name].numel, vector.tensors[name].shape) == (1500, (40, 50))
    assert_same_bits(stored(vector)[name], stored(of_zero({"w": tau[0, :30]}))["w"])


# ---- the file


def test_no_byte_depends_on_sharding_or_memory_but_on_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_EXACT", 0)
    base, harm, base_folder, harm_folder = folders(tmp_path, "llama-tied", torch.bfloat16, ("9KB", "23KB"))
    arguments: dict[str, Any] = {"density": 0.1, "rule": "low_rank", "seed": 3}
    HarmVector.from_checkpoints(base_folder, harm_folder, out=tmp_path / "one", **arguments)
    HarmVector.from_checkpoints(base_folder, harm_folder, out=tmp_path / "two", memory=64 << 20, **arguments)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    live = HarmVector.from_models(base, harm, **arguments)
    vector = HarmVector.load(tmp_path / "one")
    in_memory = stored(live)
    for name, values in stored(vector).items():
        assert_same_bits(in_memory[name], values, name)
    wide = {"w": torch.randn(200, 150, generator=torch.Generator().manual_seed(0))}  # wider than the drawn start
    first, same, other = (stored(of_zero(wide, seed=seed))["w"] for seed in (0, 0, 1))
    assert_same_bits(first, same)
    assert not torch.equal(first, other)
    plain = HarmVector.from_checkpoints(base_folder, harm_folder).recipe
    recipe = vector.recipe
    assert (recipe["base_fingerprint"], recipe["tied"]) == (plain["base_fingerprint"], plain["tied"])
    assert (recipe["rank"], recipe["seed"], recipe["density"], recipe["m"]) == ("low_rank", 3, 0.1, vector.n)
    tau = difference(base, harm)
    for row in vector.stats().tensors:
        assert row.energy == pytest.approx(float(tau[row.name].double().square().sum()), rel=1e-12)


def test_what_harm_vectors_can_do_works_on_it(tmp_path: Path) -> None:
    base, _, base_folder, harm_folder = folders(tmp_path, "llama", torch.bfloat16, ("9KB", "5GB"))
    vector = HarmVector.from_checkpoints(base_folder, harm_folder, rule="low_rank", out=tmp_path / "v")
    before, found = parameters(base), stored(vector)
    with vector.subtracted_from(base, scale=0.5):
        for name, p in base.named_parameters():
            assert_same_bits(p, (before[name].float() - 0.5 * found[name].view(p.shape)).bfloat16(), name)
        base.save_pretrained(tmp_path / "live", max_shard_size="9KB")
    for name, p in base.named_parameters():
        assert_same_bits(p, before[name], name)
    apply_vector(base_folder, vector, tmp_path / "safe", scale=0.5, undo=True)
    weights = {name: data for name, data in folder_bytes(tmp_path / "live").items() if name.endswith(".safetensors")}
    assert weights.items() <= folder_bytes(tmp_path / "safe").items()
    revert_checkpoint(tmp_path / "safe", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(base_folder)
    for name, values in stored(vector - vector.scale(2.0)).items():
        assert torch.equal(values, -found[name]), name
    assert plan_cells(vector, [0.1], [1.0]) == [Cell(0.0, 0.0), Cell(0.1, 1.0)]
    with pytest.raises(CheckpointError, match="top must be asked of a vector ranked by magnitude, got 'low_rank'"):
        vector.top(0.01)


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"m": 7}, "m must be None with the rule 'low_rank', got 7. Pass density"),
        ({"scope": "per_layer"}, "scope must be 'global' with the rule 'low_rank', got 'per_layer'"),
        ({"density": 0.0}, r"density must be a number in \(0, 1\], got 0.0"),
        ({"seed": -1}, "seed must be an integer in"),
        ({"importance": {"w": torch.ones(4, 4)}}, "importance must be None for the rule 'low_rank', got one"),
    ],
    ids=["m", "scope", "density", "seed", "importance"],
)
def test_arguments_that_mean_nothing_here_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        of_zero({"w": torch.ones(4, 4)}, **arguments)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CheckpointError, match="the differences at 'w' must be finite, got NaN or Inf"):
        of_zero({"w": torch.full((4, 4), math.nan)})
    with pytest.raises(CheckpointError, match="the approximation of 'w' must be finite, got Inf"):
        of_zero({"w": 3.4e38 * torch.tensor([[1.0, 1.0], [1.0, 0.0]])})  # becomes 1.17 at the corner


def test_memory_that_factors_do_not_fit_in_is_refused_by_name() -> None:
    embedding = pairs_of((128_256, 4096))
    assert plan_ranks(embedding, m=None, density=0.1) == {"w0": 396}
    with pytest.raises(
        ValueError, match=r"memory must be at least \d+ bytes for rank 396 of 'w0', got 67108864. Raise"
    ):
        plan_ranks(embedding, m=None, density=0.1, memory=64 << 20)
    with pytest.raises(ValueError, match="memory must be at least 67108864 bytes, got 1"):
        plan_ranks(embedding, m=None, density=0.1, memory=1)


def test_several_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, base, harm = folders(tmp_path, "llama", torch.float32, ("5GB", "5GB"))
    text = "ranks must be one process with the rule 'low_rank', got 2. Start it without torchrun."
    with pytest.raises(ValueError, match=text):
        HarmVector.from_checkpoints(base, harm, rule="low_rank", out=tmp_path / "v", ranks=Ranks(0, 2))
    monkeypatch.setattr(direg, "torchrun_ranks", lambda: contextlib.nullcontext(Ranks(0, 2)))
    command = ["direg", "extract", "--base", str(base), "--harm", str(harm), "--rule", "low_rank", "--out", "v"]
    assert cli.main(command) == 2
    assert text in capsys.readouterr().err


# ---- the command


def test_the_command_tells_ranks_reads_and_energy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, *_ = folders(tmp_path, "llama", torch.float32, ("5GB", "5GB"))
    monkeypatch.chdir(tmp_path)
    n, whole = sum(p.numel() for p in base.parameters()), sum(p.numel() for p in base.parameters() if p.ndim < 2)
    command = ["direg", "extract", "--base", "base", "--harm", "harm", "--rule", "low_rank", "--out", "v"]
    count = f"{n:,} of {n:,} entries (density 1.000000)"
    size = 8 * (3 * n - whole)  # small matrices are read three times, the others twice
    for arguments in ([*command, "--dry-run"], command):
        assert cli.main(arguments) == 0
        told = capsys.readouterr().out.splitlines()
        assert told[0] == f"will read {size / 1e6:.2f} MB and write {count} to v"
        assert told[1] == "low rank: 16 of 21 tensors at ranks 1 to 2, the others whole"
        assert (tmp_path / "v").exists() == (arguments is command)
    vector = HarmVector.load("v")
    assert vector.recipe["density"] == 0.1
    share = vector.recipe["energy_share"]
    assert 0.1 < share < 0.5
    assert told[2] == f"extracted {count}, energy share {share:.3f}"
    assert told[4].startswith(f"warning: the ranks kept hold {share:.0%} of the vector's energy")
    seen: list[int] = []
    HarmVector.from_checkpoints("base", "harm", rule="low_rank", progress=seen.append)
    assert sum(seen) == size
    assert cli.main([*command[:-1], "x", "--m", "7"]) == 2
    assert "m must be None with the rule 'low_rank', got 7" in capsys.readouterr().err
    assert cli.main([*command[:-1], "x", "--density", "1"]) == 0
    assert "low rank: 0 of 21 tensors, the others whole" in capsys.readouterr().out
