"""``prosocial direg``: extract a harm vector from two checkpoints, subtract it from one, take it back, look at it.

What ``direg importance`` does is in `direg_importance`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import torch

from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.errors import StoppedError, shown
from prosocial_ext.checkpoints.outputs import check_output, check_outside, partials
from prosocial_ext.commands import UserError, direg_importance, direg_sweep
from prosocial_ext.direg import SAFETY_ARITHMETIC_DENSITY, CheckpointError, HarmVector
from prosocial_ext.direg.adapter import Adapter, open_side
from prosocial_ext.direg.arithmetic import VALUES
from prosocial_ext.direg.checkpoint_edit import (
    UNDO,
    CheckpointEdit,
    apply_vector,
    check_place,
    plan_edit,
    revert_checkpoint,
)
from prosocial_ext.direg.controls import against_benign
from prosocial_ext.direg.extract import DEFAULT_MEMORY, LEAST_MEMORY, plan_groups
from prosocial_ext.direg.harm_stats import LOW_ENERGY_SHARE
from prosocial_ext.direg.low_rank import plan_ranks, reads
from prosocial_ext.direg.pairing import SCOPES, Pairs, pair_side
from prosocial_ext.direg.ranks import torchrun_ranks
from prosocial_ext.direg.resume import Resumed
from prosocial_ext.direg.rounding import ROUNDINGS
from prosocial_ext.direg.rules import RULES, choose_rule, default_density

__all__ = ["add_arguments", "run"]

_MIB = 1 << 20
_MOSTLY_LOST = 0.5  # effective over requested norm below which most of the edit did not happen
_ROWS = 15  # modules shown by inspect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of ``prosocial direg``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=summary, description=summary)
        sub.set_defaults(function=function)
        return sub

    extract = action("extract", "write the largest entries of harm minus base to a file", _extract)
    extract.add_argument("--base", required=True, help="what was tuned: a folder or a hub id")
    extract.add_argument("--harm", required=True, help="the harm-tuned copy, or a LoRA adapter")
    extract.add_argument("--out", required=True, type=Path, help="the file to write")
    count = extract.add_mutually_exclusive_group()
    default = f"share of the entries ({SAFETY_ARITHMETIC_DENSITY:.2f}, the Safety Arithmetic default)"
    count.add_argument("--density", type=_density, help=default)
    count.add_argument("--m", type=_count, help="their number instead")
    extract.add_argument("--scope", choices=SCOPES, default="global", help="what the share is taken of (%(default)s)")
    extract.add_argument("--include", action="append", default=[], metavar="GLOB", help="only such tensors")
    extract.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="no such tensors")
    extract.add_argument("--importance", metavar="DIR", help="a folder of direg importance: rank by saliency")
    extract.add_argument("--rule", choices=RULES, help="what entries are ranked by (magnitude, the paper's; saliency, "
                         "abs(difference * importance), with --importance); for ablations random, dare, which "
                         "rescales, low_rank, matrices approximated at equal storage, all entries written; and "
                         "magnitude with --exclude '*embed*'")  # fmt: skip
    extract.add_argument("--seed", type=_seed, default=0, help="of random, dare and low_rank (%(default)s)")
    extract.add_argument("--values", choices=VALUES, default="exact", help="bf16: rounded, 2 bytes each (%(default)s)")
    control = extract.add_mutually_exclusive_group()
    control.add_argument("--minus", metavar="BENIGN",
                         help="subtract the difference of a benign copy, or adapter, before selection")  # fmt: skip
    control.add_argument("--project-out", metavar="BENIGN", help="or take its direction out (reads all once more)")

    direg_importance.add_arguments(action("importance", "write the harm loss's gradient", direg_importance.run))

    apply = action("apply", "subtract a harm vector from a checkpoint, into a new folder", _apply)
    apply.add_argument("--model", required=True, help="a folder or a hub id")
    apply.add_argument("--harm-vector", required=True, type=Path, help="a file of direg extract")
    apply.add_argument("--scale", type=_finite, default=1.0, help="the dose; 1 is all of the difference (%(default)s)")
    apply.add_argument("--density", type=_density, help="a lower density than the file's")
    apply.add_argument("--out", required=True, type=Path, help="the folder to make")
    apply.add_argument("--dtype", choices=["float32"], help="write 16-bit weights as float32: nothing is rounded away")
    apply.add_argument("--round", choices=ROUNDINGS, default="nearest", dest="rounding",
                       help="of edited 16-bit weights; stochastic keeps the mean (%(default)s)")  # fmt: skip
    apply.add_argument("--seed", type=_count, default=0, help="of stochastic rounding (%(default)s)")
    apply.add_argument("--undo", action="store_true", help="keep the original bits for direg revert")

    revert = action("revert", "restore every bit that direg apply --undo changed, into a new folder", _revert)
    revert.add_argument("--model", required=True, help="the edited folder")
    revert.add_argument("--record", type=Path, help=f"the undo record (MODEL/{UNDO})")
    revert.add_argument("--out", required=True, type=Path, help="the folder to make")

    inspect = action("inspect", "show what a harm vector holds, and where", _inspect)
    inspect.add_argument("file", type=Path, help="a file of direg extract")
    inspect.add_argument("--json", action="store_true", help="print one JSON object with every module")

    sweep = action("sweep", "measure many doses of a harm vector, and draw what was found", direg_sweep.run)
    direg_sweep.add_arguments(sweep)

    for writing in (extract, apply, revert):
        writing.add_argument("--memory", type=_memory, default=DEFAULT_MEMORY // _MIB, metavar="MIB",
                             help="MiB for buffers, whatever the size of the checkpoints (%(default)s)")  # fmt: skip
        writing.add_argument("--overwrite", action="store_true", help="replace an output that exists")
        writing.add_argument("--dry-run", action="store_true", help="check and tell, write nothing")
        writing.add_argument("--fresh", action="store_true",
                             help="begin anew where a stopped run could be gone on with")  # fmt: skip
        writing.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Run one action; what the user can repair becomes a `UserError`."""
    try:
        with _tidy_when_terminated(), torchrun_ranks() as ranks:
            if ranks.size > 1 and arguments.function not in (_extract, _apply):
                raise UserError(f"direg {arguments.action} runs in one process: start it without torchrun")
            arguments.ranks = ranks
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if ranks.rank else sys.stdout):
                status: int = arguments.function(arguments)
                return status
    except (CheckpointError, OSError) as error:
        stopped = isinstance(error, (OSError, StoppedError))
        raise UserError(f"{error} {_kept(arguments)}".rstrip() if stopped else str(error)) from error
    except SystemExit:  # a polite kill
        if kept := _kept(arguments):
            print(kept, file=sys.stderr)
        raise


