"""`attnlab plan`: how MiniMax-01 would be spread over GPUs, and what a layer would cost there.

A step takes so many packs, which replicas share out. For each number of GPUs the layout with the
shortest step is taken, among those whose tokens a GPU fit, or else those with the fewest. All times come from `attnlab.distributed.costs`, which says what they rest on.
"""

import argparse
import itertools
import re
from collections.abc import Iterator

from attnlab.checks import expect
from attnlab.distributed.anchors import anchors
from attnlab.distributed.balance import MAPS, MIXES, mean_imbalance
from attnlab.distributed.costs import HARDWARE, Forward, Hardware, Job, forward
from attnlab.model.config import HybridConfig

_POWERS = tuple(2**n for n in range(13))
_STATE_BYTES = 16  # of a parameter: 16-bit weight and gradient, float32 weight and two moments
_UNITS = {"": 1, "K": 2**10, "M": 2**20}
_COLUMNS: tuple[str, ...] = (
    "GPUs",
    "tp/cp/ep/etp",
    "tokens a GPU",
    "GB a GPU",
    "gather",
    "(measured)",
    "lightning",
    "softmax",
    "tp",
    "D",
    "A",
    "experts",
    "seen",
    "layer",
    "comm. %",
    "s a step",
    "tokens/s/GPU",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of `run`."""
    parser.add_argument("--gpus", default="8..2048", help="N, or N..M by doubling (%(default)s)")
    parser.add_argument("--seq", default="1M", help="tokens of a pack: 64K, 1M (%(default)s)")
    parser.add_argument("--packs", type=int, default=8, help="of a step (%(default)s)")
    parser.add_argument("--hardware", default="H800", choices=HARDWARE, help="(%(default)s)")
    parser.add_argument("--groups", type=int, default=4, help="of expert tokens (%(default)s)")
    parser.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        help="slowest rank's causal attention over the mean, see --balance (%(default)s)",
    )
    parser.add_argument("--max-tokens", type=int, default=8192, help="a GPU (%(default)s)")
    parser.add_argument("--chart", metavar="FILE", help="draw the parts of a layer, .png or .svg")
    parser.add_argument("--balance", action="store_true", help="imbalance by mix of documents")
    parser.add_argument("--anchors", action="store_true", help="published figures and the model's")


def run(args: argparse.Namespace) -> int:
    """Print the table of layouts, or one of the other two."""
    if args.anchors or args.balance:
        print(anchors_table() if args.anchors else balance_table())
        return 0
    seq_len, packs = parse_size(args.seq), args.packs
    expect(packs >= 1, "at least one pack", packs)
    expect(args.groups >= 1, "at least one group", args.groups)
    expect(args.imbalance >= 1, "an imbalance of at least 1", args.imbalance)
    found = []
    for gpus in parse_range(args.gpus):
        job = best_job(
            gpus,
            seq_len,
            HARDWARE[args.hardware],
            packs=packs,
            groups=args.groups,
            imbalance=args.imbalance,
            max_tokens=args.max_tokens,
        )
        found.append((job, forward(job)))
    print(
        f"MiniMax-01, {packs} packs of {seq_len} tokens a step, {args.hardware}; ms a layer, forward"
    )
    print(plan_table(found, packs, args.max_tokens))
    print(_NOTES)
    if args.chart:
        draw(found, args.chart)
    return 0


def best_job(
    gpus: int,
    seq_len: int,
    hardware: Hardware,
    *,
    packs: int = 8,
    groups: int = 4,
    imbalance: float = 1.0,
    max_tokens: int = 8192,
) -> Job:
    """The layout with the shortest step, of those with at most `max_tokens` a GPU, or the fewest.

    Raises:
        ValueError: if no layout factors the GPUs and divides the pack and the model.
    """
    config = HybridConfig.minimax_01()
    jobs = [
        Job(
            config=config,
            hardware=hardware,
            gpus=gpus,
            seq_len=seq_len,
            tp=tp,
            cp=cp,
            ep=ep,
            etp=etp,
            groups=groups,
            imbalance=imbalance,
        )
        for tp, cp, ep, etp in _layouts(config, gpus, seq_len)
    ]
    expect(bool(jobs), f"a layout of {gpus} GPUs for packs of {seq_len} tokens", "none")
    fewest = min(job.tokens // job.tp for job in jobs)
    fitting = [job for job in jobs if job.tokens // job.tp <= max(max_tokens, fewest)]
    return min(fitting, key=lambda job: step_time(job, forward(job), packs))


def step_time(job: Job, parts: Forward, packs: int) -> float:
    """Seconds of a training step: all layers forward, twice that backward, packs in turn."""
    turns = -(-packs * job.tp * job.cp // job.gpus)
    return 3 * turns * len(job.config.layer_types) * parts.layer / 1e3


def _layouts(config: HybridConfig, gpus: int, seq_len: int) -> Iterator[tuple[int, int, int, int]]:
    for tp, cp, ep, etp in itertools.product((1, 2, 4, 8), _POWERS, _POWERS[:6], (1, 2, 4)):
        factors = gpus % (tp * cp) == 0 and gpus % (ep * etp) == 0 and seq_len % cp == 0
        fits = config.num_key_value_heads % tp == 0 and config.num_local_experts % ep == 0
        # Experts' weights have to leave room: a GPU holds at most one eighth of a layer's.
        if factors and fits and ep * etp >= min(8, gpus):
            yield tp, cp, ep, etp


def parse_size(text: str) -> int:
    """65536 of "64K" or "65536"; M is 2^20.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+)([KM]?)", text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"expected a number of tokens such as 64K or 1M, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def parse_range(text: str) -> list[int]:
    """[8, 16, 32] of "8..32", and [8] of "8".

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"expected a number of GPUs such as 8 or 8..2048, got {text!r}")
    first, last = int(match[1]), int(match[2] or match[1])
    expect(first <= last, "a range that rises", text)
    return [n for n in (first * p for p in _POWERS) if n <= last]


def plan_table(found: list[tuple[Job, Forward]], packs: int, max_tokens: int) -> str:
    """Lines of a table, a number of GPUs each."""
    rows = [_COLUMNS]
    state = HybridConfig.minimax_01().num_parameters() * _STATE_BYTES / 1e9
    for job, parts in found:
        tokens, step = job.tokens // job.tp, step_time(job, parts, packs)
        times = (
            *(parts.gather, parts.gather_measured, parts.lightning, parts.softmax, parts.tensor),
            *(parts.dispatch, parts.expert_gather, parts.experts, parts.moe_exposed, parts.layer),
        )
        rows.append(
            (
                str(job.gpus),
                f"{job.tp}/{job.cp}/{job.ep}/{job.etp}",
                f"{tokens}" + ("!" if tokens > max_tokens else ""),
                f"{state / job.gpus:.0f}" + ("!" if state / job.gpus > 80 else ""),
                *(f"{time:.2f}" for time in times),
                f"{100 * parts.communication:.0f}",
                f"{step:.1f}",
                f"{packs * job.seq_len / step / job.gpus:.0f}",
            )
        )
    return _aligned(rows)


def anchors_table() -> str:
    """Lines of a table, a published figure each."""
    rows: list[tuple[str, ...]] = [
        ("figure", "published", "model", "unit", "kind", "agrees", "source")
    ]
    for anchor in anchors():
        rows.append(
            (
                anchor.name,
                f"{anchor.published:.4g}",
                f"{anchor.modelled:.4g}",
                anchor.unit,
                anchor.kind,
                f"within {anchor.tolerance:.2g}" if anchor.agrees else "no",
                anchor.source,
            )
        )
    return _aligned(rows)


def balance_table() -> str:
    """Lines of a table, a mix of documents in packs of 1M tokens each."""
    ranks = (8, 32, 128)
    cells = [(layout, n) for n in ranks for layout in MAPS]
    rows: list[tuple[str, ...]] = [
        ("short/medium/long", *(f"cp {n} {layout}" for layout, n in cells))
    ]
    for name, mix in MIXES.items():
        values = (mean_imbalance(mix, n, layout) for layout, n in cells)
        rows.append((name, *(f"{value:.2f}" for value in values)))
    return _aligned(rows)


def draw(found: list[tuple[Job, Forward]], path: str) -> None:
    """Bars of the shares that a mean layer's time goes to, a number of GPUs each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{job.gpus}\n{job.tp}/{job.cp}/{job.ep}/{job.etp}" for job, _ in found]
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    bottom = [0.0] * len(found)
    for name, share in _shares(found).items():
        axes.bar(labels, share, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, share, strict=True)]
    axes.set_xlabel("GPUs, tp/cp/ep/etp")
    axes.set_ylabel("% of a mean layer, forward (modelled)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _shares(found: list[tuple[Job, Forward]]) -> dict[str, list[float]]:
    """Percentages of a mean layer: seven of eight mixers are lightning's."""
    parts = [p for _, p in found]
    times = {
        "lightning (7 of 8 layers)": [7 / 8 * p.lightning for p in parts],
        "softmax (1 of 8)": [p.softmax / 8 for p in parts],
        "experts": [p.experts for p in parts],
        "states and ring": [7 / 8 * p.gather + p.ring / 8 for p in parts],
        "tp": [p.tensor for p in parts],
        "experts' communication": [p.moe_exposed for p in parts],
    }
    whole = [p.layer for p in parts]
    return {
        name: [100 * x / total for x, total in zip(row, whole, strict=True)]
        for name, row in times.items()
    }


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


_NOTES = """\
gather: LASP+'s states by NCCL's constants, (measured): by a fit to published all-gathers; D, A: rows
to the experts' ranks and over those that share one, one way; seen: what of both is not hidden by the
experts; tp: activations, not hidden. GB: weights, gradients and optimizer over all GPUs. !: above 80
GB, or more tokens than a GPU may have. A step: forward, twice that backward. One document fills the
pack. Left out: FSDP, the optimizer, stages of layers, recomputation. Nothing here is measured."""
