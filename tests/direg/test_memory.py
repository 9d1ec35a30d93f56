"""The working buffer is fixed: a checkpoint of 1.5 GB with a tensor of 700 MB under a limit on private memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prosocial_ext.checkpoints.safetensors_writer import SafetensorsWriter

SHAPES = {"big": (350_000, 1000), "other": (250_000, 1000), "small": (150_000, 1000)}  # 1.5 GB of bfloat16
HEADROOM = 600 << 20
BLOCK = 1 << 20

LIMITED = """
import json, resource, sys
from prosocial_ext import cli
from prosocial_ext.commands import direg
import tqdm, huggingface_hub
taken = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
limit = taken + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    bytearray(int(sys.argv[1]) + (64 << 20))
except MemoryError:
    pass
else:
    sys.exit("the limit does not bite")
for arguments in json.loads(sys.argv[2]):
    status = cli.main(arguments)
    if status:
        sys.exit(status)
"""


def write(folder: Path, seed: int | None) -> None:
    """Zeros that take no disk, or one drawn block over and over."""
    folder.mkdir()
    with open(folder / "model.safetensors", "w+b") as file:
        writer = SafetensorsWriter(file.fileno(), room=1024)
        places = {name: writer.add(name, "BF16", shape) for name, shape in SHAPES.items()}
        if seed is not None:
            block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)).bfloat16()
            for name, (rows, columns) in SHAPES.items():
                for start in range(0, rows * columns, BLOCK):
                    writer.write(places[name] + 2 * start, block[: rows * columns - start])
        writer.finish({})


def limited(steps: list[list[str]]) -> str:
    """What these commands print, one after the other in one process under the limit."""
    command = [sys.executable, "-c", LIMITED, str(HEADROOM), json.dumps(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_fixed_buffer_is_enough_whatever_the_sizes(tmp_path: Path) -> None:
    write(tmp_path / "base", None)
    write(tmp_path / "harm", 0)
    place = {name: str(tmp_path / name) for name in ("base", "harm", "v", "out")}
    steps = [
        [
            "direg",
            "extract",
            "--base",
            place["base"],
            "--harm",
            place["harm"],
            "--out",
            place["v"],
            "--density",
            "0.01",
        ],
        ["direg", "apply", "--model", place["base"], "--harm-vector", place["v"], "--out", place["out"], "--undo"],
    ]
    assert "edited 7,500,000 of 750,000,000 entries (density 0.010000)" in limited(steps)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_fixed_buffer_is_enough_for_a_matrix_of_low_rank(tmp_path: Path) -> None:
    write(tmp_path / "base", None)
    write(tmp_path / "harm", 0)
    place = {name: str(tmp_path / name) for name in ("base", "harm", "v")}
    step = ["direg", "extract", "--base", place["base"], "--harm", place["harm"], "--out", place["v"]]
    told = limited([[*step, "--density", "0.01", "--rule", "low_rank", "--include", "big"]])
    assert "low rank: 1 of 1 tensors at rank 9" in told
    assert "extracted 350,000,000 of 350,000,000 entries" in told
