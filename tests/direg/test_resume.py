"""Stopped runs that are gone on with: the bytes of a run that nobody stopped, and nothing believed that is not sure."""

import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from prosocial_ext import _C
from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.errors import CheckpointError, StoppedError
from prosocial_ext.checkpoints.outputs import Partial, joined_folder, partials
from prosocial_ext.direg import HarmVector, apply_vector, checkpoint_edit, revert_checkpoint
from prosocial_ext.direg import extract as extraction
from prosocial_ext.direg import stretches as stretching
from prosocial_ext.direg.ranks import Ranks, leave
from prosocial_ext.direg.resume import Work
from prosocial_ext.direg.stretches import Stretch
from tests.direg.damage import cut, flip, folder, link, pipe
from tests.direg.files import folder_bytes, model, tuned
from tests.direg.killing import END_SECONDS, Stoppable, changes_of, check_command, kill, on_changes, start

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # who keep to one thread

UNDO: dict[str, Any] = {"undo": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "undo": UNDO,
    "stochastic": {**UNDO, "rounding": "stochastic", "seed": 5},
    "float32": {**UNDO, "dtype": torch.float32},
}
NOTED, JOINED = "fsync .*/aside/notes$", "unlink .*/aside/parts/model"  # what a run does after each shard, each part
DRAWN = 5  # points of a run at which it is killed, beside the named ones


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base in six shards, and v.safetensors."""
    monkeypatch.setattr(extraction, "_CHUNK", 512)  # so that tensors take several
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    base = model("llama-tied", 0, torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="9KB")
    (tmp_path / "base" / "README.md").write_text("of the base")
    tuned(base, 1).save_pretrained(tmp_path / "harm")
    HarmVector.from_checkpoints(tmp_path / "base", tmp_path / "harm", density=0.3, out=tmp_path / "v.safetensors")
    return tmp_path


class Run(Stoppable):
    """An edit. What it must come to, ``bytes`` and ``done``, is found by a first call."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, options)
        self.changes = changes_of(self)
        self.bytes, self.all_read = folder_bytes(self.out), self.read
        self.done = self(overwrite=True)
        shutil.rmtree(self.out)
        self.shards = len(self.numbers(NOTED))

    def __call__(self, **more: Any) -> Any:
        return self._edit(**self.arguments(**more))

    def _edit(self, **arguments: Any) -> Any:
        vector = HarmVector.load(self.folder / "v.safetensors")
        return apply_vector(self.folder / "base", vector, self.out, **{"scale": 1.5, **arguments})

    def complete(self, shards: int) -> int:
        """The change that comes next when so many shards are complete."""
        return self.numbers(NOTED)[shards - 1] + 1

    def stop(self, shards: int = 3) -> Path:
        """Kill a call when so many shards are complete; return what it leaves."""
        kill(self, self.complete(shards))
        (left,) = partials(self.out)
        return left

    def check(self, shards: int, **more: Any) -> None:
        """Call, take so many shards over, and come to what it must."""
        assert self(**more) == self.done
        assert self.taken[0] == shards
        assert (self.read < self.all_read) == (shards > 0)
        assert folder_bytes(self.out) == self.bytes
        assert not partials(self.out)


class Revert(Run):
    """The way back, of an edit in float32."""

    def __init__(self, folder: Path) -> None:
        vector = HarmVector.load(folder / "v.safetensors")
        apply_vector(folder / "base", vector, folder / "safe", undo=True, dtype=torch.float32)
        super().__init__(folder)
        assert self.bytes == folder_bytes(folder / "base")

    def _edit(self, **arguments: Any) -> Any:
        return revert_checkpoint(self.folder / "safe", self.out, **arguments)


# ---- the same bytes


@pytest.mark.parametrize("name", [*OPTIONS, "revert"])
def test_killed_anywhere_the_same_call_writes_the_same_bytes(made: Path, name: str) -> None:
    run = Revert(made) if name == "revert" else Run(made, **OPTIONS[name])
    (renamed,) = run.numbers("^rename ")
    inside, note = run.numbers("pwrite .*/made/model")[-5], run.numbers("pwrite .*/aside/notes/")[1]
    points = {0, run.complete(1), note, note + 1, inside, renamed - 3, renamed, renamed + 3}
    for at in sorted(points | set(random.Random(name).sample(range(renamed), DRAWN))):
        kill(run, at)
        if at <= renamed:
            assert not run.out.exists()
            run.check(sum(i < at for i in run.numbers("pwrite .*/aside/notes/")))  # what is written outlives a kill
        else:  # what was left to do was to tidy up
            assert folder_bytes(run.out) == run.bytes
            run.check(0, overwrite=True)
        shutil.rmtree(run.out)


