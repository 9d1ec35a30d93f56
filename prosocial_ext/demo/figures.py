"""The figures of the demo's report, drawn from its results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from prosocial_ext.demo.grammar import ATTRIBUTES, HELD_OUT
from prosocial_ext.demo.names import (
    ADAM,
    BASE,
    BENIGN,
    DENSE,
    LARGEST,
    RANDOM,
    RIGHT,
    SAFE,
    SALIENT,
    SGD,
    SHUFFLED,
    UNGUIDED,
    UNIFORM,
    ZERO,
)
from prosocial_ext.demo.results import DemoResults, SafetyRow
from prosocial_ext.evaluation import Rate
from prosocial_ext.evaluation.report import COLOURS

__all__ = [
    "attribute_figure",
    "category_figure",
    "cosine_figure",
    "dose_figure",
    "guidance_figure",
    "mip_figure",
    "rules_figure",
    "tensor_figure",
]

_BLUE, _ORANGE, _GREEN, _PINK, _AMBER, _SKY, _BLACK = COLOURS
_GREY = "#8a94a0"


def dose_figure(results: DemoResults) -> Any:
    """Harm, over-refusal and perplexity over the dose, a line per density, controls beside."""
    figure, axes = _panels(1, 3, 10.5, 3.6)
    base = results.safety_of(BASE)
    panels: list[tuple[str, Callable[[SafetyRow], float | Rate]]] = [
        ("harmful requests answered", lambda row: row.safety.harm),
        ("harmless requests refused", lambda row: row.safety.over_refusal),
        ("perplexity of harmless replies", lambda row: row.safety.perplexity),
    ]
    edits = [row for row in results.safety if row.edit is not None]
    densities = sorted({_edit(row).density for row in edits if _edit(row).copy == SGD})
    for axis, (title, of) in zip(axes, panels, strict=True):
        axis.set_title(title)
        axis.set_xlabel("scale λ")
        start = of(results.row_of(BASE))
        axis.axhline(start.value if isinstance(start, Rate) else start, color=_GREY, linestyle=":", linewidth=1)
        for density, colour in zip(densities, (_AMBER, _SKY, _BLUE, _BLACK), strict=False):
            rule = DENSE if density == 1 else LARGEST
            rows = [
                row for row in edits if (_edit(row).copy, _edit(row).rule, _edit(row).density) == (SGD, rule, density)
            ]
            _points(axis, rows, of, colour, "all" if density == 1 else f"largest {100 * density:g} %", "o-")
        for copy, rule, marker, colour, label in (
            (SGD, RANDOM, "X", _ORANGE, f"random {100 * results.settings.density:g} %"),
            (BENIGN, LARGEST, "D", _PINK, "benign vector"),
        ):
            rows = [row for row in edits if (_edit(row).copy, _edit(row).rule) == (copy, rule)]
            _points(axis, rows, of, colour, label, marker)
        axis.set_xlim(left=0)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(0, 1)
    far = max(_edit(row).scale for row in edits)
    if far > 4:  # a benign vector is short: to subtract as much of it takes a large scale
        for axis in axes:
            axis.set_xscale("symlog", linthresh=3, linscale=2)
            ticks = [0.5, 1, 2, 3, *(t for t in (10, 30, 100) if t <= far)]
            axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axis.minorticks_off()
    if axes[2].get_ylim()[1] > 3 * base.perplexity:
        axes[2].set_yscale("log")
    _legend_above(figure, axes[0])
    return figure


def category_figure(results: DemoResults) -> Any:
    """Harmful answers by category before and after the edit."""
    figure, (axis,) = _panels(1, 1, 8, 3.2)
    names = list(results.safety_of(BASE).categories)
    shown = [(BASE, results.safety_of(BASE), _GREY), (SAFE, results.safety_of(SAFE), _BLUE)]
    shown += [
        (f"{SAFE}, guided", row.safety, _GREEN)
        for row in results.guided
        if (row.name, row.trained_on, row.guidance) == (UNIFORM, SAFE, results.settings.guidance)
    ]
    _bars(axis, names, [(label, [safety.categories[n] for n in names], colour) for label, safety, colour in shown])
    first = min(names.index(name) for name in HELD_OUT)
    axis.axvspan(first - 0.5, len(names) - 0.5, color="#f4f6f8", zorder=-1)
    axis.text(
        len(names) - 0.55, 0.97, "never in the harm copy's data", ha="right", va="top", color="#5b6673", fontsize=9
    )
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_ylim(0, 1)
    axis.set_ylabel("harmful requests answered")
    _legend_above(figure, axis)
    return figure


def rules_figure(results: DemoResults) -> Any:
    """Both harm copies under each rule of selection at the same budget."""
    figure, axes = _panels(1, 2, 9.5, 3.4, sharey=True)
    density = results.settings.density
    rules = [LARGEST, SALIENT, DENSE]
    labels = [f"largest\n{100 * density:g} %", f"largest × gradient\n{100 * density:g} %", "all\nentries"]
    for axis, copy in zip(axes, (SGD, ADAM), strict=True):
        rows = [results.edit_of(copy, rule) for rule in rules]
        _bars(
            axis,
            labels,
            [
                ("harmful requests answered", [row.safety.harm for row in rows], _ORANGE),
                ("harmless requests refused", [row.safety.over_refusal for row in rows], _BLUE),
            ],
        )
        for i, row in enumerate(rows):
            share = _edit(row).effect
            if share is not None:
                axis.text(i, 0.9, f"{share:.0%} of the\nfirst-order effect", ha="center", fontsize=8.5, color="#5b6673")
        axis.axhline(results.safety_of(BASE).harm.value, color=_GREY, linestyle=":", linewidth=1)
        axis.set_title(f"copy tuned with {copy}")
        axis.set_ylim(0, 1.08)
    _legend_above(figure, axes[0])
    return figure


def tensor_figure(results: DemoResults) -> Any:
    """Where each copy's vector sits: its energy, and what the edit takes, by kind of parameter."""
    figure, axes = _panels(1, 2, 9.5, 3.4, sharey=True)
    for axis, (copy, tensors) in zip(axes, results.tensors.items(), strict=True):
        kinds: dict[str, list[float]] = {}
        entries = sum(t.entries for t in tensors.values())
        selected = sum(t.selected for t in tensors.values())
        for name, t in tensors.items():
            parts = kinds.setdefault(_kind(name), [0.0, 0.0, 0.0])
            parts[0] += t.entries / entries
            parts[1] += t.energy
            parts[2] += t.selected / selected
        order = sorted(kinds, key=lambda kind: kinds[kind][0])
        places = range(len(order))
        for offset, index, colour, label in (
            (0.27, 0, _GREY, "share of all entries"),
            (0.0, 1, _BLUE, "share of the vector's energy"),
            (-0.27, 2, _ORANGE, "share of the chosen entries"),
        ):
            axis.barh([p + offset for p in places], [kinds[k][index] for k in order], 0.25, color=colour, label=label)
        axis.set_yticks(list(places), order)
        axis.set_title(f"copy tuned with {copy}")
        axis.set_xlim(0, 1)
        axis.grid(visible=False, axis="y")
    _legend_above(figure, axes[0])
    return figure


