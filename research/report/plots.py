"""Plots as PNG files: value against cost with Pareto fronts, and curves over steps. Matplotlib is imported when one is
made."""

import itertools
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.files import replace_file
from research.report.tables import human_bytes, human_count, human_ms, is_finite, pareto

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Okabe and Ito's colours, told apart by colour-blind readers; markers differ as well, for print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LOG_SPREAD = 4  # a cost axis whose largest value is more than this times its smallest is logarithmic
MAX_NAMES = 12  # points of a series that are named; beyond that only the front is

COST_LABELS = {
    "params": "parameters",
    "flops": "FLOPs of one example's forward pass",
    "latency_ms": "latency at batch 1",
    "peak_memory_bytes": "memory",
}


def pareto_plot(
    path: str | os.PathLike,
    series: Mapping[str, Sequence[Row]],
    cost_key: str = "flops",
    value_key: str = "value",
    *,
    title: str = "",
    xlabel: str | None = None,
    ylabel: str | None = None,
    name_key: str = "name",
    full: str | None = None,
    higher_is_better: bool = True,
) -> Path:
    """Draws each series as named points of value against cost, with the line of its Pareto front.

    Args:
      path: the PNG to write (atomically).
      series: label to rows, e.g. {"many-in-one": rows, "trained alone": rows}; rows without a finite cost or value are
        left out.
      cost_key, value_key, name_key: keys of a row. The cost's unit follows from its key, as in tables.
      full: name of the full network: a dashed line marks its value in the first series that has it.
      higher_is_better: of the value; False for a loss.
    """
    figure, axes = _figure()
    costs: list[float] = []
    labels: list[tuple[float, float, str, str]] = []
    for index, (label, rows) in enumerate(series.items()):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        rows = [row for row in rows if is_finite(row.get(cost_key)) and is_finite(row.get(value_key))]
        front = pareto(rows, cost_key, value_key, higher_is_better=higher_is_better)
        axes.plot(
            [r[cost_key] for r in front], [r[value_key] for r in front], color=color, lw=1.6, alpha=0.75, zorder=2
        )
        points = [r[cost_key] for r in rows], [r[value_key] for r in rows]
        axes.scatter(*points, s=44, color=color, marker=marker, edgecolor="white", linewidth=0.9, label=label, zorder=3)
        costs += points[0]
        named = rows if len(rows) <= MAX_NAMES else front
        ink = color if len(series) == 1 else "#333333"
        labels += [(r[cost_key], r[value_key], str(r.get(name_key) or ""), ink) for r in named]
    _full_line(axes, series, value_key, name_key, full)
    _cost_axis(axes, costs, cost_key)
    axes.set_xlabel(xlabel or COST_LABELS.get(cost_key, cost_key))
    axes.set_ylabel(ylabel or value_key)
    axes.set_title(title, loc="left")
    axes.margins(x=0.1, y=0.14)
    _name_points(figure, axes, _once(labels), above=higher_is_better)
    if len(series) > 1:
        axes.legend(loc="lower right" if higher_is_better else "upper right")
    return _save(figure, path)


