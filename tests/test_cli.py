"""The program `prosocial`: help, mistakes, exit statuses."""

import importlib
import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest

from prosocial_ext import cli
from prosocial_ext.commands import UserError


def test_help_lists_every_command_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, command in cli.COMMANDS.items():
        assert f"{name} {command.summary}" in words


def test_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"prosocial_ext {importlib.metadata.version('prosocial_ext')}\n"


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ([], "COMMAND"),
        (["nothing"], "'nothing'"),
        (["env", "--nothing"], "--nothing"),
        (["--nothing", "env"], "--nothing"),
    ],
    ids=["no_command", "unknown_command", "unknown_option", "unknown_option_first"],
)
def test_a_mistake_in_the_arguments_exits_2_with_one_line(
    arguments: list[str], culprit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("prosocial")
    assert culprit in captured.err


def fake_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(arguments: object) -> int:
        raise error

    fake = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(importlib, "import_module", lambda name: fake)


def test_a_command_s_mistake_exits_2_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_command(monkeypatch, UserError("density must be in (0, 1], got 10.0.\nPass density=0.10."))
    assert cli.main(["env"]) == 2
    assert capsys.readouterr().err == "prosocial env: density must be in (0, 1], got 10.0. Pass density=0.10.\n"


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["env"])


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, KeyboardInterrupt())
    assert cli.main(["env"]) == 130


def test_a_reader_that_goes_away_ends_it_without_a_word() -> None:
    code = "import sys; from prosocial_ext.cli import main; sys.stdin.read(); sys.exit(main(['env']))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    assert process.stdout is not None
    process.stdout.close()  # before it writes: it waits for the end of its input
    process.stdout = None
    _, said = process.communicate("", timeout=120)
    assert (process.returncode, said) == (141, "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_s_module_has_the_two_functions(name: str) -> None:
    module = importlib.import_module(cli.COMMANDS[name].module)
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_the_installed_program_is_this_main() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="prosocial")
    assert script.load() is cli.main
