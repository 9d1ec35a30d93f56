"""``prosocial direg sweep``: measure many doses of a harm vector, and draw what was found."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.errors import refuse
from prosocial_ext.checkpoints.outputs import check_outside
from prosocial_ext.commands import UserError, users_mistakes
from prosocial_ext.direg import CheckpointError, HarmVector
from prosocial_ext.direg.extract import DEFAULT_MEMORY
from prosocial_ext.direg.rewrite import write_json
from prosocial_ext.direg.sweep import Cell, SweepTable, command_of, plan_cells, sweep_checkpoint, sweep_model
from prosocial_ext.user_function import import_function

__all__ = ["add_arguments", "run"]

_TABLE, _RECIPE, _REPORT = "sweep.csv", "sweep.json", "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prosocial direg sweep``."""
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    parser.add_argument("--harm-vector", required=True, type=Path, help="a file of direg extract")
    parser.add_argument("--densities", required=True, type=_numbers, metavar="D,...", help="at most the file's")
    parser.add_argument("--scales", required=True, type=_numbers, metavar="S,...", help="doses")
    parser.add_argument("--evaluate", required=True, metavar="WHAT", help="a .yaml of prosocial eval; or "
                        "module:function, called with (model, tokenizer); or a command with {model} that ends with a "
                        "line of JSON: numbers")  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, help=f"a folder for {_TABLE} and {_REPORT}; one that is "
                        "there is gone on with")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="of the live model: cpu, cuda, ... (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="check and tell, measure nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Measure the cells that are not in the table yet."""
    from tqdm import tqdm

    vector = HarmVector.load(arguments.harm_vector)
    try:
        cells = plan_cells(vector, arguments.densities, arguments.scales)
    except CheckpointError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    command = command_of(arguments.evaluate)
    evaluate: Callable[[Any, Any], Any] | None = None
    out: Path = arguments.out
    with Checkpoint(arguments.model) as checkpoint:
        check_outside(out, checkpoint.folder)
        facts = {
            "model": checkpoint.describe(), "vector": _fingerprint(vector.recipe), "evaluate": arguments.evaluate,
        }  # fmt: skip
        if command is None:
            evaluate, more = _evaluation(arguments, checkpoint.folder)
            facts |= more
        _check_same(out / _RECIPE, facts)
        table = SweepTable(out / _TABLE)
        done = sum(cell in table.rows for cell in cells)
        print(f"will measure {len(cells) - done} of {len(cells)} cells, {done} are in {out / _TABLE}")
        if arguments.dry_run:
            return 0
        out.mkdir(exist_ok=True)
        if not (out / _RECIPE).exists():
            write_json(out / _RECIPE, facts)
        disable = True if arguments.quiet else None  # None: where nobody looks
        with tqdm(total=len(cells), initial=done, desc="sweep", unit="cell", disable=disable, leave=False) as bar:
            if evaluate is None:
                assert command is not None
                sweep_checkpoint(checkpoint, vector, cells, command, table, memory=DEFAULT_MEMORY, progress=bar.update)
            elif done < len(cells):
                _live(checkpoint.folder, arguments.device, vector, cells, evaluate, table, bar.update)
    _print(table)
    _report(table, out / _REPORT)
    return 0


def _evaluation(arguments: argparse.Namespace, folder: Path) -> tuple[Callable[[Any, Any], Any], dict[str, Any]]:
    """What is called with the live model, and what else decides the outcome."""
    from prosocial_ext.quiet import quiet_transformers

    text: str = arguments.evaluate
    if text.endswith((".yaml", ".yml")):
        from prosocial_ext.evaluation.live import LiveEvaluation

        with quiet_transformers(), users_mistakes(arguments, ValueError, TypeError):
            evaluation = LiveEvaluation(text, folder, arguments.device)
        for note in evaluation.notes:
            print(f"note: {note}")

        def measured(model: Any, tokenizer: Any) -> dict[str, float]:
            with users_mistakes(arguments, ValueError):
                return evaluation(model, tokenizer)

        return measured, {"evaluation": evaluation.facts}
    if ":" not in text:
        rule = "be a .yaml of prosocial eval, module:function, or a command that names {model}"
        raise UserError(f"--evaluate must {rule}, got {text!r}")
    with users_mistakes(arguments, ValueError):
        return import_function("evaluate", text), {}


def _live(folder: Path, device: str, vector: HarmVector, cells: list[Cell], evaluate: Callable[[Any, Any], Any],
          table: SweepTable, progress: Callable[[int], object]) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prosocial_ext.quiet import quiet_transformers

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError):
            print("note: the model has no tokenizer, the function is given None")
            tokenizer = None
    sweep_model(model, tokenizer, vector, cells, _told(evaluate, table), table, progress=progress)


def _told(evaluate: Callable[[Any, Any], Any], table: SweepTable) -> Callable[[Any, Any], Any]:
    """The function, whose errors are shown with their place where they are not ours."""

    def measured(model: Any, tokenizer: Any) -> Any:
        try:
            return evaluate(model, tokenizer)
        except UserError:
            raise
        except Exception as error:
            traceback.print_exc()
            kept = f"{len(table.rows)} cells are in {table.path}: the same command goes on from there"
            raise UserError(f"the function failed with {type(error).__name__}; {kept}") from error

    return measured


def _check_same(path: Path, facts: dict[str, Any]) -> None:
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if found != facts:
        refuse(str(path.parent), "be a new folder, or one of this model, vector and evaluation", "another sweep's",
               "Name another --out.")  # fmt: skip


def _fingerprint(recipe: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _print(table: SweepTable) -> None:
    print(f"{'density':>9} {'scale':>9} " + " ".join(f"{name[:14]:>14}" for name in table.metrics))
    for cell, values in table.rows.items():
        print(f"{cell.density:>9g} {cell.scale:>9g} " + " ".join(f"{value:>14.4g}" for value in values.values()))


def _report(table: SweepTable, path: Path) -> None:
    from prosocial_ext.direg.sweep_report import write_report

    try:
        write_report(table, path)
    except ImportError as error:
        print(f"note: no {path.name}. {error}")
        return
    print(f"table: {table.path}; plots: {path}")


def _numbers(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"must be numbers, such as 0.01,0.1, got {text!r}")
    return values
