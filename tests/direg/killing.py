"""Processes that are killed for good (SIGKILL), or stopped, at a chosen change to the disk."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

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