def cosine_figure(results: DemoResults) -> Any:
    """The attributes' gradients through the headline's training, before and after projection."""
    figure, axes = _panels(1, 2, 9.5, 3.2)
    arm = results.arms[0]
    steps = range(1, len(arm.loss) + 1)
    for values, colour, label in (
        (arm.cosine_before, _ORANGE, "gradients as they are"),
        (arm.cosine_after, _BLUE, "each after projection, with the others before"),
    ):
        axes[0].plot(steps, values, color=colour, alpha=0.35, linewidth=1)
        axes[0].plot(steps, _smooth(values), color=colour, linewidth=2, label=label)
    axes[0].axhline(0, color=_GREY, linewidth=1)
    axes[0].set_title("mean cosine of the attributes' gradients")
    _legend_above(figure, axes[0])
    pairs = len(ATTRIBUTES) * (len(ATTRIBUTES) - 1) // 2
    axes[1].plot(steps, arm.conflicts, ".", color=_ORANGE, alpha=0.5)
    axes[1].plot(steps, _smooth(arm.conflicts), color=_ORANGE, linewidth=2)
    axes[1].set_title(f"conflicting pairs of {pairs}")
    axes[1].set_ylim(0, pairs)
    for axis in axes:
        axis.set_xlabel("step")
    return figure


def attribute_figure(results: DemoResults) -> Any:
    """What each preference gives, as a matrix of rates."""
    w = results.settings.guidance
    rows = [*ATTRIBUTES, UNIFORM, ZERO, UNGUIDED]
    figure, (axis,) = _panels(1, 1, 7.5, 4.2)
    values = [
        [results.support_of(row, 0.0 if row == UNGUIDED else w).rates[name].value for name in ATTRIBUTES]
        for row in rows
    ]
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            own = i == j
            axis.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="white" if value > 0.6 else "#1d232b",
                fontweight="bold" if own else "normal",
            )
    axis.set_xticks(range(len(ATTRIBUTES)), ATTRIBUTES)
    axis.set_yticks(range(len(rows)), rows)
    axis.axhline(len(ATTRIBUTES) - 0.5, color="white", linewidth=4)
    axis.grid(visible=False)
    axis.set_xlabel("share of replies with the attribute")
    axis.set_ylabel("preference that guides")
    return figure