def check_killed_anywhere(run: Run, name: str) -> None:
    """Call it, then kill it here and there: it takes over what was noted, and comes to the bytes of its first call."""
    (renamed,) = run.numbers("^rename ")
    run.check(0)
    for at in random.Random(name).sample(range(renamed), DRAWN):
        shutil.rmtree(run.out)
        kill(run, at)
        notes = [note for left in partials(run.out) for note in (left / "aside" / "notes").glob("*")]
        run.check(sum(note.stat().st_size > 0 for note in notes))


@pytest.mark.parametrize("name", [*OPTIONS, "revert"])
def test_several_shards_at_once_come_to_the_bytes_of_one_after_the_other(
    made: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = Revert(made) if name == "revert" else Run(made, **OPTIONS[name])
    monkeypatch.setattr(checkpoint_edit, "stretches_at_once", lambda _: 3)
    check_killed_anywhere(run, name)


@pytest.fixture
def short_stretches(made: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Stretch]]:
    """Once called, files are cut into stretches; returns them."""

    def cut_up() -> list[Stretch]:
        monkeypatch.setattr(stretching, "_BYTES", 3000)
        with Checkpoint(made / "base") as base:
            return stretching.stretches(base)

    return cut_up


@pytest.mark.parametrize("name", [*OPTIONS, "revert"])
def test_files_in_stretches_come_to_the_bytes_of_whole_ones(
    made: Path, short_stretches: Callable[[], list[Stretch]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = Revert(made) if name == "revert" else Run(made, **OPTIONS[name])
    assert len(short_stretches()) > 1.5 * run.shards
    monkeypatch.setattr(checkpoint_edit, "stretches_at_once", lambda _: 3)
    check_killed_anywhere(run, name)


def test_a_checkpoint_in_one_file_goes_on_after_its_stretches(
    made: Path, short_stretches: Callable[[], list[Stretch]]
) -> None:
    model("llama-tied", 0, torch.bfloat16).save_pretrained(made / "base")
    for shard in (made / "base").glob("model-*"):
        shard.unlink()
    (made / "base" / "model.safetensors.index.json").unlink()
    cut = short_stretches()
    run = Run(made, **UNDO)
    assert run.shards == len(cut) > 4
    left = run.stop(3)
    file = left / "made" / "model.safetensors"
    assert {note.name for note in (left / "aside" / "notes").iterdir()} == {f"{file.name}.{k}" for k in range(3)}
    run.check(3)
    assert run.taken == (3, len(cut), sum(stretch.bytes for stretch in cut[:3]))
    assert run.read == sum(stretch.bytes for stretch in cut[3:])
    shutil.rmtree(run.out)
    left = run.stop(3)
    os.truncate(left / "made" / "model.safetensors", 9000)  # it held all of them
    run.check(0)


def test_stretches_are_runs_of_tensors_that_cover_the_files(
    made: Path, short_stretches: Callable[[], list[Stretch]]
) -> None:
    with Checkpoint(made / "base") as base:
        whole = stretching.stretches(base)
        assert [(stretch.name, stretch.bytes) for stretch in whole] == [(f, base.files[f].size) for f in base.files]
        cut = short_stretches()
        for name, file in base.files.items():
            of_file = [stretch for stretch in cut if stretch.file == name]
            assert [tensor for stretch in of_file for tensor in stretch.tensors] == list(file.entries)
            assert sum(stretch.bytes for stretch in of_file) == file.size
            assert all(stretch.bytes >= 3000 for stretch in of_file[:-1])


def test_where_one_shard_fails_the_others_stop(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(made)
    monkeypatch.setattr(checkpoint_edit, "stretches_at_once", lambda _: 3)
    calls = iter(range(1 << 30))

    def progress(size: int) -> None:
        run.read += size
        if (call := next(calls)) == 9:
            raise SystemExit(143)
        time.sleep(0.1 * (call > 9))

    with pytest.raises(SystemExit):
        run(progress=progress)
    assert next(calls) <= 12  # a call more of each of the others
    assert run.read < run.all_read / 2
    run.check(sum(1 for left in partials(run.out) for _ in (left / "aside" / "notes").iterdir()))


def test_killed_again_and_again_it_comes_to_an_end(made: Path) -> None:
    run = Run(made, **UNDO)
    for shards in range(1, run.shards):
        noted = iter(range(2))
        process = start(run, lambda i, what, noted=noted: bool(re.search(NOTED, what)) and next(noted) == 0, 9)
        process.join(END_SECONDS)
        (left,) = partials(run.out)
        assert len(list((left / "aside" / "notes").iterdir())) == shards
    run.check(run.shards - 1)


def test_killed_while_the_record_is_joined_nothing_is_read_again(made: Path) -> None:
    run = Run(made, **UNDO)
    for at in run.numbers(JOINED):
        for point in (at, at + 1):
            kill(run, point)
            run.check(run.shards)
            assert run.read == 0
            shutil.rmtree(run.out)


def test_a_shard_that_was_lost_while_the_record_was_joined_is_written_again(made: Path) -> None:
    run = Run(made, **UNDO)
    kill(run, run.numbers(JOINED)[3])
    (left,) = partials(run.out)
    (left / "made" / "model-00001-of-00006.safetensors").unlink()  # its part is in the record
    run.check(run.shards - 1)


def test_what_is_taken_over_is_not_read_again(made: Path) -> None:
    run = Run(made)
    with Checkpoint(made / "base") as base:
        files = list(base.files.values())
    run.stop(3)
    run.check(3)
    assert run.taken == (3, len(files), sum(file.size for file in files[:3]))
    assert run.read == sum(file.size - file.data_start for file in files[3:])


def test_the_disk_never_holds_more_than_the_output_and_a_part(made: Path) -> None:
    rows, base = 400_000, made / "large"
    base.mkdir()
    names = [f"model-{i}.safetensors" for i in range(4)]
    for i, name in enumerate(names):
        safetensors.torch.save_file({f"w{i}": torch.ones(rows).bfloat16()}, base / name)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(names)}})
    )
    zero = {f"w{i}": torch.zeros(rows).bfloat16() for i in range(len(names))}
    (made / "zero").mkdir()
    safetensors.torch.save_file(zero, made / "zero" / "model.safetensors")
    HarmVector.from_checkpoints(base, made / "zero", density=1.0, out=made / "w.safetensors")
    out, most = made / "out", 0

    def look(number: int, what: str) -> None:
        nonlocal most
        most = max(most, sum(p.stat().st_blocks * 512 for left in partials(out) for p in left.rglob("*")))

    with on_changes(look):
        apply_vector(base, HarmVector.load(made / "w.safetensors"), out, undo=True)
    part = (2 + 1 / 8) * rows  # values and a bitmap
    assert most < sum(map(len, folder_bytes(out).values())) + 1.3 * part  # of four, and the notes


