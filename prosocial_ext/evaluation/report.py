"""Builds one self-contained HTML page of text, tables and matplotlib figures: nothing is loaded from outside."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prosocial_ext.reference import check

__all__ = ["COLOURS", "Report", "figure_style"]

# Okabe and Ito's colours: told apart with any colour vision, and in grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]

_STYLE = """
:root { color-scheme: light; --ink: #1d232b; --soft: #5b6673; --line: #d8dee5; --tint: #f4f6f8; --good: #00694c;
        --bad: #a83c00; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 66rem; background: #fff; color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
nav { margin: 1.2rem 0; font-size: .9rem; columns: 2; }
nav a { display: block; color: #00598c; text-decoration: none; }
nav a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.tile { background: var(--tint); border-radius: .5rem; padding: .9rem 1rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { text-align: right; font-weight: 600; border-bottom: 2px solid var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
table:not(.text) td:first-child { white-space: nowrap; }
table.text th, table.text td { text-align: left; }
tr.mark td { background: var(--tint); font-weight: 600; }
.yes { color: var(--good); font-weight: 600; } .no { color: var(--bad); font-weight: 600; }
figure { margin: 1.2rem 0; } figure img { display: block; max-width: 100%; height: auto; }
pre { background: var(--tint); border-radius: .4rem; padding: .7rem 1rem; overflow-x: auto; font-size: .86rem; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } nav { display: none; }
  h2 { break-after: avoid; } figure, table, .tiles { break-inside: avoid; } .scroll { overflow: visible; } }
"""


class Report:
    """A page that grows from top to bottom.

    Every text is escaped: prompts and generations may hold anything. The same calls give the same bytes.

    Args:
        title: The page's title and first heading.
        lead: A paragraph below it.

    >>> report = Report("Harm", "What was <found>.")
    >>> report.heading("Rates")
    >>> report.table(["model", "rate"], [["base", "0.63"]], caption="Share answered")
    >>> page = report.html()
    >>> "What was &lt;found&gt;." in page and '<h2 id="rates">' in page
    True
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self._title = title
        self._lead = lead
        self._parts: list[str] = []
        self._headings: list[tuple[str, str]] = []

    def heading(self, text: str, level: int = 2) -> None:
        """Begin a section (level 2, listed in the contents) or a part of one (level 3).

        Raises:
            ValueError: Another level.
        """
        if level not in (2, 3):
            check.fail("level", "be 2 or 3", level)
        if level == 3:
            self._parts.append(f"<h3>{html.escape(text)}</h3>")
            return
        taken = {anchor for anchor, _ in self._headings}
        plain = "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
        anchor = next(name for n in range(len(taken) + 2) if (name := f"{plain}-{n}" if n else plain) not in taken)
        self._headings.append((anchor, text))
        self._parts.append(f'<h2 id="{html.escape(anchor)}">{html.escape(text)}</h2>')

    def paragraph(self, text: str, *, soft: bool = False) -> None:
        """Add a paragraph; ``soft`` ones are notes, smaller and paler."""
        self._parts.append(f"<p{' class=soft' if soft else ''}>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Add lines in a fixed-width font, such as a command."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def tiles(self, tiles: Iterable[tuple[str, str, str]]) -> None:
        """Add a row of headline figures: (what, figure, note)."""
        cells = "".join(
            f"<div class=tile><span class=soft>{html.escape(what)}</span><b>{html.escape(figure)}</b>"
            f"<span class=soft>{html.escape(note)}</span></div>"
            for what, figure, note in tiles
        )
        self._parts.append(f"<div class=tiles>{cells}</div>")

    def table(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[Any]],
        *,
        caption: str = "",
        marked: Iterable[int] = (),
        text: bool = False,
    ) -> None:
        """Add a table.

        Args:
            header: A title per column.
            rows: As many cells each; a bool is shown as "holds" or "does not hold", anything else as its str.
            caption: A line above the table.
            marked: The rows to stress, counted from 0.
            text: All columns to the left, as befits texts; else all but the first to the right, as befits figures.

        Raises:
            ValueError: A row with more or fewer cells than the header.
        """
        stressed = set(marked)
        lines = []
        for index, row in enumerate(rows):
            if len(row) != len(header):
                check.fail(f"rows[{index}]", f"have {len(header)} cells, as the header", len(row))
            cells = "".join(f"<td>{_cell(cell)}</td>" for cell in row)
            lines.append(f"<tr{' class=mark' if index in stressed else ''}>{cells}</tr>")
        head = "".join(f"<th scope=col>{html.escape(title)}</th>" for title in header)
        title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        kind = " class=text" if text else ""
        self._parts.append(
            f"<div class=scroll><table{kind}>{title}<thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )

    def figure(self, figure: Any, caption: str, alt: str) -> None:
        """Add a ``matplotlib.figure.Figure`` as an inlined SVG.

        Args:
            figure: The figure, made inside `figure_style`.
            caption: What a reader should see in it, shown below.
            alt: What it shows, for those who cannot see it.
        """
        drawn = io.BytesIO()
        with figure_style():
            figure.savefig(drawn, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        data = base64.b64encode(drawn.getvalue()).decode("ascii")
        self._parts.append(
            f'<figure><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def html(self) -> str:
        """Return the page."""
        links = "".join(f'<a href="#{html.escape(a)}">{html.escape(text)}</a>' for a, text in self._headings)
        contents = f"<nav>{links}</nav>" if len(self._headings) > 2 else ""
        lead = f"<p>{html.escape(self._lead)}</p>" if self._lead else ""
        title = html.escape(self._title)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            # whatever a generated text may smuggle in, the browser loads and runs nothing
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">\n"
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{lead}\n"
            + "\n".join(self._split_contents(contents))
            + "\n</body>\n</html>\n"
        )

    def _split_contents(self, contents: str) -> list[str]:
        """The parts, the contents standing before the first section."""
        first = next((i for i, part in enumerate(self._parts) if part.startswith("<h2")), len(self._parts))
        return [*self._parts[:first], contents, *self._parts[first:]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page, over an earlier one as a whole or not at all."""
        target = Path(path)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            unfinished.write_text(self.html(), encoding="utf-8")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


def figure_style() -> AbstractContextManager[None]:
    """Return a context in which matplotlib draws in the report's style, and the same bytes every time.

    Raises:
        ImportError: matplotlib is not installed; the text says how to install it.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError("A report's figures need matplotlib: pip install 'prosocial_ext[report]'") from error
    from cycler import cycler

    return rc_context(
        {
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 10,
            "axes.edgecolor": "#5b6673",
            "grid.color": "#e4e8ec",
            "legend.frameon": False,
            "legend.fontsize": 9,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "font.size": 10,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "svg.hashsalt": "prosocial_ext",
        }
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "<span class=yes>holds</span>" if value else "<span class=no>does not hold</span>"
    return html.escape(str(value))
