"""Sweeps: every cell has the weights of `apply`, nothing is measured twice, and what is no result is refused."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prosocial_ext import cli
from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.errors import CheckpointError
from prosocial_ext.direg import HarmVector
from prosocial_ext.direg.checkpoint_edit import apply_vector
from prosocial_ext.direg.sweep import Cell, SweepTable, plan_cells, sweep_checkpoint, sweep_model
from tests.asserts import assert_same_bits
from tests.direg.files import folder_bytes, folder_state, model, parameters, tuned

MEASURE = """
calls = []


def norms(model, tokenizer):
    calls.append(tokenizer)
    total = sum(float(p.detach().double().square().sum()) for p in model.parameters())
    return {"harm_rate": total, "over_refusal": -total, "utility": 1}


def alone(model, tokenizer):
    return {"total": norms(model, tokenizer)["harm_rate"]}


def broken(model, tokenizer):
    if len(calls) == 2:
        raise RuntimeError("out of luck")
    return norms(model, tokenizer)
"""
COMMAND = """
import json, sys, zlib
print("some other line")
print(json.dumps({"sum": zlib.crc32(open(sys.argv[1] + "/model.safetensors", "rb").read())}))
"""
CELLS = [(0.0, 0.0), (0.01, 0.5), (0.01, 2.0), (0.1, 0.5), (0.1, 2.0)]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base, v.safetensors, a module and a program that measure."""
    base = model("llama", 0, torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    HarmVector.from_models(base, tuned(base, 1)).save(tmp_path / "v.safetensors")
    (tmp_path / "measure_doses.py").write_text(MEASURE)
    (tmp_path / "program.py").write_text(COMMAND)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "measure_doses", raising=False)
    return tmp_path


def sweep(evaluate: str, out: str = "out", scales: str = "0.5,2") -> list[str]:
    return ["direg", "sweep", "--model", "base", "--harm-vector", "v.safetensors", "--densities", "0.01,0.1",
            "--scales", scales, "--evaluate", evaluate, "--out", out]  # fmt: skip


