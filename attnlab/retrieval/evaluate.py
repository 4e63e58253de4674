"""How often a trained model finds what it is asked for, by task, length and depth.

Legend: B rows, Q questions, A answers, I items.

A cell is an eighth of the depth of one task at one length. A sequence has a question in each eighth, so
that 8 sequences give a column of 8 cells with 8 items each. Prompts are streamed through the caches,
as many rows at a time as one chunk holds; the sequences are the same whatever the chunk.
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from attnlab.checks import expect
from attnlab.model import costs
from attnlab.model.config import HybridConfig
from attnlab.model.config_json import FULL, LINEAR
from attnlab.model.hybrid import HybridLM
from attnlab.retrieval import text
from attnlab.retrieval.attention import watched
from attnlab.retrieval.batch import ABSENT, Batch, found, items, margins
from attnlab.retrieval.horizon import predicted_recall, trained_heads
from attnlab.retrieval.mixture import WEIGHTS
from attnlab.retrieval.mqar import SETTINGS, mqar
from attnlab.retrieval.runs import Trained, read_trained
from attnlab.retrieval.streaming import CHUNK, streamed_logits
from attnlab.retrieval.tasks import NUM_FREQUENT, make_batch

NUM_DEPTHS = 8
SEQUENCES = 8
LONG_TASKS = ("needle", "number")  # the only ones beyond LONG
LONG = 1 << 18
SEED = 2_000_000_011  # behind those of training and validation


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Items of one task and length: `correct` of `n`, in the eighth of the depth around `depth`.

    `distance` is the mean number of tokens between what tells an answer and its question. Both are
    None where answers are told nowhere in particular. `margin` is the mean of the answers' logits over
    the best wrong one, in nats; `attention` the mean of the largest weight that any softmax head has on
    what tells the answer, None without softmax layers.
    """

    depth: float | None
    distance: int | None
    n: int
    correct: int
    margin: float
    attention: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A trained model and how it was trained; `corpus` is held-out text `[L]`, for text alone."""

    trained: Trained
    model: HybridLM
    corpus: Tensor | None = None


def load(folder: Path, *, device: str, corpus: tuple[str, ...] = ()) -> Loaded:
    """The model of a finished run, in float32 on a CPU and as it was trained elsewhere.

    Raises:
        ValueError: if the folder holds no finished run, or weights of another config than the run's.
    """
    trained = read_trained(folder)
    if trained is None:
        raise ValueError(f"expected a finished run in {folder}, got none")
    dtype = torch.float32 if device == "cpu" else None
    model = HybridLM.from_pretrained(folder / "model", device=device, dtype=dtype)
    expected = trained.run.build().config
    if model.config != expected:
        names = [n for n in vars(expected) if getattr(model.config, n) != getattr(expected, n)]
        got = ", ".join(f"{n} {getattr(model.config, n)}" for n in names)
        raise ValueError(f"expected weights of the config of {trained.run.name}, got {got}")
    held_out = None
    if trained.run.data == "text":
        held_out = text.load_text(corpus)[1].to(device)
    return Loaded(trained=trained, model=model.eval(), corpus=held_out)


def chosen_runs(folder: Path) -> list[Path]:
    """Folders of the runs that are evaluated: of each model and kind of data those at its best rate."""
    runs: dict[tuple[str, str], list[tuple[Path, Trained]]] = {}
    for path in sorted(folder.glob("*/run.json")):
        trained = read_trained(path.parent)
        if trained is not None and (path.parent / "model" / "config.json").exists():
            key = trained.run.model, trained.run.data
            runs.setdefault(key, []).append((path.parent, trained))
    chosen = []
    for group in runs.values():
        best = max(group, key=lambda pair: (pair[1].run.seed == 0, pair[1].score))[1]
        rate = best.run.learning_rate
        chosen += [path for path, trained in group if trained.run.learning_rate == rate]
    return chosen


def tasks_of(trained: Trained, length: int) -> list[str]:
    """Tasks that a model is asked at a length: its own, but needles alone of second seeds and of a recipe's variants."""
    data = trained.run.data
    if data == "mqar":
        return ["mqar"] if length in dict(SETTINGS) else []
    tasks = list(text.KINDS) if data == "text" else [t for t in WEIGHTS if t in trained.run.tasks]
    if length > LONG or trained.run.seed > 0 or "." in trained.run.model:
        return [task for task in tasks if task in LONG_TASKS]
    return tasks


