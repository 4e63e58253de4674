"""Time whole models by length, beside transformers' MiniMax: `python bench/bench_model.py --size 3m`.

Three stacks of a size (softmax, lightning, hybrid) prefill prompts, decode behind contexts and train;
transformers' hybrid does the first two with the same weights. Rows, resuming, budgets and the report
are those of `bench/sweep.py`. On a GPU, in this order as time allows:

    python bench/bench_model.py --size 1b --passes prefill,decode --out DIR
    python bench/bench_model.py --size 3m,15m,100m --passes train --out DIR --resume
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from bench import models, plan, sweep
from bench.inputs import check_corpus
from bench.model_calls import PASSES
from bench.rows import Point

DEFAULTS = {
    "cpu": {
        **{"size": "3m", "min_len": "1K", "max_len": "16K", "train_len": "4K", "batches": "1"},
        **{"dtype": "float32", "input": "text", "budget": 160, "point_budget": 30},
    },
    "cuda": {
        **{"size": "1b", "min_len": "2K", "max_len": "4M", "train_len": "128K", "batches": "1,64"},
        **{"dtype": "bfloat16", "input": "random", "budget": 540, "point_budget": 120},
    },
}
SMOKE = {"size": "tiny", "min_len": "256", "max_len": "256", "train_len": "256"}
SWEEP_LEN = 1 << 14
MODELS = (*models.STACKS, models.PEER)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Options of the command line; those that depend on the device are filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--size", help=f"comma-separated, of {', '.join(models.SIZES)} (default: 3m; 1b on CUDA)")
    add("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    add("--passes", default="prefill,decode,train", help=f"comma-separated, of {', '.join(PASSES)}")
    add("--min-len", help="shortest prompt or context; lengths go up by factors of 4")
    add("--max-len", help="longest prompt or context")
    add("--train-len", help="longest sequence in training")
    add("--batches", help="rows that decode together, comma-separated (default: 1; 1,64 on CUDA)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: by device")
    add("--input", choices=("text", "random"), help="ids: bytes of text (default on a CPU), or any")
    add("--corpus", help="file or folder for --input text (default: Python's standard library)")
    add("--budget", type=float, help="seconds for the whole run")
    add("--point-budget", type=float, help="seconds for one point")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="folder of results (default: a new one under results/runs)")
    add("--resume", action="store_true", help="go on in --out, or in the newest run")
    add("--smoke", action="store_true", help="short points of the tiny size: seconds on a CPU")
    arguments = parser.parse_args(argv)
    sweep.fill_in(arguments, DEFAULTS, **(SMOKE if arguments.smoke else {}))
    return arguments


def plan_points(arguments: argparse.Namespace, device_name: str) -> list[list[Point]]:
    """Points of the run, a shuffled list a length; `ValueError` for what can't be meant."""
    sweep.check_positive(arguments, "budget", "point_budget")
    sizes = sweep.listed(arguments.size, tuple(models.SIZES), "sizes")
    kinds = sweep.listed(arguments.models, MODELS, "models")
    passes = sweep.listed(arguments.passes, PASSES, "passes")
    batches = [plan.parse_length(text) for text in arguments.batches.split(",")]
    shortest, longest, train = (
        plan.parse_length(text)
        for text in (arguments.min_len, arguments.max_len, arguments.train_len)
    )
    points = []
    for size, length in itertools.product(sizes, lengths(shortest, longest)):
        calls = [
            (kind, pass_, length, batch)
            for kind, pass_ in itertools.product(kinds, passes)
            if pass_ != "train" or (length <= train and kind != models.PEER)
            for batch in (batches if pass_ == "decode" else [1])
        ]
        found = [point_of(arguments, device_name, size, *call) for call in calls]
        points += [plan.shuffled(found, arguments.seed)] if found else []
    if not points:
        raise ValueError(f"expected passes that {arguments.models} has, got {arguments.passes}")
    if arguments.input == "text":
        check_corpus(arguments.corpus, longest + 1)
    return points


def points_of_sweep(arguments: argparse.Namespace, device_name: str) -> list[list[Point]]:
    """Prefills and decoding steps of the sizes that a sweep's options ask for, up to 16K tokens."""
    longest = min(plan.parse_length(arguments.max_len), SWEEP_LEN)
    options = {"max-len": longest, "min-len": min(1 << 10, longest), "passes": "prefill,decode"}
    for name in ("device", "dtype", "input", "corpus", "seed", "budget", "point_budget"):
        if getattr(arguments, name) is not None:
            options[name.replace("_", "-")] = getattr(arguments, name)
    words = [f"--{name}={value}" for name, value in options.items()]
    return plan_points(parse_arguments([f"--size={arguments.models}", *words]), device_name)


def lengths(shortest: int, longest: int) -> list[int]:
    """Steps by a factor of 4 from `shortest`, and `longest` at the end."""
    found = [n for i, n in enumerate(plan.lengths(shortest, longest)) if i % 2 == 0]
    return found if found[-1] == longest else [*found, longest]


def point_of(
    arguments: argparse.Namespace,
    device_name: str,
    size: str,
    kind: str,
    pass_: str,
    length: int,
    batch: int,
) -> Point:
    """One point; its op is the stack, its backend whose implementation it is."""
    peer = kind == models.PEER
    stack = "hybrid" if peer else kind
    model = f"{models.PEER}-{stack}-{size}" if peer else f"{stack}-{size}"
    config = models.config_of(model)
    return Point(
        suite="model",
        op=stack,
        backend=models.PEER if peer else "attnlab",
        pass_=pass_,
        batch=batch,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        q_len=length,
        head_dim=config.head_dim,
        value_dim=config.head_dim,
        dtype=arguments.dtype,
        device=device_name,
        layer=None,
        precision="default",
        input=arguments.input,
        model=model,
    )


def main(argv: list[str]) -> int:
    """Run the measurements; an exit code, as `bench.sweep.execute` gives it."""
    arguments = parse_arguments(argv)
    flags = {"in_process": True, "ceiling_rounds": 1} if arguments.smoke else {}
    return sweep.execute(arguments, plan_points, **flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