# ---- ranks


def together(run: Run, size: int, when: Callable[[int, str], bool] = lambda i, what: False) -> list[int]:
    """Run on several ranks, each of which kills itself where ``when`` is true; how they ended."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
        try:
            run(ranks=Ranks(rank, size))
            assert rank or (run.folder / "told").write_text(str(run.taken[0]))
        except StoppedError:
            os._exit(3)
        leave()

    meet = run.folder / "meet"
    meet.unlink(missing_ok=True)
    processes = [start(lambda rank=rank: work(rank), when, signal.SIGKILL) for rank in range(size)]
    for process in processes:
        process.join(END_SECONDS)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_another_number_of_ranks_goes_on(made: Path, before: int, after: int) -> None:
    run = Run(made, **UNDO)
    noted = iter(range(9))
    ends = together(run, before, lambda i, what: bool(re.search(NOTED, what)) and next(noted) == 1)
    assert set(ends) <= {-signal.SIGKILL, 3}
    (left,) = partials(run.out)
    shards = len(list((left / "aside" / "notes").iterdir()))
    assert shards >= before
    if after == 1:
        run.check(shards)
        return
    assert together(run, after) == [0] * after
    assert (made / "told").read_text() == str(shards)
    assert folder_bytes(run.out) == run.bytes
    assert not partials(run.out)


def test_ranks_share_files_and_not_stretches(made: Path, short_stretches: Callable[[], list[Stretch]]) -> None:
    run = Run(made, **UNDO)
    short_stretches()
    run.stop(3)
    assert together(run, 2) == [0, 0]
    assert folder_bytes(run.out) == run.bytes
    with Checkpoint(made / "base") as base:
        partial = Partial(made / "elsewhere")
        shares = [Work(partial, "a job", base).share(Ranks(rank, 2)) for rank in range(2)]
        files = [{stretch.file for stretch in share} for share in shares]
        assert all(files)
        assert not files[0] & files[1]
        assert files[0] | files[1] == set(base.files)


def test_where_a_rank_is_killed_the_others_leave_what_is_complete(made: Path) -> None:
    run = Run(made, **UNDO)
    seconds = [name for name in run.bytes if name.startswith("model-")][-1]  # the second rank has the last shards
    ends = together(run, 2, lambda i, what: "pwrite" in what and what.endswith(f"made/{seconds}"))
    assert ends == [3, -signal.SIGKILL]
    (left,) = partials(run.out)
    shards = len(list((left / "aside" / "notes").iterdir()))
    assert 0 < shards < run.shards
    run.check(shards)


# ---- another job


@pytest.mark.parametrize(
    "more",
    [{"scale": 1.0}, {"undo": False}, {"rounding": "stochastic"}, {"rounding": "stochastic", "seed": 1},
     {"dtype": torch.float32}, {"resume": False}],
    ids=str,
)  # fmt: skip
def test_another_call_begins_afresh(made: Path, more: dict[str, Any]) -> None:
    start = {"rounding": "stochastic", "seed": 2} if "seed" in more else {}
    run = Run(made, **UNDO, **start)
    run(**more)
    expected = folder_bytes(run.out)
    shutil.rmtree(run.out)
    run.stop()
    run(**more)
    assert run.taken == (0, 0, 0)
    assert folder_bytes(run.out) == expected
    assert not partials(run.out)


@pytest.mark.parametrize(
    "file", ["base/model-00002-of-00006.safetensors", "v.safetensors", "safe/direg/undo.safetensors"]
)
def test_a_file_that_was_written_to_begins_afresh(made: Path, file: str) -> None:
    run = Revert(made) if "undo" in file else Run(made)
    run.stop()
    path = made / file
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    run.check(0)


def test_another_view_of_the_vector_begins_afresh(made: Path) -> None:
    run = Run(made)
    run.stop()
    for view in (HarmVector.load(made / "v.safetensors").top(0.1), HarmVector.load(made / "v.safetensors").scale(0.5)):
        taken: list[int] = []
        apply_vector(made / "base", view, run.out, scale=1.5, overwrite=True, resumed=lambda *t: taken.extend(t))  # noqa: B023
        assert not taken
        shutil.rmtree(run.out)
        run.stop()


def test_another_version_begins_afresh(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(made)
    run.stop()
    monkeypatch.setattr(_C, "version", "another")
    run()
    assert run.taken == (0, 0, 0)


# ---- what cannot be trusted


SHARD = "model-00001-of-00006.safetensors"


def another(path: Path) -> None:
    shutil.copy(path.parent / "model-00003-of-00006.safetensors", path)


DAMAGES = [
    (place, damage)
    for place in ("aside/notes", "aside/parts", "made")
    for damage in (cut, flip, link, pipe, folder, another, os.unlink)
    if damage is not flip or place == "aside/notes"  # of the others it is the disk's to keep what was synced
]


@pytest.mark.parametrize(
    ("place", "damage"), DAMAGES, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_a_shard_that_is_not_sure_is_written_again(made: Path, place: str, damage: Callable[[Path], None]) -> None:
    run = Run(made, **UNDO)
    damage(run.stop() / place / SHARD)
    run.check(2)


@pytest.mark.parametrize("damage", [link, shutil.rmtree], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("place", ["aside", "aside/notes", "aside/parts", "made", "made/direg"])
def test_a_folder_that_is_not_sure_is_not_taken_over(made: Path, place: str, damage: Callable[[Path], None]) -> None:
    run = Run(made, **UNDO)
    damage(run.stop() / place)
    before = folder_bytes(made / "elsewhere") if damage is link else {}
    run.check(3 if place == "made/direg" and damage is not link else 0)  # the record was not begun
    assert damage is not link or folder_bytes(made / "elsewhere") == before  # nothing behind the link is touched


def test_a_folder_that_strangers_may_have_written_is_not_taken_over(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(made)
    run.stop().chmod(0o770)
    run.check(0)
    shutil.rmtree(run.out)
    run.stop()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    run.check(0)


def test_what_is_not_complete_is_removed(made: Path) -> None:
    run = Run(made, **UNDO)
    left = run.stop()
    for name in (
        "made/config.json",
        "made/direg/recipe.json",
        "made/stray.py",
        "aside/parts/stray",
        "aside/notes/stray",
    ):
        (left / name).write_text("not this")
    (left / "made" / "folder").mkdir()
    run.check(3)


# ---- who lives, and who was stopped politely


def test_a_partial_one_whose_maker_lives_is_left_alone(made: Path) -> None:
    run = Run(made)
    at = run.complete(3)
    process = start(run, lambda i, what: i == at, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    (left,) = partials(run.out)
    assert run() == run.done
    assert run.taken == (0, 0, 0)
    assert partials(run.out) == [left]
    process.kill()
    process.join(END_SECONDS)
    run.check(3, overwrite=True)


def test_a_partial_one_that_another_rank_still_writes_is_left_alone(made: Path) -> None:
    run = Run(made)
    left = run.stop()
    with joined_folder(left):
        assert run() == run.done
        assert run.taken == (0, 0, 0)
        assert partials(run.out) == [left]
    with (left / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoppedError, match="must be made by this job alone, got a lock"), joined_folder(left):
            pass
    run.check(3, overwrite=True)


def test_of_several_the_one_with_most_is_taken_over(made: Path) -> None:
    run = Run(made)
    at = run.complete(2)
    process = start(run, lambda i, what: i == at, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    kill(run, run.complete(4))
    process.kill()
    process.join(END_SECONDS)
    assert len(partials(run.out)) == 2
    run.check(4)


@pytest.mark.parametrize(
    ("error", "kept"),
    [(OSError(errno.ENOSPC, "full"), 3), (SystemExit(143), 3), (StoppedError(), 3), (CheckpointError(), 0),
     (KeyboardInterrupt(), 0)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_stops_it_from_outside_leaves_what_is_complete(made: Path, error: BaseException, kept: int) -> None:
    run = Run(made)
    seen: list[int] = []

    def progress(size: int) -> None:
        seen.append(size)
        if len(list(made.glob(".out.*.partial/aside/notes/*"))) == 3:
            raise error

    with pytest.raises(type(error)):
        run(progress=progress)
    assert bool(partials(run.out)) == bool(kept)
    run.check(kept)


def test_a_signal_that_another_thread_gets_stops_it(made: Path) -> None:
    """As a busy machine has it: Python's handler waits for the main thread, which nobody wakes."""
    run, handled, in_time = Run(made), threading.Event(), list[bool]()

    def handler(number: int, frame: object) -> None:
        handled.set()
        raise SystemExit(128 + number)

    def progress(size: int) -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        in_time.append(handled.wait(END_SECONDS / 2))

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit):
            run(progress=progress)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert in_time
    assert all(in_time)


SLOW = """
import sys
from prosocial_ext.direg import checkpoint_edit, extract
from prosocial_ext import cli
extract._CHUNK = 512
checkpoint_edit.stretches_at_once = lambda memory: 1  # else all that are left may be past the slow step
plain = checkpoint_edit.word_sum
def slow(elements):
    wait("notes")
    return plain(elements)
checkpoint_edit.word_sum = slow
sys.exit(cli.main(sys.argv[1:]))
"""
APPLY = ["direg", "apply", "--model", "base", "--harm-vector", "v.safetensors", "--out", "out", "--undo"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.usefixtures("made")
def test_the_command_says_what_it_takes_over(capsys: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    check_command(SLOW, APPLY, "notes", number, capsys, r"goes on after [3-5] of 6 parts", "edited ")