def evaluation_batch(loaded: Loaded, task: str, length: int, device: str) -> Batch:
    """The sequences of one task and length, 64 items or more; the same for all models of its kind.

    Raises:
        ValueError: for a length or a vocabulary in which the task doesn't fit.
    """
    seed = SEED + 1_000_003 * length + zlib.crc32(task.encode())
    if task == "mqar":
        expect(length in dict(SETTINGS), f"a length among {list(dict(SETTINGS))}", length)
        pairs = dict(SETTINGS)[length]
        return mqar(rows=64, length=length, num_pairs=pairs, seed=seed, device=device)
    if task in text.KINDS:
        assert loaded.corpus is not None
        return text.needle_in_text(
            loaded.corpus, rows=SEQUENCES, length=length, seed=seed, kind=task
        )
    rows = 64 // NUM_FREQUENT + 1 if task == "frequent" else SEQUENCES
    vocabulary = loaded.trained.run.vocabulary
    return make_batch(
        task, rows=rows, length=length, seed=seed, vocabulary=vocabulary, device=device
    )


def evaluate(loaded: Loaded, task: str, length: int, *, chunk: int = CHUNK) -> list[Cell]:
    """Cells of one task at one length, from the start of the sequence to its end.

    `chunk` bounds the tokens of all rows in one pass.

    Raises:
        ValueError: as `evaluation_batch`.
    """
    model = loaded.model
    batch = evaluation_batch(loaded, task, length, str(model.lm_head.weight.device))
    step = max(chunk // length, 1)
    right, margin, attention = [], [], []
    for start in range(0, batch.input_ids.shape[0], step):
        rows = batch.rows(slice(start, start + step))
        with watched(model, rows) as weights:
            logits = streamed_logits(model, rows.input_ids, rows.tail_len, chunk=chunk)
        right.append(items(found(logits, rows), rows).cpu())
        margin.append(items(margins(logits, rows), rows).cpu())
        attention += [torch.stack(weights).amax((0, 2))] if weights else []  # [B, Q]
    weight = None
    if attention and batch.answers.shape[2] == 1:
        weight = items(torch.cat(attention)[..., None], batch)
    return cells_of(batch, torch.cat(right), torch.cat(margin), weight)


def predictions(loaded: Loaded, length: int, cells: list[Cell]) -> list[float] | None:
    """Expected shares of needle cells of a model without softmax layers; None for another model.

    They follow from how its heads read contexts of the longest length of its training.
    """
    if FULL in loaded.model.config.layer_types:
        return None
    run = loaded.trained.run
    batch = make_batch(
        "needle",
        rows=4 * SEQUENCES,
        length=run.curriculum.longest,
        seed=SEED,
        vocabulary=run.vocabulary,
        device=loaded.model.lm_head.weight.device,
    )
    heads = trained_heads(loaded.model, batch)
    return [
        predicted_recall(
            heads,
            num_tokens=length,
            distance=cell.distance or 0,
            codebook=run.vocabulary.num_values,
        )
        for cell in cells
    ]


def cells_of(
    batch: Batch, right: Tensor, margin: Tensor, attention: Tensor | None = None
) -> list[Cell]:
    """Cells of the items' results `[B, I, A]`, by eighths of their depths."""
    there = items(batch.answers != ABSENT, batch).cpu()
    depth, distance = (items(x, batch).cpu() for x in (batch.depth, batch.distance))
    eighth = (depth * NUM_DEPTHS).floor().clamp(max=NUM_DEPTHS - 1)
    cells = []
    for number in [None, *range(NUM_DEPTHS)]:
        here = there & (depth.isnan() if number is None else eighth == number)
        if here.any():
            away = None if number is None else round(float(distance[here].double().mean()))
            cells.append(
                Cell(
                    depth=None if number is None else (number + 0.5) / NUM_DEPTHS,
                    distance=away,
                    n=int(here.sum()),
                    correct=int(right[here].sum()),
                    margin=float(margin[here].double().mean()),
                    attention=None if attention is None else float(attention[here].mean()),
                )
            )
    return cells


def streaming_flops(config: HybridConfig, length: int) -> int:
    """Operations of reading a prompt whose last token alone gets logits.

    A last layer with softmax attention is counted without its attention, which isn't computed.
    """
    if config.layer_types[-1] == FULL:
        config = replace(config, layer_types=(*config.layer_types[:-1], LINEAR))
    return costs.prefill_flops(config, length)
