"""What trained models have come to: `python bench/training_figure.py FOLDER` draws FOLDER/validation.png.

FOLDER holds folders of runs of `attnlab train`, each with its run.json and log.jsonl.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from attnlab.training.log import Record, read_log
from bench.fit import format_len
from bench.lines import format_count
from bench.png import save_png

COLOURS = {"lightning": "#0072B2", "softmax": "#D55E00", "hybrid": "#009E73"}
MARKERS = {"3m": "^", "15m": "o", "100m": "s"}
LEAST_TARGETS = 1000  # of an octave that is drawn: the mean of fewer is mostly noise


@dataclass(frozen=True)
class Run:
    """A run: its size and variant, the records of its steps and of its validations."""

    size: str
    variant: str
    steps: list[Record]
    validations: list[Record]

    @property
    def name(self) -> str:
        """As "hybrid 15m"."""
        return f"{self.variant} {self.size}"

    @property
    def tokens(self) -> int:
        """Tokens seen by the end."""
        return self.steps[-1]["tokens"]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimiser step."""
        return self.tokens // self.steps[-1]["step"]

    @property
    def tokens_per_s(self) -> float:
        """Median over the steps."""
        speeds = sorted(record["tokens_per_s"] for record in self.steps)
        return speeds[len(speeds) // 2]


def read_runs(folder: Path) -> list[Run]:
    """The runs of a folder, small models first; `ValueError` if there is none."""
    runs = []
    for path in sorted(folder.glob("*/log.jsonl")):
        settings = json.loads((path.parent / "run.json").read_text())["train"]
        events: dict[str, list[Record]] = {"step": [], "validation": []}
        for record in read_log(path):
            events[record["event"]].append(record)
        runs.append(Run(settings["size"], settings["variant"], *events.values()))
    if not runs:
        raise ValueError(f"expected folders with a log.jsonl, got none in {folder}")
    return sorted(runs, key=lambda run: (list(MARKERS).index(run.size), run.variant))


def make_figure(runs: list[Run]) -> Figure:
    """Validation loss by the tokens seen, and at the end by the position in the document."""
    figure = Figure((11.0, 4.8), dpi=150, layout="constrained")
    over_time, by_position = figure.subplots(1, 2)
    for run in runs:
        look = {"color": COLOURS[run.variant], "marker": MARKERS[run.size], "label": run.name}
        later = [record for record in run.validations if record["step"] > 0]
        tokens = [record["step"] * run.tokens_per_step for record in later]
        over_time.plot(tokens, [record["bits_per_byte"] for record in later], **look)
        octaves = [x for x in later[-1]["by_position"] if x["targets"] >= LEAST_TARGETS]
        starts = [max(1, x["start"]) for x in octaves]
        by_position.plot(starts, [x["bits_per_byte"] for x in octaves], **look)
    _finish(over_time, "While training", "tokens seen", format_count)
    over_time.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    _finish(by_position, "At the end, by position", "first position of an octave", format_len)
    over_time.set_ylabel("validation loss, bits per byte")
    handles, labels = by_position.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _finish(axes: Axes, title: str, x_label: str, x_format: Callable[[float], str]) -> None:
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: x_format(round(x))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def table(runs: list[Run]) -> str:
    """Markdown: speed, tokens seen, loss of each run, and its loss early and late in documents."""
    header = ["model", "tokens/s", "tokens seen", "bits per byte", "at positions 64-127", "4K-8K"]
    cells = [header, ["---"] * len(header)]
    for run in runs:
        last = run.validations[-1]
        early, late = (
            next(x["bits_per_byte"] for x in last["by_position"] if x["start"] == start)
            for start in (64, 4096)
        )
        losses = [f"{x:.3f}" for x in (last["bits_per_byte"], early, late)]
        speed = format_count(float(f"{run.tokens_per_s:.3g}"))
        cells.append([run.name, speed, format_count(float(f"{run.tokens:.3g}")), *losses])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main(argv: list[str]) -> int:
    """Draw the figure of a folder and print its table."""
    try:
        folder = Path(argv[0]) if len(argv) == 1 else None
        if folder is None:
            raise ValueError("expected one folder of runs: training_figure.py FOLDER")
        runs = read_runs(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    save_png(make_figure(runs), folder / "validation.png")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