def table(path: Path) -> dict[tuple[float, float], dict[str, float]]:
    with path.open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {(row.pop("density"), row.pop("scale")): row for row in rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cell_has_the_weights_of_apply_and_the_model_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    base = model("llama", 0, dtype)
    base.save_pretrained(tmp_path / "base")
    vector = HarmVector.from_models(base, tuned(base, 1))
    before = parameters(base)
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(live: nn.Module, tokenizer: Any) -> dict[str, float]:
        assert not live.training
        seen.append(parameters(live))
        return {"n": len(seen)}

    cells = plan_cells(vector, [0.01, 0.1], [0.5, 2.0])
    assert cells == CELLS
    found = SweepTable(tmp_path / "sweep.csv")
    sweep_model(base.train(), None, vector, cells, evaluate, found)
    for name, p in parameters(base).items():
        assert_same_bits(p, before[name], name)
        assert_same_bits(seen[0][name], before[name], name)
    for (density, scale), weights in zip(cells[1:], seen[1:], strict=True):
        apply_vector(tmp_path / "base", vector.top(density), tmp_path / "out", scale=scale, overwrite=True)
        for name, tensor in folder_state(tmp_path / "out").items():
            assert_same_bits(weights[name], tensor, name)
    assert SweepTable(tmp_path / "sweep.csv").rows == found.rows == {
        Cell(*cell): {"n": float(i + 1)} for i, cell in enumerate(CELLS)
    }  # fmt: skip


def test_a_sweep_that_failed_goes_on_where_it_was(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(sweep("measure_doses:broken")) == 2
    told = capsys.readouterr().err
    assert "RuntimeError: out of luck" in told  # with its place: it is the user's function
    assert "the function failed with RuntimeError; 2 cells are in out/sweep.csv" in told
    assert list(table(made / "out" / "sweep.csv")) == CELLS[:2]
    sys.modules["measure_doses"].calls.append(None)  # mended
    assert cli.main(sweep("measure_doses:broken")) == 0
    assert "will measure 3 of 5 cells, 2 are in out/sweep.csv" in capsys.readouterr().out
    assert list(table(made / "out" / "sweep.csv")) == CELLS
    calls = len(sys.modules["measure_doses"].calls)
    assert cli.main(sweep("measure_doses:broken")) == 0
    assert len(sys.modules["measure_doses"].calls) == calls == 6
    assert cli.main(sweep("measure_doses:broken", scales="0.5,2,3")) == 0  # more cells of the same sweep
    assert len(table(made / "out" / "sweep.csv")) == 7


def test_a_command_is_given_what_apply_writes(made: Path) -> None:
    before = folder_bytes(made / "base")
    assert cli.main(sweep(f"{sys.executable} program.py {{model}}")) == 0
    found = table(made / "out" / "sweep.csv")
    assert list(found) == CELLS
    vector = HarmVector.load(made / "v.safetensors")
    expected = [zlib.crc32(before["model.safetensors"])]
    for density, scale in CELLS[1:]:
        apply_vector(made / "base", vector.top(density), made / "one", scale=scale, overwrite=True)
        expected.append(zlib.crc32((made / "one" / "model.safetensors").read_bytes()))
    assert [row["sum"] for row in found.values()] == expected
    assert folder_bytes(made / "base") == before
    assert not list((made / "out").glob(".*"))


def test_a_sweep_by_command_goes_on_after_a_kill_and_tidies_up(made: Path) -> None:
    arguments = sweep(f"{sys.executable} program.py {{model}}")
    assert cli.main(arguments) == 0
    expected = table(made / "out" / "sweep.csv")
    shutil.rmtree(made / "out")
    program = (made / "program.py").read_text()
    rows = "len(open('out/sweep.csv').readlines())"
    (made / "program.py").write_text(
        f"import os\nif os.path.exists('out/sweep.csv') and {rows} == 3:\n    os.kill(os.getppid(), 9)\n{program}"
    )
    command = [sys.executable, "-m", "prosocial_ext.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert list(table(made / "out" / "sweep.csv")) == CELLS[:2]
    assert [path.name for path in (made / "out").glob(".*")] == [".cell"]
    (made / "program.py").write_text(program)
    assert cli.main(arguments) == 0
    assert table(made / "out" / "sweep.csv") == expected
    assert not list((made / "out").glob(".*"))


def test_progress_counts_the_cells_that_are_measured(made: Path) -> None:
    vector = HarmVector.load(made / "v.safetensors")
    cells, seen = plan_cells(vector, [0.01, 0.1], [0.5, 2.0]), list[int]()
    found = SweepTable(made / "one.csv")
    found.add(cells[0], {"n": 0.0})
    sweep_model(model("llama", 0), None, vector, cells, lambda *_: {"n": 1.0}, found, progress=seen.append)
    assert seen == [1] * 4
    command = [sys.executable, "program.py", "{model}"]
    with Checkpoint(made / "base") as base:
        sweep_checkpoint(base, vector, cells[:2], command, SweepTable(made / "two.csv"), progress=seen.append)
    assert seen == [1] * 6


def test_quiet_shows_no_bar(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main(sweep("measure_doses:norms")) == 0
    assert "sweep:" in capsys.readouterr().err
    assert cli.main([*sweep("measure_doses:norms", "other"), "--quiet"]) == 0
    assert "sweep:" not in capsys.readouterr().err


def test_the_report_shows_harm_and_over_refusal_against_utility(made: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(sweep("measure_doses:norms")) == 0
    page = (made / "out" / "report.html").read_text()
    assert 'alt="harm_rate and over_refusal against utility"' in page
    assert page.count("<img") == 2
    assert page.count("<tr><td>") == 5
    assert cli.main(sweep("measure_doses:alone", "other")) == 0
    assert (made / "other" / "report.html").read_text().count("<img") == 1


def test_a_dry_run_measures_nothing(made: Path) -> None:
    before = folder_bytes(made)
    assert cli.main([*sweep("measure_doses:norms"), "--dry-run"]) == 0
    assert {k: v for k, v in folder_bytes(made).items() if "__pycache__" not in k} == before


def test_mistakes_are_one_line_each(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "taken").mkdir()
    (made / "taken" / "sweep.json").write_text("{}")
    (made / "program.py").write_text("import sys\nsys.exit(len(sys.argv))")
    python = sys.executable
    for arguments, culprit in [
        (sweep("measure_doses"), "must be a .yaml of prosocial eval, module:function, or a command that names {model}"),
        (sweep("measure_doses:nothing"), "must name what can be imported, got measure_doses:nothing"),
        (sweep("no_such_module:f"), "must name what can be imported, got no_such_module:f: No module named"),
        (sweep("measure_doses:norms", "taken"), "got another sweep's"),
        (sweep("measure_doses:norms", "base/in"), "neither lie in a folder that is read"),
        ([*sweep("measure_doses:norms"), "--densities", "0.5"], "ask for at most the"),
        ([*sweep("measure_doses:norms"), "--densities", "7"], "densities must be in (0, 1]"),
        (sweep(f"{python} program.py {{model}}"), "must exit with status 0, got 2"),
        (sweep("/no/such/program {model}", "b"), "must be a program, got No such file"),
        (sweep(f"{python} -c 'print(7)' {{model}}", "c"), "must be a JSON object"),
    ]:
        assert cli.main(arguments) == 2
        told = capsys.readouterr().err
        assert culprit in told
        assert told.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(sweep("measure_doses:norms", scales="one"))


@pytest.mark.parametrize(
    ("measured", "match"),
    [
        (0.5, "return a dict of numbers"),
        ({}, "return a dict of numbers"),
        ({"harm": "high"}, "return a dict of numbers"),
        ({"harm": True}, "return a dict of numbers"),
        ({"harm": float("inf")}, "return a dict of numbers"),
        ({"scale": 1.0}, "other than density and scale"),
        ({"other": 1.0}, "return 'harm' as the cells before"),
    ],
    ids=str,
)
def test_what_is_no_result_is_refused(tmp_path: Path, measured: Any, match: str) -> None:
    found = SweepTable(tmp_path / "sweep.csv")
    found.add(Cell(0.0, 0.0), {"harm": 1})
    with pytest.raises(CheckpointError, match=match):
        found.add(Cell(0.1, 1.0), measured)
    assert list(SweepTable(tmp_path / "sweep.csv").rows) == [Cell(0.0, 0.0)]


@pytest.mark.parametrize(
    "text", ["", "a,b\n", "density,scale,x\n0,0\n", "density,scale,x\n0,0,y\n", "density,scale,x,x\n"]
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.csv").write_text(text)
    with pytest.raises(CheckpointError, match=r"sweep.csv must .* Name another output."):
        SweepTable(tmp_path / "sweep.csv")


def test_metrics_of_any_name_come_back(tmp_path: Path) -> None:
    names = {'a,"b"\n<i>': 1.5, "nan": float("nan")}
    SweepTable(tmp_path / "sweep.csv").add(Cell(0.1, 1e-7), names)
    again = SweepTable(tmp_path / "sweep.csv").rows[Cell(0.1, 1e-7)]
    assert json.dumps(again) == json.dumps(names)
