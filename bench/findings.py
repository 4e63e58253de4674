"""What the rows of a run say: sentences and tables, computed and never guessed."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.document import Table
from bench.fit import TermShares, asymptotic_exponent, format_len, term_shares
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
README_LENGTHS = tuple(1 << n for n in (10, 13, 16, 18, 20, 22))
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
    items = []
    for words, lines in passes_of(rows):
        for op in ("lightning", "softmax"):
            items += exponent_sentence(words, [line for line in lines if line.op == op])
        items += crossover_sentence(words, lines)
    return items + accuracy_sentence(rows)


def exponent_sentence(words: str, lines: list[Line]) -> list[str]:
    """How far the backends of one op were measured, and the exponent of the fastest."""
    best = fastest(lines, lines[0].op) if lines else None
    if best is None:
        return []
    reach = {line.backend: max((p.q_len for p in line.points()), default=0) for line in lines}
    last = max(reach.values())
    names = ", ".join(name for name, length in reach.items() if length == last)
    guesses = any(row["q_len"] > last and row.get("pred_ms") for line in lines for row in line.rows)
    return [
        f"{best.op.capitalize()} {words} is measured to {format_len(last)} tokens ({names}): "
        f"exponent of {best.backend} {exponent_text(best)}"
        + ("; beyond that the points are predictions." if guesses else ".")
    ]


def exponent_text(line: Line) -> str:
    found = asymptotic_exponent(line.points())
    if found.value is not None and found.reason:
        found = replace(found, reason="not settled")
    return str(found).replace("-0.00", "0.00")


def crossover_sentence(words: str, lines: list[Line]) -> list[str]:
    found = crossover_of(lines)
    if found is None:
        return []
    soft, light, where = found
    ratios = ratios_of(soft, light)
    last = max(ratios)
    beyond = isinstance(where.value, str) and (
        "; lightning is the faster one at every length measured for both"
        if where.value.startswith("<")
        else "; softmax is still the faster one there"
    )
    return [
        f"Crossover {words}: {where} tokens ({soft.name} against {light.name}){beyond or ''}. "
        f"At {format_len(last)}, the longest length measured for both, softmax takes "
        f"{format_digits(ratios[last])} times as long as lightning."
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
        for line in (line for line in lines if line.points()):
            terms = term_shares(line.points())
            shares = [getattr(terms, name) for name in TERMS]
            cells.append([line.name, words, span([terms.n_min, terms.n_max]), exponent_text(line)])
            cells[-1] += [NONE if share is None else f"{share:.1%}" for share in shares]
            cells[-1] += [equal_text(terms)]
    header = ["series", "pass", "measured", "exponent of the tail", *TERMS, "linear = quadratic at"]
    return Table(header, cells, words={"pass", "exponent of the tail"})


def equal_text(terms: TermShares) -> str:
    """Where the linear and the quadratic term are equal, as far as it was measured."""
    if terms.equal_len is None:
        return NONE
    if terms.equal_len > terms.n_max:
        return f"> {format_len(terms.n_max)}"
    return (
        f"< {format_len(terms.n_min)}"
        if terms.equal_len < terms.n_min
        else format_len(terms.equal_len)
    )


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
    return Table([*header, "softmax / lightning there"], cells, words={"pass"})


def time_table(lines: list[Line]) -> Table:
    by_len = [{row["q_len"]: row for row in line.rows} for line in lines]
    lengths = sorted({length for rows in by_len for length in rows})
    cells = [[format_len(n), *(time_cell(rows.get(n, {})) for rows in by_len)] for n in lengths]
    return Table(["tokens", *(line.name for line in lines)], cells)


def readme_table(rows: list[Row], lengths: tuple[int, ...] = README_LENGTHS) -> str:
    """Markdown table of times at a few lengths, forward and both passes, without the naive form."""
    columns = [
        (f"{line.name}, {words}", {row["q_len"]: row for row in line.rows})
        for words, lines in passes_of(rows)
        for line in lines
        if line.backend != "reference" and words != PASSES["decode"]
    ]
    lines = ["| tokens | " + " | ".join(name for name, _ in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for length in lengths:
        cells = [time_cell(by_len.get(length, {})) for _, by_len in columns]
        lines.append(f"| {format_len(length)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
            model = row.get("model") if row.get("suite") == "retrieval" else None
            name = model or f"{row.get('op')} {row.get('backend') or row.get('suite')}"
            groups.setdefault((name, row["status"]), []).append(row)
    cells = []
    severity = {status: i for i, status in enumerate(reversed(STATUSES))}
    worst_first = sorted(groups.items(), key=lambda group: severity.get(group[0][1], -1))
    for (name, status), found in worst_first:
        lengths: dict[str, list[int]] = {}
        for row in found:
            words = PASSES.get(row.get("pass"), row.get("suite"))
            lengths.setdefault(words, []).append(row.get("q_len") or 0)
        where = "; ".join(f"{words} {span(values)}" for words, values in lengths.items())
        reasons = list(dict.fromkeys(row.get("reason") or "no reason given" for row in found))
        more = f" (and {len(reasons) - 1} more like it)" if len(reasons) > 1 else ""
        cells.append([name, STATUSES.get(status, status), where, reasons[0] + more])
    return Table(
        ["series", "status", "lengths", "reason"], cells, words={"status", "lengths", "reason"}
    )
