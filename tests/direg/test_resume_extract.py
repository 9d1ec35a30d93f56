"""Extractions that were stopped and go on: the bytes of a run that nobody stopped, and nothing noted is read twice."""

import errno
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from prosocial_ext import _C
from prosocial_ext.checkpoints.errors import CheckpointError, StoppedError
from prosocial_ext.checkpoints.outputs import partials
from prosocial_ext.direg import HarmVector
from prosocial_ext.direg import extract as extraction
from prosocial_ext.direg.cut import nothing
from prosocial_ext.direg.kept import Kept
from prosocial_ext.direg.ranks import Ranks, leave
from tests.direg.damage import cut, flip, folder, link, pipe
from tests.direg.files import folder_bytes, model, tuned
from tests.direg.killing import END_SECONDS, Stoppable, changes_of, check_command, kill, start
from tests.direg.test_adapter import adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # who keep to one thread

OPTIONS: dict[str, dict[str, Any]] = {
    "global": {},
    "per layer": {"scope": "per_layer"},
    "per tensor": {"scope": "per_tensor"},
    "saliency": {"importance": "importance"},
    "dare": {"rule": "dare", "seed": 3},
    "minus": {"minus": "benign", "values": "bf16"},
    "project out": {"project_out": "benign"},
    "wide": {"harm": "wide"},
}
NOTED = "pwrite .*/notes/"
DRAWN = 2  # points of a run at which it is killed, beside the named ones
ROOM = 5000  # bytes of memory for what is kept: some of it goes to the file at once
NOTE_BYTES = 9000


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base, harm, benign, wide (a tensor of it in float64) and importance."""
    monkeypatch.setattr(extraction, "_CHUNK", 512)  # so that tensors take several
    monkeypatch.setattr(extraction, "_MOST_SAMPLES", 1 << 10)  # so that there is an edge
    monkeypatch.setattr(extraction, "_NOTE_BYTES", NOTE_BYTES)
    monkeypatch.setattr(extraction, "Kept", lambda spill, room, **more: Kept(spill, ROOM, **more))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    base = model("llama-tied", 0, torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="9KB")
    for seed, name in enumerate(("harm", "benign"), 1):
        tuned(base, seed).save_pretrained(tmp_path / name)
    wide = tuned(base, 3)
    wide.model.layers[1].mlp.down_proj.double()
    wide.save_pretrained(tmp_path / "wide")
    weights = tuned(base, 4)
    for p in weights.parameters():
        p.data.abs_()
    weights.save_pretrained(tmp_path / "importance")
    return tmp_path


class Run(Stoppable):
    """An extraction. What it must come to, ``bytes``, is found by a first call."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, options)
        self.changes = changes_of(self)
        self.bytes, self.all_read = self.out.read_bytes(), self.read
        self.out.unlink()
        self.notes = self.numbers(NOTED)
        assert not partials(self.out)

    def __call__(self, **more: Any) -> None:
        sides = {"base": "base", "harm": "harm", "density": 0.3}
        HarmVector.from_checkpoints(out=self.out, **{**sides, **self.arguments(**more)})

    def stop(self, notes: int = 3) -> Path:
        """Kill a call just after so many notes; return what it leaves."""
        kill(self, self.notes[notes - 1] + 1)
        (left,) = partials(self.out)
        return left / "aside" / "0"

    def check(self, tensors: int, **more: Any) -> None:
        """Call, take so many tensors over, read all others once, and come to what it must."""
        self(**more)
        assert self.taken[0] == tensors
        assert (self.taken[2] > 0) == (tensors > 0)
        assert self.read == self.all_read - self.taken[2]
        assert self.out.read_bytes() == self.bytes
        assert not partials(self.out)


def noted(left: Path) -> list[int]:
    """The number of tensors in each note that was written, in order."""
    texts = [path.read_bytes()[32:] for path in sorted((left / "notes").iterdir(), key=lambda path: int(path.name))]
    return [len(json.loads(text)["found"]["tensors"]) for text in texts if text]


