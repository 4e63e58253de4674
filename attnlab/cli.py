"""Command line: what runs on this machine (`backends`), and training (`train`)."""

import argparse
import sys

import torch

from attnlab import registry
from attnlab.problem import Problem
from attnlab.training.guard import NonFiniteError
from attnlab.training.options import add_options, config_from
from attnlab.training.train import resume, train


def typical_problem(op: str, device: str) -> Problem:
    """A call that every complete backend should accept: 128-dim heads, 16 bits on a GPU."""
    return Problem(
        op=op,
        batch=1,
        heads=16,
        kv_heads=16,
        q_len=1 if op == "lightning_decode_" else 4096,
        kv_len=1 if op == "lightning_decode_" else 4096,
        key_dim=128,
        value_dim=128,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        device=device,
    )


def backends_table(device: str) -> str:
    """Lines of op, backend and "ok" or the reason why the backend can't run there."""
    lines = [("op", "backend", f"on {device}")]
    for op in registry.list_ops():
        problem = typical_problem(op, device)
        for backend in registry.list_backends(op):
            reason = registry.why_not(op, backend, problem)
            lines.append((op, backend, "ok" if reason is None else f"no: {reason}"))
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines)


def run_backends(args: argparse.Namespace) -> int:
    """Print the table of backends."""
    print(backends_table("cuda" if torch.cuda.is_available() else "cpu"))
    return 0


def run_train(args: argparse.Namespace) -> int:
    """Train, or go on with a run; 130 if a signal ended it early."""
    given = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    if given.pop("resume"):
        if set(given) != {"out"}:
            raise ValueError(f"expected --out DIR alone beside --resume, got {sorted(given)}")
        result = resume(given["out"])
        out = given["out"]
    else:
        config = config_from(given)
        result, out = train(config), config.out
    if result.model_path is None:
        print(f"stopped after step {result.step}; go on with: attnlab train --resume --out {out}")
        return 130
    print(f"trained {result.step} steps; the model is in {result.model_path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 if it succeeds, 2 for wrong arguments, 1 if it fails."""
    parser = argparse.ArgumentParser(prog="attnlab", description="Linear versus softmax attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    backends = commands.add_parser(
        "backends", help="which backend of which op runs here, or why not"
    )
    backends.set_defaults(run=run_backends)
    training = commands.add_parser("train", help="train a lab model on text")
    add_options(training)
    training.set_defaults(run=run_train)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, NonFiniteError, OSError) as error:
        print(f"attnlab {args.command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
