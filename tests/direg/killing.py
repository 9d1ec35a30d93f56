"""Processes that are killed for good (SIGKILL), or stopped, at a chosen change to the disk."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from prosocial_ext import cli
from prosocial_ext.checkpoints.outputs import partials
from tests.direg.files import folder_bytes

CHANGES = ("pwrite", "fsync", "ftruncate", "rename", "replace", "unlink", "mkdir", "rmdir")
END_SECONDS = 60


@contextmanager
def on_changes(then: Callable[[int, str], object]) -> Iterator[None]:
    """Call ``then`` with number, from 0, and name and path of each change to the disk before this process makes it."""
    numbers = iter(range(1 << 60))
    plain = {name: getattr(os, name) for name in CHANGES}

    def told(name: str, place: Any, *arguments: Any, **more: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else str(place)
        then(next(numbers), f"{name} {path}")
        return plain[name](place, *arguments, **more)

    for name in CHANGES:
        setattr(os, name, lambda *arguments, name=name, **more: told(name, *arguments, **more))
    try:
        yield
    finally:
        for name, change in plain.items():
            setattr(os, name, change)


def changes_of(call: Callable[[], object]) -> list[str]:
    """What a call changes on the disk, as "call path", in order."""
    seen: list[str] = []
    with on_changes(lambda i, what: seen.append(what)):
        call()
    return seen


def start(call: Callable[[], object], when: Callable[[int, str], bool], number: int) -> Any:
    """Start a process that sends itself a signal before the change to the disk of which ``when`` is true."""

    def work() -> None:
        torch.set_num_threads(1)  # a fork has no more
        with on_changes(lambda i, what: os.kill(os.getpid(), number) if when(i, what) else None):
            call()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def kill(call: Callable[[], object], at: int) -> None:
    """Run a call in a process of its own that is killed before its change number ``at``."""
    process = start(call, lambda i, what: i == at, signal.SIGKILL)
    process.join(END_SECONDS)
    assert process.exitcode == -signal.SIGKILL, process.exitcode


class Stoppable:
    """A call that makes ``folder / "out"``, again and again.

    ``changes``: of the first call, to the disk. ``read``, ``taken``: of the last call.
    """

    changes: list[str]

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.out, self.options = folder, folder / "out", options
        self.read, self.taken = 0, (0, 0, 0)

    def arguments(self, **more: Any) -> dict[str, Any]:
        """The call's, after which nothing is read and nothing taken over."""
        self.read, self.taken = 0, (0, 0, 0)
        return {"progress": self._progress, "resumed": self._resumed, **self.options, **more}

    def numbers(self, pattern: str) -> list[int]:
        """Which changes to the disk are such."""
        return [i for i, what in enumerate(self.changes) if re.search(pattern, what)]

    def _progress(self, size: int) -> None:
        self.read += size

    def _resumed(self, *taken: int) -> None:
        self.taken = taken


# What a slow command runs before each part: once it has written three ``notes`` it waits for the test.
WAIT = """
import time
from pathlib import Path
def wait(notes):
    while len(list(Path().glob(f".out.*.partial/aside/{notes}/*"))) >= 3 and not Path("stopped").exists():
        time.sleep(0.01)
    time.sleep(1 if Path("stopped").exists() else 0.02)
"""


def check_command(
    script: str, arguments: list[str], notes: str, number: int, capsys: pytest.CaptureFixture[str], says: str, done: str
) -> None:
    """Stop a slow command that makes "out" once it has written three ``notes``; it goes on, or begins anew."""
    out, sent = Path("out"), Path("stopped")

    def written() -> int:  # a note has its name before it has its text
        return sum(note.stat().st_size > 0 for note in Path().glob(f".out.*.partial/aside/{notes}/*"))

    def content() -> object:
        return folder_bytes(out) if out.is_dir() else out.read_bytes()

    def stopped() -> str:
        sent.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", WAIT + script, *arguments], stderr=subprocess.PIPE, text=True)
        while written() < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        time.sleep(0.5)  # until it has been handled, before what waits goes on to its next part
        sent.touch()
        told = process.communicate(timeout=END_SECONDS)[1]
        assert process.returncode != 0
        return told

    told = stopped()
    (left,) = partials(out)
    kept = f"What is complete is kept in {left}: the same command goes on from there, or begins anew with --fresh.\n"
    assert told == (kept if number == signal.SIGTERM else "")
    assert cli.main(arguments) == 0
    found = capsys.readouterr().out.splitlines()
    assert re.fullmatch(says + r" of a stopped run \(--fresh begins anew\)", found[1]), found[1]
    assert found[2].startswith(done)
    undisturbed = content()
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    stopped()
    assert cli.main([*arguments, "--fresh"]) == 0
    assert "goes on" not in capsys.readouterr().out
    assert content() == undisturbed
    assert not partials(out)
