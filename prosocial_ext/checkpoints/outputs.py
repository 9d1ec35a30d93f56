"""Files and folders that exist complete or not at all: written beside their place under a hidden name, then renamed.

What an error interrupts is removed; a process killed outright leaves a hidden ".NAME.*.partial" behind, and no output.
The next one to make NAME removes that, or goes on with it if it can tell that all in it is its own work
(`resumable_folder`, `resumable_file`). A partial one whose maker lives is locked (flock, which ends with the process)
and left alone.

A partial folder holds three things: ``made``, a folder or a file, becomes the output; ``aside`` is what its makers must
know until then; ``lock`` is a file because network file systems lock nothing else.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prosocial_ext.checkpoints.errors import StoppedError, refuse

__all__ = [
    "Partial", "check_output", "check_outside", "clean_folder", "is_folder", "joined_folder", "new_descriptor",
    "new_file", "new_folder", "partials", "resumable_file", "resumable_folder", "sync_folder",
]  # fmt: skip

_REMEDY = "Name another output, or allow it with overwrite=True (--overwrite)."
_FROM_OUTSIDE = (SystemExit, OSError, StoppedError)  # a polite kill, a full disk, another rank: the job is not at fault
_LOCK = "lock"


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
    for place, left in _stale(path):
        _remove(place, left)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        try:
            yield descriptor
            os.fchmod(descriptor, 0o666 & ~_umask())
            os.fsync(descriptor)
            check_output(path, overwrite=overwrite, folder=False)
            os.replace(name, path)
        finally:
            os.close(descriptor)
    except BaseException:
        os.unlink(name)
        raise
    sync_folder(path.parent)


@dataclass(frozen=True)
class Partial:
    """An output in the making, at ``place``: ``made`` becomes the output, ``aside`` goes when that is complete."""

    place: Path

    @property
    def made(self) -> Path:
        """What becomes the output."""
        return self.place / "made"

    @property
    def aside(self) -> Path:
        """A folder for what is needed until then."""
        return self.place / "aside"


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
    with resumable_folder(path, lambda _: 0, overwrite=overwrite) as partial:
        yield partial.made


@contextmanager
def resumable_folder(
    path: Path, worth: Callable[[Partial], int], *, overwrite: bool = False, resume: bool = True
) -> Iterator[Partial]:
    """Yield a folder as `new_folder` does: an empty one, or what a stopped run of the same job left of it.

    The block completes ``made``, and removes from it what ``worth`` did not count. Whatever kills the process leaves
    what it had; so do SystemExit, an OSError or another rank's end if ``worth`` finds something in it, because the same
    job may then go on. Other errors would come again: what they interrupt is removed.

    Args:
        path: The folder to make.
        worth: How many pieces of a partial folder this job can take over, believing nothing that it has not checked; of
            several the one with most is taken, and nothing is worth 0. Only folders of this user that nobody else may
            write are asked for, and none whose makers live.
        overwrite: A folder that is there is replaced.
        resume: Begin with what a stopped run left; without, that is removed.

    >>> place = Path(tempfile.mkdtemp()) / "a"
    >>> def written(partial: Partial) -> int:
    ...     return len(list(partial.made.iterdir()))
    >>> try:
    ...     with resumable_folder(place, written) as partial:
    ...         _ = (partial.made / "b").write_text("complete")
    ...         raise SystemExit  # as a polite kill does
    ... except SystemExit:
    ...     place.exists()
    False
    >>> with resumable_folder(place, written) as partial:
    ...     [file.name for file in partial.made.iterdir()]
    ['b']
    """
    with _resumable(path, worth, overwrite, resume, folder=True) as partial:
        yield partial


@contextmanager
def resumable_file(
    path: Path, worth: Callable[[Partial], int], *, overwrite: bool = False, resume: bool = True
) -> Iterator[Partial]:
    """Yield a folder as `resumable_folder` does, in which ``made`` is a file: empty, or as a stopped run left it.

    The block writes that file anew, with what it keeps in ``aside``, and syncs it.

    >>> place = Path(tempfile.mkdtemp()) / "a"
    >>> def written(partial: Partial) -> int:
    ...     return len(list(partial.aside.iterdir()))
    >>> try:
    ...     with resumable_file(place, written) as partial:
    ...         _ = (partial.aside / "b").write_text("complete")
    ...         raise SystemExit
    ... except SystemExit:
    ...     place.exists()
    False
    >>> with resumable_file(place, written) as partial:
    ...     _ = partial.made.write_text((partial.aside / "b").read_text())
    >>> place.read_text(), partials(place)
    ('complete', [])
    """
    with _resumable(path, worth, overwrite, resume, folder=False) as partial:
        yield partial


@contextmanager
def joined_folder(place: Path) -> Iterator[Partial]:
    """Yield the partial folder that another process makes: nobody takes it over while this one lives, either.

    Raises:
        StoppedError: That process is gone, and somebody else has the folder.
    """
    lock = _open_lock(place)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                refuse(str(place), "be made by this job alone", "a lock on it", "Start again.", StoppedError)
        yield Partial(place)
    finally:
        os.close(lock)


def partials(path: Path) -> list[Path]:
    """What runs that go on or were stopped have of an output.

    >>> partials(Path(tempfile.mkdtemp()) / "a")
    []
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.partial")  # as tempfile names it
    places = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(place for place in places if pattern.fullmatch(place.name))


