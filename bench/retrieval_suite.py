"""Suite "retrieval": what trained models find, by task, length and depth; rows of `attnlab.retrieval`.

The models are those committed under results/h200/retrieval, or of any folder of runs.
"""

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from attnlab.retrieval import evaluate
from attnlab.retrieval.evaluate import Cell, Loaded
from attnlab.retrieval.intervals import wilson
from attnlab.retrieval.mqar import SETTINGS
from attnlab.retrieval.runs import Trained, read_trained
from bench.plan import ROOT, lengths
from bench.rows import Row

SHIPPED = ROOT / "results" / "h200" / "retrieval"
LEAST_LEN = 1 << 10
DEAR = 1.2e15  # operations a row from which needles of one length take as long as many other units
CHUNKS = {"cpu": 1 << 13, "cuda": 1 << 16}  # tokens in one pass
SOURCES = (
    *("attnlab/retrieval/batch.py", "attnlab/retrieval/symbols.py", "attnlab/retrieval/tasks.py"),
    *("attnlab/retrieval/text.py", "attnlab/retrieval/mqar.py", "attnlab/retrieval/evaluate.py"),
    *("attnlab/retrieval/models.py", "attnlab/retrieval/horizon.py", "attnlab/retrieval/theory.py"),
    *(
        "attnlab/retrieval/streaming.py",
        "attnlab/retrieval/attention.py",
        "attnlab/model",
        "attnlab/cache.py",
    ),
)


@dataclass(frozen=True)
class RetrievalUnit:
    """All cells of one model, task and length; `weights` is a hash of the model's file."""

    folder: str
    model: str
    weights: str
    task: str
    length: int
    suite: str = "retrieval"

    def title(self) -> str:
        return f"retrieval {self.model}, {self.task}, {self.length} tokens"

    def identity(self) -> Row:
        names = ("suite", "model", "task", "length")
        return {name: getattr(self, name) for name in names}

    def sources(self) -> tuple[str, ...]:
        return SOURCES

    def version(self) -> str:
        return self.weights

    def work(self) -> float:
        rows = 22 if self.task == "frequent" else 64 if self.task == "mqar" else 8
        config = trained_of(self.folder).run.build().config
        return float(evaluate.streaming_flops(config, self.length)) * rows + 1e9

    def series(self) -> str:
        return self.model

    def memory_bytes(self, device: str) -> int:
        """Caches of the rows that are read together, and the activations of a chunk."""
        config, chunk = trained_of(self.folder).run.build().config, CHUNKS[device]
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        rows = max(chunk // self.length, 1)
        cache = evaluate.costs.cache_bytes(config, self.length, rows, dtype)
        return cache + 64 * config.hidden_size * min(chunk, rows * self.length)

    def measure(self, device: str) -> list[Row]:
        loaded = _loaded(self.folder, device)
        try:
            cells = evaluate.evaluate(loaded, self.task, self.length, chunk=CHUNKS[device])
        except ValueError as error:
            return [row | {"status": "unsupported", "reason": str(error)} for row in self.blank()]
        facts = self._base() | {
            "dtype": str(loaded.model.lm_head.weight.dtype).removeprefix("torch."),
            "state_bytes": loaded.model.cache_bytes(self.length),
        }
        found = [facts | self._row(cell) for cell in cells]
        expected = (
            evaluate.predictions(loaded, self.length, cells) if self.task == "needle" else None
        )
        for row, share in zip(found, expected or [None] * len(found), strict=True):
            row["predicted"] = share
        return found

    def blank(self) -> list[Row]:
        return [self._base() | {"cell": "all"}]

    def _base(self) -> Row:
        trained = trained_of(self.folder)
        run, config = trained.run, trained.run.build().config
        return {
            **{"suite": self.suite, "op": self.model.partition("-")[0].partition(".")[0]},
            **{"pass": "recall", "model": self.model, "backend": "attnlab", "task": self.task},
            **{"q_len": self.length, "input": run.data, "heads": config.num_attention_heads},
            **{"kv_heads": config.num_key_value_heads, "head_dim": config.head_dim},
            **{"value_dim": config.head_dim, "architecture": run.model, "seed": run.seed},
            **{"learning_rate": run.learning_rate, "train_steps": run.steps},
            **{"train_max_len": run.curriculum.longest, "parameters": trained.num_parameters},
        }

    def _row(self, cell: Cell) -> Row:
        low, high = wilson(cell.correct, cell.n)
        return {
            **{"status": "ok", "depth": cell.depth, "distance": cell.distance, "n": cell.n},
            **{"correct": cell.correct, "wilson_lo": low, "wilson_hi": high},
            **{"margin": cell.margin, "attention": cell.attention, "cell": str(cell.depth)},
        }


@lru_cache
def trained_of(folder: str) -> Trained:
    """The run in a folder."""
    trained = read_trained(Path(folder))
    assert trained is not None
    return trained


@lru_cache(maxsize=4)
def _loaded(folder: str, device: str) -> Loaded:
    return evaluate.load(Path(folder), device=device)


def units(max_len: int, dtype: str, folder: Path = SHIPPED) -> list[RetrievalUnit]:
    """Needles first, then the other tasks, then needles that cost as much as many of these; none
    without models. Each from the cheapest model and length to the dearest.
    """
    return sorted(_units(max_len, folder), key=lambda unit: (_rank(unit), unit.work()))


def _rank(unit: RetrievalUnit) -> int:
    if unit.task not in evaluate.LONG_TASKS:
        return 1
    return 0 if unit.work() <= 8 * DEAR else 2


def _units(max_len: int, folder: Path) -> Iterable[RetrievalUnit]:
    if max_len < LEAST_LEN:
        return
    for path in evaluate.chosen_runs(folder):
        trained = trained_of(str(path))
        weights = hash_of(path / "model")
        known = [n for n, _ in SETTINGS] if trained.run.data == "mqar" else []
        for length in known or lengths(LEAST_LEN, max_len):
            for task in evaluate.tasks_of(trained, length):
                yield RetrievalUnit(str(path), model_name(trained), weights, task, length)


def model_name(trained: Trained) -> str:
    """Name in rows and charts: the architecture, its data if not symbols, its seed if not 0."""
    run = trained.run
    data = f"-{run.data}" if run.data != "symbols" else ""
    return run.model + data + (f"-seed{run.seed}" if run.seed else "")


def hash_of(folder: Path) -> str:
    """Hash of a model's weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def notice(folder: Path = SHIPPED) -> str | None:
    """Why there is nothing to evaluate, for the report; None if there is."""
    if evaluate.chosen_runs(folder):
        return None
    name = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    return (
        f"No trained models are in `{name}`: `python bench/retrieval.py` trains and evaluates them."
    )


if __name__ == "__main__":
    print(*(unit.title() for unit in units(int(sys.argv[2]), "", Path(sys.argv[1]))), sep="\n")
