"""What every process of the tests of ranks does."""

import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from prosocial_ext import cli
from prosocial_ext.direg import CheckpointError, HarmVector, apply_vector
from prosocial_ext.direg import extract as extraction
from prosocial_ext.direg.ranks import Ranks, leave

CASES: dict[str, dict[str, Any]] = {
    "global": {"density": 0.1},
    "most": {"density": 0.7},
    "few": {"m": 5},
    "per_tensor": {"density": 0.05, "scope": "per_tensor"},
    "per_layer": {"density": 0.2, "scope": "per_layer"},
    "bf16": {"density": 0.1, "values": "bf16"},
}


def make(out: Path, root: Path, ranks: Ranks) -> None:
    """All files that this test compares."""
    for name, options in CASES.items():
        HarmVector.from_checkpoints(root / "base", root / "harm", out=out / name, ranks=ranks, **options)
    for name in ("ties", "wide"):
        HarmVector.from_checkpoints(root / "zero", root / name, out=out / name, density=0.3, ranks=ranks)
    done = apply_vector(root / "base", HarmVector.load(out / "global"), out / "safe", undo=True, ranks=ranks)
    (out / f"edit-{ranks.rank}").write_text(repr(done))


def worker(rank: int, size: int, root: Path) -> None:
    torch.set_num_threads(1)
    extraction._CHUNK = 1 << 14
    dist.init_process_group("gloo", init_method=f"file://{root}/meet-{size}", rank=rank, world_size=size)
    try:
        make(root / f"ranks-{size}", root, Ranks(rank, size))
        text = "differences at 'b' must be finite" if rank == size - 1 else "ranks must all get this far"
        with pytest.raises(CheckpointError, match=text):
            HarmVector.from_checkpoints(root / "zeros", root / "nan", out=root / "nothing", ranks=Ranks(rank, size))
    finally:
        leave()


def apply(rank: int, port: int, root: Path) -> None:
    """`prosocial direg apply` as torchrun starts it, without the seconds that its start takes."""
    torch.set_num_threads(1)
    os.chdir(root)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = ["direg", "apply", "--model", "base", "--harm-vector", "v", "--out", "safe", "--undo"]
    with (root / f"told-{rank}").open("w") as told, redirect_stdout(told):
        assert cli.main(arguments) == 0