@contextmanager
def new_descriptor(path: Path, *, may_exist: bool = False) -> Iterator[int]:
    """Open a file that must not exist, unless it may, following no link; sync it on leaving."""
    exclusive = 0 if may_exist else os.O_EXCL
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | exclusive | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_folder(path: Path) -> bool:
    """Whether a folder itself, and no link to one, lies there."""
    return path.is_dir() and not path.is_symlink()


def clean_folder(path: Path, keep: Collection[str] = ()) -> None:
    """Make it a folder that holds nothing but what is named, following no link.

    >>> place = Path(tempfile.mkdtemp())
    >>> (place / "a").touch(), (place / "b").mkdir()
    (None, None)
    >>> clean_folder(place, {"a"})
    >>> [inner.name for inner in place.iterdir()]
    ['a']
    """
    if not is_folder(path):
        path.unlink(missing_ok=True)
        path.mkdir()
    for inner in path.iterdir():
        if inner.name not in keep:
            shutil.rmtree(inner) if is_folder(inner) else inner.unlink()


def sync_folder(path: Path) -> None:
    """Make what was made, renamed or removed in a folder outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _resumable(
    path: Path, worth: Callable[[Partial], int], overwrite: bool, resume: bool, *, folder: bool
) -> Iterator[Partial]:
    check_output(path, overwrite=overwrite, folder=folder)
    partial, lock = _taken_over(path, worth if resume else lambda _: 0, folder) or _fresh(path, folder)
    try:
        yield partial
        if folder:
            partial.made.chmod(0o777 & ~_umask())
            for inner, _, _ in os.walk(partial.made):
                sync_folder(Path(inner))
        check_output(path, overwrite=overwrite, folder=folder)
        if folder and path.exists():
            _replace_folder(partial.made, path)
        else:
            os.rename(partial.made, path)
    except BaseException as error:
        if isinstance(error, _FROM_OUTSIDE) and _worth(partial, worth, folder):
            os.close(lock)
        else:
            _remove(partial.place, lock)
        raise
    _remove(partial.place, lock)
    sync_folder(path.parent)


def _replace_folder(made: Path, path: Path) -> None:
    former = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".former", dir=path.parent))
    os.rename(path, former)
    try:
        os.rename(made, path)
    except BaseException:
        os.rename(former, path)
        raise
    shutil.rmtree(former)


def _fresh(path: Path, folder: bool) -> tuple[Partial, int]:
    partial = Partial(Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)))
    lock = _open_lock(partial.place)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_SH)  # shared with the ranks
    if folder:
        partial.made.mkdir()
    else:
        partial.made.touch()
    partial.aside.mkdir()
    return partial, lock


def _taken_over(path: Path, worth: Callable[[Partial], int], folder: bool) -> tuple[Partial, int] | None:
    """The partial folder of most worth with its lock, if any is worth something; the others are removed."""
    found = [(_worth(Partial(place), worth, folder), place, lock) for place, lock in _stale(path)]
    most, best, kept = max(found, key=lambda row: row[0], default=(0, path, -1))
    for _, place, lock in found:
        if place != best or not most:
            _remove(place, lock)
    if not most:
        return None
    try:
        fcntl.flock(kept, fcntl.LOCK_SH | fcntl.LOCK_NB)  # not in one step: another process may be faster
    except BlockingIOError:
        os.close(kept)
        return None
    return Partial(best), kept


def _worth(partial: Partial, worth: Callable[[Partial], int], folder: bool) -> int:
    """What a job says of a folder; 0 where strangers may have written, or where ``made`` is of the other kind."""
    try:
        status = [os.lstat(part) for part in (partial.place, partial.aside, partial.made)]
    except OSError:
        return 0
    kinds = [stat.S_ISDIR, stat.S_ISDIR, stat.S_ISDIR if folder else stat.S_ISREG]
    ours = all(of_kind(one.st_mode) and one.st_uid == os.geteuid() for of_kind, one in zip(kinds, status, strict=True))
    return worth(partial) if ours and not status[0].st_mode & 0o022 else 0


def _stale(path: Path) -> Iterator[tuple[Path, int]]:
    """What stopped processes left of this output, each with a lock on it; where the file system has no locks, none."""
    for place in partials(path):
        try:
            lock = _open_lock(place)
        except OSError:  # gone, somebody else's, a link
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its makers live
            os.close(lock)
            continue
        yield place, lock


def _open_lock(place: Path) -> int:
    """What carries the lock of a partial file or folder, open for writing, without which some systems lock nothing."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    if not stat.S_ISDIR(os.lstat(place).st_mode):
        return os.open(place, flags)
    folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.open(_LOCK, flags | os.O_CREAT, 0o600, dir_fd=folder)
    finally:
        os.close(folder)


def _remove(place: Path, lock: int) -> None:
    """Remove a partial file or folder: all but the lock while it is held, so that nobody takes over what is going."""
    with suppress(OSError):
        if place.is_dir():
            for inner in place.iterdir():
                if is_folder(inner):
                    shutil.rmtree(inner, ignore_errors=True)
                elif inner.name != _LOCK:
                    inner.unlink()
        else:
            place.unlink()
    os.close(lock)
    shutil.rmtree(place, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
