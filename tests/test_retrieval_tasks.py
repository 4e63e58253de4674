"""Retrieval tasks: answers are found again from the tokens alone, depths and distances by counting."""

import math

import pytest
import torch

from attnlab.retrieval.batch import (
    ABSENT,
    Batch,
    answer_loss,
    found,
    items,
    join,
    margins,
)
from attnlab.retrieval.mqar import SETTINGS, mqar
from attnlab.retrieval.symbols import (
    ALL,
    BEGIN,
    FREQUENT,
    LIST,
    QUERY,
    SPECIALS,
    TRACK,
    Shape,
    Vocabulary,
)
from attnlab.retrieval.tasks import TASKS, make_batch
from attnlab.retrieval.text import KINDS, WORDS, needle_in_text

pytestmark = pytest.mark.usefixtures("one_thread")
V = Vocabulary()
MARKERS = {"needle": QUERY, "multi_key": QUERY, "multi_query": LIST, "multi_value": ALL}
MARKERS |= {"haystack": QUERY, "tracking": TRACK}
PAIRED = tuple(MARKERS)


def is_key(token):
    return SPECIALS <= token < V.first_value


def is_value(token):
    return V.first_value <= token < V.first_noise


def written(body, width):
    """What is written where: {key tokens: [(value, position of the value), ...]}."""
    told = {}
    place = 1
    while place < len(body):
        key = tuple(body[place : place + width - 1])
        if is_key(body[place]):
            told.setdefault(key, []).append((body[place + width - 1], place + width - 1))
            place += width
        else:
            place += 1
    return told


def solved(row, task, tail_len):
    """Answers and their positions of one row's questions, in order, from its tokens."""
    body, tail = row[: len(row) - tail_len], row[len(row) - tail_len :]
    width = 3 if task == "haystack" else 2
    told = written(body, width)
    assert set(tail) & {QUERY, LIST, ALL, TRACK, FREQUENT} == {MARKERS[task]}
    keys = [t for t in tail if is_key(t)]
    questions = [tuple(keys[i : i + width - 1]) for i in range(0, len(keys), width - 1)]
    answers = []
    for question in questions:
        found_pairs = told[question]
        while is_key(found_pairs[0][0]):  # a variable: follow it
            found_pairs = told[(found_pairs[0][0],)]
        answers.append(found_pairs)
    return answers, len(body)


@pytest.mark.parametrize("length", [256, 1000])
@pytest.mark.parametrize("task", PAIRED)
def test_the_tokens_alone_give_answers_depths_and_distances(task, length):
    batch = make_batch(task, rows=5, length=length, seed=3, shape=Shape(num_questions=4))
    for row in range(5):
        answers, body = solved(batch.input_ids[row].tolist(), task, batch.tail_len)
        assert len(answers) == batch.asked.shape[1] == 4
        for q, pairs in enumerate(answers):
            asked = int(batch.asked[row, q])
            assert asked >= body and is_key(int(batch.input_ids[row, asked]))
            told = {value: (round(place / body, 5), asked - place) for value, place in pairs}
            recorded = {
                int(value): (round(float(depth), 5), int(distance))
                for value, depth, distance in zip(
                    batch.answers[row, q], batch.depth[row, q], batch.distance[row, q], strict=True
                )
            }
            assert recorded == told and all(is_value(value) for value in told)


@pytest.mark.parametrize("task", ["needle", "multi_key", "multi_query", "haystack", "tracking"])
def test_each_eighth_of_the_depth_is_asked_for_once(task):
    batch = make_batch(task, rows=50, length=2048, seed=0)
    eighths = (batch.depth[:, :, 0] * 8).long()
    assert torch.equal(eighths.sort(1).values, torch.arange(8).expand(50, 8))
    assert eighths.float().mean(0).std() < 1  # no question has a depth of its own


def test_depths_within_a_stratum_are_uniform():
    """1,600 depths: the largest gap of their distribution from a uniform one, 1.95 / sqrt(n) at 0.1 %."""
    depth = make_batch("needle", rows=200, length=4096, seed=1).depth.flatten().sort().values
    ideal = (torch.arange(len(depth)) + 0.5) / len(depth)
    assert float((depth - ideal).abs().max()) < 1.95 / math.sqrt(len(depth))


def test_noise_shares_no_symbol_with_keys_and_values():
    batch = make_batch("needle", rows=4, length=8192, seed=0)
    for row in batch.input_ids.tolist():
        assert row[0] == BEGIN
        assert sum(is_key(t) for t in row) == 16 and sum(is_value(t) for t in row) == 8
        assert max(row) < V.size


def test_a_haystack_is_pairs_from_end_to_end_with_distinct_keys():
    batch = make_batch("haystack", rows=3, length=4096, seed=5)
    for row in batch.input_ids.tolist():
        told = written(row[: 4096 - batch.tail_len], 3)
        assert len(told) == (4096 - 1 - batch.tail_len) // 24 * 8
        assert all(len(pairs) == 1 for pairs in told.values())
        assert sum(t >= V.first_noise for t in row) <= 4096 - 1 - batch.tail_len - 3 * len(told)


