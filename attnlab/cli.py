"""Command line: `attnlab backends` shows what runs on this machine, and why the rest does not."""

import argparse
import sys

import torch

from attnlab import registry
from attnlab.problem import Problem


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


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 unless the arguments are wrong (2)."""
    parser = argparse.ArgumentParser(prog="attnlab", description="Linear versus softmax attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("backends", help="which backend of which op runs here, or why not")
    parser.parse_args(argv)
    print(backends_table("cuda" if torch.cuda.is_available() else "cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
