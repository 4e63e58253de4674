"""Which small models are trained, and in which order: `attnlab retrieval` runs a plan.

A plan has two stages: every architecture at every learning rate; then, at the rate that did best, a
second seed of each architecture, the recipe's ablations, and the models of other data. All runs lie
side by side in one folder, so a plan that was interrupted goes on where it was. Runs are small, so
several processes may share a GPU: the runs of a stage are dealt out so that all end at about the
same time.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from attnlab.checks import expect
from attnlab.retrieval.mixture import Curriculum
from attnlab.retrieval.models import KINDS
from attnlab.retrieval.runs import Run, Trained, read_trained
from attnlab.retrieval.symbols import Vocabulary
from attnlab.retrieval.text import load_text
from attnlab.retrieval.train import train

ABLATIONS = (
    *("hybrid-7to1.no-ramp", "hybrid-7to1.no-log-length", "hybrid-7to1.half-rotary"),
    *("hybrid-7to1.softmax-first", "hybrid-7to1.minimax"),
    *("softmax.no-log-length", "softmax.half-rotary"),
)
MQAR_MODELS = ("softmax", "lightning", "hybrid-1to1")
TEXT_MODEL = "hybrid-3to1"
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
MQAR_RATES = (5e-4, 1e-3, 2e-3)
TEXT_RATES = (2e-3, 4e-3)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Runs by architecture and learning rate, all like `base`, and the extra ones of stage two.

    `mqar` and `text` are the settings of the runs on other data, None for none.
    """

    base: Run
    kinds: tuple[str, ...]
    rates: tuple[float, ...]
    ablations: tuple[str, ...] = ()
    second_seed: bool = True
    mqar: Run | None = None
    text: Run | None = None

    def first_stage(self) -> list[Run]:
        """Every architecture at every learning rate."""
        return [self._run(kind, rate, 0) for kind in self.kinds for rate in self.rates]

    def second_stage(self, found: Iterable[Trained]) -> list[Run]:
        """What follows from the results of the first stage."""
        best = best_rates(found)
        runs = [self._run(kind, best[kind], 1) for kind in self.kinds if self.second_seed]
        for name in self.ablations:
            runs.append(self._run(name, best[name.partition(".")[0]], 0))
        if self.mqar is not None:
            runs += [
                replace(self.mqar, model=kind, name=f"{kind}-mqar-lr{rate:g}", learning_rate=rate)
                for kind, rate in itertools.product(MQAR_MODELS, MQAR_RATES)
            ]
        if self.text is not None:
            runs += [
                replace(self.text, name=f"{TEXT_MODEL}-text-lr{rate:g}", learning_rate=rate)
                for rate in TEXT_RATES
            ]
        return runs

    def _run(self, model: str, rate: float, seed: int) -> Run:
        name = f"{model}-lr{rate:g}-seed{seed}"
        return replace(self.base, name=name, model=model, learning_rate=rate, seed=seed)


_FULL = Run(
    name="full",
    model="softmax",
    curriculum=Curriculum(shortest=16, stages=((0.2, 64), (0.4, 128), (0.6, 256), (1.0, 1024))),
    validation_lengths=(256, 1024, 4096),
)
_SMALL = Run(
    name="small",
    model="softmax",
    size="small",
    vocabulary=Vocabulary(num_keys=32, num_values=32, num_noise=32),
    tasks=("needle", "multi_query"),
    steps=400,
    batch_tokens=2048,
    warmup_steps=20,
    curriculum=Curriculum(shortest=16, stages=((0.4, 32), (1.0, 128))),
    dtype="float32",
    validation_lengths=(128, 512),
)
PLANS = {
    "full": Plan(
        base=_FULL,
        kinds=KINDS,
        rates=RATES,
        ablations=ABLATIONS,
        mqar=replace(
            _FULL,
            data="mqar",
            name="mqar",
            curriculum=Curriculum(shortest=64, stages=((0.3, 64), (0.6, 256), (1.0, 512))),
            validation_lengths=(64, 128, 256, 512),
        ),
        text=replace(
            _FULL,
            data="text",
            name="text",
            model=TEXT_MODEL,
            steps=6000,
            curriculum=Curriculum(shortest=256, stages=((0.6, 512), (1.0, 2048))),
            validation_lengths=(512, 2048),
        ),
    ),
    "small": Plan(
        base=_SMALL,
        kinds=("softmax", "lightning", "hybrid-3to1"),
        rates=(2e-3,),
        ablations=("hybrid-3to1.no-ramp",),
        second_seed=False,
    ),
}


