"""`attnlab retrieval`: train the small models of a plan."""

import argparse
import time
from pathlib import Path

import torch

from attnlab.checks import expect
from attnlab.retrieval.plans import PLANS, Session, run_plan, trained_in


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of `run`."""
    add = parser.add_argument
    add("--plan", default="small", help=f"{' or '.join(PLANS)} (%(default)s); full wants a GPU")
    add("--out", default="runs/retrieval", help="folder of all its runs (%(default)s)")
    add("--device", help="cpu, cuda or cuda:N; without it, a GPU if there is one")
    add("--minutes", type=float, help="save and end after so long; without it, when all is done")
    add("--jobs", type=int, default=1, help="processes that share the runs (%(default)s)")
    add("--steps", type=int, help="of each run; without it, the plan's")
    add("--corpus", nargs="*", default=[], help="text; without it, Python's standard library")


def run(args: argparse.Namespace) -> int:
    """Train what is left of the plan and print what it came to; 130 if not all of it is done."""
    minutes = float("inf") if args.minutes is None else args.minutes
    expect(minutes > 0, "minutes > 0", minutes)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    there = device == "cpu" or (device.startswith("cuda") and torch.cuda.is_available())
    expect(there, "a device that this machine has", device)
    session = Session(
        plan=args.plan,
        out=args.out,
        device=device,
        deadline=time.time() + 60 * minutes,
        jobs=args.jobs,
        steps=args.steps,
        corpus=tuple(args.corpus),
    )
    done = run_plan(session)
    print(table(Path(args.out)))
    if not done:
        print("not all is done; go on with the same command")
    return 0 if done else 130


def table(folder: Path) -> str:
    """Lines of run, learning rate, seconds, mean accuracy, and that of needle, by length."""
    lines = [("run", "rate", "seconds", "mean", "needle")]
    for trained in trained_in(folder):
        needle = [
            f"{name.partition('@')[2]}: {share:.2f}"
            for name, share in trained.accuracies.items()
            if name.startswith(("needle", "mqar", "number"))
        ]
        rate, seconds = f"{trained.run.learning_rate:g}", f"{trained.seconds:.0f}"
        lines.append((trained.run.name, rate, seconds, f"{trained.score:.3f}", ", ".join(needle)))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
