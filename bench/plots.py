"""Figures of a sweep, from its rows.

One rule holds in every figure: a filled marker on an unbroken line was measured, a hollow marker on
a dashed line is a prediction that the sweep made before it skipped the point. Each figure has one
panel per pass (forward, forward + backward, decode; prefill, training step of whole models) that
has something to show.

Figures are built with matplotlib's object interface, so that no global backend is chosen and a
notebook's inline backend keeps working.
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MultipleLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.fit import format_len
from bench.lines import (
    PASSES,
    Line,
    Row,
    by_configuration,
    crossover_of,
    describe,
    exponents_of,
    format_bytes,
    format_count,
    format_digits,
    format_ms,
    lines_of,
)
from bench.parts_figure import make_parts_figure
from bench.png import save_png

# Okabe-Ito colours: cool ones for lightning, warm ones for softmax, neutral ones for the naive
# definition and for the peer fla. Markers differ too, for print in black and white.
LOOKS = {
    ("lightning", "triton"): ("#0072B2", "o"),
    ("lightning", "cuda"): ("#009E73", "s"),
    ("lightning", "torch"): ("#56B4E9", "^"),
    ("lightning", "fla"): ("#000000", "D"),
    ("lightning", "reference"): ("#777777", "p"),
    ("softmax", "sdpa"): ("#D55E00", "v"),
    ("softmax", "flash"): ("#E69F00", "P"),
    ("softmax", "cudnn"): ("#CC79A7", "<"),
    ("softmax", "triton"): ("#882255", "H"),
    ("lightning", "lasp+"): ("#332288", ">"),
    ("softmax", "ring"): ("#AA4400", "8"),
    ("softmax", "reference"): ("#777777", "h"),
}
MODEL_LOOKS = {  # whole models have figures of their own
    ("lightning", "attnlab"): ("#0072B2", "o"),
    ("softmax", "attnlab"): ("#D55E00", "v"),
    ("hybrid", "attnlab"): ("#009E73", "s"),
    ("hybrid", "transformers"): ("#000000", "D"),
}
OTHER_COLOURS = {"lightning": "#004D73", "softmax": "#8A3D00"}  # backends that LOOKS lacks
OTHER_MARKERS = "d"
OP_DASHES = {"lightning": "-", "hybrid": "-", "softmax": (0, (8, 1.5, 1.5, 1.5))}
PREDICTED_DASHES = (0, (3, 2.5))
NOTES = {  # kinds of hollow points: marker ("": the line's own), explanation in the legend
    "predicted": ("", "hollow, dashed: predicted, not measured"),
    "out_of_memory": ("X", "hollow cross: out of memory (at its prediction)"),
    "failed": ("*", "hollow star: failed the accuracy gate"),
}
EXPONENT_WORDS = {0: "constant", 1: "linear", 2: "quadratic"}
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.grid": True, "grid.alpha": 0.3}
PANEL_INCHES = (5.0, 4.8)


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What a figure shows: fields of a row, and how its y axis is written."""

    title: str
    y_label: str
    measured: str
    predicted: str = ""
    bars: tuple[str, str] = ("", "")  # lower and upper end of the error bar
    y_base: int = 10  # of the logarithmic axis; 0 for a linear one
    y_format: Callable[[float], str] = format_digits


QUANTITIES = {
    "time": Quantity(
        title="Time per call",
        y_label="median time per call (bars: quartiles)",
        measured="ms_median",
        predicted="pred_ms",
        bars=("ms_q1", "ms_q3"),
        y_format=partial(format_ms, trim=True),
    ),
    "throughput": Quantity(
        title="Throughput",
        y_label="tokens per second",
        measured="tokens_per_s",
        y_format=format_count,
    ),
    "share": Quantity(
        title="Share of the hardware's limit",
        y_label="least possible time / measured time",
        measured="share_of_limit",
        y_base=0,
        y_format="{:.0%}".format,
    ),
    "memory": Quantity(
        title="Peak memory, inputs included",
        y_label="peak memory",
        measured="peak_bytes",
        predicted="pred_bytes",
        y_base=2,
        y_format=format_bytes,
    ),
    "exponent": Quantity(
        title="Exponent of time in length, octave by octave",
        y_label="log2 of time(2N) / time(N) (bars: 95 % interval)",
        measured="exponent",
        bars=("exponent_lo", "exponent_hi"),
        y_base=0,
        y_format=lambda y: f"{EXPONENT_WORDS.get(y, '')} {y:.1f}",
    ),
    "error": Quantity(
        title="Error against float64",
        y_label="rms error / rms of the exact result",
        measured="error_rms",
        y_format="{:.2g}".format,
    ),
}


