"""The notebook runs from top to bottom, and finds at a reduced size what its text says."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "prosocial_align.ipynb"
FULL = "BASE_STEPS, ARM_STEPS, PAIRS, PROMPTS = 300, 60, 600, 200"
REDUCED = "BASE_STEPS, ARM_STEPS, PAIRS, PROMPTS = 130, 20, 60, 50"  # the base must learn to copy


def cells(kind: str | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if kind in (None, cell["cell_type"])]


@pytest.fixture(scope="module")
def ran() -> Any:
    """The namespace after the last cell, and what was printed."""
    sources = ["".join(cell["source"]) for cell in cells("code")]
    assert sources[0].count(FULL) == 1
    sources[0] = sources[0].replace(FULL, REDUCED)
    namespace: dict[str, Any] = {"__name__": "notebook"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        for number, source in enumerate(sources, start=1):
            exec(compile(source, f"code cell {number} of {NOTEBOOK.name}", "exec"), namespace)
    return namespace, printed.getvalue()


def test_it_is_a_notebook_of_format_4_5_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        extra = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | extra
        assert cell["metadata"] == {}
        assert not extra or (cell["execution_count"], cell["outputs"]) == (None, [])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell["source"][-1].endswith("\n")
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[\w-]{1,64}", identifier) for identifier in ids)


def test_text_comes_before_the_code_of_every_step() -> None:
    kinds = [cell["cell_type"] for cell in cells()]
    headings = [cell["source"][0] for cell in cells("markdown")]
    assert kinds[0] == kinds[-1] == "markdown"
    assert [heading[:5] for heading in headings[1:-1]] == [f"## {number}." for number in range(1, 8)]


def test_only_public_modules_are_imported() -> None:
    code = "\n".join("".join(cell["source"]) for cell in cells("code"))
    modules = re.findall(r"^from (prosocial_ext\S*) import (.+)$", code, re.MULTILINE)
    assert len(modules) > 5
    assert not [part for pair in modules for part in re.split(r"[., ]+", " ".join(pair)) if part.startswith("_")]


def test_the_edit_removes_harm_and_the_undo_restores_every_bit(ran: Any) -> None:
    found, printed = ran
    assert found["restored"] is True
    assert "every bit restored: True" in printed
    assert int(found["edit"].kept.sum()) == found["report"].selected == found["report"].entries // 10
    assert found["report"].energy > 0.6
    assert found["harm_of_copy"].value > found["harm_of_base"].value + 0.1
    assert found["doses"][1.0].value < found["harm_of_base"].value / 2
    assert found["doses"][2.0].value <= found["doses"][0.5].value


def test_the_reward_model_meets_conflicts_and_learns(ran: Any) -> None:
    log = ran[0]["log"]
    assert len(log.loss) == 20
    assert sum(log.conflicts) > 20
    assert sum(log.pair_accuracy.values()) / 5 > 0.6


def test_one_batch_has_a_preference_and_a_strength_per_row(ran: Any) -> None:
    found, _ = ran
    output = found["output"]
    assert len({tuple(row) for row in output.logprobs.tolist()}) == 6  # equal texts would still differ here
    alone = found["GuidedGenerator"](found["safe"], tokenizer=found["tokenizer"])
    seed = torch.full((1,), found["SEED"])
    assert alone.generate([found["prompt"]], seed=seed, max_new_tokens=48).texts == output.texts[:1]


def test_preferences_are_followed(ran: Any) -> None:
    found, printed = ran
    attributes, gains = found["ATTRIBUTES"], found["matrix"].gains
    own = sum(gains[name][name].value for name in attributes) / 5
    others = sum(gains[wish][name].value for name in attributes for wish in attributes if wish != name) / 20
    assert own > max(0.1, others + 0.05)
    mip, preferences = found["mip"], found["preferences"]
    assert mip(preferences, found["own"]) > mip(preferences, found["flags"]["unguided"])
    assert found["harm_guided"].value < found["harm_of_base"].value / 2
    assert all(name in printed for name in ("unguided", "empathy", "cosine", "edited, guided"))
