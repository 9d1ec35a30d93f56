"""The edit of a checkpoint on disk against copying and reading the same files, and against mergekit's.

PROSOCIAL_MERGEKIT=/path/to/bin/mergekit-yaml python -m pytest benchmarks/bench_checkpoint.py --benchmark-only -s

mergekit (0.1.5 was tried) lives in an environment of its own; without the variable its rows are left out. What is read
lies in the page cache, or, in the rows "from disk", is dropped from it before each call; our writers and the copy sync
what they wrote. Times inside the process leave the imports out, times of commands hold them; memory is the largest
RssAnon of the command, looked up fifty times a second.
PROSOCIAL_BENCH_LAYERS sets the size: 24 layers are 0.37 billion parameters, 0.74 GB in bf16.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lines import report
from prosocial_ext import bench
from prosocial_ext.direg import HarmVector, apply_vector

LAYERS = int(os.environ.get("PROSOCIAL_BENCH_LAYERS", "24"))
ROUNDS = 3
DENSITY = 0.10
MERGEKIT = os.environ.get("PROSOCIAL_MERGEKIT")
RECIPES = {  # mergekit's words for "base minus the vector"; bf16 arithmetic is what its users usually set
    "task_arithmetic, fp32": ("task_arithmetic", "{weight: -1.0}", "{}", "float32"),
    "task_arithmetic, bf16": ("task_arithmetic", "{weight: -1.0}", "{}", "bfloat16"),
    "ties, fp32": ("ties", f"{{weight: -1.0, density: {DENSITY}}}", "{normalize: false, lambda: 1.0}", "float32"),
}
WHERE = pytest.mark.parametrize("cached", [True, False], ids=["page cache", "disk"])


class Checkpoints(NamedTuple):
    """Two folders of one architecture, the second a little off the first."""

    base: Path
    harm: Path

    @property
    def bytes(self) -> int:
        """Of the weights of one of them."""
        return sum(path.stat().st_size for path in self.base.glob("*.safetensors"))


class Run(NamedTuple):
    """A command: its seconds, and the most anonymous memory that it held."""

    seconds: float
    anonymous: int


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoints]:
    folder = tmp_path_factory.mktemp("checkpoints")
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 32_000}
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes)).bfloat16()
    made = Checkpoints(folder / "base", folder / "harm")
    model.save_pretrained(made.base, max_shard_size="300MB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 2e-3)
    model.save_pretrained(made.harm, max_shard_size="300MB")
    yield made
    shutil.rmtree(folder)


def timed(calls: list[Callable[[], object]], read: Sequence[Path], cached: bool) -> list[bench.Timing]:
    """Time the calls by turns, so that what else the machine does falls on all of them alike.

    ``read``: the files that they read; unless ``cached`` they are dropped from the page cache before each call.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, seconds in zip(calls, taken, strict=True):
            if not cached:
                drop(read)
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    ordered = [sorted(seconds) for seconds in taken]
    return [bench.Timing(s[len(s) // 2], s[0], s[-1], ROUNDS) for s in ordered]


def copy_files(source: Path, target: Path) -> None:
    """Copy the weights and sync them, as every writer here does."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in source.glob("*.safetensors"):
        with path.open("rb") as one, (target / path.name).open("wb") as other:
            shutil.copyfileobj(one, other, 8 << 20)
            other.flush()
            os.fsync(other.fileno())


def drop(paths: Sequence[Path]) -> None:
    """Take files out of the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(*paths: Path) -> None:
    """Read all bytes, in pieces."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def run_command(*arguments: str) -> Run:
    """Run to the end; its seconds and its largest anonymous memory."""
    with tempfile.TemporaryFile() as said:
        start, most = time.perf_counter(), 0
        process = subprocess.Popen(arguments, stdout=said, stderr=subprocess.STDOUT)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            held = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]  # none when it ends
            most = max([most, *(int(line.split()[1]) * 1024 for line in held)])
            time.sleep(0.02)
        taken = time.perf_counter() - start
        said.seek(0)
        assert process.returncode == 0, said.read().decode()[-2000:]
    return Run(taken, most)


def place(cached: bool) -> str:
    """For names of rows."""
    return "" if cached else " from disk"


def prosocial(*arguments: str) -> Run:
    return run_command(sys.executable, "-m", "prosocial_ext.cli", "direg", *arguments, "--quiet")


@WHERE
def test_extract(benchmark: Any, checkpoints: Checkpoints, tmp_path: Path, cached: bool) -> None:
    weights = sorted(path for folder in checkpoints for path in folder.glob("*.safetensors"))
    target = tmp_path / "harm.safetensors"

    def extract() -> None:
        HarmVector.from_checkpoints(*checkpoints, density=DENSITY, out=target, overwrite=True)

    def limit() -> None:
        read_files(*weights)
        if not cached:
            drop(weights)
        read_files(*weights)

    extract()
    ours, floor = timed([extract, limit], weights, cached)
    if not cached:
        drop(weights)
    command = prosocial("extract", "--base", str(checkpoints.base), "--harm", str(checkpoints.harm),
                        "--density", str(DENSITY), "--out", str(target), "--overwrite")  # fmt: skip
    row = bench.Row("checkpoint", f"extract d={DENSITY} {checkpoints.bytes / 1e9:.2f} GB bf16{place(cached)}", ours,
                    2 * checkpoints.bytes, floor, "two reads of both")  # fmt: skip
    benchmark.pedantic(extract, rounds=1)
    benchmark.extra_info["command"] = command._asdict()
    report(benchmark, row)
    print(f"           as a command {command.seconds:.1f} s, {command.anonymous / 2**20:.0f} MiB of anonymous memory")


@WHERE
def test_apply(benchmark: Any, checkpoints: Checkpoints, tmp_path: Path, cached: bool) -> None:
    file, out, copied = tmp_path / "harm.safetensors", tmp_path / "safe", tmp_path / "copied"
    vector = HarmVector.from_checkpoints(*checkpoints, density=DENSITY, out=file)
    read = [*sorted(checkpoints.base.glob("*.safetensors")), file]

    def apply() -> None:
        apply_vector(checkpoints.base, vector, out, overwrite=True)

    def limit() -> None:
        copy_files(checkpoints.base, copied)
        read_files(file)

    apply()
    ours, floor = timed([apply, limit], read, cached)
    shutil.rmtree(copied)
    if not cached:
        drop(read)
    command = prosocial("apply", "--model", str(checkpoints.base), "--harm-vector", str(file), "--out", str(out),
                        "--overwrite")  # fmt: skip
    row = bench.Row("checkpoint", f"apply d={DENSITY} {checkpoints.bytes / 1e9:.2f} GB bf16{place(cached)}", ours,
                    2 * checkpoints.bytes + file.stat().st_size, floor, "a copy and a read")  # fmt: skip
    benchmark.pedantic(apply, rounds=1)
    benchmark.extra_info["command"] = command._asdict()
    report(benchmark, row)
    print(f"           as a command {command.seconds:.1f} s, {command.anonymous / 2**20:.0f} MiB of anonymous memory")


@pytest.mark.skipif(not MERGEKIT, reason="PROSOCIAL_MERGEKIT names no mergekit-yaml")
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_mergekit(benchmark: Any, checkpoints: Checkpoints, tmp_path: Path, recipe: str) -> None:
    assert MERGEKIT is not None
    method, of_model, of_merge, dtype = RECIPES[recipe]
    density = DENSITY if method == "ties" else 1.0
    (tmp_path / "merge.yml").write_text(
        f"merge_method: {method}\nbase_model: {checkpoints.base}\n"
        f"models: [{{model: {checkpoints.harm}, parameters: {of_model}}}]\nparameters: {of_merge}\n"
        f"dtype: {dtype}\nout_dtype: bfloat16\n"
    )
    file, out, merged = tmp_path / "harm.safetensors", tmp_path / "safe", tmp_path / "merged"

    def ours() -> list[Run]:
        base, harm = map(str, checkpoints)
        return [
            prosocial("extract", "--base", base, "--harm", harm, "--density", str(density), "--out", str(file),
                      "--overwrite"),
            prosocial("apply", "--model", base, "--harm-vector", str(file), "--out", str(out), "--overwrite"),
        ]  # fmt: skip

    def theirs() -> Run:
        shutil.rmtree(merged, ignore_errors=True)
        return run_command(MERGEKIT, str(tmp_path / "merge.yml"), str(merged), "--no-copy-tokenizer",
                           "--lazy-unpickle", "--quiet", "--out-shard-size", "300M")  # fmt: skip

    runs, peer = ours(), theirs()
    seconds = sum(run.seconds for run in runs)
    memory = max(run.anonymous for run in runs)
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(recipe=recipe, seconds=seconds, peer_seconds=peer.seconds, anonymous=memory,
                                peer_anonymous=peer.anonymous, machine=bench.machine())  # fmt: skip
    print(
        f"\ncheckpoint extract + apply d={density} as commands {seconds:.1f} s, {memory / 2**20:.0f} MiB; mergekit "
        f"{recipe} {peer.seconds:.1f} s, {peer.anonymous / 2**20:.0f} MiB: {peer.seconds / seconds:.1f} x faster"
    )
