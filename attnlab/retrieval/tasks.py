"""Symbolic retrieval tasks: made on the device, from a seed, with every answer's place on record.

Legend: B rows, T tokens, P pairs, Q questions a row, A answers a question.

A sequence is BEGIN, a body, and a tail of questions. The body is noise from a vocabulary of its own,
so that no key ever comes up by chance, into which pairs (key, value) are written. Pair i of P lies
anywhere in the i-th of P equal strata of the body: every depth is as likely as any other, and a row
with 8 questions has one in each eighth. They are the tasks of RULER (arXiv 2404.06654) in symbols:

    needle        P pairs in noise, each asked for: QUERY key
    multi_key     8 pairs to a question, 7 of them distractors
    multi_query   as needle, all keys behind one LIST
    multi_value   each key is written with 4 values: ALL key has 4 answers
    haystack      no noise, nothing but pairs, whose keys are two symbols: how much is remembered
    tracking      x = value, then y = x, ... : TRACK variable, so many hops from the value
    frequent      no pairs: which 3 symbols are the most frequent, by Zipf's law with exponent 2
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnlab.checks import expect
from attnlab.retrieval.batch import ABSENT, Batch
from attnlab.retrieval.symbols import (
    ALL,
    BEGIN,
    FREQUENT,
    LIST,
    QUERY,
    SHAPE,
    SPECIALS,
    TRACK,
    VOCABULARY,
    Draw,
    Shape,
    Vocabulary,
    distinct_of_many,
)

GROUP = 8  # pairs to a question of multi_key
NUM_VALUES_OF_KEY = 4
NUM_FREQUENT = 3
ZIPF_EXPONENT = 2.0


def needle(draw: Draw, vocabulary: Vocabulary, length: int, shape: Shape) -> Batch:
    """As many pairs in noise as questions, each asked for once."""
    return _pairs(draw, vocabulary, length, shape.num_questions, 1, QUERY)


def multi_key(draw: Draw, vocabulary: Vocabulary, length: int, shape: Shape) -> Batch:
    """8 pairs in noise to a question, of which one is asked for."""
    return _pairs(draw, vocabulary, length, shape.num_questions, GROUP, QUERY)


def multi_query(draw: Draw, vocabulary: Vocabulary, length: int, shape: Shape) -> Batch:
    """As needle, with all keys in a list behind one marker."""
    return _pairs(draw, vocabulary, length, shape.num_questions, 1, LIST)


def _pairs(
    draw: Draw, vocabulary: Vocabulary, length: int, questions: int, group: int, marker: int
) -> Batch:
    """Pairs of distinct keys in noise; one of each run of `group` of them is asked for."""
    count = questions * group
    _check_symbols("num_keys", vocabulary.num_keys, count)
    keys = draw.distinct(vocabulary.num_keys, count) + SPECIALS  # [B, P]
    values = draw.integers(vocabulary.num_values, count) + vocabulary.first_value
    chosen = draw.pick(questions, group)  # [B, Q]
    tail, asked = _tail(marker, keys.gather(1, chosen)[..., None], each=marker != LIST)
    ids, starts = _written(draw, vocabulary, length, torch.stack([keys, values], 2), tail)
    told = (starts + 1).gather(1, chosen)[..., None]
    return _finished(ids, tail, asked, values.gather(1, chosen)[..., None], told)


def multi_value(draw: Draw, vocabulary: Vocabulary, length: int, shape: Shape) -> Batch:
    """4 distinct values under each key, all of them asked for at once.

    Each quarter of the body holds all keys once, so the values of a key lie at four depths.
    """
    questions, answers = shape.num_questions, NUM_VALUES_OF_KEY
    _check_symbols("num_keys", vocabulary.num_keys, questions)
    _check_symbols("num_values", vocabulary.num_values, answers)
    keys = draw.distinct(vocabulary.num_keys, questions) + SPECIALS  # [B, Q]
    step = draw.integers(max(vocabulary.num_values // answers, 1), questions, answers)
    offset = torch.arange(answers, device=draw.device) * (vocabulary.num_values // answers)
    values = step + offset + vocabulary.first_value  # [B, Q, A], one of each quarter of the values
    values = values.gather(2, draw.uniform(questions, answers).argsort(2))
    turn = draw.uniform(answers, questions).argsort(2)  # [B, A, Q], whose turn it is
    inverse = turn.argsort(2)
    written_keys = keys[:, None].expand(-1, answers, -1).gather(2, turn)
    written = values.mT.gather(2, turn)
    pairs = torch.stack([written_keys.flatten(1), written.flatten(1)], 2)  # [B, A Q, 2]
    tail, asked = _tail(ALL, keys[..., None], each=True)
    ids, starts = _written(draw, vocabulary, length, pairs, tail)
    told = (starts + 1).unflatten(1, (answers, questions)).gather(2, inverse).mT  # [B, Q, A]
    return _finished(ids, tail, asked, values, told)


def haystack(draw: Draw, vocabulary: Vocabulary, length: int, shape: Shape) -> Batch:
    """Pairs from end to end; a key is two symbols, and each eighth of them is asked for once."""
    questions, num_keys = shape.num_questions, vocabulary.num_keys
    body = length - 1 - 3 * questions
    count = max(body // 3 // questions, 0) * questions
    _check_room(length, 1 + 6 * questions)
    _check_symbols("num_keys squared", num_keys**2, count)
    numbers = distinct_of_many(draw, num_keys**2, count)  # [B, P]
    keys = torch.stack([numbers // num_keys, numbers % num_keys], 2) + SPECIALS  # [B, P, 2]
    values = draw.integers(vocabulary.num_values, count) + vocabulary.first_value
    chosen = draw.pick(questions, count // questions)
    asked_keys = keys.gather(1, chosen[..., None].expand(-1, -1, 2))
    tail, asked = _tail(QUERY, asked_keys, each=True)
    triples = torch.cat([keys, values[..., None]], 2)
    ids, starts = _written(draw, vocabulary, length, triples, tail)
    told = (starts + 2).gather(1, chosen)[..., None]
    return _finished(ids, tail, asked, values.gather(1, chosen)[..., None], told)


def tracking(draw: Draw, vocabulary: Vocabulary, length: int, shape: Shape) -> Batch:
    """Chains of variables, each assigned the one before it; a question is for a chain's value.

    Chain c has its value and all its hops in the c-th stretch of the body, one after the other.
    """
    questions, links = shape.num_questions, shape.hops + 1
    expect(shape.hops >= 0, "hops >= 0", shape.hops)
    _check_symbols("num_keys", vocabulary.num_keys, questions * links)
    variables = draw.distinct(vocabulary.num_keys, questions * links) + SPECIALS
    variables = variables.unflatten(1, (questions, links))  # [B, Q, links]
    values = draw.integers(vocabulary.num_values, questions, 1) + vocabulary.first_value
    sources = torch.cat([values, variables[:, :, :-1]], 2)
    pairs = torch.stack([variables, sources], 3).flatten(1, 2)  # [B, Q links, 2]
    order = draw.distinct(questions, questions)
    last = variables[:, :, -1].gather(1, order)
    tail, asked = _tail(TRACK, last[..., None], each=True)
    ids, starts = _written(draw, vocabulary, length, pairs, tail)
    told = (starts.unflatten(1, (questions, links))[:, :, 0] + 1).gather(1, order)
    return _finished(ids, tail, asked, values.gather(1, order[..., None]), told[..., None])


def frequent(draw: Draw, vocabulary: Vocabulary, length: int, shape: Shape) -> Batch:
    """The 3 most frequent of the values that fill the body, with frequencies 1, 1/4, 1/9, ...

    What counts is what was drawn; the answer has no depth. There is one question a row.
    """
    _check_symbols("num_values", vocabulary.num_values, NUM_FREQUENT + 1)
    _check_room(length, 64)
    rank = torch.arange(1, vocabulary.num_values + 1, device=draw.device, dtype=torch.float64)
    share = rank**-ZIPF_EXPONENT
    bounds = (share / share.sum()).cumsum(0)
    ranks = torch.searchsorted(bounds, draw.uniform(length - 2)).clamp(max=len(bounds) - 1)
    names = draw.distinct(vocabulary.num_values, vocabulary.num_values)
    body = names.gather(1, ranks)
    counts = torch.zeros(draw.rows, vocabulary.num_values, device=draw.device, dtype=torch.int64)
    counts.scatter_add_(1, body, torch.ones_like(body))
    answers = counts.topk(NUM_FREQUENT, 1).indices[:, None] + vocabulary.first_value  # [B, 1, A]
    edge = torch.full_like(body[:, :1], BEGIN)
    tail = torch.full_like(edge, FREQUENT)
    ids = torch.cat([edge, body + vocabulary.first_value, tail], 1)
    batch = _finished(ids, tail, torch.zeros_like(edge), answers, torch.zeros_like(answers))
    nowhere = torch.full_like(batch.depth, float("nan"))
    return replace(batch, depth=nowhere, distance=torch.full_like(answers, ABSENT))


Task = Callable[[Draw, Vocabulary, int, Shape], Batch]
TASKS: dict[str, Task] = {
    "needle": needle,
    "multi_key": multi_key,
    "multi_query": multi_query,
    "multi_value": multi_value,
    "haystack": haystack,
    "tracking": tracking,
    "frequent": frequent,
}


def make_batch(
    task: str,
    *,
    rows: int,
    length: int,
    seed: int,
    vocabulary: Vocabulary = VOCABULARY,
    shape: Shape = SHAPE,
    device: torch.device | str = "cpu",
) -> Batch:
    """`rows` sequences of `length` tokens of one of TASKS; the same bits from the same arguments.

    Raises:
        ValueError: for an unknown task, a length too short for its pairs, or a vocabulary with too
            few symbols for them.
    """
    expect(task in TASKS, f"a task among {', '.join(TASKS)}", repr(task))
    expect(rows >= 1, "rows >= 1", rows)
    expect(shape.num_questions >= 1, "num_questions >= 1", shape.num_questions)
    return TASKS[task](Draw(rows, seed, device), vocabulary, length, shape)


def _tail(marker: int, keys: Tensor, *, each: bool) -> tuple[Tensor, Tensor]:
    """Questions for keys `[B, Q, W]` as tokens `[B, n]`, and where in it each is answered `[B, Q]`.

    The marker stands before each key, or once before all of them.
    """
    rows, questions, width = keys.shape
    if each:
        marks = keys.new_full((rows, questions, 1), marker)
        tail, step, first = torch.cat([marks, keys], 2).flatten(1), width + 1, width
    else:
        marks = keys.new_full((rows, 1), marker)
        tail, step, first = torch.cat([marks, keys.flatten(1)], 1), width, width
    place = torch.arange(questions, device=keys.device) * step + first
    return tail, place.expand(rows, questions)


def _written(
    draw: Draw, vocabulary: Vocabulary, length: int, pairs: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor]:
    """Sequences `[B, T]` with pairs `[B, P, W]` in noise, and where each pair starts `[B, P]`."""
    count, width = pairs.shape[1:]
    slots = (length - 1 - tail.shape[1]) // width
    _check_room(length, 1 + count * width + tail.shape[1])
    starts = 1 + draw.strata(slots, count) * width  # [B, P]
    body = draw.integers(vocabulary.num_noise, length) + vocabulary.first_noise
    body[:, 0] = BEGIN
    place = starts[..., None] + torch.arange(width, device=draw.device)  # [B, P, W]
    body.scatter_(1, place.flatten(1), pairs.flatten(1))
    body[:, length - tail.shape[1] :] = tail
    return body, starts


def _finished(ids: Tensor, tail: Tensor, asked: Tensor, answers: Tensor, told: Tensor) -> Batch:
    """Batch of whole sequences; `asked` `[B, Q]` counts from the tail's start, `told` from 0."""
    body = ids.shape[1] - tail.shape[1]
    asked = asked + body
    return Batch(
        input_ids=ids,
        asked=asked,
        answers=answers,
        depth=(told.double() / body).float(),
        distance=asked[..., None] - told,
        tail_len=tail.shape[1],
    )


def _check_room(length: int, needed: int) -> None:
    expect(length >= needed, f"a length of at least {needed} tokens for the pairs", length)


def _check_symbols(what: str, there: int, needed: int) -> None:
    expect(there >= needed, f"a vocabulary with {what} >= {needed}", there)