def best_rates(found: Iterable[Trained]) -> dict[str, float]:
    """The learning rate of each architecture's best run with seed 0, by `Trained.score`."""
    best: dict[str, Trained] = {}
    for trained in found:
        kind = trained.run.model
        if kind not in best or trained.score > best[kind].score:
            best[kind] = trained
    return {kind: trained.run.learning_rate for kind, trained in best.items()}


def trained_in(folder: Path) -> list[Trained]:
    """The finished runs in a folder, by name."""
    found = (read_trained(path.parent) for path in sorted(folder.glob("*/run.json")))
    return [trained for trained in found if trained is not None]


@dataclass(frozen=True, kw_only=True)
class Session:
    """What running a plan takes: where to, on what, until when (a `time.time()`), in how many processes.

    `steps` shortens every run, `corpus` is the text of the runs on text.

    Raises:
        ValueError: for an unknown plan, or no jobs.
    """

    plan: str
    out: str
    device: str
    deadline: float = math.inf
    jobs: int = 1
    steps: int | None = None
    corpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what a caller can get wrong."""
        expect(self.plan in PLANS, f"a plan among {', '.join(PLANS)}", repr(self.plan))
        expect(self.jobs >= 1, "jobs >= 1", self.jobs)

    def stages(self) -> Iterable[list[Run]]:
        """The runs of the first stage and, when those are done, of the second."""
        plan = PLANS[self.plan]
        first = self._shortened(plan.first_stage())
        yield first
        names = {run.name for run in first}
        found = [trained for trained in trained_in(Path(self.out)) if trained.run.name in names]
        yield self._shortened(plan.second_stage(found))

    def left(self, runs: list[Run]) -> list[Run]:
        """Those that are not finished."""
        return [run for run in runs if read_trained(Path(self.out) / run.name) is None]

    def _shortened(self, runs: list[Run]) -> list[Run]:
        return runs if self.steps is None else [replace(run, steps=self.steps) for run in runs]


def run_plan(session: Session) -> bool:
    """Train what is left of a plan; whether all of it is done by now.

    At the deadline, or at a signal, the runs in hand save their states.

    Raises:
        ValueError: for folders that hold runs of other settings.
        RuntimeError: if a process of several failed.
    """
    for runs in session.stages():
        left = session.left(runs)
        if session.jobs > 1 and len(left) > 1:
            _spawn(session, left)
        else:
            train_all(session, left)
        if session.left(runs):
            return False
    return True


def train_all(session: Session, runs: list[Run]) -> None:
    """Train runs one after the other until the deadline or a signal."""
    texts: tuple[Tensor | None, Tensor | None] = None, None
    monotonic = time.monotonic() + session.deadline - time.time()
    for run in runs:
        if run.data == "text" and texts[0] is None:
            texts = load_text(session.corpus)
        corpus, held_out = texts if run.data == "text" else (None, None)
        flags = {"corpus": corpus, "held_out": held_out}
        folder = Path(session.out) / run.name
        if train(run, folder, device=session.device, deadline=monotonic, **flags) is None:
            return


def shares(runs: list[Run], jobs: int) -> list[list[Run]]:
    """The runs of each of up to `jobs` processes: the longest first, each to who has least to do."""
    dealt: list[list[Run]] = [[] for _ in range(min(jobs, len(runs)))]
    for run in sorted(runs, key=_tokens, reverse=True):
        min(dealt, key=lambda share: sum(map(_tokens, share))).append(run)
    return dealt


def _tokens(run: Run) -> int:
    return run.steps * run.batch_tokens


def _spawn(session: Session, runs: list[Run]) -> None:
    """Share runs among processes of this module, and wait for them; a signal reaches them too."""
    threads = str(max((os.cpu_count() or 1) // session.jobs, 1))
    settings = json.dumps(asdict(replace(session, jobs=1)))
    workers = []
    for share in shares(runs, session.jobs):
        names = [run.name for run in share]
        command = [sys.executable, "-m", "attnlab.retrieval.plans", settings, *names]
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        workers.append(subprocess.Popen(command, env=environment))
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise RuntimeError(f"expected all training processes to end well, got codes {codes}")


def _main(argv: list[str]) -> None:
    """One of several processes: the session as JSON, then the names of its runs."""
    settings = json.loads(argv[0])
    session = Session(**{**settings, "corpus": tuple(settings["corpus"])})
    for runs in session.stages():
        mine = [run for run in runs if run.name in argv[1:]]
        if mine:
            train_all(session, mine)
            return


if __name__ == "__main__":
    _main(sys.argv[1:])
