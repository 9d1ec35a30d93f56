"""The guide, docs/direg.md: its commands parse, its Python runs, its sizes are what the formats come to."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import torch

from prosocial_ext.commands import direg
from prosocial_ext.direg import HarmVector
from prosocial_ext.direg.checkpoint_edit import UNDO, apply_vector
from tests import readme
from tests.direg.files import write

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "direg.md"


def test_every_command_parses() -> None:
    parser = argparse.ArgumentParser()
    direg.add_arguments(parser)
    shell = "\n".join(code for _, code in readme.blocks(GUIDE.read_text(), "bash")).replace("\\\n", " ")
    commands = [shlex.split(line)[2:] for line in shell.splitlines() if line.startswith("prosocial direg ")]
    known = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parsed = {command[0] for command in commands if command[0] in known and parser.parse_args(command)}
    assert parsed >= {"extract", "inspect", "sweep", "apply", "revert"}


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    HarmVector.from_models(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).save("harm.safetensors")
    assert readme.run_python(GUIDE) == 2


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE.read_text()):
        assert (GUIDE.parent / target).exists(), target


def test_sizes_are_what_the_formats_come_to(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4000, 1000, generator=generator).bfloat16()
    base = write(tmp_path / "base", {"w": weights})
    harm = write(tmp_path / "harm", {"w": (weights + torch.randn(4000, 1000, generator=generator)).bfloat16()})
    vector = HarmVector.from_checkpoints(base, harm, density=0.10, out=tmp_path / "v.safetensors")
    apply_vector(base, vector, tmp_path / "out", undo=True)
    low_rank = HarmVector.from_checkpoints(base, harm, rule="low_rank", out=tmp_path / "low-rank.safetensors")
    assert low_rank.file_bytes / 4_000_000 == pytest.approx(4.125, abs=0.01)  # a header of 5 kB
    for path, per_entry in ((tmp_path / "v.safetensors", 5), (tmp_path / "out" / UNDO, 3)):
        assert path.stat().st_size / 400_000 == pytest.approx(per_entry, abs=0.1)  # header and histogram are small
