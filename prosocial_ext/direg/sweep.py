"""Many doses of one harm vector, each measured: densities x scales into a table that is never half written.

The unedited model is the cell (0, 0). A live model is loaded once: each cell is reached from the last by undoing it to
the bit, so its weights are those that `apply_vector` writes. For a command every cell is written, measured and removed.
"""

from __future__ import annotations

import csv
import io
import math
import numbers
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prosocial_ext.checkpoints.checkpoint import Checkpoint
from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.outputs import new_file
from prosocial_ext.checkpoints.raw_io import write_all
from prosocial_ext.checkpoints.safetensors_header import parse_json
from prosocial_ext.direg.checkpoint_edit import apply_vector
from prosocial_ext.direg.extract import DEFAULT_MEMORY
from prosocial_ext.direg.harm_vector import HarmVector
from prosocial_ext.reference import check
from prosocial_ext.reference.topm import check_scale

__all__ = ["Cell", "SweepTable", "command_of", "plan_cells", "sweep_checkpoint", "sweep_model"]

_KEYS = ["density", "scale"]
_MODEL = "{model}"


class Cell(NamedTuple):
    """One dose; (0, 0) is the unedited model."""

    density: float
    scale: float


class SweepTable:
    """Cells and what was measured in each: a CSV file with columns density, scale, and the metrics.

    Every `add` replaces the file as a whole, so that a sweep that was killed goes on where it was.

    Args:
        path: The file; read if it is there.

    Raises:
        CheckpointError: It is there and no such table.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "sweep.csv"
    >>> SweepTable(path).add(Cell(0.1, 1.0), {"harm_rate": 0.25})
    >>> SweepTable(path).rows
    {Cell(density=0.1, scale=1.0): {'harm_rate': 0.25}}
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Cell, dict[str, float]] = {}
        if path.exists():
            self.rows = dict(_read(path))

    @property
    def metrics(self) -> list[str]:
        """The names of what was measured."""
        return list(next(iter(self.rows.values()), {}))

    def add(self, cell: Cell, measured: Any) -> None:
        """Add a row and write the table.

        Raises:
            CheckpointError: ``measured`` is no mapping from names to numbers, or names others than the rows before.
        """
        what = f"the evaluation at density {cell.density}, scale {cell.scale}"
        if not isinstance(measured, Mapping) or not measured or not all(map(_is_number, measured.values())):
            refuse(what, "return a dict of numbers by name", shown(measured))
        if not all(isinstance(name, str) and name and name not in _KEYS for name in measured):
            refuse(what, f"name its numbers other than {' and '.join(_KEYS)}", shown(list(measured)))
        if self.rows and set(measured) != set(self.metrics):
            refuse(what, f"return {', '.join(map(shown, self.metrics))} as the cells before", shown(list(measured)))
        self.rows[cell] = {name: float(measured[name]) for name in self.metrics or measured}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*_KEYS, *self.metrics])
        writer.writerows([*map(repr, row), *map(repr, values.values())] for row, values in self.rows.items())
        with new_file(self.path, overwrite=True) as descriptor:
            write_all(descriptor, 0, text.getvalue().encode())


def plan_cells(vector: HarmVector, densities: Sequence[float], scales: Sequence[float]) -> list[Cell]:
    """Return the cells: the unedited model, then every density with every scale.

    Raises:
        ValueError: A number out of range, or a density that the vector cannot give.
    """
    cells = [Cell(0.0, 0.0)]
    for density in dict.fromkeys(densities):
        check.number("densities", density, 0, 1, "be in (0, 1]")
        _at(vector, density)
        cells += [Cell(float(density), float(scale)) for scale in dict.fromkeys(map(check_scale, scales)) if scale]
    return cells


def sweep_model(
    model: torch.nn.Module,
    tokenizer: Any,
    vector: HarmVector,
    cells: Sequence[Cell],
    evaluate: Callable[[torch.nn.Module, Any], Any],
    table: SweepTable,
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Measure the cells that the table lacks on one live model, which is as it was afterwards, to the bit.

    Args:
        model: The base, or another model that the vector fits.
        tokenizer: Handed on.
        vector: The harm vector.
        cells: Of `plan_cells`.
        evaluate: evaluate(model, tokenizer) returns a dict of numbers; it must leave the weights alone.
        table: Where they go.
        progress: Called with 1 for each cell measured.

    Raises:
        CheckpointError: The model does not fit, or the evaluation returned something else.
    """
    todo = [cell for cell in cells if cell not in table.rows]
    for density in dict.fromkeys(cell.density for cell in todo):
        doses = [cell for cell in todo if cell.density == density]
        if density == 0:
            table.add(doses[0], evaluate(model.eval(), tokenizer))
            progress(1)
            continue
        view = _at(vector, density)
        with view.subtracted_from(model, doses[0].scale):
            for cell in doses:
                if cell != doses[0]:
                    view.rescale_(model, cell.scale)
                table.add(cell, evaluate(model.eval(), tokenizer))
                progress(1)


