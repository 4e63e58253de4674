"""Published figures that are shown beside ours and never mixed with them."""

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.recall_axes import PANEL, SHADES, length_axis

RULER_SOURCE = "MiniMax-01 technical report, arXiv 2501.08313, RULER (13 tasks)"
RULER_LENGTHS = tuple(1 << power for power in range(12, 21))  # 4K to 1M
RULER = {  # average accuracy from 4K on, as far as it is published
    "MiniMax-Text-01": (0.963, 0.961, 0.953, 0.954, 0.943, 0.947, 0.945, 0.928, 0.910),
    "Gemini 1.5 Pro": (0.962, 0.960, 0.960, 0.958, 0.938, 0.917, 0.916, 0.861, 0.850),
    "Gemini 2.0 Flash": (0.960, 0.960, 0.951, 0.957, 0.937, 0.860, 0.797, 0.709),
    "Claude 3.5 Sonnet": (0.965, 0.960, 0.957, 0.950, 0.952, 0.938),
    "GPT-4o": (0.970, 0.921, 0.890, 0.888, 0.884),
}
MINIMAX_PRICES = {
    "input": 0.001,
    "output": 0.008,
}  # yuan per thousand tokens, MiniMax-Text-01's API


def make_ruler_figure() -> Figure:
    """Published RULER averages of large models: other tasks, other models than ours."""
    figure = Figure((7.5, PANEL[1] + 0.3), dpi=150, layout="constrained")
    axes = figure.subplots()
    length_axis(axes, list(RULER_LENGTHS))
    for colour, marker, (model, values) in zip(SHADES, "so^DP", RULER.items(), strict=False):
        x = RULER_LENGTHS[: len(values)]
        axes.plot(x, values, color=colour, marker=marker, label=model, linewidth=1.3)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    axes.set_ylim(0.68, 1.0)
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("RULER average (axis from 68 %)")
    axes.legend(fontsize=9)
    figure.suptitle(f"Published, not measured here\n{RULER_SOURCE}")
    return figure
