"""The guide, docs/eval.md: its configurations and commands are read, its Python runs, its links and claims hold."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import yaml

from prosocial_ext.commands import direg, eval
from prosocial_ext.evaluation import rate
from prosocial_ext.evaluation.judges import KINDS
from prosocial_ext.evaluation.settings import EvaluationSettings, read_settings
from tests import readme

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "eval.md"


def test_every_configuration_is_read(tmp_path: Path) -> None:
    blocks = [code for _, code in readme.blocks(GUIDE.read_text(encoding="utf-8"), "yaml")]
    assert len(blocks) == 2
    for code in blocks:
        (tmp_path / "eval.yaml").write_text(code, encoding="utf-8")
        settings = read_settings(tmp_path / "eval.yaml", {})
        assert settings.harm_judge is not None
        assert settings.harm_judge["kind"] in KINDS
    assert yaml.safe_load(blocks[0])["harm_judge"]["before_answer"] == "\n\n"


def test_every_command_parses() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    eval.add_arguments(commands.add_parser("eval"))
    direg.add_arguments(commands.add_parser("direg"))
    shell = "\n".join(code for _, code in readme.blocks(GUIDE.read_text(encoding="utf-8"), "bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True)[1:] for line in shell.splitlines() if line.startswith("prosocial ")]
    assert [parser.parse_args(line).command for line in lines] == ["eval"] * 5 + ["direg"] * 2


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert readme.run_python(GUIDE) == 1


def test_every_link_leads_somewhere_and_the_defaults_are_those() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (GUIDE.parent / target).exists(), target
    settings = EvaluationSettings(model="B", harmful="h")
    assert (settings.temperature, settings.samples, settings.seed, settings.guidance) == (0.0, 1, 0, 1.0)
    assert "0 of 50 harmful is anything up to 7 %" in text
    assert round(rate([False] * 50).high, 2) == 0.07
