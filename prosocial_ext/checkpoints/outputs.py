"""Files and folders that exist complete or not at all: written beside their place under a hidden name, then renamed.

What an error interrupts is removed; a process killed outright leaves a hidden ".NAME.*.partial" behind, and no output.
The next one to make NAME removes that: a partial one whose maker lives is locked (flock, which ends with the process).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prosocial_ext.checkpoints.errors import refuse

__all__ = ["check_output", "check_outside", "new_file", "new_folder"]

_REMEDY = "Name another output, or allow it with overwrite=True (--overwrite)."


def check_output(path: Path, *, overwrite: bool, folder: bool) -> None:
    """Raise unless ``path`` may be made: its parent is there, and it is free or may be overwritten.

    Raises:
        CheckpointError: It is a symlink, of the other kind, taken, or has no folder to lie in.
    """
    if path.name in ("", "..") or not path.parent.is_dir():
        refuse(f"output {path}", "lie in a folder that exists", str(path.parent), "Make the folder first.")
    if path.is_symlink():
        refuse(f"output {path}", "not be a symlink", f"one to {os.readlink(path)}", "Name the place itself.")
    if path.exists():
        if not overwrite:
            refuse(f"output {path}", "not exist", "something that does", _REMEDY)
        if path.is_dir() != folder:
            refuse(f"output {path}", "be a folder" if folder else "be a file", "the other", "Name another output.")


def check_outside(path: Path, *inputs: Path) -> None:
    """Raise if ``path`` lies in one of the folders that are read, or holds one.

    Raises:
        CheckpointError: It does.
    """
    place = path.resolve()
    for folder in inputs:
        source = folder.resolve()
        if place == source or source in place.parents or place in source.parents:
            rule = "neither lie in a folder that is read nor hold one"
            refuse(f"output {path}", rule, str(folder), "Inputs are never written.")


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[int]:
    """Yield the descriptor of a new file (read and write) that becomes ``path``, synced, if the block succeeds.

    >>> place = Path(tempfile.mkdtemp()) / "a"
    >>> with new_file(place) as descriptor:
    ...     os.write(descriptor, b"complete"), place.exists()
    (8, False)
    >>> place.read_text()
    'complete'
    """
    check_output(path, overwrite=overwrite, folder=False)
    _remove_stale(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    lock = _lock(Path(name))
    try:
        try:
            yield descriptor
            os.fchmod(descriptor, 0o666 & ~_umask())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        check_output(path, overwrite=overwrite, folder=False)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    finally:
        os.close(lock)
    _sync_folder(path.parent)


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` if the block succeeds; a folder that was there is then removed.

    The block syncs its own files.

    >>> place = Path(tempfile.mkdtemp()) / "a"
    >>> with new_folder(place) as folder:
    ...     _ = (folder / "b").write_text("complete")
    ...     place.exists()
    False
    >>> [file.name for file in place.iterdir()]
    ['b']
    """
    check_output(path, overwrite=overwrite, folder=True)
    _remove_stale(path)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    lock = _lock(partial)
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        for folder, _, _ in os.walk(partial):
            _sync_folder(Path(folder))
        check_output(path, overwrite=overwrite, folder=True)
        if path.exists():
            former = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".former", dir=path.parent))
            os.rename(path, former)
            try:
                os.rename(partial, path)
            except BaseException:
                os.rename(former, path)
                raise
            shutil.rmtree(former)
        else:
            os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    _sync_folder(path.parent)


def _remove_stale(path: Path) -> None:
    """Remove what killed processes left of this output; where the file system has no locks, nothing."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.partial")  # as tempfile names it
    for place in [place for place in path.parent.iterdir() if pattern.fullmatch(place.name)]:
        with suppress(OSError):  # locked, gone, somebody else's, a link
            lock = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place) if place.is_dir() else place.unlink()
            finally:
                os.close(lock)


def _lock(partial: Path) -> int:
    """A descriptor that locks what was just made, until it is closed."""
    lock = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