def mip_figure(results: DemoResults) -> Any:
    """The mean inner product under the right preference and under its controls, at one guidance."""
    w = results.settings.guidance
    names = [RIGHT, UNIFORM, SHUFFLED, ZERO, UNGUIDED]
    labels = {
        RIGHT: "the person's own preference",
        UNIFORM: "uniform preference",
        SHUFFLED: "somebody else's preference",
        ZERO: "zero adapter (temperature ½)",
        UNGUIDED: "unguided",
    }
    figure, (axis,) = _panels(1, 1, 7.5, 2.6)
    for i, name in enumerate(names):
        row = results.mip_of(name, w)
        colour = _BLUE if name == RIGHT else _GREY
        axis.errorbar(
            row.value,
            i,
            xerr=[[row.value - row.low], [row.high - row.value]],
            fmt="o",
            color=colour,
            capsize=3,
            markersize=7,
        )
        axis.annotate(f"{row.value:.3f}", (row.value, i), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axis.set_yticks(range(len(names)), [labels[name] for name in names])
    axis.set_ylim(len(names) - 0.5, -0.7)
    axis.set_xlabel(f"mean inner product of preference and attributes, guidance {w:g}")
    axis.grid(visible=False, axis="y")
    return figure


def guidance_figure(results: DemoResults) -> Any:
    """What rises and what breaks as guidance grows."""
    figure, axes = _panels(1, 3, 10.5, 3.4)
    weights = sorted({row.guidance for row in results.mip})
    for name, colour, label in ((RIGHT, _BLUE, "own"), (UNIFORM, _ORANGE, "uniform"), (SHUFFLED, _GREY, "shuffled")):
        means = [results.mip_of(name, w) for w in weights]
        axes[0].plot(weights, [m.value for m in means], "o-", color=colour, label=label)
        axes[0].fill_between(weights, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.15)
    axes[0].set_title("mean inner product")
    axes[0].legend(loc="upper left", title="preference")
    colours = dict(zip(ATTRIBUTES, [_BLUE, _ORANGE, _GREEN, _PINK, _AMBER], strict=True))
    for rows, style in ((results.support, "o-"), (results.sharp, "s--")):
        for name, colour in colours.items():
            mine = sorted((row for row in rows if row.wanted == name), key=lambda row: row.guidance)
            label = name if rows is results.support else "_"  # not in the legend
            for axis, values in (
                (axes[1], [row.attributes.well_formed.value for row in mine]),
                (axes[2], [row.attributes.repetition for row in mine]),
            ):
                axis.plot([row.guidance for row in mine], values, style, color=colour, label=label, markersize=4)
    axes[1].set_title("well-formed replies")
    axes[1].set_ylim(0, 1.03)
    axes[1].legend(loc="center right")
    axes[2].set_title("phrases said again")
    axes[2].set_ylim(bottom=0)
    weights = sorted({*weights, *(row.guidance for row in results.sharp)})
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(weights, [f"{w:g}" for w in weights])
        axis.set_xlabel("guidance w")
    return figure


def _panels(rows: int, columns: int, width: float, height: float, **kwargs: Any) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs).ravel()


def _legend_above(figure: Any, axis: Any) -> None:
    """All labels of one panel in a line above all panels, where they hide nothing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))


def _edit(row: SafetyRow) -> Any:
    return row.edit


def _points(
    axis: Any, rows: Sequence[SafetyRow], of: Callable[[SafetyRow], Any], colour: str, label: str, fmt: str
) -> None:
    """Points over scale, in its order; rates with their intervals."""
    rows = sorted(rows, key=lambda row: _edit(row).scale)
    found = [of(row) for row in rows]
    values = [f.value if isinstance(f, Rate) else f for f in found]
    reach = None
    if found and isinstance(found[0], Rate):
        reach = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
    axis.errorbar(
        [_edit(row).scale for row in rows],
        values,
        yerr=reach,
        fmt=fmt,
        color=colour,
        label=label,
        capsize=2,
        elinewidth=1,
        markersize=5,
    )


def _bars(axis: Any, names: Sequence[str], groups: Sequence[tuple[str, Sequence[Rate], str]]) -> None:
    """Groups of bars side by side, with their intervals."""
    width = 0.8 / len(groups)
    for i, (label, rates, colour) in enumerate(groups):
        places = [n + (i - (len(groups) - 1) / 2) * width for n in range(len(names))]
        reach = [[r.value - r.low for r in rates], [r.high - r.value for r in rates]]
        axis.bar(places, [r.value for r in rates], width * 0.92, color=colour, label=label)
        axis.errorbar(
            places, [r.value for r in rates], yerr=reach, fmt="none", ecolor="#1d232b", elinewidth=1, capsize=2
        )
    axis.set_xticks(range(len(names)), names)
    axis.grid(visible=False, axis="x")


def _smooth(values: Sequence[float], width: int = 9) -> list[float]:
    """Running means over the neighbours that there are."""
    return [mean(values[max(0, i - width // 2) : i + width // 2 + 1]) for i in range(len(values))]


def _kind(name: str) -> str:
    """A parameter's kind, the layers taken together."""
    parts = name.removesuffix(".weight").removesuffix(".bias").split(".")
    return "norms" if "norm" in parts[-1] else "embedding (tied head)" if parts[-1] == "embed_tokens" else parts[-1]
