"""The README's table of whole models: prefill and decoding of three stacks beside transformers."""

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
