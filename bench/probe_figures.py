"""Figures of the probe: recall of the untrained ops beside its closed form, and what follows from it.

A marker was measured, its bar is Wilson's 95 % interval; a line is the closed form of
`attnlab.retrieval.theory`.
"""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from attnlab.decay import minimax_log_decay
from attnlab.retrieval import theory
from attnlab.retrieval.probe import MINIMAX_HEADS, MINIMAX_LAYERS
from bench.fit import format_len
from bench.lines import Row
from bench.recall_axes import (
    PANEL,
    SHADES,
    draw_share,
    grouped,
    length_axis,
    of_suite,
    recall,
    share_axis,
)


def head_label(row: Row) -> str:
    """Which of MiniMax-01's heads a row is of, and in how many tokens its writes fade by a factor e."""
    if row["slope"] == 0:
        return "no decay"
    fades = format_len(round(1 / row["slope"]))
    return f"layer {row['layer'].partition('/')[0]}, head {row['head']}: 1/e in {fades}"


def make_probe_figure(rows: list[Row]) -> Figure | None:
    """Recall by distance and by number of tokens, measured and predicted; None without any."""
    rows = of_suite(rows, "probe")
    light = [row for row in rows if row["op"] == "lightning"]
    decaying = [row for row in light if row["distance"] is not None and row["head_dim"] == 64]
    heads = sorted(decaying, key=lambda row: -row["slope"])
    colours = dict(zip(grouped(heads, head_label), SHADES, strict=False))
    panels: list[tuple[str, str, Callable[[Axes], None]]] = []
    for gap in sorted({row["write_gap"] for row in decaying}):
        own = [row for row in decaying if row["write_gap"] == gap]
        words = "every token writes" if gap == 1 else f"one token in {gap} writes"
        title, label = f"lightning, {words}", "distance of the pair in tokens"
        panels.append((title, label, lambda axes, own=own: _by_distance(axes, own, colours)))
    flat = [r for r in light if r["distance"] is None and r["write_gap"] == 1]
    if flat:
        title = "lightning without decay: capacity"
        panels.append((title, "pairs written", lambda axes: _by_dim(axes, flat)))
    soft = [row for row in rows if row["op"] == "softmax"]
    if soft:
        panels.append(("softmax", "keys in the context", lambda axes: _by_scale(axes, soft)))
    return _panels("Recall without training", panels) if panels else None


def _panels(title: str, panels: list[tuple[str, str, Callable[[Axes], None]]]) -> Figure:
    """Panels in one row, or two from four on, each with a legend of its own."""
    columns = 2 if len(panels) >= 4 else len(panels)
    lines = math.ceil(len(panels) / columns)
    size = max(columns * PANEL[0] * 1.15, 8.0), lines * PANEL[1]
    figure = Figure(size, dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, label, draw) in zip(grid, panels, strict=False):
        axes.set_title(name)
        axes.set_xlabel(label)
        axes.set_ylabel("recalled")
        share_axis(axes)
        draw(axes)
    figure.suptitle(f"{title}\nmarkers: measured, with 95 % intervals; lines: predicted")
    return figure


def _curves(
    axes: Axes, groups: dict[str, list[Row]], place: str, colours: dict[str, str] | None = None
) -> None:
    """A colour a group: markers as measured, a line as predicted."""
    colours = colours or dict(zip(groups, SHADES, strict=False))
    everywhere = [max(row[place], 1) for group in groups.values() for row in group]
    length_axis(axes, everywhere)
    for label, group in groups.items():
        colour = colours[label]
        best: dict[int, Row] = {}
        for row in group:  # of several streams the longest
            if row[place] not in best or row["q_len"] >= best[row[place]]["q_len"]:
                best[row[place]] = row
        ordered = [best[x] for x in sorted(best)]
        x = [max(row[place], 1) for row in ordered]
        axes.plot(x, [row["predicted"] for row in ordered], color=colour, linewidth=1.3)
        shares = [recall([row]) for row in ordered]
        draw_share(axes, x, shares, color=colour, fmt="o", markersize=4, label=label)
    axes.legend(fontsize=8)


def _by_distance(axes: Axes, rows: list[Row], colours: dict[str, str]) -> None:
    """A curve a head, of the same colour in every panel."""
    ordered = sorted(rows, key=lambda row: -row["slope"])
    _curves(axes, grouped(ordered, head_label), "distance", colours)


def _by_dim(axes: Axes, rows: list[Row]) -> None:
    ordered = sorted(rows, key=lambda row: row["head_dim"])
    _curves(axes, grouped(ordered, lambda row: f"head dim {row['head_dim']}"), "q_len")


def _by_scale(axes: Axes, rows: list[Row]) -> None:
    def label(row: Row) -> str:
        return (
            "logit scale ln N" if row["per_log_length"] else f"logit scale {row['logit_scale']:g}"
        )

    ordered = sorted(rows, key=lambda row: (row["per_log_length"], row["logit_scale"]))
    _curves(axes, grouped(ordered, label), "q_len")


def make_horizon_figure(write_gap: int = 256, head_dim: int = 128) -> Figure:
    """How far back each of MiniMax-01's lightning heads recalls by the closed form."""
    horizon = np.full((MINIMAX_LAYERS, MINIMAX_HEADS), np.nan)
    for layer in range(MINIMAX_LAYERS):
        if layer % 8 != 7:
            for head, g in enumerate(minimax_log_decay(MINIMAX_HEADS, layer, MINIMAX_LAYERS)):
                horizon[layer, head] = theory.lightning_horizon(
                    -float(g), key_dim=head_dim, value_dim=head_dim, write_gap=write_gap
                )
    figure = Figure((8.0, 5.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.grid(False)
    axes.set_facecolor("#bbbbbb")
    image = axes.imshow(
        np.log2(np.maximum(horizon, 1)), aspect="auto", origin="lower", cmap="viridis"
    )
    bar = figure.colorbar(image, ax=axes, label="tokens back to which half is recalled")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_len(round(2**y))))
    axes.set_xlabel("head, from the fastest decay to the slowest")
    axes.set_ylabel("layer (grey: softmax)")
    longest = format_len(round(float(np.nanmax(horizon))))
    figure.suptitle(
        "Recall horizon of MiniMax-01's lightning heads, predicted\n"
        f"head dim {head_dim}, one token in {write_gap} writes; the longest is {longest}"
    )
    return figure
