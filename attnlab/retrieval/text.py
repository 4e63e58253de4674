"""Needles in real text, of bytes: sentences that tell a number, and questions behind the text.

Legend: B rows, T tokens, Q needles a row, L corpus bytes, W bytes of a sentence.

The sentences are RULER's (arXiv 2404.06654) and the pass-key test's (arXiv 2305.16300). A question is
the needle's sentence begun anew, and the digits of its number are the answer: every digit has to be
the likeliest byte, given those before it, which is the exact match of greedy decoding. All keys and
numbers have the same width, so a batch is made on the device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attnlab.checks import expect
from attnlab.retrieval.batch import Batch
from attnlab.retrieval.symbols import Draw
from attnlab.training.data import Corpus, read_corpus
from attnlab.training.tokenizer import ByteTokenizer

BEGIN = 256  # the byte tokenizer's
VOCAB_SIZE = 320
WORDS = (
    *("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron", "ivory", "jetty"),
    *("knoll", "lemon", "maple", "north", "ocean", "pearl", "quail", "river", "stone", "tulip"),
    *("ultra", "viola", "wheat", "xenon", "yacht", "zebra", "acorn", "basil", "coral", "dunes"),
    *("eagle", "fjord"),
)
KINDS = {  # needle, question; "#" stands for a digit, "@" for a letter of the key
    "number": (
        " One of the special magic numbers for @@@@@ is: #######. ",
        " The special magic number for @@@@@ is: #######",
    ),
    "pass_key": (
        " The pass key of @@@@@ is #####. Remember it. ",
        " The pass key of @@@@@ is #####",
    ),
}


def load_text(
    sources: Sequence[str] = (), *, validation_share: float = 0.05
) -> tuple[Tensor, Tensor]:
    """Bytes of the training and of the held-out documents, each `[L]` uint8 on the CPU.

    Without sources, of Python's own library.
    """
    parts = read_corpus(sources, ByteTokenizer(), validation_share=validation_share)
    return _bytes_of(parts[0]), _bytes_of(parts[1])


def needle_in_text(
    text: Tensor,
    *,
    rows: int,
    length: int,
    seed: int,
    kind: str = "number",
    num_questions: int = 8,
) -> Batch:
    """`rows` windows of `text` `[L]` uint8 with needles in equal strata, each asked for once.

    A text that is shorter than a window is repeated. Ids are bytes behind a BEGIN; a text on a GPU
    gives a batch there.

    Raises:
        ValueError: for an unknown kind, more needles than keys, or a length too short for them.
    """
    expect(kind in KINDS, f"a kind among {', '.join(KINDS)}", repr(kind))
    count = num_questions
    expect(1 <= count <= len(WORDS), f"num_questions in [1, {len(WORDS)}]", count)
    draw = Draw(rows, seed, text.device)
    sentence, question = KINDS[kind]
    digits, width = sentence.count("#"), len(sentence)
    needed = 1 + count * (width + len(question))
    expect(length >= needed, f"a length of at least {needed} bytes for the needles", length)
    words = torch.tensor([list(word.encode()) for word in WORDS], device=text.device)
    keys = words[draw.distinct(len(WORDS), count)]  # [B, Q, 5]
    numbers = draw.integers(10, count, digits) + ord("0")  # [B, Q, digits]
    order = draw.distinct(count, count)
    tail = _filled(question, _ordered(keys, order), _ordered(numbers, order))
    body = length - tail.shape[1] * tail.shape[2]
    offset = draw.integers(len(text), 1) + torch.arange(length, device=text.device)
    ids = text[offset % len(text)].long()  # [B, T]
    starts = 1 + draw.strata(body - width, count)  # nearly in strata: the last reach over them
    starts = _apart(starts, width, body)
    place = starts[..., None] + torch.arange(width, device=text.device)  # [B, Q, W]
    ids.scatter_(1, place.flatten(1), _filled(sentence, keys, numbers).flatten(1))
    ids[:, 0] = BEGIN
    ids[:, body:] = tail.flatten(1)
    first_digit = len(question) - digits
    step = torch.arange(count, device=text.device)[:, None] * len(question)
    asked = body + step + first_digit - 1 + torch.arange(digits, device=text.device)  # [Q, digits]
    told = starts.gather(1, order)[..., None].expand(-1, -1, digits).flatten(1)  # [B, Q digits]
    asked = asked.flatten().expand(rows, -1)
    return Batch(
        input_ids=ids,
        asked=asked,
        answers=_ordered(numbers, order).flatten(1)[..., None],
        depth=(told / body).float()[..., None],
        distance=(asked - told)[..., None],
        tail_len=length - body,
        joint=digits,
    )


def _apart(starts: Tensor, width: int, body: int) -> Tensor:
    """Ascending starts moved to the right, and at the end to the left, so that none overlap."""
    count = starts.shape[1]
    ranks = torch.arange(count, device=starts.device) * width
    forward = (starts - ranks).cummax(1).values + ranks
    last = body - width * torch.arange(count, 0, -1, device=starts.device)
    return torch.minimum(forward, last)


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """`[B, Q, n]` with its second dimension in the order `[B, Q]`."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))


def _filled(template: str, keys: Tensor, numbers: Tensor) -> Tensor:
    """Sentences `[B, Q, W]` with keys `[B, Q, 5]` and numbers `[B, Q, digits]` in their places."""
    bytes_ = torch.tensor(list(template.encode()), device=keys.device)
    sentences = bytes_.expand(*keys.shape[:2], -1).clone()
    for mark, x in (("@", keys), ("#", numbers)):
        start = template.index(mark)
        sentences[:, :, start : start + x.shape[2]] = x
    return sentences


def _bytes_of(corpus: Corpus) -> Tensor:
    pieces = [
        np.asarray(corpus.tokens[start:stop])
        for start, stop in zip(corpus.starts, corpus.stops, strict=True)
    ]
    return torch.from_numpy(np.concatenate(pieces).astype(np.uint8))
