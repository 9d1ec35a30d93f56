"""Sums of harm vectors on the union of their entries, and values in 16 bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from prosocial_ext import cli
from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.direg import HarmVector, arithmetic
from tests.asserts import assert_same_bits
from tests.direg.files import model, parameters, tuned
from tests.direg.test_harm_vector import module_of


def dense(vector: HarmVector) -> dict[str, Tensor]:
    """The vector as whole tensors, NaN where nothing is stored."""
    found = {}
    for name, tensor in vector.tensors.items():
        flat = torch.full(tensor.shape, float("nan"), dtype=vector.dtype(name)).flatten()
        for positions, values in vector.blocks(name):
            flat[positions] = values
        found[name] = flat.view(tensor.shape)
    return found


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("sign", [1, -1], ids=["sum", "difference"])
def test_the_union_of_entries_is_added_to_the_bit(chunk: int, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_CHUNK", chunk)
    base = model("llama", 0)
    one = HarmVector.from_models(base, tuned(base, 1), density=0.2)
    other = HarmVector.from_models(base, tuned(base, 2), density=0.02, exclude=["*norm*"]).scale(3.0)
    found = dense(one + other if sign > 0 else one - other)
    theirs = dense(other)
    both = 0
    for name, a in dense(one).items():
        b = theirs.get(name, torch.full_like(a, float("nan")))
        both += int((a.isfinite() & b.isfinite()).sum())
        kept = a.isfinite() | b.isfinite()
        expected = a.nan_to_num() + b.nan_to_num() if sign > 0 else a.nan_to_num() - b.nan_to_num()
        assert_same_bits(found[name][kept], expected[kept], name)
        assert bool(found[name][~kept].isnan().all()), name
    assert both > 10
    assert len(found) == len(dense(one)) > len(theirs)


def test_a_sum_says_what_it_is_and_is_subtracted_and_saved(tmp_path: Path) -> None:
    base = model("llama", 0)
    one, other = (HarmVector.from_models(base, tuned(base, seed)) for seed in (1, 2))
    total = one + other
    total.save(tmp_path / "v")
    loaded = HarmVector.load(tmp_path / "v")
    assert loaded.recipe["operation"] == "one + other"
    assert loaded.recipe["one"] == one.recipe
    assert loaded.recipe["rank"] == "union of the stored entries"
    assert loaded.recipe["base_fingerprint"] == one.recipe["base_fingerprint"]
    assert loaded.recipe["m"] == loaded.entries > one.entries
    assert loaded.stats().total.energy_share == pytest.approx(1.0)
    expected = {n: p - dense(loaded)[n].nan_to_num() for n, p in parameters(base).items()}
    with loaded.subtracted_from(base):
        for name, p in parameters(base).items():
            assert_same_bits(p, expected[name], name)
    with pytest.raises(CheckpointError, match="ranked by magnitude, got 'union of the stored entries'"):
        total.top(0.01)
    elsewhere = tuned(base, 3)
    assert (one - HarmVector.from_models(elsewhere, base)).recipe["base_fingerprint"] == "0" * 16
    assert one.__add__(1) is NotImplemented  # type: ignore[operator]


def test_a_float64_tensor_keeps_its_width() -> None:
    base = module_of({"w": torch.zeros(3)})
    narrow = HarmVector.from_models(base, {"w": torch.tensor([1.0, 0.0, 3.0])}, m=2)
    wide = HarmVector.from_models(base, {"w": torch.tensor([1e-12, 2.0, 0.0], dtype=torch.float64)}, m=3)
    (positions, values), *_ = (narrow - wide).blocks("w")
    assert positions.tolist() == [0, 1, 2]
    assert_same_bits(values, torch.tensor([1 - 1e-12, -2.0, 3.0], dtype=torch.float64))


def test_vectors_that_do_not_fit_are_not_added() -> None:
    vectors = [HarmVector.from_models(module_of({"w": torch.zeros(n)}), {"w": torch.ones(n)}, m=1) for n in (2, 3)]
    with pytest.raises(CheckpointError, match=r"have the same shapes, got 'w' \[2\] and \[3\]"):
        vectors[0] + vectors[1]
    most = HarmVector.from_models(module_of({"w": torch.zeros(2)}), {"w": torch.full((2,), 3e38)}, m=1)
    with pytest.raises(CheckpointError, match="sums at 'w' must be finite"):
        most + most
    untied, tied = (model(family, 0) for family in ("llama", "llama-tied"))
    one, other = (HarmVector.from_models(m, tuned(m, 1), m=9) for m in (untied, tied))
    with pytest.raises(CheckpointError, match=r"same tensors tied, got 'lm_head\.weight' tied in one alone"):
        one + other


def test_rounded_values_are_the_nearest_and_say_what_they_lost(tmp_path: Path) -> None:
    base = model("llama", 0)
    exact = HarmVector.from_models(base, tuned(base, 1))
    exact.save(tmp_path / "exact")
    exact.save(tmp_path / "bf16", values="bf16")
    rounded = HarmVector.load(tmp_path / "bf16")
    saved = HarmVector.load(tmp_path / "exact").file_bytes - rounded.file_bytes
    assert saved == pytest.approx(2 * exact.entries, rel=0.02)
    ours = dense(exact)
    for name, values in dense(rounded).items():
        assert_same_bits(values, ours[name].bfloat16().float(), name)
    both = [torch.cat([t[t.isfinite()] for t in dense(v).values()]).double() for v in (exact, rounded)]
    error = float((both[1] - both[0]).norm() / both[0].norm())
    assert rounded.recipe["values_error"] == pytest.approx(error, rel=1e-4)
    assert 1e-4 < error < 2**-8
    assert torch.equal(rounded.magnitudes, exact.magnitudes)  # type: ignore[arg-type]
    rounded.scale(2.0).save(tmp_path / "scaled")  # views are saved in float32
    assert_same_bits(
        dense(HarmVector.load(tmp_path / "scaled"))["lm_head.weight"], dense(rounded)["lm_head.weight"] * 2
    )
    with pytest.raises(CheckpointError, match="vector with exact values, got 'bf16'"):
        rounded.top(0.01)
    huge = HarmVector.from_models(module_of({"w": torch.zeros(1)}), {"w": torch.tensor([3.4e38])}, m=1)
    with pytest.raises(CheckpointError, match="stay finite in bfloat16"):
        huge.save(tmp_path / "x", values="bf16")
    with pytest.raises(ValueError, match="values must be"):
        exact.save(tmp_path / "x", values="fp8")


def test_extract_rounds_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model("llama", 0)
    base.save_pretrained(tmp_path / "base")
    tuned(base, 1).save_pretrained(tmp_path / "harm")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["direg", "extract", "--base", "base", "--harm", "harm", "--out", "v", "--values", "bf16"]) == 0
    assert "values in bf16: relative error 1." in capsys.readouterr().out
    HarmVector.from_checkpoints("base", "harm").save("w", values="bf16")
    assert Path("v").read_bytes() == Path("w").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "harm", "v", "w"]
    with pytest.raises(ValueError, match="values must be 'exact' where out is None"):
        HarmVector.from_checkpoints("base", "harm", values="bf16")
