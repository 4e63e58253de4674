"""The README's tables of whole models: three stacks beside transformers, and the parts of a prefill."""

from bench.fit import format_len
from bench.lines import Row
from bench.models import PEER

HEADER = [
    *("tokens", "prefill: hybrid", "of peak", "lightning", "softmax", PEER),
    *("step: hybrid", "lightning", "softmax", PEER, "64 rows: hybrid", PEER),
]


def readme_table(rows: list[Row], size: str) -> str:
    """Markdown: prefill in thousand tokens a second, a decoding step in milliseconds, by length."""
    found = {
        (row["model"], row["pass"], row["batch"], row["q_len"]): row
        for row in rows
        if row["status"] == "ok" and str(row["model"]).endswith(f"-{size}")
    }
    cells = [HEADER, ["---"] * len(HEADER)]
    for length in sorted({key[3] for key in found if key[1] == "prefill"}):
        stacks = [f"{stack}-{size}" for stack in ("hybrid", "lightning", "softmax")]
        stacks.append(f"{PEER}-{stacks[0]}")
        prefills = [found.get((model, "prefill", 1, length)) for model in stacks]
        steps = [found.get((model, "decode", 1, length)) for model in stacks]
        steps += [found.get((model, "decode", 64, length)) for model in (stacks[0], stacks[3])]
        speeds = [f"{row['tokens_per_s'] / 1e3:.3g}K/s" if row else "-" for row in prefills]
        share = f"{prefills[0]['mfu']:.0%}" if prefills[0] else "-"
        times = [f"{row['ms_median']:.3g} ms" if row else "-" for row in steps]
        cells.append([format_len(length), speeds[0], share, *speeds[1:], *times])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def parts_table(rows: list[Row], model: str) -> str:
    """Markdown: a model's prefill by length, its speed, where its time goes, and its peak memory."""
    parts = ["softmax", "lightning", "experts", "rest"]
    cells = [["tokens", "prefill", "tokens/s", "of peak", *parts, "peak memory"]]
    cells.append(["---"] * len(cells[0]))
    for row in sorted(rows, key=lambda row: row["q_len"]):
        if row["status"] == "ok" and row["model"] == model and row.get("parts_ms"):
            total = sum(row["parts_ms"].values())
            shares = [f"{row['parts_ms'][part] / total:.1%}" for part in parts]
            speed = f"{row['tokens_per_s'] / 1e3:.3g}K", f"{row['mfu']:.0%}"
            seconds = f"{row['ms_median'] / 1e3:.3g} s"
            memory = f"{row['peak_bytes'] / 2**30:.3g} GiB"
            cells.append([format_len(row["q_len"]), seconds, *speed, *shares, memory])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