def curves_plot(
    path: str | os.PathLike,
    series: Mapping[str, Sequence[Row]],
    value_key: str = "loss",
    *,
    step_key: str = "step",
    title: str = "",
    xlabel: str = "step",
    ylabel: str | None = None,
    log_x: bool = False,
) -> Path:
    """Draws one metric over steps, a line a series: rows of metrics.jsonl; rows without the metric are left out.

    Series of more than 300 points show the raw values faintly and their running median over 1/50 of the points on top.
    """
    figure, axes = _figure()
    for index, (label, rows) in enumerate(series.items()):
        color, dashes = COLORS[index % len(COLORS)], ("-", "--", ":")[index // len(COLORS) % 3]
        rows = [row for row in rows if is_finite(row.get(step_key)) and is_finite(row.get(value_key))]
        steps, values = [row[step_key] for row in rows], [row[value_key] for row in rows]
        if len(rows) > 300:
            axes.plot(steps, values, color=color, lw=0.7, alpha=0.22)
            values = _running_median(values, len(values) // 100)
        few = len(rows) <= 30
        axes.plot(steps, values, color=color, lw=1.7, ls=dashes, label=label, marker="o" if few else None, ms=4)
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel or value_key)
    axes.set_title(title, loc="left")
    if len(series) > 1:
        axes.legend(loc="best")
    return _save(figure, path)


def heat_maps(
    path: str | os.PathLike,
    panels: Mapping[str, tuple["Sequence[float] | np.ndarray", Any]],
    *,
    title: str = "",
    ylabel: str = "",
    most: float = 2.0,
) -> Path:
    """Draws a map for each panel, one below the other: steps from left to right, a row for each of the values at a
    step.

    Args:
      path: the PNG to write (atomically).
      panels: label -> (steps [S], values [S, N]).
      most: values from here on have the darkest colour; 0 is white.
    """
    figure, axes = _figure()
    axes.remove()
    figure.set_size_inches(7.2, max(2.2, 0.6 + 1.3 * len(panels)))
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    meshes = []
    for own, (label, (steps, values)) in zip(grid, panels.items(), strict=True):
        edges = [1.5 * steps[0] - 0.5 * steps[-1] if len(steps) < 2 else 2 * steps[0] - steps[1], *steps]
        rows = [n - 0.5 for n in range(values.shape[1] + 1)]
        meshes.append(own.pcolormesh(edges, rows, values.T, cmap="Blues", vmin=0, vmax=most))
        own.set_ylabel(label, fontsize=8)
        own.tick_params(labelsize=8)
        own.invert_yaxis()
    grid[-1].set_xlabel("step")
    grid[0].set_title(title, loc="left", fontsize=10)
    figure.colorbar(meshes[-1], ax=list(grid), label=ylabel, fraction=0.03)
    return _save(figure, path)


def bars_plot(
    path: str | os.PathLike,
    rows: Sequence[Row],
    group_key: str,
    series_key: str,
    value_key: str,
    floor_key: str,
    *,
    title: str = "",
) -> Path:
    """Draws a group of horizontal bars for each value of `group_key`, a bar for each row, on a logarithmic axis.

    Args:
      path: the PNG to write (atomically).
      rows: in the order to draw; a colour stands for a value of `series_key`.
      value_key: of the bars' lengths; the unit follows from it, as in tables.
      floor_key: of a number of the group, drawn as a line across its bars.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = _figure()
    groups = {
        group: [row for row in rows if row[group_key] == group]
        for group in dict.fromkeys(row[group_key] for row in rows)
    }
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(dict.fromkeys(row[series_key] for row in rows))}
    low = min(min(row[value_key], row[floor_key]) for row in rows) / 2
    top, ticks = 0.0, []
    for group, bars in groups.items():
        places = [top + i for i in range(len(bars))]
        for place, row in zip(places, bars, strict=True):
            axes.barh(place, row[value_key] - low, left=low, height=0.9, color=colors[row[series_key]], zorder=2)
            axes.annotate(
                _tick(value_key, row[value_key]),
                (row[value_key], place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        axes.plot([bars[0][floor_key]] * 2, [places[0] - 0.5, places[-1] + 0.5], color="black", lw=1.6, zorder=3)
        ticks.append((sum(places) / len(places), group))
        top = places[-1] + 2
    figure.set_size_inches(7.2, max(2.5, 1.0 + 0.2 * top))
    axes.set_yticks([place for place, _ in ticks], [group for _, group in ticks], fontsize=7)
    axes.set_ylim(top - 1, -1)
    axes.set_xscale("log")
    axes.set_xlim(left=low, right=3 * max(row[value_key] for row in rows))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value_key, value)))
    handles = [axes.barh(-9, 0, color=color) for color in colors.values()] + axes.plot([], [], color="black", lw=1.6)
    figure.legend(
        handles=handles,
        labels=[*colors, "floor"],
        loc="outside lower center",
        ncols=min(6, len(colors) + 1),
        fontsize=8,
        frameon=False,
    )
    axes.set_title(title, loc="left", fontsize=8)
    return _save(figure, path)


def _running_median(values: Sequence[float], half: int) -> list[float]:
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _figure() -> tuple["Figure", "Axes"]:
    # The object interface with the Agg canvas: pyplot would pick a backend and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors="#333333", labelsize=9, which="both")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_fontsize(10)
    axes.yaxis.label.set_fontsize(10)
    axes.title.set_fontsize(11.5)
    return figure, axes


def _full_line(
    axes: "Axes", series: Mapping[str, Sequence[Row]], value_key: str, name_key: str, full: str | None
) -> None:
    found = (r[value_key] for rows in series.values() for r in rows if full is not None and r.get(name_key) == full)
    value = next(filter(is_finite, found), None)
    if value is None:
        return
    axes.axhline(value, color="#777777", lw=1, ls=(0, (5, 4)), zorder=1)
    axes.annotate(
        f"full network: {value:.4g}", (0, value), xycoords=("axes fraction", "data"), xytext=(4, 3),
        textcoords="offset points", fontsize=8.5, color="#555555",
    )  # fmt: skip


def _cost_axis(axes: "Axes", costs: Sequence[float], cost_key: str) -> None:
    """Human numbers as ticks; a logarithmic axis at 1, 2 and 5 where the costs spread."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if costs and min(costs) > 0 and max(costs) > LOG_SPREAD * min(costs):
        axes.set_xscale("log")
        decades = math.log10(max(costs) / min(costs))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: _tick(cost_key, cost)))


