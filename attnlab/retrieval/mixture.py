"""What the small models train on: batches by step, of rising lengths, and what they are judged by.

Three kinds of data: "symbols" are the tasks of `attnlab.retrieval.tasks`, all in every batch; "mqar"
is zoology's task, one of its settings a batch; "text" are needles in the byte corpus. A step's batch
follows from the seed and the step's number alone, and is made on the model's device.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.checks import expect
from attnlab.retrieval import mqar, text
from attnlab.retrieval.batch import ABSENT, Batch, found, items, join
from attnlab.retrieval.symbols import MAX_HOPS, Shape, Vocabulary
from attnlab.retrieval.tasks import make_batch

DATA = ("symbols", "mqar", "text")
WEIGHTS = {  # shares of a batch's rows
    "needle": 4,
    "multi_key": 2,
    "multi_query": 2,
    "multi_value": 2,
    "haystack": 2,
    "tracking": 2,
    "frequent": 1,
}
TEXT_LEAST = max(len(a + b) for a, b in text.KINDS.values())  # bytes of a needle and its question
VALIDATION_SEED = 1_000_000_007  # behind the seeds of all training steps


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Which lengths come when: from `shortest` up to that of the stage, in powers of two.

    `stages` are pairs (share of the steps at which the stage ends, its longest length), the last
    share being 1. In each step a length is drawn from those of the stage.

    Raises:
        ValueError: for shares that don't rise to 1, or lengths below the shortest.
    """

    shortest: int
    stages: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        """Check the stages."""
        shares = [share for share, _ in self.stages]
        ok = bool(shares) and shares == sorted(shares) and shares[-1] == 1.0
        expect(ok, "stages whose shares rise to 1", self.stages)
        fits = all(longest >= self.shortest >= 1 for _, longest in self.stages)
        expect(fits, f"lengths of at least {self.shortest}", self.stages)

    def length(self, step: int, steps: int, draw: random.Random) -> int:
        """Tokens of the sequences of a step, from 1 to `steps`."""
        longest = next(n for share, n in self.stages if step <= share * steps + 1e-9)
        doublings = (longest // self.shortest).bit_length() - 1
        return self.shortest << draw.randint(0, doublings)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequences."""
        return max(n for _, n in self.stages)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The batches of a run: kind of data, tokens a step, curriculum, seed; see the module.

    `tasks` are those of "symbols" that are in every batch.
    """

    data: str
    batch_tokens: int
    curriculum: Curriculum
    seed: int
    vocabulary: Vocabulary
    device: str
    tasks: tuple[str, ...] = tuple(WEIGHTS)
    corpus: Tensor | None = None  # "text" alone

    def batch(self, step: int, steps: int) -> Batch:
        """The batch of a step, from 1 to `steps`."""
        draw = random.Random(self.seed * 1_000_003 + step)
        length = self.curriculum.length(step, steps, draw)
        rows = max(self.batch_tokens // length, 1)
        seed = draw.getrandbits(62)
        makers: dict[str, Callable[[int, int, int, random.Random], Batch]] = {
            "symbols": self._symbols,
            "mqar": self._mqar,
            "text": self._text,
        }
        return makers[self.data](rows, length, seed, draw)

    def _symbols(self, rows: int, length: int, seed: int, draw: random.Random) -> Batch:
        parts = []
        weights = {task: WEIGHTS[task] for task in self.tasks}
        for number, (task, weight) in enumerate(weights.items()):
            shape = training_shape(task, length, self.vocabulary, draw)
            if shape is not None:
                share = max(round(rows * weight / sum(weights.values())), 1)
                parts.append(
                    make_batch(
                        task,
                        rows=share,
                        length=length,
                        seed=seed + number,
                        vocabulary=self.vocabulary,
                        shape=shape,
                        device=self.device,
                    )
                )
        expect(bool(parts), f"a length that one of {', '.join(self.tasks)} fits", length)
        return join(parts)

    def _mqar(self, rows: int, length: int, seed: int, draw: random.Random) -> Batch:
        """One of zoology's numbers of pairs that fit the length."""
        pairs = draw.choice([n for _, n in mqar.SETTINGS if 4 * n <= length])
        return mqar.mqar(
            rows=rows,
            length=length,
            num_pairs=pairs,
            seed=seed,
            vocab_size=self.vocabulary.size,
            device=self.device,
        )

    def _text(self, rows: int, length: int, seed: int, draw: random.Random) -> Batch:
        assert self.corpus is not None
        kind = draw.choice(list(text.KINDS))
        count = draw.randint(1, _most_needles(length))
        return text.needle_in_text(
            self.corpus, rows=rows, length=length, seed=seed, kind=kind, num_questions=count
        )


def _most_needles(length: int) -> int:
    """As many as fit, up to 8: a model that sees one at a time learns no more than to copy it."""
    return max(min((length - 1) // TEXT_LEAST, 8), 1)


def training_shape(
    task: str, length: int, vocabulary: Vocabulary, draw: random.Random
) -> Shape | None:
    """A random number of questions, and of hops, that fit a length; None if not even one can.

    At most 8 questions, 64 of multi_query; the pairs take up to half of the sequence.
    """
    hops = min(draw.randint(1, MAX_HOPS), max(length // 4 - 2, 1), vocabulary.num_keys - 1)
    pairs = {"multi_key": 8, "multi_value": 4, "tracking": hops + 1}.get(task, 1)
    most_tokens = length // 2 // (2 * pairs + 2)
    keys = vocabulary.num_keys // (8 if task == "multi_key" else hops + 1)
    most = min(64 if task == "multi_query" else 8, most_tokens, keys)
    if task == "haystack":
        most = min(8, (length - 1) // 6) if length // 3 <= vocabulary.num_keys**2 else 0
    if task == "frequent":
        most = int(length >= 64 and vocabulary.num_values > 3)
    if most < 1:
        return None
    return Shape(
        num_questions=draw.choice([n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most]), hops=hops
    )


def validation_batches(mixture: Mixture, *, rows: int, lengths: list[int]) -> dict[str, Batch]:
    """Batches by "task@length" that all runs of one kind of data are judged by, on the device."""
    batches: dict[str, Batch] = {}
    for length in lengths:
        flags = {"rows": rows, "length": length, "seed": VALIDATION_SEED + length}
        if mixture.data == "mqar":
            pairs = max(n for _, n in mqar.SETTINGS if 4 * n <= length)
            size, device = mixture.vocabulary.size, mixture.device
            batches[f"mqar@{length}"] = mqar.mqar(
                num_pairs=pairs, vocab_size=size, device=device, **flags
            )
        elif mixture.data == "text":
            assert mixture.corpus is not None
            count = _most_needles(length)
            for kind in text.KINDS:
                batches[f"{kind}@{length}"] = text.needle_in_text(
                    mixture.corpus, kind=kind, num_questions=count, **flags
                )
        else:
            batches |= _symbolic(mixture, length, flags)
    return batches


def _symbolic(mixture: Mixture, length: int, flags: dict) -> dict[str, Batch]:
    """Each task with as many questions, up to 8, as training has at that length."""
    batches = {}
    for task in mixture.tasks:
        shape = _largest_shape(task, length, mixture.vocabulary)
        if shape is not None:
            batches[f"{task}@{length}"] = make_batch(
                task, shape=shape, vocabulary=mixture.vocabulary, device=mixture.device, **flags
            )
    return batches


def _largest_shape(task: str, length: int, vocabulary: Vocabulary) -> Shape | None:
    shapes = [training_shape(task, length, vocabulary, random.Random(i)) for i in range(32)]
    fitting = [s.num_questions for s in shapes if s is not None]
    if not fitting:
        return None
    return Shape(num_questions=min(max(fitting), 8), hops=2)


@torch.no_grad()
def accuracies(logits_of: Callable[[Batch], Tensor], batches: dict[str, Batch]) -> dict[str, float]:
    """Share of the items found in each batch, given the logits `[B, N, V]` of its last tokens."""
    shares = {}
    for name, batch in batches.items():
        there = items(batch.answers != ABSENT, batch)
        right = items(found(logits_of(batch), batch), batch)
        shares[name] = float(right.sum() / there.sum())
    return shares
