"""Questions behind sequences of tokens, their answers, and how an output is scored.

Legend: B rows, T tokens, Q questions a row, A answers a question, V vocabulary, N last tokens that
get logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnlab.checks import expect

ABSENT = -1
TENSORS = ("input_ids", "asked", "answers", "depth", "distance")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences with questions about them; only answers are targets.

    input_ids: `[B, T]` int64
    asked: `[B, Q]` int64, positions whose logits answer; ABSENT where a row has fewer questions
    answers: `[B, Q, A]` int64 ids, in any order; ABSENT where a question has fewer answers
    depth: `[B, Q, A]` float32, place in the body of what tells the answer, from 0 (its start) to 1; \
NaN where it is nowhere in particular
    distance: `[B, Q, A]` int64, tokens from there to the question's position; ABSENT likewise
    tail_len: last tokens N that hold all questions
    joint: so many questions in a row make one item, found if all of its answers are
    """

    input_ids: Tensor
    asked: Tensor
    answers: Tensor
    depth: Tensor
    distance: Tensor
    tail_len: int
    joint: int = 1

    def rows(self, part: slice) -> "Batch":
        """Some of the rows."""
        return replace(self, **{name: getattr(self, name)[part] for name in TENSORS})


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several; questions and answers that a row lacks are ABSENT.

    Raises:
        ValueError: for sequences of different lengths, or items of different sizes.
    """
    lengths = {batch.input_ids.shape[1] for batch in batches}
    expect(len(lengths) == 1, "sequences of one length", sorted(lengths))
    joint = {batch.joint for batch in batches}
    expect(len(joint) == 1, "items of one size", sorted(joint))
    questions = max(batch.answers.shape[1] for batch in batches)
    answers = max(batch.answers.shape[2] for batch in batches)
    missing = {"depth": float("nan")}

    def padded(name: str) -> Tensor:
        parts = []
        for batch in batches:
            x = getattr(batch, name)
            if name != "input_ids":
                shape = (x.shape[0], questions, answers)[: x.ndim]
                whole = x.new_full(shape, missing.get(name, ABSENT))
                whole[tuple(slice(n) for n in x.shape)] = x
                x = whole
            parts.append(x)
        return torch.cat(parts)

    tail_len = max(batch.tail_len for batch in batches)
    return Batch(**{name: padded(name) for name in TENSORS}, tail_len=tail_len, joint=joint.pop())


def answer_logits(logits: Tensor, batch: Batch) -> Tensor:
    """Logits `[B, Q, V]` float32 at the questions, of those of the last tokens `[B, N, V]`."""
    first = batch.input_ids.shape[1] - logits.shape[1]
    place = (batch.asked - first).clamp(min=0)  # [B, Q]
    rows = torch.arange(place.shape[0], device=place.device)[:, None]
    return logits[rows, place].float()


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of all answers in nats, from `[B, N, V]`; a scalar.

    A question with several answers has its least loss where each gets an equal share.
    """
    scores = answer_logits(logits, batch).log_softmax(-1)  # [B, Q, V]
    there = batch.answers != ABSENT
    losses = -scores.gather(2, batch.answers.clamp(min=0))  # [B, Q, A]
    return (losses * there).sum() / there.sum()


def found(logits: Tensor, batch: Batch) -> Tensor:
    """Which answers `[B, Q, A]` are found: of a question with a answers, those among its a best.

    With one answer it is the argmax over the whole vocabulary; an equal logit elsewhere is a miss.
    """
    scores = answer_logits(logits, batch)  # [B, Q, V]
    there = batch.answers != ABSENT
    own = scores.gather(2, batch.answers.clamp(min=0))  # [B, Q, A]
    not_worse = (scores[:, :, None] >= own[..., None]).sum(-1)  # [B, Q, A], itself included
    return there & (not_worse <= there.sum(-1, keepdim=True))


def items(x: Tensor, batch: Batch) -> Tensor:
    """`[B, I, A]` of the items, from `[B, Q, A]` of the questions: a bool by "all", else the first."""
    parts = x.unflatten(1, (-1, batch.joint))  # [B, I, joint, A]
    return parts.all(2) if x.dtype == torch.bool else parts[:, :, 0]


def margins(logits: Tensor, batch: Batch) -> Tensor:
    """Logit of each answer over the best id that is no answer, `[B, Q, A]` float32, in nats."""
    scores = answer_logits(logits, batch)
    wrong = scores.clone()
    index = batch.answers.clamp(min=0)
    for column in range(index.shape[2]):
        here = batch.answers[:, :, column : column + 1] != ABSENT
        fill = torch.where(here, float("-inf"), wrong.gather(2, index[:, :, column : column + 1]))
        wrong.scatter_(2, index[:, :, column : column + 1], fill)
    return scores.gather(2, index) - wrong.max(-1, keepdim=True).values
