"""What figures of recall share: pooled shares, axes of lengths and of shares, bars of intervals."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter

from attnlab.retrieval.intervals import wilson
from bench.fit import format_len
from bench.lines import Row

STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.grid": True, "grid.alpha": 0.3}
PANEL = (5.0, 4.4)  # inches
SHADES = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#777777", "#000000")


def recall(rows: list[Row]) -> tuple[float, float, float]:
    """Share of all items of some rows that were found, and its interval."""
    correct, n = (sum(row[name] for row in rows) for name in ("correct", "n"))
    return correct / n, *wilson(correct, n)


def of_suite(rows: list[Row], suite: str) -> list[Row]:
    """Measured rows of a suite."""
    return [row for row in rows if row.get("suite") == suite and row["status"] == "ok"]


def length_axis(axes: Axes, values: list[float]) -> None:
    """Powers of two as 1K, 1M, at most eight of them, the largest always labelled.

    Four octaves or more are seen, so that one length or two look like neighbours.
    """
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    step = 1 + (high - low) // 8
    axes.set_xscale("log", base=2)
    margin = max(0.05 * (high - low), (4 - (high - low)) / 2)
    axes.set_xlim(2.0 ** (low - margin), 2.0 ** (high + margin))
    axes.xaxis.set_major_locator(FixedLocator([2.0**p for p in range(high, low - 1, -step)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_len(x)))
    axes.minorticks_off()


def share_axis(axes: Axes) -> None:
    """Accuracy from 0 to 100 %."""
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))


def draw_share(
    axes: Axes, x: list[float], shares: list[tuple[float, float, float]], **style
) -> None:
    """Shares with bars of their intervals."""
    middle = np.array([share for share, _, _ in shares])
    bars = np.abs(np.array([(lo, hi) for _, lo, hi in shares]).T - middle)
    axes.errorbar(x, middle, yerr=bars, capsize=2, elinewidth=1, **style)


def grouped(rows: list[Row], label: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a label, in the order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return groups
