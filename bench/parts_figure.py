"""The figure of where a prefill's time goes: shares by part, stacked by length, a panel a stack."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.fit import format_len
from bench.lines import Row, describe

TITLE = "Where a prefill's time goes"
# Softmax and lightning as in the other figures of models.
COLOURS = {"softmax": "#D55E00", "lightning": "#0072B2", "experts": "#009E73", "rest": "#999999"}


def make_parts_figure(rows: list[Row]) -> Figure | None:
    """Shares of a prefill's time by part, stacked by length, a panel a stack; None without them."""
    rows = [row for row in rows if row["status"] == "ok" and row.get("parts_ms")]
    stacks = list(dict.fromkeys(row["op"] for row in rows))
    if not rows:
        return None
    width, height = max(1.8, len(stacks)) * 5.0, 4.8
    figure = Figure((width, height), dpi=150, layout="constrained")
    all_axes = figure.subplots(1, len(stacks), squeeze=False, sharey=True)[0]
    for axes, stack in zip(all_axes, stacks, strict=True):
        own = sorted((row for row in rows if row["op"] == stack), key=lambda row: row["q_len"])
        bottom = np.zeros(len(own))
        for part, colour in COLOURS.items():
            shares = [row["parts_ms"][part] / sum(row["parts_ms"].values()) for row in own]
            names = [format_len(row["q_len"]) for row in own]
            axes.bar(names, shares, bottom=bottom, color=colour, label=part)
            bottom += shares
        axes.set_title(stack)
        axes.set_xlabel("tokens per sequence")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    all_axes[0].set_ylabel("share of the prefill's time")
    figure.suptitle(f"{TITLE}\n{describe(rows)}")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(COLOURS))
    return figure
