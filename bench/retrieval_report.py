"""The report's part on recall: of the ops without training, and of trained models."""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attnlab.retrieval.runs import Trained
from bench import document as doc
from bench import retrieval_suite
from bench.fit import format_len
from bench.lines import Row
from bench.probe_figures import head_label
from bench.recall_axes import of_suite, recall
from bench.retrieval_figures import MODELS, expected_share

GOOD = 0.9
CAPTIONS = {
    "recall": (
        "Recall of random pairs",
        "A fast head forgets; a slow one holds more pairs than it can tell apart, and recalls few of "
        "them at any distance. Softmax fails where the keys outweigh the matched one, which ln N mends.",
    ),
    "horizon": (
        "Recall horizon of MiniMax-01's lightning heads",
        "From the closed form alone, which the figure above tests. Beyond these distances the model "
        "can only recall through its softmax layers.",
    ),
    "decay": (
        "Retrieval by length of the context",
        "Eight needles a sequence, one in each eighth of the depth, all asked for at the end. Dotted: "
        "the longest sequences of training.",
    ),
    "text": (
        "Needles in text",
        "Eight sentences with a number each, hidden in bytes of text. One found in eight is what a "
        "guess among the eight numbers gives.",
    ),
    "depth": (
        "Retrieval by depth and length",
        "What fades with distance darkens from the top left down; what fades with length darkens all "
        "depths alike.",
    ),
    "distance": (
        "Retrieval by distance",
        "A model that forgets with distance falls at the same place whatever the length of its "
        "contexts; one whose memory is full, or whose attention is spread thin, doesn't.",
    ),
    "state": (
        "Retrieval against state",
        "A marker a length: to the right a model keeps more of a longer context; a vertical line is a "
        "state of fixed size, which loses what it cannot hold.",
    ),
    "tasks": (
        "Retrieval by task",
        "The tasks are RULER's in symbols; results/README.md names them.",
    ),
    "ruler": (
        "Published RULER scores",
        "Large language models on text, for orientation: neither tasks nor models are those above.",
    ),
}
PROBE = ("recall", "horizon")


def blocks(
    rows: list[Row], figures: dict[str, Path], trained: list[Trained] | None = None
) -> list[doc.Block]:
    """Sentences, figures and tables; nothing if a run has no such rows. `trained` were trained for it."""
    found: list[doc.Block] = []
    if any(row.get("suite") == "probe" for row in rows):
        found += [doc.Heading(2, "Recall of the ops, without training")]
        found += [doc.Bullets(probe_findings(rows)), *_pictures(figures, probe=True)]
    if any(row.get("suite") == "retrieval" for row in rows):
        found += [doc.Heading(2, "Retrieval of trained models")]
        found += [doc.Bullets(findings(rows)), *_pictures(figures, probe=False)]
        found += [doc.Heading(2, "Needles found, by length"), needle_table(rows)]
        if trained:
            found += [doc.Heading(2, "All training runs"), run_table(trained)]
    elif found:
        notice = retrieval_suite.notice()
        found += [doc.Heading(2, "Retrieval of trained models"), doc.Text(notice)] if notice else []
    return found


def _pictures(figures: dict[str, Path], *, probe: bool) -> list[doc.Block]:
    names = [n for n in CAPTIONS if n in figures and (n in PROBE) == probe]
    return [doc.Picture(figures[name], *CAPTIONS[name]) for name in names]


def half_way(rows: list[Row], place: str, share: str) -> float | None:
    """Place at which a share falls below one half, between two rows; None if it doesn't."""
    ordered = sorted(rows, key=lambda row: row[place])
    values = [row["correct"] / row["n"] if share == "measured" else row[share] for row in ordered]
    above = [i for i, value in enumerate(values) if value >= 0.5]
    if not above or above[-1] + 1 == len(values):
        return None
    i = above[-1]
    steps = [math.log2(ordered[j][place]) for j in (i, i + 1)]
    part = (values[i] - 0.5) / (values[i] - values[i + 1])
    return 2 ** (steps[0] + part * (steps[1] - steps[0]))


def horizons(rows: list[Row]) -> list[tuple[str, float, float]]:
    """What, and up to where half of it is recalled: measured and predicted, in tokens."""
    groups: dict[tuple, list[Row]] = {}
    for row in of_suite(rows, "probe"):
        scale = "ln N" if row["per_log_length"] else row["logit_scale"]
        fields = (row["op"], row["head_dim"], row["write_gap"], row["slope"], scale)
        groups.setdefault(fields, []).append(row)
    found = []
    for (op, dim, gap, slope, scale), group in groups.items():
        longest = max(row["q_len"] for row in group)
        place = "q_len" if slope in (None, 0) else "distance"
        own = [row for row in group if place == "q_len" or row["q_len"] == longest]
        own = list({row[place]: row for row in own}.values())
        measured, predicted = (half_way(own, place, share) for share in ("measured", "predicted"))
        if measured and predicted:
            name = head_label(own[0]) if op == "lightning" else f"logit scale {scale}"
            every = f", one token in {gap} writes" if gap > 1 else ""
            found.append((f"{op}, head dim {dim}, {name}{every}", measured, predicted))
    return found