def _tick(cost_key: str, cost: float) -> str:
    if cost_key.endswith("_ms"):
        return _short(human_ms(cost))
    if cost_key.endswith("_bytes"):
        return _short(human_bytes(cost))
    return _short(human_count(cost))


def _short(text: str) -> str:
    """Drops the zeros that a table wants and a tick does not: "2.00 M" -> "2 M"."""
    digits, space, unit = text.partition(" ")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + space + unit


def _once(labels: Sequence[tuple[float, float, str, str]]) -> list[tuple[float, float, str, str]]:
    """Names a network once, at its first point at each cost: series over the same networks would write every name
    twice."""
    seen: dict[tuple[str, float], tuple[float, float, str, str]] = {}
    for label in labels:
        seen.setdefault((label[2], label[0]), label)
    return list(seen.values())


def _name_points(figure: "Figure", axes: "Axes", labels: Sequence[tuple[float, float, str, str]], above: bool) -> None:
    """Writes each name beside its point, at the first of eight places that is free of points, lines and names so
    far."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patheffects import withStroke

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)  # as `_figure` makes them
    figure.draw_without_rendering()  # fixes the layout, so that points have places in pixels
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = _occupied(axes)
    # A front bulges towards the upper left (value: the more the better) or the lower left (a loss): that side is free.
    up, down = (9, -9) if above else (-9, 9)
    places = [(-7, up * 0.7), (0, up), (8, down * 0.7), (0, down), (8, up * 0.7), (9, 0), (-9, 0), (-7, down * 0.7)]
    for x, y, name, color in labels:
        for dx, dy in places:
            text = axes.annotate(
                name, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=8, color=color, zorder=4,
                ha="center" if dx == 0 else "left" if dx > 0 else "right", va="center",
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _occupied(axes: "Axes") -> list[Any]:
    """Boxes in pixels of what the names must not cover: points, front lines in short pieces, texts."""
    from matplotlib.transforms import Bbox

    boxes = [text.get_window_extent() for text in axes.texts]
    for collection in axes.collections:
        for x, y in axes.transData.transform(collection.get_offsets()):
            boxes.append(Bbox.from_bounds(x - 7, y - 7, 14, 14))
    for line in axes.lines:
        corners = line.get_transform().transform(line.get_xydata())
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            pieces = max(1, round(math.hypot(x1 - x0, y1 - y0) / 6))
            for i in range(pieces + 1):
                x, y = x0 + (x1 - x0) * i / pieces, y0 + (y1 - y0) * i / pieces
                boxes.append(Bbox.from_bounds(x - 1, y - 1, 2, 2))
    return boxes


def _save(figure: "Figure", path: str | os.PathLike) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temp: figure.savefig(temp, format="png"))
    return path