def sweep_checkpoint(
    checkpoint: Checkpoint,
    vector: HarmVector,
    cells: Sequence[Cell],
    command: Sequence[str],
    table: SweepTable,
    *,
    memory: int = DEFAULT_MEMORY,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Measure the cells that the table lacks by a command, on one written checkpoint at a time.

    Args:
        checkpoint: The base, or another that the vector fits.
        vector: The harm vector.
        cells: Of `plan_cells`.
        command: Of `command_of`. The last line that it prints is a JSON object of numbers.
        table: Where they go; the checkpoints are written beside it.
        memory: As for `apply_vector`.
        progress: Called with 1 for each cell measured.

    Raises:
        CheckpointError: The checkpoint does not fit, the command failed or printed something else.
    """
    edited = table.path.parent / ".cell"  # of a fixed name: what a killed sweep leaves is gone on with, or overwritten
    try:
        for cell in cells:
            if cell in table.rows:
                continue
            folder = edited if cell.density else checkpoint.folder
            if cell.density:
                view = _at(vector, cell.density)
                apply_vector(checkpoint, view, edited, scale=cell.scale, overwrite=True, memory=memory)
            table.add(cell, _run([part.replace(_MODEL, str(folder.resolve())) for part in command]))
            progress(1)
    finally:
        shutil.rmtree(edited, ignore_errors=True)


def command_of(text: str) -> list[str] | None:
    """Split a command that names {model}; None for anything else. No shell is involved.

    >>> command_of("python measure.py --model {model}"), command_of("package.module:function")
    (['python', 'measure.py', '--model', '{model}'], None)
    """
    return shlex.split(text) if _MODEL in text else None


def _at(vector: HarmVector, density: float) -> HarmVector:
    """The vector at a density; at its own it need not be ranked again, which one ranked by importance cannot be."""
    return vector if density == vector.recipe.get("density") else vector.top(density)


def _run(command: list[str]) -> dict[str, Any]:
    what = f"the command {shown(command[0])}"
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        refuse(what, "be a program", error.strerror)
    if done.returncode:
        refuse(what, "exit with status 0", done.returncode, "Its messages are above.")
    lines = done.stdout.strip().splitlines() or [""]
    return parse_json(lines[-1].encode(), f"the last line of {what}", floats=True)


def _read(path: Path) -> Iterator[tuple[Cell, dict[str, float]]]:
    rows = list(csv.reader(io.StringIO(path.read_text())))
    what, damaged = str(path), "Name another output."
    if not rows or rows[0][:2] != _KEYS or len(set(rows[0])) != len(rows[0]):
        refuse(what, "begin with density, scale and a name per metric", shown(rows[:1]), damaged)
    for row in rows[1:]:
        try:
            density, scale, *values = map(float, row)
        except ValueError:
            refuse(what, "hold numbers", shown(row), damaged)
        if len(row) != len(rows[0]):
            refuse(what, f"have {len(rows[0])} columns in every row", len(row), damaged)
        yield Cell(density, scale), dict(zip(rows[0][2:], values, strict=True))


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isinf(value)
