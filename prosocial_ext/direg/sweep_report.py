"""A page of what a sweep found: harm and over-refusal against utility, every metric over the dose, the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prosocial_ext.direg.sweep import Cell, SweepTable
from prosocial_ext.evaluation.report import Report, figure_style

__all__ = ["write_report"]

_UTILITIES = ("utility", "perplexity")  # the first that was measured; of perplexity less is better
_SAFETY = {"harm_rate": "o", "over_refusal": "^"}
_PANELS = 3  # in a row


def write_report(table: SweepTable, path: Path) -> None:
    """Write the page; harm_rate and over_refusal get a figure of their own against utility or perplexity.

    Raises:
        ImportError: matplotlib is not installed; the text says how to install it.
    """
    report = Report("Sweep of a harm vector", "One row per dose; density 0 and scale 0 is the unedited model.")
    safety = [name for name in _SAFETY if name in table.metrics]
    utility = next((name for name in _UTILITIES if name in table.metrics), None)
    if utility is not None and safety:
        report.figure(
            _tradeoff(table, safety, utility),
            "Each density is a line through its scales, from the unedited model on. Take the dose that lowers harm "
            f"before over-refusal rises: {utility} moves last.",
            f"{' and '.join(safety)} against {utility}",
        )
    report.figure(_doses(table), "Every metric over the scale, a line per density.", "metrics over the scale")
    rows = [[f"{v:g}" for v in (*cell, *values.values())] for cell, values in table.rows.items()]
    report.table(["density", "scale", *table.metrics], rows, caption=table.path.name)
    report.save(path)


def _lines(table: SweepTable) -> dict[float, list[Cell]]:
    """The cells of each density by ascending scale, the unedited model first."""
    densities = sorted({cell.density for cell in table.rows if cell.density})
    start = [cell for cell in table.rows if not cell.density]
    return {d: start + sorted(cell for cell in table.rows if cell.density == d) for d in densities}


def _tradeoff(table: SweepTable, safety: list[str], utility: str) -> Any:
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.2 * len(safety), 3.6))
        for axis, metric in zip(figure.subplots(1, len(safety), squeeze=False)[0], safety, strict=True):
            axis.set(title=metric, xlabel=utility)
            for density, cells in _lines(table).items():
                xs = [table.rows[cell][utility] for cell in cells]
                ys = [table.rows[cell][metric] for cell in cells]
                axis.plot(xs, ys, marker=_SAFETY[metric], label=f"density {density:g}")
                for cell, x, y in zip(cells, xs, ys, strict=True):
                    axis.annotate(f"{cell.scale:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
            axis.legend()
    return figure


def _doses(table: SweepTable) -> Any:
    rows = -(-len(table.metrics) // _PANELS)
    columns = min(len(table.metrics), _PANELS)
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.5 * columns, 3.2 * rows))
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes[len(table.metrics) :]:
            axis.set_visible(False)
        for axis, metric in zip(axes, table.metrics, strict=False):
            axis.set(title=metric, xlabel="scale λ")
            for density, cells in _lines(table).items():
                axis.plot([c.scale for c in cells], [table.rows[c][metric] for c in cells], marker="o",
                          label=f"density {density:g}")  # fmt: skip
            axis.legend()
    return figure