def probe_findings(rows: list[Row]) -> list[str]:
    """How well the closed form predicts, and what it says of the farthest recall."""
    measured = of_suite(rows, "probe")
    found = horizons(rows)
    if not found:
        return ["The probe was skipped, or too short for anything to be forgotten."]
    ratios = [max(a / b, b / a) for _, a, b in found]
    worst = found[ratios.index(max(ratios))]
    longest = format_len(max(row["q_len"] for row in measured))
    fading = [item for item in found if "1/e in" in item[0]]
    sentences = [
        f"Pairs were streamed to {longest} tokens. Where recall falls to one half is predicted "
        f"within a factor of {max(ratios):.2f} in all {len(found)} series (worst: {worst[0]}, "
        f"{format_len(round(worst[1]))} measured, {format_len(round(worst[2]))} predicted).",
    ]
    if fading:
        name, tokens, _ = max(fading, key=lambda item: item[1])
        sentences.append(
            f"The farthest at which a decaying head recalls half of its pairs is "
            f"{format_len(round(tokens))} tokens ({name})."
        )
    return sentences


def by_length(rows: list[Row], task: str = "needle") -> dict[str, dict[int, list[Row]]]:
    """Measured rows of a task by model and length, the architectures first."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in of_suite(rows, "retrieval"):
        if row["task"] == task:
            found.setdefault(row["model"], {}).setdefault(row["q_len"], []).append(row)
    order = {name: i for i, name in enumerate(MODELS)}
    return dict(sorted(found.items(), key=lambda pair: order.get(pair[0], len(order))))


def findings(rows: list[Row]) -> list[str]:
    """Of each architecture how far it finds 90 % of the needles, and how far it was asked."""
    items = []
    for model, lengths in by_length(rows).items():
        if model in MODELS:
            shares = {n: recall(group) for n, group in sorted(lengths.items())}
            good = [n for n, (share, _, _) in shares.items() if share >= GOOD]
            last = max(shares)
            share, low, high = shares[last]
            reach = f"90 % or more up to {format_len(max(good))}" if good else "nowhere 90 %"
            items.append(
                f"{model} finds {reach}; at {format_len(last)}, the longest length measured, "
                f"{share:.1%} (95 % interval {low:.1%} to {high:.1%})."
            )
            items += _against_prediction(model, lengths)
    return items or ["No needle task was measured."]


def _against_prediction(model: str, lengths: dict[int, list[Row]]) -> list[str]:
    """Where a model falls to one half, measured and predicted, if both were seen."""
    rows = []
    for length, group in sorted(lengths.items()):
        share = expected_share(group)
        if share is not None:
            counts = {name: sum(row[name] for row in group) for name in ("n", "correct")}
            rows.append({"q_len": length, "predicted": share, **counts})
    places = [half_way(rows, "q_len", share) for share in ("measured", "predicted")]
    if None in places:
        return []
    measured, predicted = (format_len(round(place)) for place in places if place is not None)
    return [f"{model} finds half of the needles up to {measured}; predicted: {predicted}."]


def run_table(trained: list[Trained]) -> doc.Table:
    """Every run: its learning rate and seed, and what it finds, at all lengths of its validation."""
    cells = []
    for one in sorted(trained, key=lambda t: (t.run.data, t.run.model, t.run.learning_rate)):
        run, groups = one.run, {}
        for name, share in one.accuracies.items():
            groups.setdefault(int(name.partition("@")[2]), []).append(share)
        means = ", ".join(f"{format_len(n)}: {sum(x) / len(x):.1%}" for n, x in groups.items())
        cells.append([run.model, run.data, f"{run.learning_rate:g}", str(run.seed)])
        cells[-1] += [f"{one.score:.1%}", means, f"{one.seconds:.0f} s"]
    header = [
        "model",
        "data",
        "learning rate",
        "seed",
        "mean of all tasks",
        "by length",
        "training",
    ]
    return doc.Table(header, cells, words={"data", "by length"})


def needle_table(rows: list[Row]) -> doc.Table:
    """Shares found by length and model, with their intervals; skipped ones say so."""
    models = by_length(rows)
    asked = [r for r in rows if r.get("suite") == "retrieval" and r.get("task") == "needle"]
    lengths = sorted({row["q_len"] for row in asked})
    skipped = {(r["model"], r["q_len"]) for r in asked if r["status"].startswith("skipped")}
    cells = []
    for length in lengths:
        line = [format_len(length)]
        for model, found in models.items():
            if length in found:
                share, low, high = recall(found[length])
                line.append(f"{share:.1%} ({low:.0%} to {high:.0%})")
            else:
                line.append("skipped" if (model, length) in skipped else "—")
        cells.append(line)
    return doc.Table(["tokens", *models], cells)
