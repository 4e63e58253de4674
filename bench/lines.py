"""Rows of a sweep as the lines that charts and tables show, and how their numbers are written."""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.fit import POINT_FIELDS, Crossover, Point, crossover, local_slopes, points_from_rows

Row = dict
SUITES = ("ops", "model")  # those that charts and tables know how to show
PASSES = {
    "fwd": "forward",
    "bwd": "backward",
    "fwd+bwd": "forward + backward",
    "decode": "decode step",
    "prefill": "prefill",
    "train": "training step",
}
VARIANTS = ("kv_heads", "layer", "precision", "input")  # named where one op has several
BACKENDS = (
    *("attnlab", "transformers", "triton", "cuda", "torch", "sdpa", "flash", "cudnn", "fla"),
    *("lasp+", "ring", "reference"),
)


@dataclass(frozen=True)
class Line:
    """The rows, by length, of one backend in one configuration and one pass."""

    op: str
    backend: str
    variant: str  # "" unless the run holds several of this op and backend
    rows: list[Row]

    @property
    def name(self) -> str:
        return f"{self.op} {self.backend}{self.variant}"

    def points(self, field: str = "ms_median") -> list[Point]:
        """Measured values of a field by length, for `bench.fit`; samples where it is the time."""
        if field == "ms_median":
            return points_from_rows(self.rows)
        ok = [row for row in self.rows if row["status"] == "ok" and row.get(field)]
        return [Point(row["q_len"], row[field]) for row in ok]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows of `SUITES` that differ in nothing but the sources the last, as in `bench.fit`."""
    kept: dict[tuple, Row] = {}
    for row in rows:
        point = tuple(map(row.get, POINT_FIELDS))
        kept[point if row.get("suite") in SUITES else (row["key"],)] = row
    return list(kept.values())


def by_configuration(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of `SUITES` that share figures: equal in shape, type and device. Largest set first.

    The stacks of one size and transformers' model share them too.
    """
    fields = ("suite", "batch", "heads", "head_dim", "value_dim", "dtype", "device")
    groups: dict[tuple, list[Row]] = {}
    for row in (row for row in latest(rows) if row.get("suite") in SUITES):
        groups.setdefault((size_of(row), *map(row.get, fields)), []).append(row)
    return sorted(groups.values(), key=len, reverse=True)


def size_of(row: Row) -> str:
    """Size of a row's model, which the stacks that are compared share: "3m"; "" of an op."""
    return (row.get("model") or "").rpartition("-")[2]


def describe(rows: list[Row]) -> str:
    """What the rows of one configuration have in common, in words."""
    row = rows[0]
    dims = f"head dim {row['head_dim']}"
    if row.get("value_dim") not in (None, row["head_dim"]):
        dims += f", value dim {row['value_dim']}"
    special = sorted({row.get("precision") or "default" for row in rows} - {"default"})
    kind = row["dtype"] + "".join(f", precision {name}" for name in special)
    heads = f"{row['heads']} head{'s' * (row['heads'] > 1)}"
    models = f"models of size {size_of(row)}, " if size_of(row) else ""
    return f"{models}batch {row['batch']}, {heads}, {dims}, {kind}, {row['device']}"


def lines_of(rows: Iterable[Row], pass_name: str) -> list[Line]:
    """The lines of one panel: lightning first, in the order of BACKENDS."""
    rows = sorted((row for row in rows if row["pass"] == pass_name), key=lambda row: row["q_len"])
    values: dict[tuple[str, str], set] = {}
    for row in rows:
        for name in VARIANTS:
            values.setdefault((row["op"], name), set()).add(row.get(name))
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        varying = [n for (op, n), seen in values.items() if op == row["op"] and len(seen) > 1]
        variant = f", {row['ranks']} ranks" if row.get("ranks") else ""
        variant += "".join(f", {name} {row.get(name)}" for name in varying)
        groups.setdefault((row["op"], row["backend"], variant), []).append(row)
    lines = [Line(*key, found) for key, found in groups.items()]
    order = {name: i for i, name in enumerate(BACKENDS)}
    return sorted(lines, key=lambda line: (line.op, order.get(line.backend, len(order))))


def fastest(lines: Iterable[Line], op: str) -> Line | None:
    """The backend of an op that has the least time at most lengths, in one process.

    The naive reference is left out.
    """
    own = [line for line in lines if not any(row.get("ranks") for row in line.rows)]
    candidates = [line for line in own if line.op == op and line.backend != "reference"]
    best: dict[int, tuple[float, int]] = {}
    for i, line in enumerate(candidates):
        for point in line.points():
            best[point.q_len] = min(best.get(point.q_len, (math.inf, i)), (point.ms_median, i))
    winners = [i for _, i in best.values()]
    return candidates[max(winners, key=winners.count)] if winners else None


def crossover_of(
    lines: list[Line], field: str = "ms_median"
) -> tuple[Line, Line, Crossover] | None:
    """Where lightning's fastest backend overtakes softmax's; None without a common length."""
    soft, light = fastest(lines, "softmax"), fastest(lines, "lightning")
    if soft is None or light is None:
        return None
    points = soft.points(field), light.points(field)
    if not {p.q_len for p in points[0]} & {p.q_len for p in points[1]}:
        return None
    return soft, light, crossover(*points)


def exponents_of(line: Line) -> Line:
    """The local exponents of a line, each in the middle of its octave."""
    points = line.points()
    if len(points) < 2:
        return replace(line, rows=[])
    slopes = local_slopes(
        [p.q_len for p in points],
        [p.ms_median for p in points],
        samples=[p.samples or (p.ms_median,) for p in points],
    )
    fields = ("status", "q_len", "exponent", "exponent_lo", "exponent_hi")
    values = [("ok", math.sqrt(s.start * s.stop), s.value, s.lo, s.hi) for s in slopes]
    return replace(line, rows=[dict(zip(fields, row, strict=True)) for row in values])


def format_digits(value: float, trim: bool = False) -> str:
    """Three significant digits without an exponent: 0.0123, 4.50 (4.5 if trimmed), 12346."""
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:.{max(0, decimals)}f}"
    return text.rstrip("0").rstrip(".") if trim and "." in text else text


def format_ms(ms: float, trim: bool = False) -> str:
    """Milliseconds as a duration with its unit: 12.0 µs, 3.42 ms, 144 s."""
    factor, unit = (1e3, "µs") if ms < 1 else (1, "ms") if ms < 1e3 else (1e-3, "s")
    return f"{format_digits(ms * factor, trim)} {unit}"


def format_bytes(num_bytes: float) -> str:
    """Bytes in binary units: 512 B, 1.5 MiB, 32 GiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(5, max(0, math.floor(math.log2(max(num_bytes, 1)) / 10)))
    return f"{format_digits(num_bytes / 1024**power, trim=True)} {units[power]}"


def format_count(count: float) -> str:
    """A count in decimal units: 12.5 M."""
    power = min(3, max(0, math.floor(math.log10(max(count, 1)) / 3)))
    return f"{format_digits(count / 1000**power, trim=True)} {('', 'k', 'M', 'G')[power]}".strip()
