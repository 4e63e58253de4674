"""The report of a run: `python bench/report.py RUN_FOLDER` rebuilds it from the folder's rows.

Writes figures/*.png, rows.csv, rows.parquet, summary.md and report.html beside rows.jsonl.
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attnlab.retrieval.plans import trained_in
from bench import document as doc
from bench import parts_figure, retrieval_figures, retrieval_report
from bench.findings import (
    crossover_table,
    exponent_table,
    findings,
    not_measured,
    passes_of,
    status_counts,
    time_table,
)
from bench.lines import SUITES, Row, by_configuration, describe, latest
from bench.plots import QUANTITIES, figure_name, figures_of, write_figures
from bench.rows import load_rows
from bench.units import settled

BROKEN = ("failed_accuracy", "error")
CAPTIONS = {
    "time": "One decade up per decade of length is linear, two decades are quadratic.",
    "throughput": "A linear op keeps its tokens per second; a quadratic one halves them each octave.",
    "share": "How much of what the measured ceilings of this machine allow each backend reaches.",
    "memory": "Parallel lines grow alike; a steeper one is a score matrix, a flat one a state.",
    "exponent": "Launch costs flatten the short lengths; the right end is what the op comes to.",
    "parts": "A mixer counts with its projections; the rest is norms, residuals, embedding and head.",
    "error": "Where rounding errors accumulate over the sequence, a line rises with length.",
}
METHOD = [
    "A filled point was measured. A hollow one, and a number in italics with a leading ~, is the "
    "prediction that the sweep made before it skipped the point.",
    "Times are medians, error bars are quartiles, brackets are 95 % intervals. An exponent is fitted "
    "to the longest lengths, where launches no longer matter; it is not settled where no three local "
    "slopes up to the end agree within 0.1, and the last four points are taken. The terms are "
    "shares of a fit a + bN + cN² at the longest measured length N.",
    "Accuracy gate: before a point is timed, windows of its result, the first and the last tokens "
    "among them, are compared with float64 at that very length. Its largest and its rms error may "
    "be twice those of a plain computation that rounds to the same type; above that the point "
    "counts as failed and has no time.",
    "Models: before a point is timed, logits of its last tokens are computed once more with other "
    "backends and in other pieces (transformers' are compared with ours); gradients are compared "
    "with those of the ops' definitions. The median of the relative differences is judged.",
    "Recall: shares of items found, with Wilson's 95 % interval. The probe asks for 64 pairs a marker; "
    "a trained model is asked for 64 items or more a length, 8 in each eighth of the depth.",
    "Limit: the larger of the counted operations over the measured matrix-product ceiling and the "
    "least traffic over the measured copy ceiling. A share of 100 % is a call at that ceiling; "
    "one above it worked from a cache.",
]


def write_report(folder: Path) -> None:
    """Rebuilds everything in a run's folder that follows from its rows.

    ValueError when there are no rows, or a line or the manifest cannot be parsed.
    """
    rows = load_rows(folder / "rows.jsonl")
    if not rows:
        raise ValueError(f"expected at least one row in {folder / 'rows.jsonl'}, got none")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    export(rows, folder)
    rows = settled(latest(rows))
    figures = set(write_figures(rows, folder / "figures"))
    recall = retrieval_figures.write_figures(rows, folder / "figures")
    blocks = report_blocks(folder, rows, manifest, figures, recall)
    (folder / "summary.md").write_text(doc.to_markdown(blocks), encoding="utf-8")
    page = doc.to_html(f"Benchmark run {folder.resolve().name}", blocks)
    (folder / "report.html").write_text(page, encoding="utf-8")


def report_blocks(
    folder: Path, rows: list[Row], manifest: dict, figures: set[Path], recall: dict[str, Path]
) -> list[doc.Block]:
    blocks = [doc.Heading(1, f"Benchmark run {folder.resolve().name}"), *alert(rows)]
    timed = [row for row in rows if row.get("suite") in SUITES]
    blocks += [doc.Text(status_counts(timed or rows))]
    for i, group in enumerate(by_configuration(rows)):
        pictures = {name: folder / "figures" / figure_name(name, i) for name in figures_of(group)}
        drawn = {name: path for name, path in pictures.items() if path in figures}
        blocks += configuration_blocks(group, drawn)
    blocks += retrieval_report.blocks(rows, recall, trained_in(folder))
    skipped = not_measured(rows)
    if skipped.rows:
        blocks += [doc.Heading(2, "Points that were not measured"), skipped]
    return blocks + method_blocks(rows, manifest)


def alert(rows: list[Row]) -> list[doc.Block]:
    """What went wrong, for the top of the page."""
    broken = [row for row in rows if row["status"] in BROKEN]
    items = [
        f"{name}, {where}: {status} ({reason})"
        for name, status, where, reason in not_measured(broken).rows
    ]
    title = f"{len(broken)} of {len(rows)} points failed"
    return [doc.Alert(title, items)] if broken else []


def configuration_blocks(rows: list[Row], pictures: dict[str, Path]) -> list[doc.Block]:
    """Findings, figures and tables of the rows of one shape, type and device."""
    blocks = [doc.Heading(2, "Findings"), doc.Text(f"Measured with {describe(rows)}.")]
    blocks += [doc.Bullets(findings(rows))]
    blocks += [doc.Heading(2, "Figures")] if pictures else []
    titles = {name: quantity.title for name, quantity in QUANTITIES.items()}
    titles["parts"] = parts_figure.TITLE
    blocks += [doc.Picture(p, titles[name], CAPTIONS[name]) for name, p in pictures.items()]
    exponents, crossovers = exponent_table(rows), crossover_table(rows)
    if exponents.rows:
        blocks += [doc.Heading(2, "Exponents and shares of the terms"), exponents]
    if crossovers.rows:
        blocks += [doc.Heading(2, "Crossovers of softmax and lightning"), crossovers]
    for words, lines in passes_of(rows):
        blocks += [doc.Heading(2, f"Times, {words}"), time_table(lines)]
    return blocks


def method_blocks(rows: list[Row], manifest: dict) -> list[doc.Block]:
    from_rows = {name: rows[-1].get(name) for name in ("device", "versions", "ceilings")}
    facts = [[name, in_words(value)] for name, value in (from_rows | manifest).items() if value]
    method = [doc.Heading(2, "How it was measured"), doc.Bullets(METHOD)]
    return [*method, doc.Table(["fact", "value"], facts, words={"value"})]


def in_words(value: object) -> str:
    """A manifest entry on one line: `name value, name value` where it is a dict."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {in_words(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return " ".join(map(in_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def export(rows: list[Row], folder: Path) -> None:
    """The rows as rows.csv and rows.parquet; lists and dicts become JSON strings."""
    fields = list(dict.fromkeys(name for row in rows for name in row))
    flat = [{name: flatten(row.get(name)) for name in fields} for row in rows]
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(flat)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        print("rows.parquet is not written: pyarrow is not installed", file=sys.stderr)
        return
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), folder / "rows.parquet")


def flatten(value: object) -> object:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python bench/report.py RUN_FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    try:
        write_report(folder)
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print(folder / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
