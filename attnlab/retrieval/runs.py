"""The settings of a training run, and what it came to: `run.json` in its folder."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attnlab.checks import expect
from attnlab.retrieval import mqar, text
from attnlab.retrieval.mixture import DATA, WEIGHTS, Curriculum
from attnlab.retrieval.models import Model, model_of
from attnlab.retrieval.symbols import Vocabulary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of a run.

    name: folder under that of the plan
    model: as `attnlab.retrieval.models.model_of` knows it; `size` likewise
    data: "symbols", "mqar" or "text"
    tasks: of the symbols
    vocabulary: of the symbols; "mqar" and "text" have their own sizes
    steps, batch_tokens, learning_rate (its peak), warmup_steps, weight_decay, clip_norm: as usual
    decay_share: share of the steps over which the learning rate falls
    curriculum: lengths of the sequences by step
    seed: of the weights and of the data
    dtype: "float32", or "bfloat16" with float32 masters
    validation_rows: sequences of a task and length; validation_lengths: those lengths
    """

    name: str
    model: str
    size: str = "3m"
    data: str = "symbols"
    tasks: tuple[str, ...] = tuple(WEIGHTS)
    vocabulary: Vocabulary = Vocabulary()  # noqa: RUF009
    steps: int = 1500
    batch_tokens: int = 1 << 16
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.3
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    curriculum: Curriculum = Curriculum(shortest=64, stages=((1.0, 256),))  # noqa: RUF009
    seed: int = 0
    dtype: str = "bfloat16"
    validation_rows: int = 32
    validation_lengths: tuple[int, ...] = (256, 1024)

    def __post_init__(self) -> None:
        """Raise `ValueError` for settings that can't be meant."""
        expect(self.data in DATA, f"data among {', '.join(DATA)}", repr(self.data))
        unknown = [task for task in self.tasks if task not in WEIGHTS]
        expect(bool(self.tasks) and not unknown, f"tasks among {', '.join(WEIGHTS)}", self.tasks)
        expect(self.dtype in DTYPES, f"a dtype among {', '.join(DTYPES)}", repr(self.dtype))
        for name in ("steps", "batch_tokens", "validation_rows"):
            expect(getattr(self, name) >= 1, f"{name} of at least 1", getattr(self, name))
        for name in ("learning_rate", "clip_norm"):
            expect(getattr(self, name) > 0, f"{name} above 0", getattr(self, name))
        fits = self.batch_tokens >= self.curriculum.longest
        expect(fits, f"batch_tokens >= {self.curriculum.longest}", self.batch_tokens)
        self.build()

    def build(self) -> Model:
        """The model that is trained; an embedding of mqar's vocabulary is also its output matrix."""
        sizes = {"mqar": mqar.VOCAB_SIZE, "text": text.VOCAB_SIZE}
        built = model_of(
            self.model, vocab_size=sizes.get(self.data, self.vocabulary.size), size=self.size
        )
        if self.data == "mqar":
            return replace(built, config=replace(built.config, tie_word_embeddings=True))
        return built

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Run":
        """The settings of a `run.json`."""
        stages = tuple((share, n) for share, n in record["curriculum"]["stages"])
        shortest = record["curriculum"]["shortest"]
        return cls(
            **{
                **record,
                "vocabulary": Vocabulary(**record["vocabulary"]),
                "tasks": tuple(record["tasks"]),
                "curriculum": Curriculum(shortest=shortest, stages=stages),
                "validation_lengths": tuple(record["validation_lengths"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run came to: shares of items found by "task@length", seconds, parameters."""

    run: Run
    accuracies: dict[str, float]
    seconds: float
    num_parameters: int

    @property
    def score(self) -> float:
        """Mean accuracy over all tasks and lengths, by which learning rates are compared."""
        return math.fsum(self.accuracies.values()) / len(self.accuracies)


def read_trained(folder: Path) -> Trained | None:
    """The result of a finished run, None if the folder has none.

    Raises:
        ValueError: for a run.json that can't be read.
    """
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        run = Run.from_json(record["run"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected the settings of a run in {path}, got {error!r}") from None
    if "accuracies" not in record:
        return None
    names = ("accuracies", "seconds", "num_parameters")
    return Trained(run=run, **{name: record[name] for name in names})
