"""What the rows of a run say: sentences and tables, computed and never guessed."""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.document import Table
from bench.fit import asymptotic_exponent, format_len, term_shares
from bench.lines import PASSES, Line, Row, crossover_of, fastest, format_digits, format_ms, lines_of

NONE = "—"
STATUSES = {
    "ok": "measured",
    "skipped_budget": "skipped, too slow for the time budget",
    "skipped_memory": "skipped, too large for the memory",
    "skipped_dominated": "skipped because a shorter length was out of reach",
    "out_of_memory": "out of memory",
    "unsupported": "not supported by the backend",
    "failed_accuracy": "failed the accuracy gate",
    "error": "stopped with an error",
}
TERMS = ("constant", "linear", "quadratic")


def passes_of(rows: list[Row]) -> list[tuple[str, list[Line]]]:
    """Each pass of one configuration that has rows, in words, with its lines."""
    found = [(words, lines_of(rows, name)) for name, words in PASSES.items()]
    return [(words, lines) for words, lines in found if lines]


def span(lengths: list[int]) -> str:
    low, high = format_len(min(lengths)), format_len(max(lengths))
    return low if low == high else f"{low} to {high}"


def ratios_of(soft: Line, light: Line, field: str = "ms_median") -> dict[int, float]:
    """Softmax's value over lightning's at each length measured for both."""
    a, b = ({p.q_len: p.ms_median for p in line.points(field)} for line in (soft, light))
    return {length: a[length] / b[length] for length in sorted(a.keys() & b.keys())}


def status_counts(rows: list[Row]) -> str:
    counts = Counter(row["status"] for row in rows)
    parts = [f"{n} {STATUSES.get(status, status)}" for status, n in counts.most_common()]
    return f"Of {len(rows)} points: {'; '.join(parts)}."


def findings(rows: list[Row]) -> list[str]:
    """What one configuration says, in sentences."""
    items = reach_sentence(rows)
    for words, lines in passes_of(rows):
        for op in ("lightning", "softmax"):
            items += exponent_sentence(words, fastest(lines, op))
        items += crossover_sentence(words, lines)
    return items + accuracy_sentence(rows)


def reach_sentence(rows: list[Row]) -> list[str]:
    reach: dict[str, dict[str, int]] = {}
    for row in (row for row in rows if row["status"] == "ok"):
        backends = reach.setdefault(row["op"], {})
        backends[row["backend"]] = max(row["q_len"], backends.get(row["backend"], 0))
    parts = []
    for op, backends in sorted(reach.items()):
        last = max(backends.values())
        names = ", ".join(name for name, length in backends.items() if length == last)
        parts.append(f"{op} {format_len(last)} tokens ({names})")
    return [f"Longest measured length of any pass: {'; '.join(parts)}."] if parts else []


def exponent_sentence(words: str, line: Line | None) -> list[str]:
    if line is None:
        return []
    points = line.points()
    last = points[-1].q_len
    guesses = any(row["q_len"] > last and row.get("pred_ms") for row in line.rows)
    return [
        f"{line.op.capitalize()} {words} ({line.backend}) is measured to {format_len(last)} tokens: "
        f"exponent {asymptotic_exponent(points)}"
        + ("; beyond that the points are predictions." if guesses else ".")
    ]


def crossover_sentence(words: str, lines: list[Line]) -> list[str]:
    found = crossover_of(lines)
    if found is None:
        return []
    soft, light, where = found
    ratios = ratios_of(soft, light)
    last = max(ratios)
    return [
        f"Crossover {words}: {where} tokens (softmax {soft.backend} against lightning "
        f"{light.backend}). At {format_len(last)}, the longest length measured for both, softmax "
        f"takes {format_digits(ratios[last])} times as long as lightning."
    ]


def accuracy_sentence(rows: list[Row]) -> list[str]:
    checked = [row for row in rows if row["status"] == "ok" and row.get("error_ratio") is not None]
    if not checked:
        return []
    row = max(checked, key=lambda row: row["error_ratio"])
    where = f"{row['op']} {row['backend']}, {PASSES[row['pass']]}, {format_len(row['q_len'])}"
    return [f"Largest error: {row['error_ratio']:.2f} of the accuracy gate's limit ({where})."]


def exponent_table(rows: list[Row]) -> Table:
    cells = []
    for words, lines in passes_of(rows):
        for line in lines:
            points = line.points()
            if not points:
                continue
            terms = term_shares(points)
            shares = [getattr(terms, name) for name in TERMS]
            equal = NONE if terms.equal_len is None else format_len(terms.equal_len)
            cells.append([line.name, words, span([p.q_len for p in points])])
            cells[-1] += [str(asymptotic_exponent(points))]
            cells[-1] += [*(NONE if share is None else f"{share:.1%}" for share in shares), equal]
    header = ["series", "pass", "measured", "exponent of the tail", *TERMS, "linear = quadratic at"]
    return Table(header, cells, words={"exponent of the tail"})


def crossover_table(rows: list[Row]) -> Table:
    cells = []
    for what, field in (("time", "ms_median"), ("peak memory", "peak_bytes")):
        for words, lines in passes_of(rows):
            found = crossover_of(lines, field)
            if found is None:
                continue
            soft, light, where = found
            ratios = ratios_of(soft, light, field)
            last = max(ratios)
            equal = all(abs(ratio - 1) < 0.01 for ratio in ratios.values())
            text = "none: equal within 1 %" if equal else str(where)
            cells.append([what, words, soft.backend, light.backend, text, format_len(last)])
            cells[-1] += [format_digits(ratios[last])]
    header = ["what", "pass", "softmax", "lightning", "crossover (tokens)", "longest common length"]
    return Table([*header, "softmax / lightning there"], cells)


def time_table(lines: list[Line]) -> Table:
    by_len = [{row["q_len"]: row for row in line.rows} for line in lines]
    lengths = sorted({length for rows in by_len for length in rows})
    cells = [[format_len(n), *(time_cell(rows.get(n, {})) for rows in by_len)] for n in lengths]
    return Table(["tokens", *(line.name for line in lines)], cells)


def time_cell(row: Row) -> str:
    """The measured time, the predicted one as *~144 s*, or why there is none."""
    status = row.get("status", "")
    if status == "ok" and row.get("ms_median") is not None:
        return format_ms(row["ms_median"])
    if status.startswith("skipped_") and row.get("pred_ms") is not None:
        return f"*~{format_ms(row['pred_ms'])}*"
    words = {"out_of_memory": "out of memory", "failed_accuracy": "wrong", "error": "error"}
    return words.get(status, NONE)


def not_measured(rows: list[Row]) -> Table:
    """The rows without a time, grouped: series, status, lengths by pass, and the first reason."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["status"] != "ok":
            name = f"{row.get('op')} {row.get('backend')}"
            groups.setdefault((name, row["status"]), []).append(row)
    cells = []
    for (name, status), found in groups.items():
        lengths: dict[str, list[int]] = {}
        for row in found:
            words = PASSES.get(row.get("pass"), row.get("suite"))
            lengths.setdefault(words, []).append(row.get("q_len") or 0)
        where = "; ".join(f"{words} {span(values)}" for words, values in lengths.items())
        reasons = list(dict.fromkeys(row.get("reason") or "no reason given" for row in found))
        more = f" (and {len(reasons) - 1} more like it)" if len(reasons) > 1 else ""
        cells.append([name, STATUSES.get(status, status), where, reasons[0] + more])
    return Table(["series", "status", "lengths", "reason"], cells, words={"lengths", "reason"})