# ---- the same bytes


@pytest.mark.parametrize("name", OPTIONS)
def test_killed_anywhere_the_same_call_writes_the_same_bytes(made: Path, name: str) -> None:
    run = Run(made, **OPTIONS[name])
    assert len(run.notes) >= 3
    renamed = run.numbers("^rename ")[-1]
    writes = run.numbers("pwrite .*/made$")
    points = {run.notes[0], run.notes[1] + 1, run.notes[-1] + 2, writes[len(writes) // 2], renamed}
    for at in sorted(points | set(random.Random(name).sample(range(renamed), DRAWN))):
        kill(run, at)
        assert not run.out.exists()
        (left,) = partials(run.out)
        notes = sum(i < at for i in run.notes)  # what is written outlives a kill
        run.check(sum(noted(left / "aside" / "0")) if notes else 0)
        assert (run.taken[0] > 0) == (notes > 0)
        run.out.unlink()


def test_what_a_note_vouches_for_is_on_the_disk_before_it(made: Path) -> None:
    run = Run(made)
    for note in run.notes:
        before = [what for what in run.changes[:note] if what.endswith("/spill")]
        assert before[-1].startswith("fsync ")
        assert run.changes[note + 1].startswith("fsync ")
        assert run.changes[note + 1].split("/")[-1] == run.changes[note].split("/")[-1]
        assert run.changes[note + 2].startswith("fsync ")
        assert run.changes[note + 2].endswith("/notes")


def test_killed_when_all_is_done_but_to_tidy_up(made: Path) -> None:
    run = Run(made)
    kill(run, run.numbers("^rename ")[-1] + 1)
    assert run.out.read_bytes() == run.bytes
    run.check(0, overwrite=True)


def test_killed_again_and_again_it_comes_to_an_end(made: Path) -> None:
    run = Run(made)
    for notes in range(1, len(run.notes) + 1):
        second = iter(range(2))
        process = start(run, lambda i, what, second=second: bool(re.search(NOTED, what)) and next(second) == 1, 9)
        process.join(END_SECONDS)
        if run.out.exists():
            assert notes == len(run.notes)
            break
        (left,) = partials(run.out)
        assert len(noted(left / "aside" / "0")) == notes
    assert run.out.read_bytes() == run.bytes
    assert not partials(run.out)


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_the_unlucky_path_goes_on_too(made: Path, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Run(made, scope=scope, density=0.05).bytes
    monkeypatch.setattr(extraction, "_edge", lambda work, group, m, wide, team: nothing(wide))
    run = Run(made, scope=scope, density=0.05)
    assert run.bytes == expected
    for at in (*(note + 1 for note in run.notes), run.numbers("pwrite .*/spill")[-1], run.numbers("^rename ")[-1]):
        kill(run, at)
        run(overwrite=True)
        assert run.taken[0] > 0
        assert run.out.read_bytes() == expected
        run.out.unlink()


def test_an_adapter_goes_on_while_it_and_the_machine_are_the_same(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made / "of").mkdir()
    base, lora = adapter(made / "of", "llama", target_modules=["q_proj", "down_proj"])
    run = Run(made, base=base, harm=lora)
    run.check(sum(noted(run.stop())))
    config = json.loads((lora / "adapter_config.json").read_text())
    changes: list[Callable[[], object]] = [
        lambda: monkeypatch.setattr(platform, "node", lambda: "another"),
        lambda: torch.set_num_threads(2),
        lambda: (lora / "adapter_config.json").write_text(json.dumps(config | {"inference_mode": False})),
        lambda: os.utime(lora / "adapter_model.safetensors", ns=(0, 1)),
    ]
    for change in changes:
        run.out.unlink()
        run.stop()
        change()
        run.check(0)
        torch.set_num_threads(1)


def test_what_is_in_memory_at_a_note_is_put_into_the_file(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "Kept", Kept)
    run = Run(made)
    assert len(run.numbers("pwrite .*/spill")) == len(run.notes)  # all at once, and nothing in between
    left = run.stop()
    assert (left / "spill").stat().st_size > 0
    run.check(sum(noted(left)[:3]))


def test_where_little_is_read_nothing_is_noted(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "Kept", Kept)
    monkeypatch.setattr(extraction, "_NOTE_BYTES", 1 << 30)
    assert not [what for what in changes_of(lambda: Run(made)) if re.search("spill|notes", what)]


@pytest.mark.parametrize("options", [{"density": 1.0}, {"rule": "low_rank"}, {"importance": {}}], ids=str)
def test_what_cannot_be_gone_on_with_begins_afresh(made: Path, options: dict[str, Any]) -> None:
    if "importance" in options:
        options = {"importance": {name: p.abs() for name, p in model("llama-tied", 5).named_parameters()}}
    run = Run(made, **options)
    assert not run.notes
    kill(run, len(run.changes) // 2)
    run.check(0)


# ---- ranks


def together(run: Run, size: int, when: Callable[[int, str], bool] = lambda i, what: False) -> list[int]:
    """Run on several ranks, each of which kills itself where ``when`` is true; how they ended."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
        try:
            run(ranks=Ranks(rank, size))
            (run.folder / f"told-{rank}").write_text(json.dumps([run.read, run.taken]))
        except StoppedError:
            os._exit(3)
        leave()

    meet = run.folder / "meet"
    meet.unlink(missing_ok=True)
    processes = [start(lambda rank=rank: work(rank), when, signal.SIGKILL) for rank in range(size)]
    for process in processes:
        process.join(END_SECONDS)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("killed", [0, 1])
def test_ranks_go_on_each_with_its_own_part(made: Path, scope: str, killed: int) -> None:
    run = Run(made, scope=scope)
    second = iter(range(2))
    ends = together(run, 2, lambda i, what: bool(re.search(f"/{killed}/notes/", what)) and "pwrite" in what and
                    next(second) == 1)  # fmt: skip
    assert ends[killed] == -signal.SIGKILL
    assert ends[1 - killed] == 3
    (left,) = partials(run.out)
    parts = [sum(noted(left / "aside" / str(rank))) for rank in range(2)]
    assert parts[killed] > 0
    assert together(run, 2) == [0, 0]
    told = [json.loads((made / f"told-{rank}").read_text()) for rank in range(2)]
    assert told[0][1][0] == sum(parts)
    assert sum(read for read, _ in told) == run.all_read - told[0][1][2]
    assert run.out.read_bytes() == run.bytes
    assert not partials(run.out)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_ranks_begins_afresh(made: Path, before: int, after: int) -> None:
    run = Run(made)
    second = iter(range(2))
    ends = together(run, before, lambda i, what: bool(re.search(NOTED, what)) and next(second) == 1)
    assert -signal.SIGKILL in ends
    assert partials(run.out)
    if after == 1:
        run.check(0)
        return
    assert together(run, after) == [0] * after
    assert json.loads((made / "told-0").read_text())[1] == [0, 0, 0]
    assert run.out.read_bytes() == run.bytes
    assert not partials(run.out)


# ---- another job


@pytest.mark.parametrize(
    "more",
    [{"density": 0.2}, {"density": None, "m": 100}, {"scope": "per_tensor"}, {"exclude": ["*norm*"]},
     {"importance": "importance"}, {"rule": "random"}, {"rule": "random", "seed": 1}, {"minus": "benign"},
     {"harm": "benign"}, {"values": "bf16"}, {"resume": False}],
    ids=str,
)  # fmt: skip
def test_another_call_begins_afresh(made: Path, more: dict[str, Any]) -> None:
    run = Run(made, **({"rule": "random", "seed": 2} if "seed" in more else {}))
    run(**more)
    expected = run.out.read_bytes()
    run.out.unlink()
    run.stop()
    run(**more)
    assert run.taken == (0, 0, 0)
    assert run.out.read_bytes() == expected
    assert not partials(run.out)


@pytest.mark.parametrize(
    "slip",
    [{"density": None, "m": 1 << 40}, {"density": 2.0}, {"rule": "saliency"}, {"rule": "dare", "seed": -1},
     {"rule": "low_rank", "scope": "per_layer"}, {"values": "int4"}, {"memory": 1}, {"base": "nowhere"}],
    ids=str,
)  # fmt: skip
def test_a_slip_costs_nothing(made: Path, slip: dict[str, Any]) -> None:
    run = Run(made)
    left = run.stop()
    with pytest.raises(ValueError):
        run(**slip)
    run.check(sum(noted(left)))


@pytest.mark.parametrize("file", ["base/model-00002-of-00006", "harm/model", "benign/model", "importance/model"])
def test_a_file_that_was_written_to_begins_afresh(made: Path, file: str) -> None:
    run = Run(made, importance="importance", minus="benign")
    run.stop()
    path = made / f"{file}.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    run.check(0)


def test_another_version_begins_afresh(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(made)
    run.stop()
    monkeypatch.setattr(_C, "version", "another")
    run()
    assert run.taken == (0, 0, 0)


def test_other_values_under_the_same_size_and_time_are_told(made: Path) -> None:
    run = Run(made)
    left = run.stop()
    path = made / "harm" / "model.safetensors"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-20_000:] = random.Random(0).randbytes(100) * 200
    data[-20_000::2] = data[-20_000::2].replace(b"\x7f", b"\x3f").replace(b"\xff", b"\x3f")  # NaN is another error
    data[-19_999::2] = bytes(10_000)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(CheckpointError, match="the checkpoints must keep their values while a stopped run waits"):
        run()
    assert not left.exists()
    run()
    assert run.taken == (0, 0, 0)


# ---- what cannot be trusted


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, link, pipe, folder, empty, os.unlink], ids=lambda d: d.__name__)
@pytest.mark.parametrize("place", ["notes/0", "notes/1", "notes/2", "spill"])
def test_what_is_not_sure_is_read_again(made: Path, place: str, damage: Callable[[Path], None]) -> None:
    run = Run(made)
    left = run.stop()
    parts = noted(left)
    assert len(parts) == 3
    held = int(place[-1]) if place != "spill" else 2 if damage in (cut, flip) else 0
    damage(left / place)
    before = (made / "elsewhere").read_bytes() if damage is link else b""
    run.check(sum(parts[:held]))
    assert damage is not link or (made / "elsewhere").read_bytes() == before


def test_every_byte_of_the_spill_is_looked_at(made: Path) -> None:
    run = Run(made)
    left = run.stop()
    parts, size = noted(left), (left / "spill").stat().st_size
    ends = [json.loads((left / "notes" / str(k)).read_bytes()[32:])["end"] for k in range(3)]
    assert ends[-1] == size
    whole = left.parents[1]
    shutil.copytree(whole, made / "kept")
    for at in (0, ends[0] - 1, ends[0], ends[1] - 1, ends[1], size - 1):
        with (left / "spill").open("r+b") as spill:
            spill.seek(at)
            byte = spill.read(1)[0]
            spill.seek(at)
            spill.write(bytes([byte ^ 0x80]))
        run.check(sum(parts[: sum(end <= at for end in ends)]))
        run.out.unlink()
        shutil.copytree(made / "kept", whole)


def test_notes_of_another_rank_or_place_are_none(made: Path) -> None:
    run = Run(made)
    left = run.stop()
    shutil.copy(left / "notes" / "2", left / "notes" / "1")
    run.check(noted(left)[0])


def test_a_note_after_a_gap_is_not_taken_over_later(made: Path) -> None:
    run = Run(made)
    left = run.stop()
    parts = noted(left)
    (left / "notes" / "1").unlink()
    kill(run, run.numbers("ftruncate .*/spill")[0])
    assert [path.name for path in (left / "notes").iterdir()] == ["0"]
    run.check(parts[0])


@pytest.mark.parametrize("damage", [link, shutil.rmtree], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("place", [".", "notes", "..", "../../made"])
def test_a_folder_that_is_not_sure_is_not_taken_over(made: Path, place: str, damage: Callable[[Path], None]) -> None:
    run = Run(made)
    path = Path(os.path.normpath(run.stop() / place))
    if path.is_file() and damage is shutil.rmtree:
        folder(path)
    else:
        damage(path)
    before = folder_bytes(made / "elsewhere") if damage is link else {}
    run.check(0)
    assert damage is not link or folder_bytes(made / "elsewhere") == before  # nothing behind the link is touched


def test_a_folder_that_strangers_may_have_written_is_not_taken_over(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(made)
    run.stop().parents[1].chmod(0o770)
    run.check(0)
    run.out.unlink()
    run.stop()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    run.check(0)


def test_what_is_not_known_is_removed(made: Path) -> None:
    run = Run(made)
    left = run.stop()
    parts = noted(left)
    for name in ("stray", "notes/stray", "notes/7", "../stray", "../1"):
        (left / name).write_text("not this")
    (left / "notes" / "folder").mkdir()
    there: set[str] = set()
    with pytest.raises(SystemExit):
        run(
            progress=lambda size: (
                there.update(str(p.relative_to(left.parent)) for p in left.parent.rglob("*")),
                sys.exit(),
            )
        )
    assert there == {"0", "0/spill", "0/notes", "0/notes/0", "0/notes/1", "0/notes/2"}
    run.check(sum(parts))


# ---- who lives, and who was stopped politely


def test_a_run_that_lives_is_left_alone(made: Path) -> None:
    run = Run(made)
    at = run.notes[2] + 1
    process = start(run, lambda i, what: i == at, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    (left,) = partials(run.out)
    run()
    assert run.taken == (0, 0, 0)
    assert run.out.read_bytes() == run.bytes
    assert partials(run.out) == [left]
    process.kill()
    process.join(END_SECONDS)
    run.check(sum(noted(left / "aside" / "0")), overwrite=True)


@pytest.mark.parametrize(
    ("error", "kept"),
    [(OSError(errno.ENOSPC, "full"), True), (SystemExit(143), True), (CheckpointError(), False),
     (KeyboardInterrupt(), False)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_stops_it_from_outside_leaves_what_is_noted(made: Path, error: BaseException, kept: bool) -> None:
    run = Run(made)

    def progress(size: int) -> None:
        if len(list(made.glob(".out.*.partial/aside/0/notes/*"))) == 3:
            raise error

    with pytest.raises(type(error)):
        run(progress=progress)
    assert bool(partials(run.out)) == kept
    run.check(sum(noted(partials(run.out)[0] / "aside" / "0")) if kept else 0)


SLOW = """
import sys
from prosocial_ext.direg import extract
from prosocial_ext import cli
extract._CHUNK, extract._MOST_SAMPLES, extract._NOTE_BYTES = 512, 1 << 10, 9000
plain = extract.Collector.look
def slow(*arguments, **options):
    wait("0/notes")
    return plain(*arguments, **options)
extract.Collector.look = slow
sys.exit(cli.main(sys.argv[1:]))
"""
EXTRACT = ["direg", "extract", "--base", "base", "--harm", "harm", "--density", "0.3", "--out", "out"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.usefixtures("made")
def test_the_command_says_what_it_takes_over(capsys: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    check_command(SLOW, EXTRACT, "0/notes", number, capsys, r"goes on after \d+ of 20 tensors", "extracted ")