MODEL_QUANTITIES = ("throughput", "time", "memory", "share")


def figures_of(rows: list[Row]) -> list[str]:
    """Names of the figures of one configuration; whole models have no float64 to err against."""
    return [*MODEL_QUANTITIES, "parts"] if rows[0].get("suite") == "model" else list(QUANTITIES)


def look_of(line: Line) -> tuple[str, str]:
    """Colour and marker: the same in every run, for unknown backends and variants too."""
    other = OTHER_MARKERS[sum(line.name.encode()) % len(OTHER_MARKERS)]
    fallback = OTHER_COLOURS.get(line.op, "#444444"), other
    colour, marker = (LOOKS | MODEL_LOOKS).get((line.op, line.backend), fallback)
    return colour, other if line.variant else marker


def kind_of(row: Row, quantity: Quantity) -> str:
    """How a row is drawn: "measured", a key of NOTES, or "" (not at all)."""
    status, guessed = row["status"], row.get(quantity.predicted) is not None
    if status in ("ok", "failed_accuracy") and row.get(quantity.measured) is not None:
        return "measured" if status == "ok" else "failed"
    if guessed and status.startswith("skipped_"):
        return "predicted"
    return "out_of_memory" if guessed and status == "out_of_memory" else ""


def draw_line(axes: Axes, line: Line, quantity: Quantity, depth: int) -> None:
    """Draws one backend; a deeper one is wider, so that it shows beneath one that coincides."""
    kinds = np.array([kind_of(row, quantity) for row in line.rows])
    guessed = np.isin(kinds, ("predicted", "out_of_memory"))
    fields = np.where(guessed, quantity.predicted, quantity.measured)
    x = np.array([row["q_len"] for row in line.rows], dtype=float)
    y = np.array([row.get(f) for f, row in zip(fields, line.rows, strict=True)], dtype=float)
    colour, marker = look_of(line)

    def plot(kind: str, where: np.ndarray, **style) -> None:
        style = {
            "color": colour,
            "markersize": 5 + depth,
            "linewidth": 1.3 + 0.25 * depth,
        } | style
        style["gid"] = f"{kind}: {line.name}"
        axes.plot(x, np.where(where, y, np.nan), **style)

    beside = guessed.copy()  # so that the dashed line starts at the last measured point
    beside[:-1] |= guessed[1:]
    beside[1:] |= guessed[:-1]
    plot("dashed", beside, linestyle=PREDICTED_DASHES, linewidth=1.2)
    plot("measured", kinds == "measured", linestyle=OP_DASHES.get(line.op, ":"), marker=marker)
    for kind, (own, _) in NOTES.items():
        style = {"marker": own, "markersize": 10} if own else {"marker": marker}
        plot(kind, kinds == kind, linestyle="none", markerfacecolor="none", **style)
    for row in line.rows:
        if all(row.get(end) is not None for end in quantity.bars):
            ends = map(row.get, quantity.bars)
            axes.vlines(row["q_len"], *ends, color=colour, linewidth=3, alpha=0.5)