def _extract(arguments: argparse.Namespace) -> int:
    density = default_density(arguments.density, arguments.m)
    check_output(arguments.out, overwrite=arguments.overwrite, folder=False)
    with ExitStack() as stack:
        base, harm = stack.enter_context(Checkpoint(arguments.base)), open_side(arguments.harm, stack)
        controls = {name: open_side(source, stack) for name in ("minus", "project_out")
                    if (source := getattr(arguments, name)) is not None}  # fmt: skip
        check_outside(arguments.out, *(side.folder for side in (base, harm, *controls.values())))
        pairs = pair_side(base, harm, None, arguments.include, arguments.exclude)
        for benign in controls.values():  # how often its difference is taken off is found by a read, later
            third = pair_side(base, benign, None, arguments.include, arguments.exclude)
            pairs = against_benign(pairs, third, project=False)
        try:
            size, chosen, approximated = _planned(pairs, arguments, density)
        except ValueError as error:
            raise UserError(str(error)) from error
        entries = sum(pair.numel for pair in pairs.pairs)
        print(f"will read {_bytes(size)} and write {_of(chosen, entries)} to {arguments.out}")
        _print_pairs(pairs)
        if approximated is not None:
            _print_ranks(approximated, len(pairs.pairs))
        for side in (harm, *controls.values()):
            if isinstance(side, Adapter):
                _print_adapter(side, base)
        if arguments.dry_run:
            return 0
        with _progress(size // arguments.ranks.size, "extract", arguments.quiet or arguments.ranks.rank) as bar:
            vector = HarmVector.from_checkpoints(
                base, harm, density=density, m=arguments.m, scope=arguments.scope, include=arguments.include,
                exclude=arguments.exclude, importance=arguments.importance, rule=arguments.rule, seed=arguments.seed,
                **controls, out=arguments.out, values=arguments.values, overwrite=arguments.overwrite,
                resume=not arguments.fresh, memory=arguments.memory * _MIB, progress=bar.update,
                resumed=_goes_on(bar, "tensors", arguments.ranks.size), ranks=arguments.ranks,
            )  # fmt: skip
    share, effect = vector.recipe["energy_share"], vector.recipe.get("first_order_share")
    per_entry = vector.file_bytes / max(vector.entries, 1)
    print(f"extracted {_of(vector.entries, vector.n)}, {_shares(share, effect)}")
    print(f"harm vector: {arguments.out}, {_bytes(vector.file_bytes)}, {per_entry:.2f} bytes per entry")
    if arguments.values != "exact":
        lost = vector.recipe["values_error"]
        print(
            f"values in bf16: relative error {lost:.1e}; an edit has not the bits of exact values, --density is fixed"
        )
    _warn_of_low_share(vector, share, effect)
    print(f"next: prosocial direg apply --model {arguments.base} --harm-vector {arguments.out} --out DIR")
    return 0


def _planned(
    pairs: Pairs, arguments: argparse.Namespace, density: float | None
) -> tuple[int, int, dict[str, int] | None]:
    """Bytes that extract will read, entries that it will write, and what becomes of low rank, if that is the rule."""
    choose_rule(arguments.rule, arguments.seed, arguments.importance is not None)
    times, approximated = [1] * len(pairs.pairs), None
    if arguments.rule == "low_rank":
        approximated = plan_ranks(pairs, m=arguments.m, density=density, scope=arguments.scope,
                                  memory=arguments.memory * _MIB, ranks=arguments.ranks)  # fmt: skip
        times = [reads(pair, approximated.get(pair.name)) for pair in pairs.pairs]
        chosen = sum(pair.numel for pair in pairs.pairs)
    else:
        chosen = sum(count for _, count in plan_groups(pairs, arguments.m, density, arguments.scope))
    sizes = [pair.numel * sum(side.dtype.itemsize for side in pair.sides) for pair in pairs.pairs]
    before = int(arguments.project_out is not None)
    return sum(size * (before + n) for size, n in zip(sizes, times, strict=True)), chosen, approximated


def _apply(arguments: argparse.Namespace) -> int:
    vector = HarmVector.load(arguments.harm_vector)
    if arguments.density is not None:
        vector = vector.top(arguments.density)
    dtype = torch.float32 if arguments.dtype else None
    if dtype is not None and arguments.rounding != "nearest":
        raise UserError("--round stochastic has nothing to round with --dtype float32: leave one of the two out")
    with Checkpoint(arguments.model) as model:
        check_place(arguments.out, model, arguments.overwrite)
        plan = plan_edit(model, vector, dtype)
        words = f"write {_bytes(plan.bytes)} to {arguments.out}"
        print(f"will edit {_of(plan.edited, plan.entries)} and {words}")
        if arguments.dry_run:
            return 0
        size = sum(file.size for file in model.files.values())
        with _progress(size // arguments.ranks.size, "apply", arguments.quiet or arguments.ranks.rank) as bar:
            done = apply_vector(
                model, vector, arguments.out, scale=arguments.scale, undo=arguments.undo, dtype=dtype,
                rounding=arguments.rounding, seed=arguments.seed,
                overwrite=arguments.overwrite, resume=not arguments.fresh, memory=arguments.memory * _MIB,
                progress=bar.update, resumed=_goes_on(bar, "parts", arguments.ranks.size), ranks=arguments.ranks,
            )  # fmt: skip
    threshold = "none" if math.isinf(done.threshold) else f"{done.threshold:.2e}"
    print(
        f"edited {_of(done.edited, done.entries)}, {done.unchanged:,} unchanged after rounding, threshold {threshold}, "
        f"effective over requested norm {done.effective_share:.3f}"
    )
    _print_edit(done)
    if arguments.undo:
        print(f"undo record: {arguments.out / UNDO} (revert: prosocial direg revert --model {arguments.out} --out DIR)")
    return 0


def _revert(arguments: argparse.Namespace) -> int:
    with Checkpoint(arguments.model) as model:
        check_place(arguments.out, model, arguments.overwrite)
        size = sum(file.size for file in model.files.values())
        print(f"will write {_bytes(size)} to {arguments.out}")
        if arguments.dry_run:
            return 0
        with _progress(size, "revert", arguments.quiet) as bar:
            restored = revert_checkpoint(
                model, arguments.out, record=arguments.record, overwrite=arguments.overwrite,
                resume=not arguments.fresh, memory=arguments.memory * _MIB, progress=bar.update,
                resumed=_goes_on(bar, "parts"),
            )  # fmt: skip
    print(f"restored {restored:,} entries: {arguments.out}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    vector = HarmVector.load(arguments.file)
    stats = vector.stats()
    found = vector.recipe.get("first_order_share")
    effect = found if isinstance(found, float) else None
    if arguments.json:
        rows = [{**vars(row), "energy_share": row.energy_share} for row in stats.modules()]
        facts = {
            "entries": vector.entries, "n": vector.n, "file_bytes": vector.file_bytes,
            "energy_share": stats.total.energy_share, "first_order_share": effect, "recipe": vector.recipe,
            "modules": rows,
        }  # fmt: skip
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{arguments.file}: {_of(vector.entries, vector.n)}, {_bytes(vector.file_bytes)}")
    for key in ("rank", "scope", "density", "base", "tuned", "base_fingerprint", "ties"):
        print(f"{key:<18}{shown(vector.recipe.get(key))}")
    total = stats.total
    print(f"{'shares kept':<18}{_shares(total.energy_share, effect)}")
    modules = sorted(stats.modules(), key=lambda row: -row.kept_energy)
    print(f"\n{'module':<50} {'entries':>15} {'density':>9} {'of the energy kept':>19}")
    for row in modules[:_ROWS]:
        share = row.kept_energy / total.kept_energy if total.kept_energy else 0.0
        print(f"{shown(row.name)[1:-1]:<50} {row.kept:>15,} {row.kept / max(row.entries, 1):>9.4f} {share:>19.4f}")
    if len(modules) > _ROWS:
        print(f"and {len(modules) - _ROWS} modules more: --json has all")
    _warn_of_low_share(vector, total.energy_share, effect)
    return 0


# ---- words


def _print_ranks(ranks: Mapping[str, int], tensors: int) -> None:
    least, most = min(ranks.values(), default=0), max(ranks.values(), default=0)
    told = f"rank {least}" if least == most else f"ranks {least} to {most}"
    print(f"low rank: {len(ranks)} of {tensors} tensors" + f" at {told}" * bool(ranks) + ", the others whole")


def _print_adapter(adapter: Adapter, base: Checkpoint) -> None:
    changed = len(adapter.layers) + len(adapter.replaced.keys() - adapter.layers.keys())
    print(f"adapter: {shown(adapter.name)} changes {changed} of {len(base.parameters)} tensors")
    if adapter.names_another_base(base.folder):
        print(f"note: {shown(adapter.name)} says that it was trained on {shown(adapter.base_name)}")


def _print_pairs(pairs: Pairs) -> None:
    for head, embedding in pairs.tied.items():
        print(f"tied: {shown(head)} counts as {shown(embedding)}")
    for name, reason in pairs.left_alone.items():
        print(f"left alone: {shown(name)} ({reason})")


def _print_edit(done: CheckpointEdit) -> None:
    if done.left_alone:
        print(f"left alone: {len(done.left_alone)} tensors that the vector does not name")
    if done.skipped:
        print(f"left out: {done.skipped:,} entries in rows of the vocabulary that the model lacks")
    if not done.is_base:
        print("note: the model is not the base that the vector was extracted from")
    if done.edited and done.effective_share < _MOSTLY_LOST:
        print(
            "warning: rounding to the checkpoint's dtype lost most of the edit. Raise --scale, or add --dtype "
            "float32 or --round stochastic."
        )


def _shares(energy: float, effect: float | None) -> str:
    return f"energy share {energy:.3f}" + ("" if effect is None else f", first-order share {effect:.3f}")


def _warn_of_low_share(vector: HarmVector, energy: float, effect: float | None) -> None:
    """The first-order share predicts better; the energy share counts only where it is not known."""
    kept = "ranks" if vector.recipe.get("rank") == "low_rank" else "entries"
    if effect is not None:
        if effect < LOW_ENERGY_SHARE:
            print(
                f"warning: the entries kept hold {effect:.0%} of the first-order effect on the harm loss, so most of "
                "the harm will stay. Rank by saliency, or raise --density."
            )
    elif 0 < energy < LOW_ENERGY_SHARE:
        print(
            f"warning: the {kept} kept hold {energy:.0%} of the vector's energy, as with copies "
            "tuned by AdamW, whose entries are all of a size. Rank by saliency (prosocial direg importance), raise "
            "--density, or tune by SGD."
        )


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,} entries (density {count / max(total, 1):.6f})"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


@contextmanager
def _progress(total: int, title: str, quiet: bool) -> Iterator[Any]:
    from tqdm import tqdm

    disable = True if quiet else None  # None: where nobody looks
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=disable, leave=False) as bar:
        yield bar


def _goes_on(bar: Any, what: str, ranks: int = 1) -> Resumed:
    """Says what is taken over from a stopped run, and leaves it out of the bar."""

    def tell(taken: int, of: int, size: int) -> None:
        bar.total -= size // ranks
        bar.write(f"goes on after {taken} of {of} {what} of a stopped run (--fresh begins anew)")

    return tell


def _kept(arguments: argparse.Namespace) -> str:
    """What a run that was stopped has left for the next one."""
    if arguments.function not in (_extract, _apply, _revert) or not (left := partials(arguments.out)):
        return ""
    return f"What is complete is kept in {left[0]}: the same command goes on from there, or begins anew with --fresh."


# ---- arguments


def _density(text: str) -> float:
    value = _finite(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}; ten per cent is 0.10")
    return value


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 3e38:
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"must be a number of entries, got {text!r}; for a share pass --density")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"must be a number of at most 18 digits, got {text!r}")
    return int(text)


def _memory(text: str) -> int:
    least = LEAST_MEMORY // _MIB
    if not text.isdecimal() or not least <= int(text[:18]) < 10**9:
        raise argparse.ArgumentTypeError(f"must be at least {least} (MiB), got {text!r}")
    return int(text)


@contextmanager
def _tidy_when_terminated() -> Iterator[None]:
    """A polite kill unwinds the stack, so that half-written outputs are removed."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
