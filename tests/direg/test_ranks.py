"""Several processes: the bytes of one, and no output where one fails."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from prosocial_ext import cli
from prosocial_ext.commands import direg
from prosocial_ext.direg import HarmVector, apply_vector
from prosocial_ext.direg.ranks import ALONE, Ranks
from tests.direg.files import folder_bytes, folders, write
from tests.direg.rank_worker import apply, make, worker


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # the workers keep to one thread
def test_any_number_of_ranks_writes_the_bytes_of_one(tmp_path: Path) -> None:
    _, _, base, _ = folders(tmp_path, "llama", torch.bfloat16, ("9KB", "23KB"))
    assert len(list(base.glob("*.safetensors"))) > 3
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (301, 200), "b": (0,), "c": (70_003,), "d": (50_000,)}  # enough that an edge is sampled
    drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    write(tmp_path / "zero", {name: torch.zeros(size) for name, size in sizes.items()})
    write(tmp_path / "ties", {name: t.round() for name, t in drawn.items()})
    write(tmp_path / "wide", drawn | {"c": drawn["c"].double() * (1 + 1e-9)})
    write(tmp_path / "zeros", {"a": torch.zeros(9), "b": torch.zeros(9)})
    write(tmp_path / "nan", {"a": torch.ones(9), "b": torch.full((9,), float("nan"))})
    for size in (1, 2, 3):
        (tmp_path / f"ranks-{size}").mkdir()
    make(tmp_path / "ranks-1", tmp_path, ALONE)
    expected = folder_bytes(tmp_path / "ranks-1")
    for size in (2, 3):
        mp.start_processes(worker, (size, tmp_path), nprocs=size, start_method="fork")  # type: ignore[no-untyped-call]
        found = folder_bytes(tmp_path / f"ranks-{size}")
        for rank in range(1, size):
            assert found.pop(f"edit-{rank}") == found["edit-0"]
        assert found.keys() == expected.keys()
        for name, content in expected.items():
            assert found[name] == content, f"{name} of {size} ranks"
    assert not (tmp_path / "nothing").exists()
    assert not list(tmp_path.glob(".*"))  # nor a part or a spill


def torchrun(folder: Path, size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += ["-m", "prosocial_ext.cli", "direg", *arguments]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_torchrun_works_together_and_speaks_once(tmp_path: Path) -> None:
    folders(tmp_path, "llama", torch.bfloat16, ("9KB", "23KB"))
    done = torchrun(tmp_path, 2, "extract", "--base", "base", "--harm", "harm", "--out", "v")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("extracted ") == 1
    HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm", out=tmp_path / "w")
    assert (tmp_path / "v").read_bytes() == (tmp_path / "w").read_bytes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(apply, (port, tmp_path), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    assert [(tmp_path / f"told-{rank}").read_text().count("edited ") for rank in range(2)] == [1, 0]
    apply_vector(tmp_path / "base", HarmVector.load(tmp_path / "v"), tmp_path / "again", undo=True)
    assert folder_bytes(tmp_path / "safe") == folder_bytes(tmp_path / "again")


def test_ranks_need_a_file_to_write(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(3)}
    for name in ("base", "harm"):
        write(tmp_path / name, tensors)
    with pytest.raises(ValueError, match="out must be a file where several ranks write it"):
        HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm", ranks=Ranks(0, 2))


def test_revert_runs_in_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(direg, "torchrun_ranks", lambda: contextlib.nullcontext(Ranks(0, 2)))
    assert cli.main(["direg", "revert", "--model", "x", "--out", "y"]) == 2
    assert "direg revert runs in one process: start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [[], [0, 0], [7], [1, 1, 1, 1, 1, 1], [9, 1, 1, 1], [1, 1, 1, 9], [0, 5, 0, 5]])
def test_shares_follow_each_other_and_cover_all(sizes: list[int]) -> None:
    for size in (1, 2, 3, 8):
        runs = [Ranks(rank, size).share(sizes) for rank in range(size)]
        assert [i for run in runs for i in run] == list(range(len(sizes)))
    assert [list(Ranks(rank, 3).share([1] * 6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
