"""What people find beside the weights: cards that no metadata can smuggle markup into, and shared harm vectors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.direg import HarmVector
from prosocial_ext.direg.cards import edit_card, vector_card
from prosocial_ext.direg.checkpoint_edit import UNDO, apply_vector, revert_checkpoint
from tests.asserts import assert_same_bits
from tests.direg.files import folder_bytes, model, tuned


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with base, harm, and v.safetensors of them."""
    base = model("llama", 0, torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    tuned(base, 1).save_pretrained(tmp_path / "harm")
    HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm", out=tmp_path / "v.safetensors")
    return tmp_path


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    empty, front, body = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), body


def test_an_edited_checkpoint_says_what_it_is(made: Path) -> None:
    vector = HarmVector.load(made / "v.safetensors")
    done = apply_vector(made / "base", vector, made / "out", scale=0.5)
    front, body = parts((made / "out" / "README.md").read_text())
    assert front == {"library_name": "transformers", "tags": ["prosocial_ext", "direg", "safety", "task-arithmetic"]}
    assert f"| edited | {done.edited:,} of {done.entries:,} entries (density 0.0999" in body
    assert f"| unchanged after rounding | {done.unchanged} |" in body
    assert "| base | base |" in body
    assert "lowest position first" in body
    for limit in ("Over-refusal", "Abilities", "Embeddings"):
        assert f"**{limit}.**" in body
    kept = sum(t.entries for n, t in vector.tensors.items() if "embed" in n or "lm_head" in n)
    assert f"{kept / done.edited:.1%} of the edited entries lie in embeddings" in body


def test_the_base_card_is_kept_and_comes_back(made: Path) -> None:
    (made / "base" / "README.md").write_text("the base's own")
    vector = HarmVector.load(made / "v.safetensors")
    for number, dtype in enumerate((None, torch.float32)):
        out, back = made / f"out{number}", made / f"back{number}"
        apply_vector(made / "base", vector, out, undo=True, dtype=dtype)
        assert (out / "README.base.md").read_text() == "the base's own"
        assert "[README.base.md](README.base.md)" in (out / "README.md").read_text()
        revert_checkpoint(out, back)
        assert folder_bytes(back) == folder_bytes(made / "base")
    apply_vector(made / "out0", vector, made / "twice", undo=True)  # the card of the first edit is the base's here
    assert (made / "twice" / "README.base.md").read_text() == (made / "out0" / "README.md").read_text()
    revert_checkpoint(made / "twice", made / "once", record=made / "twice" / UNDO)
    assert (made / "once" / "README.md").read_text() == (made / "out0" / "README.md").read_text()


