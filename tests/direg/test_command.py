"""`prosocial direg`: what it prints, refuses and leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from prosocial_ext import cli
from tests.direg.files import folder_bytes, model, tuned


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base and harm in it."""
    base = model("llama", 0, torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="9KB")
    tuned(base, 1).save_pretrained(tmp_path / "harm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


EXTRACT = ["direg", "extract", "--base", "base", "--harm", "harm", "--out", "h.safetensors"]
APPLY = ["direg", "apply", "--model", "base", "--harm-vector", "h.safetensors", "--out", "safe"]


def lines(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 0) -> list[str]:
    assert cli.main(arguments) == status
    captured = capsys.readouterr()
    assert not status or captured.err.count("\n") == 1
    return (captured.err if status else captured.out).splitlines()


def test_extract_apply_revert_and_inspect_follow_each_other(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    n = sum(p.numel() for p in model("llama", 0).parameters())
    told = lines(capsys, [*EXTRACT, "--density", "0.05"])
    count = f"{n // 20:,} of {n:,} entries (density {n // 20 / n:.6f})"
    assert told[0] == f"will read {4 * n / 1e6:.2f} MB and write {count} to h.safetensors"
    assert told[1].startswith(f"extracted {count}, energy share 0.")
    assert told[2].startswith("harm vector: h.safetensors, 0.")
    assert told[3].startswith("warning: the entries kept hold ")
    assert told[4] == "next: prosocial direg apply --model base --harm-vector h.safetensors --out DIR"

    told = lines(capsys, [*APPLY, "--undo", "--scale", "1.5"])
    assert told[0].startswith(f"will edit {count} and write 0.")
    assert told[1].startswith(f"edited {count}, ")
    assert "unchanged after rounding, threshold " in told[1]
    assert told[2:] == [
        "undo record: safe/direg/undo.safetensors (revert: prosocial direg revert --model safe --out DIR)"
    ]

    told = lines(capsys, ["direg", "revert", "--model", "safe", "--out", "back"])
    assert told[1:] == [f"restored {n // 20:,} entries: back"]
    assert folder_bytes(made / "back") == folder_bytes(made / "base")

    told = lines(capsys, ["direg", "inspect", "h.safetensors"])
    assert told[0].startswith(f"h.safetensors: {count}")
    facts = json.loads("\n".join(lines(capsys, ["direg", "inspect", "h.safetensors", "--json"])))
    assert (facts["entries"], facts["n"]) == (n // 20, n)
    assert sum(row["kept"] for row in facts["modules"]) == n // 20


@pytest.mark.parametrize("arguments", [EXTRACT, APPLY], ids=["extract", "apply"])
def test_a_dry_run_checks_and_writes_nothing(
    made: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    if arguments is APPLY:
        lines(capsys, EXTRACT)
    before = folder_bytes(made)
    assert "will " in lines(capsys, [*arguments, "--dry-run"])[0]
    assert folder_bytes(made) == before
    elsewhere = [*arguments[:3], "no/such/place", *arguments[4:], "--dry-run"]
    assert "'no/such/place' must be a folder" in lines(capsys, elsewhere, 2)[0]


def test_most_of_a_small_dose_is_lost_and_said(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(capsys, [*EXTRACT, "--density", "1.0"])
    told = lines(capsys, [*APPLY, "--scale", "0.001"])
    assert any(line.startswith("warning: rounding to the checkpoint's dtype lost most") for line in told)


def test_mistakes_are_one_line_each(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(capsys, EXTRACT)
    for arguments, culprit in [
        (EXTRACT, "output h.safetensors must not exist"),
        ([*EXTRACT[:-1], "x", "--m", "99999999"], "m must be an integer in"),
        ([*EXTRACT[:-1], "x", "--include", "nothing*"], "include must match a tensor"),
        ([*APPLY[:-1], "base/in"], "neither lie in a folder that is read"),
        ([*APPLY, "--density", "0.5"], "at most the"),
        (["direg", "inspect", "base/config.json"], "the header of base/config.json"),
        (["direg", "revert", "--model", "base", "--out", "x"], "hold direg/undo.safetensors"),
    ]:
        assert culprit in lines(capsys, arguments, 2)[0]
    for option, value in [("--density", "10"), ("--m", "-1"), ("--memory", "1"), ("--density", "x")]:
        with pytest.raises(SystemExit) as stop:
            cli.main([*EXTRACT, option, value])
        assert stop.value.code == 2
        assert option in capsys.readouterr().err


SLOW = """
import sys, time
from prosocial_ext.direg import checkpoint_edit, extract
from prosocial_ext import cli
extract._CHUNK = 512
def slow(plain):
    def call(*arguments, **options):
        print("reading", flush=True)
        time.sleep(0.2)
        return plain(*arguments, **options)
    return call
checkpoint_edit.word_sum = slow(checkpoint_edit.word_sum)
extract.Collector.look = slow(extract.Collector.look)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("action", ["extract", "apply"])
def test_killed_in_the_middle_there_is_no_output(
    made: Path, capsys: pytest.CaptureFixture[str], action: str, number: signal.Signals
) -> None:
    lines(capsys, EXTRACT)
    arguments = APPLY if action == "apply" else [*EXTRACT[:-1], "again"]
    before = folder_bytes(made)
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "reading" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.3)
    os.kill(process.pid, number)
    process.stdout.close()
    status = process.wait(timeout=60)
    assert status != 0
    left = {name: data for name, data in folder_bytes(made).items() if not name.startswith(".")}
    assert left == before
    if number != signal.SIGKILL:  # nobody can tidy up after that
        assert folder_bytes(made) == before
        assert not [path for path in made.iterdir() if path.name.startswith(".")]
    lines(capsys, arguments)  # and nothing is in the way of another try
    assert not [path for path in made.iterdir() if path.name.startswith(".")]  # which tidies up


def test_harm_vector_is_offered_by_the_package() -> None:
    import prosocial_ext
    from prosocial_ext.direg import HarmVector

    assert prosocial_ext.HarmVector is HarmVector
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        prosocial_ext.nothing  # noqa: B018
