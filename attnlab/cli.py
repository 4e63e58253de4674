"""Command line: what runs on this machine (`backends`), training (`train`, `retrieval`), text (`generate`)."""

import argparse
import sys

import torch

from attnlab import registry
from attnlab.checks import expect
from attnlab.distributed import planning
from attnlab.distributed.launch import joined
from attnlab.inference.generate import stream
from attnlab.inference.sampling import check_sampling
from attnlab.inference.text import TextStream
from attnlab.model.checkpoint import read_config
from attnlab.model.hybrid import HybridLM
from attnlab.problem import Problem
from attnlab.registry import BackendUnavailable
from attnlab.retrieval import command as retrieval_command
from attnlab.training.config import check_vocabulary
from attnlab.training.guard import NonFiniteError
from attnlab.training.options import add_options, config_from
from attnlab.training.tokenizer import Tokenizer, load_tokenizer
from attnlab.training.train import TrainResult, resume, train


def typical_problem(op: str, device: str) -> Problem:
    """A call that every complete backend should accept: 128-dim heads, 16 bits on a GPU."""
    return Problem(
        op=op,
        batch=1,
        heads=16,
        kv_heads=16,
        q_len=1 if "decode" in op else 4096,
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
    """Train, or go on with a run, alone or as a rank under torchrun; 130 if a signal ended it early."""
    given = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    with joined(given.get("device")) as job:
        if given.pop("resume"):
            expect("out" in given, "--out DIR beside --resume", sorted(given))
            result = resume(given.pop("out"), job=job, **given)
        else:
            result = train(config_from(given), job=job)
        if job is None or job.leads:
            print(_outcome(result))
    return 130 if result.model_path is None else 0


def _outcome(result: TrainResult) -> str:
    if result.model_path is None:
        again = f"attnlab train --resume --out {result.out}"
        return f"stopped after step {result.step}; go on with: {again}"
    return f"trained {result.step} steps; the model is in {result.model_path}"


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of `run_generate`."""
    parser.add_argument("path", help="folder with config.json, safetensors and a tokenizer")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    options = {
        "max-new-tokens": (int, 200, "tokens at most; the end of the text may come earlier"),
        "temperature": (float, 0.8, "0 takes the likeliest token"),
        "top-k": (int, None, "draw among so many tokens"),
        "top-p": (float, None, "draw among the likeliest tokens of so much probability"),
        "seed": (int, None, "of the draws; without it they differ from run to run"),
        "backend": (str, None, "of the attention layers that have it; see attnlab backends"),
        "device": (str, None, "cpu, cuda or cuda:N; without it, a GPU if there is one"),
        "chunk-size": (int, None, "tokens of the prompt in one pass; without it, all"),
    }
    for name, (kind, default, text) in options.items():
        text += "" if default is None else " (%(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def run_generate(args: argparse.Namespace) -> int:
    """Print the prompt and, as it comes, how a model goes on; 130 if that is interrupted."""
    check_sampling(args.temperature, args.top_k, args.top_p)
    expect(args.prompt != "", "a prompt", "an empty one")
    model, tokenizer = _load(args)
    prompt = tokenizer.encode(args.prompt)
    tokens = stream(
        model,
        [prompt],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=torch.seed() if args.seed is None else args.seed,
        eos_token_id=tokenizer.eos_token_id if model.config.eos_token_id is None else None,
        chunk_size=args.chunk_size,
    )
    text = TextStream(tokenizer.decode, prompt)
    print(args.prompt, end="", flush=True)
    try:
        for token in tokens:
            print(text.push(int(token)), end="", flush=True)
    except KeyboardInterrupt:
        print()
        return 130
    print(text.close())
    return 0


def _load(args: argparse.Namespace) -> tuple[HybridLM, Tokenizer]:
    """The model of `args.path` on its device with its backend, and its tokenizer."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    there = device == "cpu" or (device.startswith("cuda") and torch.cuda.is_available())
    expect(there, "a device that this machine has", device)
    registry.check_backend_name(args.backend)
    config, tokenizer = read_config(args.path), load_tokenizer(args.path)
    check_vocabulary(tokenizer, config.vocab_size)
    model = HybridLM.from_pretrained(args.path, device=device)
    lightning, softmax = (
        args.backend if args.backend in registry.list_backends(op) else None
        for op in ("lightning_attention", "softmax_attention")
    )
    return model.use_backend(lightning=lightning, softmax=softmax), tokenizer


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
    generating = commands.add_parser("generate", help="let a trained model continue a text")
    add_generate_options(generating)
    generating.set_defaults(run=run_generate)
    plan = commands.add_parser("plan", help="what MiniMax-01's layers would cost on many GPUs")
    planning.add_options(plan)
    plan.set_defaults(run=planning.run)
    recalling = commands.add_parser("retrieval", help="train the small models of a retrieval plan")
    retrieval_command.add_options(recalling)
    recalling.set_defaults(run=retrieval_command.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, NonFiniteError, OSError, BackendUnavailable) as error:
        print(f"attnlab {args.command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