def test_a_hub_model_is_named_as_the_base() -> None:
    recipe = {"model": {"name": "meta-llama/Llama-3.1-8B-Instruct", "commit": "c0ffee"}}
    assert parts(edit_card(recipe, base_card=False))[0]["base_model"] == "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize("evil", ["a\n---\nlicense: mit", "<script>alert(1)</script>", "[x](http://y) | `z`", "‮é\x00"])
def test_metadata_is_data(evil: str) -> None:
    origin = {"name": evil, "commit": evil}
    vector = {"base": origin, "tuned": origin, "rank": evil, "scope": evil, "density": [evil], "include": {evil: evil}}
    recipe = {"model": origin, "harm_vector": vector, "dtype": evil, "prosocial_ext": evil, "scale": evil}
    for card in (
        edit_card(recipe, base_card=True),
        vector_card(vector, entries=1, n=2, energy_share=0.5, of_vocabulary=0),
        edit_card({**recipe, "harm_vector": evil, "model": evil}, base_card=False),
    ):
        front, body = parts(card)
        assert set(front) == {"library_name", "tags"}
        assert "<" not in body.replace("\\<", "")
        assert "](http" not in body.replace("](https://arxiv.org/abs/2512.06515)", "")
        assert not any(len(row.replace("\\|", "").split("|")) != 4 for row in body.splitlines() if row.startswith("|"))
        assert "\x00" not in body
        assert "\u202e" not in body


# ---- harm vectors


def test_a_vector_is_saved_with_card_and_recipe_and_opened_again(made: Path) -> None:
    vector = HarmVector.load(made / "v.safetensors").top(0.01)
    vector.save_pretrained(made / "shared")
    assert sorted(folder_bytes(made / "shared")) == ["README.md", "harm.safetensors", "recipe.json"]
    again = HarmVector.from_pretrained(made / "shared")
    assert again.entries == vector.entries
    for name in vector.tensors:
        for (p, v), (q, w) in zip(vector.blocks(name), again.blocks(name), strict=True):
            assert_same_bits(p, q)
            assert_same_bits(v, w)
    assert json.loads((made / "shared" / "recipe.json").read_text()) == again.recipe
    front, body = parts((made / "shared" / "README.md").read_text())
    assert front["library_name"] == "prosocial_ext"
    assert f"| entries | {vector.entries:,} of {vector.n:,}" in body
    with pytest.raises(CheckpointError, match="must not exist"):
        vector.save_pretrained(made / "shared")
    with pytest.raises(CheckpointError, match="revision must be None for a folder"):
        HarmVector.from_pretrained(made / "shared", revision="main")
    with pytest.raises(CheckpointError, match=r"base/harm.safetensors must be a readable file"):
        HarmVector.from_pretrained(made / "base")


class Hub:
    """Stands for huggingface_hub: what was asked, and the files that a repository has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Path, error: Exception | None = None) -> None:
        import huggingface_hub

        self.calls: list[tuple[str, dict[str, Any]]] = []
        hub = self

        class Api:
            def create_repo(self, repo_id: str, **options: Any) -> None:
                if error:
                    raise error
                hub.calls.append((repo_id, options))

            def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> Any:
                hub.calls.append((repo_id, options))
                for path in Path(folder_path).iterdir():
                    (store / path.name).write_bytes(path.read_bytes())
                return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})()

            def model_info(self, name: str, revision: str | None = None) -> Any:
                hub.calls.append((name, {"revision": revision}))
                return type("Info", (), {"sha": "c0ffee"})()

        def download(name: str, **options: Any) -> str:
            hub.calls.append((name, options))
            return str(store)

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_vector_goes_to_the_hub_in_private_and_comes_back(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made / "store").mkdir()
    hub = Hub(monkeypatch, made / "store")
    vector = HarmVector.load(made / "v.safetensors")
    assert vector.push_to_hub("owner/harm") == "https://hub/owner/harm/commit/1"
    assert hub.calls[0] == ("owner/harm", {"private": True, "exist_ok": True})
    assert hub.calls[1][1] == {"commit_message": "Upload harm vector", "revision": None, "create_pr": False}
    again = HarmVector.from_pretrained("owner/harm", revision="v1")
    assert again.recipe == vector.recipe
    assert hub.calls[2] == ("owner/harm", {"revision": "v1"})
    assert hub.calls[3][1]["revision"] == "c0ffee"
    assert hub.calls[3][1]["allow_patterns"] == ["harm.safetensors"]
    vector.push_to_hub("owner/harm", private=False, create_pr=True, revision="dev", commit_message="Again")
    assert hub.calls[4][1]["private"] is False
    assert hub.calls[5][1] == {"commit_message": "Again", "revision": "dev", "create_pr": True}


def test_what_the_hub_refuses_is_said(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = HarmVector.load(made / "v.safetensors")
    Hub(monkeypatch, made, OSError("403 Forbidden\nmore"))
    with pytest.raises(CheckpointError, match=r"'owner/harm' must take an upload, got 403 Forbidden\. Log in"):
        vector.push_to_hub("owner/harm")
    with pytest.raises(CheckpointError, match="repo_id must be a hub id"):
        vector.push_to_hub("../harm")
    for source, revision in (("../harm", None), ("owner/harm", "a..b"), ("owner/harm", "x y")):
        with pytest.raises(CheckpointError, match="be a folder of a checkpoint or a hub id"):
            HarmVector.from_pretrained(source, revision)