def test_the_keys_of_a_haystack_fill_their_space_evenly():
    """Of 65,536 keys 43,680 are drawn; each quarter gets its share to six deviations."""
    batch = make_batch("haystack", rows=1, length=1 << 17, seed=0)
    row = batch.input_ids[0, : -batch.tail_len].tolist()
    first = torch.tensor([key[0] - SPECIALS for key in written(row, 3)])
    share = (first // 64).bincount(minlength=4) / len(first)
    assert float((share - 0.25).abs().max()) < 6 * math.sqrt(0.1875 / len(first))


def test_a_chain_takes_exactly_its_hops():
    batch = make_batch("tracking", rows=2, length=512, seed=2, shape=Shape(num_questions=3, hops=4))
    for row in batch.input_ids.tolist():
        told = written(row[: 512 - batch.tail_len], 2)
        asked = [t for t in row[512 - batch.tail_len :] if is_key(t)]
        for variable in asked:
            hops = 0
            while is_key(told[(variable,)][0][0]):
                variable, hops = told[(variable,)][0][0], hops + 1
            assert hops == 4


def test_frequent_symbols_are_those_counted():
    batch = make_batch("frequent", rows=6, length=2048, seed=0)
    for row, answers in zip(batch.input_ids, batch.answers, strict=True):
        counts = row[1:-1].bincount(minlength=V.size)
        least = counts[answers[0]].min()
        assert int((counts > least).sum()) < 3 and row[-1] == FREQUENT
        assert counts.sort(descending=True).values[:3].sum() == counts[answers[0]].sum()
    assert batch.depth.isnan().all() and (batch.distance == ABSENT).all()


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_bits_and_another_one_others(task):
    one, same, other = (
        make_batch(task, rows=2, length=300, seed=s, shape=Shape(num_questions=2))
        for s in (7, 7, 8)
    )
    assert torch.equal(one.input_ids, same.input_ids) and torch.equal(one.answers, same.answers)
    assert not torch.equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("needle", {"length": 32}, "at least 33 tokens for the pairs, got 32"),
        ("multi_key", {"length": 128}, "at least 145 tokens for the pairs, got 128"),
        ("haystack", {"length": 40}, "at least 49 tokens"),
        ("haystack", {"length": 1 << 18}, "num_keys squared >= 87368, got 65536"),
        ("needle", {"vocabulary": Vocabulary(num_keys=7)}, "num_keys >= 8, got 7"),
        ("multi_value", {"vocabulary": Vocabulary(num_values=3)}, "num_values >= 4, got 3"),
        ("tracking", {"vocabulary": Vocabulary(num_keys=39)}, "num_keys >= 40, got 39"),
        ("frequent", {"length": 10}, "at least 64 tokens"),
        ("niah", {}, "a task among needle"),
        ("needle", {"rows": 0}, "rows >= 1, got 0"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_refused(task, flags, message):
    with pytest.raises(ValueError, match=message):
        make_batch(task, **{"rows": 1, "length": 256, "seed": 0, **flags})


def test_the_least_length_that_is_named_is_enough():
    batch = make_batch("needle", rows=1, length=33, seed=0)
    assert len(solved(batch.input_ids[0].tolist(), "needle", batch.tail_len)[0]) == 8


def test_a_kind_without_symbols_is_refused():
    with pytest.raises(ValueError, match="num_noise >= 1, got 0"):
        Vocabulary(num_noise=0)


def two_questions():
    """One row: a question with one answer (id 1), one with two answers (ids 2, 3)."""
    return Batch(
        input_ids=torch.zeros(1, 4, dtype=torch.int64),
        asked=torch.tensor([[2, 3]]),
        answers=torch.tensor([[[1, ABSENT], [2, 3]]]),
        depth=torch.zeros(1, 2, 2),
        distance=torch.ones(1, 2, 2, dtype=torch.int64),
        tail_len=2,
    )


def test_answers_are_found_among_as_many_best_as_there_are():
    logits = torch.tensor([[[0.0, 5.0, 1.0, 2.0], [4.0, 0.0, 5.0, 3.0]]])
    assert found(logits, two_questions()).tolist() == [[[True, False], [True, False]]]
    logits[0, 1, 3] = 6.0
    assert found(logits, two_questions()).tolist() == [[[True, False], [True, True]]]
    logits[0, 0, 3] = 5.0  # as good as the answer
    assert found(logits, two_questions()).tolist() == [[[False, False], [True, True]]]


def test_the_margin_leaves_out_other_answers():
    logits = torch.tensor([[[0.0, 5.0, 1.0, 2.0], [4.0, 0.0, 5.0, 4.5]]])
    assert margins(logits, two_questions())[0].tolist()[0][0] == 3.0
    assert margins(logits, two_questions())[0, 1].tolist() == [1.0, 0.5]


def test_the_loss_is_the_mean_over_all_answers():
    logits = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
    logp = logits[0].log_softmax(-1)
    expected = -(logp[0, 1] + logp[1, 2] + logp[1, 3]) / 3
    assert float(answer_loss(logits, two_questions())) == pytest.approx(float(expected), rel=1e-6)


def test_joined_batches_keep_their_rows_questions_and_losses():
    parts = [
        make_batch(task, rows=2, length=200, seed=0, shape=Shape(num_questions=2))
        for task in ("needle", "multi_value", "frequent")
    ]
    whole = join(parts)
    logits = torch.randn(6, whole.tail_len, V.size, generator=torch.Generator().manual_seed(0))
    right = found(logits, whole)
    losses, counts = [], []
    for number, part in enumerate(parts):
        rows = slice(2 * number, 2 * number + 2)
        own = logits[rows, whole.tail_len - part.tail_len :]
        _, questions, answers = part.answers.shape
        assert torch.equal(right[rows, :questions, :answers], found(own, part))
        assert torch.equal(whole.rows(rows).input_ids, part.input_ids)
        counts.append(part.answers.numel())
        losses.append(float(answer_loss(own, part)) * counts[-1])
    assert float(answer_loss(logits, whole)) == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


def test_an_item_is_found_if_all_its_questions_are():
    batch = Batch(**{**vars(two_questions()), "joint": 2})
    right = torch.tensor([[[True], [False]]])
    assert items(right, batch).tolist() == [[[False]]]
    assert items(torch.ones(1, 2, 1, dtype=torch.bool), batch).tolist() == [[[True]]]


@pytest.mark.parametrize(("length", "pairs"), SETTINGS, ids=str)
def test_mqar_asks_for_every_key_once_behind_its_pairs(length, pairs):
    batch = mqar(rows=3, length=length, num_pairs=pairs, seed=0)
    for row in range(3):
        ids = batch.input_ids[row].tolist()
        keys, values = ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= k < 4096 for k in keys) and all(4096 <= v < 8192 for v in values)
        asked = batch.asked[row].tolist()
        assert len(set(asked)) == pairs and all(a >= 2 * pairs and a % 2 == 0 for a in asked)
        assert [ids[a] for a in asked] == keys
        assert batch.answers[row, :, 0].tolist() == values
        expected = [a - (2 * i + 1) for i, a in enumerate(asked)]
        assert batch.distance[row, :, 0].tolist() == expected


def test_mqar_places_follow_zoologys_power_law():
    """With one pair, place g has the chance (g+1)^(a-1) over its sum: chi-square, 0.1 % of 30 bins."""
    places, rows = 30, 4000
    asked = mqar(rows=rows, length=2 + 2 * places, num_pairs=1, seed=1, vocab_size=64).asked
    seen = ((asked[:, 0] - 2) // 2).bincount(minlength=places).double()
    chance = torch.arange(1, places + 1).double() ** -0.99
    expected = chance / chance.sum() * rows
    assert float(((seen - expected) ** 2 / expected).sum()) < 58.3


@pytest.mark.parametrize(
    ("length", "pairs", "vocab", "message"),
    [(63, 4, 8192, ">= 16, got 63"), (64, 17, 8192, ">= 68, got 64"), (64, 4, 64, "more than 64")],
)
def test_mqar_refuses_what_zoology_refuses(length, pairs, vocab, message):
    with pytest.raises(ValueError, match=message):
        mqar(rows=1, length=length, num_pairs=pairs, seed=0, vocab_size=vocab)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_holds_its_needles_and_asks_for_each(kind):
    text = torch.frombuffer(bytearray(b"the quick brown fox jumps. " * 40), dtype=torch.uint8)
    batch = needle_in_text(text, rows=3, length=1500, seed=0, kind=kind, num_questions=4)
    sentence = KINDS[kind][0]
    digits = sentence.count("#")
    assert batch.joint == digits and batch.input_ids[:, 0].eq(256).all()
    for row in range(3):
        string = bytes(batch.input_ids[row, 1:].tolist()).decode()
        body = string[: 1500 - batch.tail_len - 1]
        for item in range(4):
            part = slice(item * digits, (item + 1) * digits)
            asked = batch.asked[row, part].tolist()
            number = "".join(chr(i) for i in batch.answers[row, part, 0].tolist())
            assert string[asked[0] : asked[0] + digits] == number  # the digits follow their places
            word = next(w for w in WORDS if w in string[asked[0] - 12 : asked[0]])
            told = sentence.replace("@@@@@", word).replace("#" * digits, number)
            place = body.index(told) + 1
            assert int(batch.distance[row, item * digits, 0]) == asked[0] - place
            depth = float(batch.depth[row, item * digits, 0])
            assert depth == pytest.approx(place / (1500 - batch.tail_len), abs=1e-6)


def test_needles_that_fill_a_text_do_not_overlap():
    sentence, question = KINDS["number"]
    length = 1 + 6 * (len(sentence) + len(question))
    text = torch.full((5000,), ord("x"), dtype=torch.uint8)
    batch = needle_in_text(text, rows=20, length=length, seed=0, num_questions=6)
    for row in batch.input_ids[:, 1:].tolist():
        assert bytes(row).decode().count(". ") == 6 and b"x: " not in bytes(row)
    with pytest.raises(ValueError, match=f"at least {length} bytes"):
        needle_in_text(text, rows=1, length=length - 1, seed=0, num_questions=6)
