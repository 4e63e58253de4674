"""Figures of trained models: what they find by length, depth, distance, state and task.

A marker was measured, its bar is Wilson's 95 % interval. Hatched cells were skipped.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from bench.fit import format_len
from bench.lines import Row, format_bytes
from bench.png import save_png
from bench.probe_figures import make_horizon_figure, make_probe_figure
from bench.published import make_ruler_figure
from bench.recall_axes import (
    PANEL,
    STYLE,
    draw_share,
    grouped,
    length_axis,
    of_suite,
    recall,
    share_axis,
)

# Okabe-Ito colours; softmax warm and lightning blue as in the other figures.
MODELS = {
    "softmax": ("#D55E00", "v"),
    "lightning": ("#0072B2", "o"),
    "hybrid-7to1": ("#009E73", "s"),
    "hybrid-3to1": ("#CC79A7", "D"),
    "hybrid-1to1": ("#E69F00", "P"),
}
OTHERS = ("#000000", "#777777", "#8A3D00", "#56B4E9", "#7A5195", "#B8860B", "#2F6B4F", "#A0A0FF")
APART = 0.012, 0.4  # models at one length: share of the axis between two, most octaves in all
NEEDLES_IN_TEXT = {"number": "number", "pass_key": "pass key"}


def make_decay_figure(rows: list[Row]) -> Figure | None:
    """Needles in noise by length, a line a model: architectures, and the recipe's parts left out."""
    needles = [row for row in of_suite(rows, "retrieval") if row["task"] == "needle"]
    first = grouped([row for row in needles if not row["seed"]], lambda row: row["model"])
    panels = {
        "needles in noise": {m: group for m, group in first.items() if m in MODELS},
        "parts of the recipe left out": {m: r for m, r in first.items() if m not in MODELS},
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return None
    size = max(len(panels), 1.5) * PANEL[0] * 1.1, PANEL[1] + 1.2
    figure = Figure(size, dpi=150, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        axes.set_title(title)
        _lengths(axes, lines)
    if "needles in noise" in panels:
        _second_seeds(grid[0], [row for row in needles if row["seed"]])
    for axes in grid:
        _legend_below(axes)
    grid[0].set_ylabel("found (bars: 95 % intervals)")
    figure.suptitle(f"Retrieval by length of the context\n{_trained(needles)}")
    return figure


def make_text_figure(rows: list[Row]) -> Figure | None:
    """Needles in text by length, a line a model and kind of needle."""
    rows = [row for row in of_suite(rows, "retrieval") if row["task"] in NEEDLES_IN_TEXT]
    lines = grouped(
        rows, lambda r: f"{r['model'].removesuffix('-text')}: {NEEDLES_IN_TEXT[r['task']]}"
    )
    if not lines:
        return None
    figure, axes = _one_panel()
    _lengths(axes, lines)
    _legend_below(axes)
    axes.set_ylabel("found, every digit right (bars: 95 % intervals)")
    figure.suptitle(f"Needles in text, by length of the context\n{_trained(rows)}")
    return figure


def _second_seeds(axes: Axes, rows: list[Row]) -> None:
    """A thin line in the architecture's colour for each model of another seed."""
    groups = grouped(rows, lambda row: row["model"].partition("-seed")[0])
    for model in (model for model in MODELS if model in groups):
        by_len = grouped(groups[model], lambda row: row["q_len"])
        x = sorted(by_len)
        axes.plot(x, [recall(by_len[n])[0] for n in x], color=MODELS[model][0], linewidth=0.8)
    if groups:
        axes.plot([], [], color="#555555", linewidth=0.8, label="thin: second seeds")


def _legend_below(axes: Axes) -> None:
    """A legend that covers no data, what was measured with its interval first."""
    handles, labels = axes.get_legend_handles_labels()
    pairs = sorted(zip(handles, labels, strict=True), key=lambda pair: isinstance(pair[0], Line2D))
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    axes.legend(*zip(*pairs, strict=True), fontsize=8, ncols=2, **place)


def _trained(rows: list[Row]) -> str:
    """What the models have in common."""
    counts = [row["parameters"] / 1e6 for row in rows if row.get("parameters")]
    lengths = sorted({row["train_max_len"] for row in rows if row.get("train_max_len")})
    size = f"{min(counts):.2g} to {max(counts):.2g}" if max(counts) > 1.05 * min(counts) else None
    words = f"{size or f'{counts[0]:.2g}'}M parameters"
    return f"{words}, trained on at most {', '.join(map(format_len, lengths))} tokens"


def look_of(model: str, number: int) -> tuple[str, str]:
    """Colour and marker of a model."""
    return MODELS.get(model) or (OTHERS[number % len(OTHERS)], "ov^sDPX*"[number % 8])


def _ordered(lines: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The architectures first, in their order."""
    order = {name: i for i, name in enumerate(MODELS)}
    return dict(sorted(lines.items(), key=lambda pair: order.get(pair[0], len(order))))


def _apart(axes: Axes, x: list[float], number: int, count: int) -> list[float]:
    """Places of one of so many models, beside each other lest one hides another."""
    low, high = (math.log2(end) for end in axes.get_xlim())
    step = min(APART[0] * (high - low), APART[1] / max(count - 1, 1))
    return [place * 2 ** (step * (number - (count - 1) / 2)) for place in x]


def _lengths(axes: Axes, lines: dict[str, list[Row]]) -> None:
    """Recall by length, with the longest length of training."""
    share_axis(axes)
    axes.set_xlabel("tokens in the context")
    every = [row["q_len"] for group in lines.values() for row in group]
    trained = {row["train_max_len"] for group in lines.values() for row in group} - {None}
    length_axis(axes, every + list(trained))
    for number, (model, group) in enumerate(_ordered(lines).items()):
        by_len = grouped(group, lambda row: row["q_len"])
        x = sorted(by_len)
        colour, marker = look_of(model, number)
        style = {"color": colour, "marker": marker, "linewidth": 1.3, "markersize": 5}
        places = _apart(axes, x, number, len(lines))
        draw_share(axes, places, [recall(by_len[n]) for n in x], label=model, **style)
        expected = [expected_share(by_len[n]) for n in x]
        if None not in expected:
            words = f"{model}, predicted from {format_len(max(trained))}"
            axes.plot(x, expected, color=colour, linestyle="--", linewidth=1.3, label=words)
    for length in trained:
        axes.axvline(length, color="#333333", linestyle=":", linewidth=1)


def expected_share(rows: list[Row]) -> float | None:
    """Mean predicted share of some cells, None unless all have one."""
    shares = [row.get("predicted") for row in rows]
    return None if None in shares else sum(shares) / len(shares)


def make_depth_figure(rows: list[Row]) -> Figure | None:
    """Recall of needles by depth and length, a panel a model."""
    found = [row for row in rows if row.get("suite") == "retrieval" and row.get("task") == "needle"]
    measured = [row for row in of_suite(found, "retrieval") if not row["seed"]]
    models = list(_ordered(grouped(measured, lambda row: row["model"])))
    if not models:
        return None
    lengths = sorted({row["q_len"] for row in found})
    columns = min(len(models), 4)
    lines = math.ceil(len(models) / columns)
    size = columns * 3.6 + 1, lines * 3.2 + 0.6
    figure = Figure(size, dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flatten()[len(models) :]:
        axes.set_visible(False)
    for number, (axes, model) in enumerate(zip(grid.flatten(), models, strict=False)):
        image = _heat(axes, model, [row for row in found if row["model"] == model], lengths)
        if number % columns == 0:
            axes.set_ylabel("depth")
        if number + columns >= len(models):
            axes.set_xlabel("tokens in the context")
            axes.tick_params(labelbottom=True)
    figure.colorbar(image, ax=grid, label="found", format=FuncFormatter(lambda y, _: f"{y:.0%}"))
    figure.suptitle("Needles found by depth and length (0 %: at the start; hatched: skipped)")
    return figure


def _heat(axes: Axes, model: str, rows: list[Row], lengths: list[int]):
    """Cells of one model."""
    cells = np.full((8, len(lengths)), np.nan)
    for row in rows:
        if row["status"] == "ok":
            cells[int(row["depth"] * 8), lengths.index(row["q_len"])] = row["correct"] / row["n"]
    axes.grid(False)
    axes.set_title(model)
    image = axes.imshow(cells, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    for column in np.flatnonzero(np.isnan(cells).all(0)):
        axes.axvspan(
            column - 0.5, column + 0.5, facecolor="#eeeeee", hatch="///", edgecolor="#999999"
        )
    step = 1 + (len(lengths) - 1) // 6
    places = list(range(len(lengths) - 1, -1, -step))
    axes.set_xticks(places, [format_len(lengths[i]) for i in places])
    axes.set_yticks([-0.5, 3.5, 7.5], ["0 %", "50 %", "100 %"])
    return image


def _needles(rows: list[Row]) -> tuple[list[Row], dict[str, list[Row]]]:
    """Rows of the needle task by the first seed, and those of the main models by model."""
    rows = [r for r in of_suite(rows, "retrieval") if r["task"] == "needle" and not r["seed"]]
    lines = _ordered(grouped(rows, lambda r: r["model"]))
    return rows, {m: r for m, r in lines.items() if m in MODELS}


def _one_panel() -> tuple[Figure, Axes]:
    figure = Figure((7.5, PANEL[1] + 0.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    share_axis(axes)
    return figure, axes


def make_state_figure(rows: list[Row]) -> Figure | None:
    """Recall of needles against the bytes that a model keeps, a line a model, a marker a length."""
    rows, lines = _needles(rows)
    if not lines:
        return None
    figure, axes = _one_panel()
    for number, (model, group) in enumerate(lines.items()):
        by_len = grouped(group, lambda row: row["q_len"])
        ordered = sorted(by_len)
        x = [by_len[n][0]["state_bytes"] for n in ordered]
        colour, marker = look_of(model, number)
        shares = [recall(by_len[n]) for n in ordered]
        reach = f"{model}, {format_len(ordered[0])} to {format_len(ordered[-1])} tokens"
        draw_share(axes, x, shares, color=colour, marker=marker, label=reach, linewidth=1.3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(x)))
    axes.set_xlabel("bytes kept of the context: keys and values, states")
    axes.set_ylabel("needles found (bars: 95 % intervals)")
    axes.legend(fontsize=9)
    figure.suptitle(f"Retrieval against state\n{_trained(rows)}")
    return figure


def make_distance_figure(rows: list[Row]) -> Figure | None:
    """Recall of needles by distance, all lengths of a model together, an octave of distances a marker."""
    rows, lines = _needles(rows)
    if not lines:
        return None
    figure, axes = _one_panel()
    length_axis(axes, [row["distance"] for row in rows])
    for number, (model, group) in enumerate(lines.items()):
        octaves = grouped(group, lambda row: row["distance"].bit_length())
        middles = [2 ** (octave - 0.5) for octave in sorted(octaves)]
        x = _apart(axes, middles, number, len(lines))
        colour, marker = look_of(model, number)
        shares = [recall(octaves[octave]) for octave in sorted(octaves)]
        draw_share(axes, x, shares, color=colour, marker=marker, label=model, linewidth=1.3)
    axes.set_xlabel("tokens between the needle and its question")
    axes.set_ylabel("needles found (bars: 95 % intervals)")
    axes.legend(fontsize=9)
    figure.suptitle(f"Retrieval by distance\n{_trained(rows)}")
    return figure


def make_task_figure(rows: list[Row]) -> Figure | None:
    """Recall by length in every task, a panel each; None if there is no task but needles."""
    rows = [r for r in of_suite(rows, "retrieval") if not r["seed"] and r["input"] != "text"]
    tasks = grouped(sorted(rows, key=lambda r: r["input"] == "mqar"), lambda row: row["task"])
    if set(tasks) <= {"needle"}:
        return None
    columns = min(4, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure = Figure((columns * 3.9, lines * 3.5 + 0.9), dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    names = {}
    for axes, (task, group) in zip(grid, tasks.items(), strict=False):
        own = {m.removesuffix("-mqar"): r for m, r in grouped(group, lambda r: r["model"]).items()}
        axes.set_title(task.replace("_", " "))
        _lengths(axes, {m: r for m, r in own.items() if m in MODELS} or own)
        handles, labels = axes.get_legend_handles_labels()
        names |= dict(zip(labels, handles, strict=True))
    figure.legend(names.values(), names, loc="outside lower center", ncols=len(names), fontsize=10)
    figure.suptitle("Retrieval by task and length (dotted: longest length of training)")
    return figure


FIGURES: dict[str, Callable[[list[Row]], Figure | None]] = {
    "recall": make_probe_figure,
    "horizon": lambda rows: make_horizon_figure() if of_suite(rows, "probe") else None,
    "decay": make_decay_figure,
    "text": make_text_figure,
    "depth": make_depth_figure,
    "distance": make_distance_figure,
    "state": make_state_figure,
    "tasks": make_task_figure,
    "ruler": lambda rows: make_ruler_figure() if of_suite(rows, "retrieval") else None,
}


def write_figures(rows: list[Row], folder: Path) -> dict[str, Path]:
    """Write the figures that have data into a folder; their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, make in FIGURES.items():
        with rc_context(STYLE):
            figure = make(rows)
            if figure is not None:
                paths[name] = folder / f"{name}.png"
                save_png(figure, paths[name])
    return paths