def set_scales(axes: Axes, quantity: Quantity) -> None:
    """Lengths at powers of two, the longest one always labelled; the quantity in its own unit."""
    low, high = (math.log2(end) for end in axes.dataLim.intervalx)
    powers = range(math.floor(high), math.ceil(low) - 1, -1 - math.floor(high - low) // 7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_len(x)))
    if quantity.y_base:
        axes.set_yscale("log", base=quantity.y_base)
        low, high = axes.get_ylim()
        widen = max(1, math.sqrt(10 * low / high))  # to a decade: less would magnify noise
        axes.set_ylim(low / widen, high * widen)
        subs = (1, 2, 5) if quantity.y_base == 10 and high / low < 1000 else (1,)
        axes.yaxis.set_major_locator(LogLocator(quantity.y_base, subs, numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: quantity.y_format(y)))
    axes.minorticks_off()


def mark_crossover(axes: Axes, lines: list[Line]) -> None:
    found = crossover_of(lines)
    if found and isinstance(found[2].value, float):
        soft, light, where = found
        axes.axvline(where.value, color="#333333", linewidth=1, linestyle=":")
        apart = soft.backend != light.backend  # stacks of one implementation differ by their op
        names = (soft.backend, light.backend) if apart else (soft.op, light.op)
        text = f"{' = '.join(names)}\nat {where}"
        left = where.value**2 < math.prod(axes.get_xlim())  # the text stands on the roomier side
        side = {"xytext": (4, -4)} if left else {"xytext": (-4, -4), "ha": "right"}
        place = {"xy": (where.value, 1), "xycoords": ("data", "axes fraction"), "va": "top"}
        axes.annotate(text, textcoords="offset points", **place, **side)


def mark_limits(axes: Axes, lines: list[Line]) -> None:
    """Says which resource is the limit of each op, and from which length on where it changes."""
    limits: dict[str, str] = {}
    for op in dict.fromkeys(line.op for line in lines):
        rows = [row for line in lines if line.op == op for row in line.rows if row.get("limit")]
        steps: list[str] = []
        for row in sorted(rows, key=lambda row: row["q_len"]):
            if not steps or not steps[-1].startswith(row["limit"]):
                steps.append(row["limit"] + f" from {format_len(row['q_len'])}" * bool(steps))
        if steps:
            limits[op] = ", ".join(steps)
    texts = [f"limit of {op}: {words}" for op, words in limits.items()]
    if len(set(limits.values())) == 1:
        texts = [f"limit: {words}" for words in set(limits.values())]
    axes.set_title("\n".join((axes.get_title(), *texts)))
    axes.set_ylim(0, max(1, axes.get_ylim()[1]))
    axes.axhline(1, color="#333333", linewidth=1, zorder=1)


def mark_exponents(axes: Axes, lines: list[Line]) -> None:
    axes.set_ylim(min(-0.3, axes.get_ylim()[0]), max(2.4, axes.get_ylim()[1]))
    axes.yaxis.set_major_locator(MultipleLocator(0.5))
    for value in EXPONENT_WORDS:
        axes.axhline(value, color="#333333", linewidth=1, zorder=1)


MARKS = {"time": mark_crossover, "share": mark_limits, "exponent": mark_exponents}


def legend_handles(lines: Iterable[Line], quantity: Quantity) -> list[Line2D]:
    handles, kinds = {}, set()
    for line in lines:
        (colour, marker), dashes = look_of(line), OP_DASHES.get(line.op, ":")
        style = {"color": colour, "marker": marker, "linestyle": dashes, "label": line.name}
        handles[line.name] = Line2D([], [], **style)
        kinds |= {kind_of(row, quantity) for row in line.rows}
    for kind in (kind for kind in NOTES if kind in kinds):
        dashes = PREDICTED_DASHES if kind == "predicted" else "none"
        style = {"marker": NOTES[kind][0] or "o", "linestyle": dashes, "label": NOTES[kind][1]}
        handles[kind] = Line2D([], [], color="#333333", markerfacecolor="none", **style)
    return list(handles.values())


def make_figure(name: str, rows: list[Row]) -> Figure | None:
    """One of QUANTITIES over the rows of one configuration; None if no row has it."""
    quantity, panels = QUANTITIES[name], {}
    for pass_name in PASSES:
        lines = lines_of(rows, pass_name)
        lines = [exponents_of(line) for line in lines] if name == "exponent" else lines
        lines = [line for line in lines if any(kind_of(row, quantity) for row in line.rows)]
        panels |= {pass_name: lines} if lines else {}
    if not panels:
        return None
    handles = legend_handles((line for lines in panels.values() for line in lines), quantity)
    legend = {"handles": handles, "loc": "outside lower center", "ncols": min(4, 1 + len(panels))}
    width, height = max(1.8, len(panels)) * PANEL_INCHES[0], PANEL_INCHES[1]
    height += 0.25 * math.ceil(len(handles) / legend["ncols"])
    figure = Figure((width, height), dpi=150, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    all_axes[0].set_ylabel(quantity.y_label)
    for axes, (pass_name, lines) in zip(all_axes, panels.items(), strict=True):
        axes.set_title(PASSES[pass_name])
        axes.set_xlabel("tokens in the context" if pass_name == "decode" else "tokens per sequence")
        for i, line in enumerate(lines):
            draw_line(axes, line, quantity, depth=min(5, len(lines) - 1 - i))
        set_scales(axes, quantity)
        MARKS.get(name, lambda *_: None)(axes, lines)
    figure.suptitle(f"{quantity.title}\n{describe(rows)}")
    figure.legend(**legend)
    return figure


def figure_name(name: str, index: int) -> str:
    return f"{name}-{index + 1}.png" if index else f"{name}.png"


def write_figures(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Writes the figures that have data: time.png, ..., and time-2.png, ... of a second shape."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, group in enumerate(by_configuration(rows)):
        for name in figures_of(group):
            with rc_context(STYLE):
                figure = make_parts_figure(group) if name == "parts" else make_figure(name, group)
                if figure is not None:
                    paths.append(folder / figure_name(name, i))
                    save_png(figure, paths[-1])
    return paths
